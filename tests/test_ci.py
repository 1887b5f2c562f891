"""The workflow and the citation can be read, and what they name is there."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parent.parent
TORCHRUN = re.compile(r"torch\.distributed\.run|\btorchrun\(|\bsbatch\(")


def workflow() -> dict:
    return yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def test_the_workflow_runs_what_is_there() -> None:
    jobs = workflow()["jobs"]
    assert jobs["linux"]["steps"][-1]["run"] == ".ci/run"
    assert (REPOSITORY / ".ci" / "run").stat().st_mode & 0o111
    commands = " ".join(step.get("run", "") for step in jobs["elsewhere"]["steps"])
    for path in re.findall(r"(?:-r|--ignore) (\S+)", commands):
        assert (REPOSITORY / path).is_file(), path


def test_elsewhere_all_tests_that_call_torchrun_are_left_out() -> None:
    command = workflow()["jobs"]["elsewhere"]["steps"][-1]["run"]
    ignored, names = re.findall(r"--ignore (\S+)", command), re.findall(r"not (\w+)", command)
    tests = {}
    for path in sorted((REPOSITORY / "tests").glob("test_*.py")):
        if str(path.relative_to(REPOSITORY)) in ignored or path.name == Path(__file__).name:
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                body = "\n".join(text.splitlines()[node.lineno:node.end_lineno])
                tests[node.name] = TORCHRUN.search(body) is not None
    left_out = {name for name in tests if any(each in name for each in names)}
    assert {name for name, calls in tests.items() if calls} - left_out == set()
    assert all(any(each in name for name in tests) for each in names), "a name that no test has any more"


def test_the_citation_is_of_this_project_and_the_paper() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # which CFF 1.2 requires
    assert citation["cff-version"] == "1.2.0"
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {citation['title']}\n")
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project
    paper = citation["references"][0]
    assert paper["title"] in " ".join(readme.split())
    for author in paper["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in " ".join(readme.split())
    assert paper["url"] in readme
