"""The curves of a run, which train.py draws after each epoch."""
from __future__ import annotations  # noqa: I001 (of `drawing`, below)

import math
from pathlib import Path
from typing import Any

import drawing  # noqa: F401 (first: where MPLBACKEND names what is not installed, matplotlib cannot be imported)
from matplotlib.figure import Figure

from safety.files import atomic_write


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses and scores by epoch, with a line where a stage begins; with stage 3, whose loss tells nothing, its reward
    and CIDEr too."""
    panels = {"loss": {"train_loss": "train", "val_loss": "validation"},
              "BLEU-4 on the validation split": {"bleu4": "generated", "bleu4_teacher_forced": "teacher-forced"}}
    if any(row["stage"] == 3 for row in rows):
        panels["CIDEr"] = {"reward": "reward of captions drawn in training", "cider": "generated, validation split"}
        rows = [{**row, "train_loss": math.nan} if row["stage"] == 3 else row for row in rows]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    epochs = range(1, len(rows) + 1)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), sharex=True), panels.items(), strict=True):
        for key, label in curves.items():
            values = [row.get(key, math.nan) for row in rows]
            axes.plot(epochs, values, label=None if all(map(math.isnan, values)) else label, marker=".")
        for stage, what in ((2, "fine-tuning"), (3, "self-critical training")):
            before = sum(row["stage"] < stage for row in rows)
            if before and any(row["stage"] == stage for row in rows):
                axes.axvline(before + 0.5, color="grey", linestyle=":" if stage == 2 else "--", label=f"{what} begins")
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
