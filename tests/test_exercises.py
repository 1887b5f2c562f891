"""Every exercise's check fails as it is handed out, passes with its page's solution, and fails with a wrong one."""
from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

import training.rewards

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "exercises"
PAGES = sorted(FOLDER.glob("[0-9]_*.md"))
NAMES = [page.stem for page in PAGES]
# What somebody may get wrong, each in a line of a solution: the check has to see it.
MISTAKES = [
    ("1_attention", "annotations.keys.size(1)", "annotations.features.size(1)"),
    ("1_attention", "len(decoder_hidden)", "len(annotations.keys)"),
    ("2_gate", "state[0]", "state[1]"),
    ("2_gate", "        del self.f_beta\n", "        pass\n"),
    ("2_gate", "self.embedding(words), context]", "self.embedding(words), 0.5 * context]"),
    ("3_search", "<= max_len", "< max_len"),
    ("3_search", "[:k - len(ended)]", "[:k]"),
    ("3_search", "max(ended or alive", "max(ended + alive"),
    ("3_search", "scores = log_prob + ", "scores = "),
    ("4_overfitting", "after and min(after) < rows[lowest][\"train_loss\"]", "after"),
    ("4_overfitting", "if i - best == patience", "if i - best > patience"),
    ("4_overfitting", "< rows[best]", "<= rows[best]"),
    ("5_score_and_loss", " - {None}", ""),
    ("5_score_and_loss", "{shape_of(word) for word in words}", "set(words)"),
    ("5_score_and_loss", "alphas.cumsum(dim=1) - alphas", "alphas.cumsum(dim=1)"),
    ("6_decoders", "        del self.init_c", "        pass"),
    ("6_decoders", "torch.sigmoid(self.f_beta(h)) * context", "context"),
    ("6_decoders", ".triu(1)", ".triu(2)"),
    ("6_decoders", " + decoder.position.weight[:steps]", ""),
    ("7_reward", "iter(follows + equal)", "iter(equal)"),
    ("7_reward", "free.pop(places[-1], None)", "pass"),
    ("7_reward", "recall + 9 * precision", "precision + 9 * recall"),
    ("7_reward", "(before is None or place != before + 1)", "place != before"),
    ("7_reward", "max(meteor_like", "min(meteor_like"),
    ("7_reward", "if word]", "]"),
]


def folded(page: str) -> str:
    """What stands in a page's folded solution."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    return re.search(r"<summary><b>The solution</b></summary>\n\n(.*?)\n</details>", text, re.DOTALL)[1]


def solution(page: str) -> dict[str, str]:
    """Functions and classes of the solution, by name; with those of docs/take_it_apart.md's sections that it links."""
    described, text = (REPOSITORY / "docs" / "take_it_apart.md").read_text(encoding="utf-8"), folded(page)
    anchors = re.findall(r"\(\.\./docs/take_it_apart\.md#([\w-]+)\)", text)
    sections = dict(each.split("\n", 1) for each in re.split(r"^## ", described, flags=re.MULTILINE)[1:])
    sections = {re.sub(r"\W+", "-", heading.lower()): python(each) for heading, each in sections.items()}
    blocks = [*python(text), *(sections[anchor][0] for anchor in anchors)]
    assert blocks
    return {node.name: code for block in blocks for node, code in parts(block)}


def python(text: str) -> list[str]:
    """The blocks of code of a page."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def parts(code: str) -> list[tuple[ast.FunctionDef | ast.ClassDef, str]]:
    """The functions and classes of a file, each with its text."""
    return [(node, ast.get_source_segment(code, node)) for node in ast.parse(code).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def handed_out(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def solved(name: str) -> str:
    """The exercise's file with the solution in the place of what is missing."""
    code, answers = handed_out(name), solution(name)
    missing = {node.name: text for node, text in parts(code) if "raise NotImplementedError" in text}
    assert missing and answers.keys() >= missing.keys()
    for each, text in missing.items():
        assert code.count(text) == 1
        code = code.replace(text, answers[each])
    assert "NotImplementedError" not in code
    return code


def check(code: str) -> None:
    """What pytest does with the file: all of its tests, in their order."""
    module = types.ModuleType("exercise")
    exec(compile(code, "exercise.py", "exec"), module.__dict__)
    tests = [each for name, each in vars(module).items() if name.startswith("test_")]
    assert len(tests) > 1
    for test in tests:
        torch.manual_seed(0)
        test()


def test_the_check_fails_as_it_is_handed_out(tmp_path: Path) -> None:
    """By the command that the pages name, in a copy of the folder: every test of every exercise."""
    shutil.copytree(FOLDER, tmp_path / "exercises")
    files = sorted((tmp_path / "exercises").glob("[0-9]_*.py"))
    assert [each.stem for each in files] == NAMES and len(NAMES) == 7
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-c", REPOSITORY / "pyproject.toml", "-q",
         "--tb=line", *files], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    n_tests = sum(text.startswith("def test_") for name in NAMES for _, text in parts(handed_out(name)))
    assert re.search(rf"^{n_tests} failed in ", done.stdout, re.MULTILINE), done.stdout[-2000:]
    assert len(re.findall(r"^E   NotImplementedError: exercise \d", done.stdout, re.MULTILINE)) == n_tests


@pytest.mark.parametrize("name", NAMES)
def test_the_check_passes_with_the_solution(name: str) -> None:
    check(solved(name))


@pytest.mark.parametrize(("name", "right", "wrong"), MISTAKES)
def test_the_check_sees_a_mistake(name: str, right: str, wrong: str) -> None:
    code, own = solved(name), handed_out(name)
    assert right in code and right not in own
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        check(code.replace(right, wrong))


def test_every_exercise_has_a_mistake_that_is_seen() -> None:
    assert {name for name, *_ in MISTAKES} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_all_its_parts(name: str) -> None:
    """And nothing of the solution stands outside of what is folded; the list names the page."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    for part in ("**The task.**", "**What you will learn.**", "| in the code |", "**How you know that it works.**",
                 f"exercises/{name}.py\n```", "<summary><b>A hint</b>", "<summary><b>The solution</b>"):
        assert text.count(part) == 1, part
    assert "```python" not in text[:text.index("<details>")]
    assert text.count("<details>") == text.count("</details>") == 2 and text.endswith("</details>\n")
    assert re.search(rf"^{name[0]}\. \[[^]]+\]\({name}\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8"),
                     re.MULTILINE)


@pytest.mark.parametrize("page", [*NAMES, "README"])
def test_links_lead_somewhere_and_lines_are_there(page: str) -> None:
    """A code in a row of the table, or in a sentence before a link, is a line of the file that the link names."""
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (FOLDER / path).is_file(), link
        headings = re.findall(r"^#+ (.+)$", (FOLDER / path).read_text(encoding="utf-8").lower(), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", each).replace(" ", "-") for each in headings}, link
    file = None
    for row in re.findall(r"^\| .* \| (.*) \|$", text, re.MULTILINE)[1:]:
        named = re.search(r" in \[[^]]+\]\(([^)]+)\)", row)
        file = named[1] if named else file
        line = re.match(r"`([^`]+)`", row)
        assert not line or line[1] in (FOLDER / file).read_text(encoding="utf-8"), row


def test_the_reward_goes_into_stage_3() -> None:
    """The change of the last page fits today's file, and stage 3 then earns what `by_meteor` says."""
    page = (FOLDER / "7_reward.md").read_text(encoding="utf-8")
    text = (REPOSITORY / "training" / "self_critical.py").read_text(encoding="utf-8")
    for hunk in re.search(r"```diff\n(.*?)```", page, re.DOTALL)[1].split("\n \n"):
        before, after = (line[1:] for line in hunk.strip("\n").split("\n"))
        assert text.count(f"{before}\n") == 1, before
        text = text.replace(before, after)
    exercise, patched = types.ModuleType("exercise"), types.ModuleType("patched")
    exec(solved("7_reward"), exercise.__dict__)
    with mock.patch.object(training.rewards, "by_meteor", exercise.by_meteor, create=True):
        exec(text, patched.__dict__)
    scenes = exercise.draw_scenes(4, "some")
    true = scenes.captions.unsqueeze(1)
    model = patched.SelfCritical(torch.nn.Identity(), exercise.small_decoder(), exercise.WORD_MAP, true)
    drawn = true[:, :, 1:].repeat(1, 5, 1)
    with mock.patch.object(patched, "draw_captions", lambda *_: (drawn, torch.zeros(drawn.shape))):
        losses = model(scenes.features, true)
    best = sum(1 - 0.5 / (int(length) - 1) ** 3 for length in scenes.lengths)
    assert losses.reward.item() == pytest.approx(5 * best)
