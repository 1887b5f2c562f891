"""Exercise 5, a metric and a term of the loss: see 5_score_and_loss.md.

    python -m pytest -n0 -s exercises/5_score_and_loss.py
"""
from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from demo.shapes import shape_of  # noqa: F401 (for you)
from eval import References, bleu
from exercises.scenes import draw_scenes, fit, small_decoder
from models import teacher_forced


def invented(references: References, captions: Sequence[Sequence[str]]) -> float:
    """Per cent of the captions that name a shape which none of their picture's references names.

    "disc" and "circles" are the shape of "circle": `shape_of` of demo/shapes.py knows, and gives None for other words.
    """
    raise NotImplementedError("exercise 5, the first part")


def coverage(alphas: Tensor) -> Tensor:
    """How much each caption looks where it has looked before, (N, T, P) -> (N,): at every step, of each region the
    smaller one of its weight now and the sum of its weights until now, summed over regions and steps."""
    raise NotImplementedError("exercise 5, the second part")


# ---- the check -------------------------------------------------------------------------------------------------------

def test_what_is_invented() -> None:
    references = [[["a", "red", "disc"], ["one", "circle"]], [["stars"]], [["a", "heart", "above", "a", "plus"]]]
    for wrong, captions in enumerate([
            ["a circle", "two stars", "a cross under a heart"],                     # other words for the same shapes
            ["a disc", "a star and a box", "there is a picture"],                   # nothing named is nothing invented
            ["a star", "a star and a box", "a plus"],
            ["a star and a box", "squares", "a disc"]]):                            # two of one caption count once
        assert invented(references, [each.split() for each in captions]) == pytest.approx(100 * wrong / 3)


def test_bleu_does_not_see_it() -> None:
    """Of two captions that BLEU finds equally good, one is true."""
    references = [[["a", "red", "star", "left", "of", "a", "blue", "heart"]]]
    true, untrue = ("a red star left of the blue heart".split(), "a red disc left of a blue heart".split())
    assert bleu(references, [true])[3] == pytest.approx(bleu(references, [untrue])[3])
    assert invented(references, [true]) < invented(references, [untrue])


def test_what_is_covered() -> None:
    stares, wanders, between, blinks = torch.zeros(4, 3, 4)                         # (T, P) of each
    stares[:, 1] = 1
    wanders[[0, 1, 2], [0, 1, 2]] = 1
    between[:, :2] = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])
    blinks[0, 0] = 1                                                                # its caption has ended: zeros
    found = coverage(torch.stack([stares, wanders, between, blinks]))
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 0.25 + 1.0, 0.0]))


def test_it_teaches_the_gaze() -> None:
    """Added to the loss of a word, with a weight, it makes the gaze wander more."""
    covered, scenes, val = {}, draw_scenes(50, "fifty"), draw_scenes(100, "val")
    for weight in (0.0, 1.0):
        decoder = small_decoder()
        rows = fit(decoder, scenes, val, epochs=15,
                   term=lambda decoded, weight=weight: weight * coverage(decoded.alphas).mean())
        with torch.no_grad():
            covered[weight] = coverage(teacher_forced(decoder, *val).alphas).mean().item()
        print(f"weight {weight}: coverage {covered[weight]:.2f}, validation loss {rows[-1]['val_loss']:.3f}")
    assert covered[1.0] < 0.8 * covered[0.0]
