"""Exercise 4, fifty scenes by heart: see 4_overfitting.md.

    python -m pytest -n0 -s exercises/4_overfitting.py
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exercises.scenes import colours_right, draw_scenes, fit, small_decoder

Rows = Sequence[dict[str, Any]]     # one for each epoch, with train_loss and val_loss, as in the log of train.py


def turning_point(rows: Rows) -> int | None:
    """The epoch, counted from 1, after which the model only learns by heart: the validation loss was never lower again,
    while the training loss was. None if no such epoch has come yet."""
    raise NotImplementedError("exercise 4, the first part")


def stops_after(rows: Rows, patience: int) -> int:
    """The epoch after which training ends: so many in a row brought no lower validation loss than the best before them.

    Where that never happens it is the last.
    """
    raise NotImplementedError("exercise 4, the second part")


# ---- the check -------------------------------------------------------------------------------------------------------

def rows_of(train: Sequence[float], val: Sequence[float]) -> list[dict[str, float]]:
    return [{"train_loss": each, "val_loss": other} for each, other in zip(train, val, strict=True)]


def test_the_turning_point() -> None:
    assert turning_point(rows_of([4, 3, 2, 1], [4, 3, 3.5, 4])) == 2
    assert turning_point(rows_of([5, 4, 3, 2, 1], [5, 4, 4.5, 3, 3.5])) == 4        # the first bump was none
    assert turning_point(rows_of([4, 3, 2, 1], [4, 3, 2, 1.5])) is None             # it still learns
    assert turning_point(rows_of([4, 3, 3.5, 4], [4, 3, 3.5, 4])) is None           # it diverges: another thing


def test_patience() -> None:
    rows = rows_of([7, 6, 5, 4, 3, 2, 1], [6, 4, 4.5, 3, 3.2, 3, 3.1])
    assert [stops_after(rows, patience) for patience in (1, 2, 3, 4)] == [3, 6, 7, 7]   # an equal loss is no lower one
    assert stops_after(rows_of([3, 2, 1], [3, 2, 1]), patience=1) == 3


def test_fifty_scenes_are_learnt_by_heart() -> None:
    """And the sign of it is found in the curves: while the model gets perfect, it gets worse."""
    scenes, val, decoder = draw_scenes(50, "fifty"), draw_scenes(100, "val"), small_decoder()
    rows = fit(decoder, scenes, val, epochs=45)
    turn, stop = turning_point(rows), stops_after(rows, patience=10)
    for epoch in dict.fromkeys((turn, stop, len(rows))):
        print(f"epoch {epoch}: train loss {rows[epoch - 1]['train_loss']:.3f}, "
              f"validation loss {rows[epoch - 1]['val_loss']:.3f}")
    print(f"both colours right: {colours_right(decoder, scenes):.0%} of the fifty, "
          f"{colours_right(decoder, val):.0%} of a hundred others")
    assert colours_right(decoder, scenes) > colours_right(decoder, val) + 0.3
    assert rows[-1]["val_loss"] > 1.2 * rows[turn - 1]["val_loss"] and rows[-1]["train_loss"] < 0.5
    assert turn < stop == turn + 10 < len(rows)
