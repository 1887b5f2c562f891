"""The curves of a run, which train.py draws after each epoch."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from safety.files import atomic_write


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses and scores by epoch, with a line where fine-tuning begins."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = range(1, len(rows) + 1)
    for axes, curves in ((losses, {"train_loss": "train", "val_loss": "validation"}),
                         (scores, {"bleu4": "generated", "bleu4_teacher_forced": "teacher-forced"})):
        for key, label in curves.items():
            axes.plot(epochs, [row[key] for row in rows], label=label, marker=".")
        first_stage = sum(row["stage"] == 1 for row in rows)
        if 0 < first_stage < len(rows):
            axes.axvline(first_stage + 0.5, color="grey", linestyle=":", label="fine-tuning begins")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    losses.set_title("loss")
    scores.set_title("BLEU-4 on the validation split")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
