"""The rules of CONTRIBUTING's first section: who imports whom, and how long a function may be."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
READING_ORDER = ["models", "datasets", "caption", "eval", "train"]
SCRIPTS = [*READING_ORDER, "create_input_files", "utils"]
FOLDERS = ["encoders", "safety", "preparing", "searching", "training", "drawing"]
GUESTS = ["show_attend_tell", "demo", "exercises", "notebooks", "benchmarks", "img", "tests"]
# What a file may import of ours, beside its own folder.
ALLOWED = {
    "encoders": set(), "models": {"encoders"}, "safety": {"models", "encoders"}, "utils": {"safety"},
    "datasets": {"models", "encoders", "safety", "utils"},
    "drawing": {"models", "safety", "utils", "datasets"},
    "preparing": {"models", "safety", "utils", "datasets"},
    "searching": {"models", "safety", "utils", "datasets"},
    "create_input_files": {"safety", "utils", "datasets", "preparing"},
    "caption": {"models", "safety", "utils", "datasets", "drawing", "searching"},
    "eval": {"models", "safety", "utils", "datasets", "drawing", "caption"},
    "training": {"models", "encoders", "safety", "utils", "datasets", "searching", "drawing", "caption", "eval"},
    "train": {"models", "safety", "utils", "datasets", "drawing", "caption", "eval", "training"},
}


def files_of(place: str) -> list[Path]:
    return [REPOSITORY / f"{place}.py"] if place in SCRIPTS else sorted((REPOSITORY / place).glob("*.py"))


def imports_of(path: Path) -> list[tuple[str, str]]:
    """Modules and the names that are taken from them, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", each.name) for each in node.names]
        elif isinstance(node, ast.Import):
            found += [(each.name, "") for each in node.names]
    return found


@pytest.mark.parametrize("place", [*SCRIPTS, *FOLDERS])
def test_a_file_imports_from_below_alone(place: str) -> None:
    """The reading order, without a circle; and no name that its folder keeps for itself."""
    assert files_of(place)
    for path in files_of(place):
        ours = [(module.split(".")[0], name) for module, name in imports_of(path)
                if module.split(".")[0] in {*SCRIPTS, *FOLDERS, *GUESTS}]
        assert {module for module, _ in ours} <= ALLOWED[place] | ({place} if place in FOLDERS else set()), path
        assert not [name for module, name in ours if module != place and name.startswith("_")], path


def test_the_order_of_imports_is_the_reading_order() -> None:
    for i, name in enumerate(READING_ORDER):
        assert not ALLOWED[name] & set(READING_ORDER[i:])


@pytest.mark.parametrize("place", SCRIPTS)
def test_functions_are_short_and_take_few_arguments(place: str) -> None:
    for path in files_of(place):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                taken = [each.arg for each in node.args.args + node.args.kwonlyargs if each.arg != "self"]
                contract = node.name in {"create_input_files"}  # the original tutorial's own signature
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
                assert len(taken) <= 7 or contract, f"{path.name}: {node.name}"
