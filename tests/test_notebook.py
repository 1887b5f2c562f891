"""The notebook is what its text says, and runs from top to bottom."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from test_eval import Model

from notebooks.build import NOTEBOOK, TEXT, cells_of, notebook_of

REPOSITORY = Path(__file__).parent.parent
FORCED = ["a", "man", "woman", "two", "the", "dog", "there", "is", "in"]  # words that the notebook says itself
WORDS = {word: i for i, word in enumerate(["<pad>", *FORCED, "cat", "on", "<unk>", "<start>", "<end>"])}


def emptied(notebook: dict[str, Any]) -> dict[str, Any]:
    cells = [{**cell, "outputs": [], "execution_count": None} if cell["cell_type"] == "code" else cell
             for cell in notebook["cells"]]
    return {**notebook, "cells": cells}


def test_the_notebook_is_made_of_its_text() -> None:
    committed = NOTEBOOK.read_text(encoding="utf-8")
    made = notebook_of(cells_of(TEXT.read_text(encoding="utf-8")))
    assert emptied(json.loads(committed)) == made, "run: python notebooks/build.py"
    assert len(committed) < 350_000  # of which outputs 300,000, so that a page of it opens quickly


def test_cells_begin_at_their_marks() -> None:
    text = "# %% [markdown]\n# # Title\n#\n# A line,\n#   indented.\n\n# %%\nx = 1\n\n\n# a comment\n"
    assert [tuple(each) for each in cells_of(text)] == [("markdown", "# Title\n\nA line,\n  indented.", ()),
                                                        ("code", "x = 1\n\n\n# a comment", ())]


def test_all_cells_run(tmp_path: Path) -> None:
    """With a tiny model, in the folder where Jupyter starts; the notebook's own assertions hold for any model."""
    code = f"""
import json, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from notebooks.build import TEXT, cells_of, run
sys.path.remove({str(REPOSITORY)!r})
print(json.dumps(run(cells_of(TEXT.read_text(encoding="utf-8")))))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=NOTEBOOK.parent, capture_output=True, text=True, env={
        **os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1",
        "INSIDE_MODEL": str(Model(WORDS).save(tmp_path / "tiny.pth.tar"))})
    assert not done.stderr and done.returncode == 0, done.stderr
    outputs = [each for _, _, outputs in json.loads(done.stdout) for each in outputs]
    printed = "".join(line for each in outputs for line in each.get("text", []))
    assert "the same, word for word" in printed
    assert [word for word in ("as trained", "everywhere alike", "nowhere", "drawn:") if word not in printed] == []
    drawings = [kind for each in outputs for kind in each.get("data", {}) if kind.startswith("image/")]
    assert len(drawings) == 11
