"""What the README names exists: files, flags, and the commands of its first screen."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import caption
import create_input_files
import eval as evaluation
import train

REPOSITORY = Path(train.__file__).parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PARSERS = {"create_input_files.py": create_input_files, "train.py": train, "eval.py": evaluation, "caption.py": caption}
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines()]


@pytest.mark.parametrize("command", [each for each in COMMANDS if ".py" in each and "demo" not in each])
def test_every_command_has_flags_that_exist(command: str) -> None:
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert PARSERS[words[at]].get_parser().parse_args(words[at + 1:])


def test_every_file_that_is_linked_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_the_first_screen_shows_both_commands() -> None:
    first = README.splitlines()[:40]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)
    targets = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert "\ndemo:" in targets
    assert "\ntest:" in targets


def test_flags_named_in_the_text_exist() -> None:
    known = {option for module in PARSERS.values() for action in module.get_parser()._actions
             for option in action.option_strings}
    named = set(re.findall(r"`(--\w+)", README))
    assert named - known == set()
