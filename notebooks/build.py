"""Makes inside.ipynb of inside.py, which is the text to edit and to review.

    python notebooks/build.py           # without outputs
    python notebooks/build.py --run     # with them: the cells are run here, without Jupyter
"""
from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # where the scripts are

from PIL import Image  # noqa: E402

from safety.errors import run_script  # noqa: E402
from safety.files import atomic_write  # noqa: E402

TEXT, NOTEBOOK = REPOSITORY / "notebooks" / "inside.py", REPOSITORY / "notebooks" / "inside.ipynb"
CODE, MARKDOWN = "# %%", "# %% [markdown]"


class Cell(NamedTuple):
    kind: str           # "code" or "markdown"
    source: str
    outputs: tuple[dict[str, Any], ...] = ()


def cells_of(text: str) -> list[Cell]:
    """A cell begins with a line `# %%`, or `# %% [markdown]`, whose lines are comments."""
    cells: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line in (CODE, MARKDOWN):
            cells.append(("code" if line == CODE else "markdown", []))
        else:
            kind, lines = cells[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
    return [Cell(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


def notebook_of(cells: list[Cell]) -> dict[str, Any]:
    """In Jupyter's format. Its version 4.4 is the last in which cells need no ids, which would only swell a diff."""
    made = []
    for cell in cells:
        code = {} if cell.kind == "markdown" else {"execution_count": None, "outputs": list(cell.outputs)}
        made.append({"cell_type": cell.kind, "metadata": {}, "source": cell.source.splitlines(keepends=True), **code})
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
              "language_info": {"name": "python"}}
    return {"cells": made, "metadata": python, "nbformat": 4, "nbformat_minor": 4}


def run(cells: list[Cell]) -> list[Cell]:
    """The same with what they print and draw, each after those before it, as Jupyter would run them."""
    import matplotlib.pyplot as plt
    plt.rcParams["figure.dpi"] = 75
    names: dict[str, Any] = {"__name__": "__main__"}
    done = []
    for i, cell in enumerate(cells):
        printed = io.StringIO()
        if cell.kind == "code":
            with redirect_stdout(printed):
                exec(compile(cell.source, f"cell {i}", "exec", dont_inherit=True), names)
        outputs = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
                   for text in [printed.getvalue()] if text]
        outputs += [drawing_of(plt.figure(number)) for number in plt.get_fignums()]
        plt.close("all")
        done.append(cell._replace(outputs=tuple(outputs)))
    return done


def drawing_of(figure: Any) -> dict[str, Any]:
    """A figure as an output, in as few bytes as will do: photographs are smaller as JPEG, diagrams as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    image = Image.open(drawn).convert("RGB")
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG", quality=60)
    image.quantize(64, Image.Quantize.MAXCOVERAGE).save(png, "PNG", optimize=True)
    kind, file = min(("image/jpeg", jpeg), ("image/png", png), key=lambda each: len(each[1].getvalue()))
    return {"data": {kind: base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]},
            "metadata": {}, "output_type": "display_data"}


def main(args: argparse.Namespace) -> None:
    cells = cells_of(TEXT.read_text(encoding="utf-8"))
    with atomic_write(NOTEBOOK) as file:
        json.dump(notebook_of(run(cells) if args.run else cells), file, indent=1, ensure_ascii=False)
        file.write("\n")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="with outputs; matplotlib must not open windows "
                        "(MPLBACKEND=agg), and the model must be there")
    return parser


if __name__ == "__main__":
    run_script(main, get_parser())
