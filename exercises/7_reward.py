"""Exercise 7, another reward: see 7_reward.md.

    python -m pytest -n0 -s exercises/7_reward.py
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from exercises.scenes import WORD_MAP, WORDS, draw_scenes, fit, small_decoder
from training.self_critical import SelfCritical


def meteor_like(caption: Sequence[int], reference: Sequence[int]) -> float:
    """METEOR without synonyms and stems, of two sentences of ids: from 0 to 1, by 7_reward.md's three formulas."""
    raise NotImplementedError("exercise 7, the first part")


def by_meteor(captions: Tensor, references: Tensor, *_: Any) -> Tensor:
    """The best that captions (N, K, T) earn by any reference of their picture (N, R, T'), both padded by 0: (N, K).

    It is called as `cider_d` of training/rewards.py is; what that knows of rare words is of no use here.
    """
    raise NotImplementedError("exercise 7, the second part")


# ---- the check -------------------------------------------------------------------------------------------------------

def test_the_score_of_a_pair() -> None:
    """Computed by hand: F, and what is left of it."""
    def scored(caption: list[int], reference: list[int], f: float, chunks: int, pairs: int) -> bool:
        return meteor_like(caption, reference) == pytest.approx(f * (1 - 0.5 * (chunks / pairs) ** 3))

    assert scored([1, 2, 3, 4], [1, 2, 3, 4], f=1, chunks=1, pairs=4)
    assert scored([4, 3, 2, 1], [1, 2, 3, 4], f=1, chunks=4, pairs=4)
    assert scored([1, 2, 9], [1, 2, 3, 4], f=20 / 39, chunks=1, pairs=2)            # P is 2/3, R 1/2
    assert scored([1, 2, 9, 3, 4], [1, 2, 3, 4], f=40 / 41, chunks=2, pairs=4)      # what has no partner ends a chunk
    assert scored([1, 1, 1], [1, 2], f=10 / 21, chunks=1, pairs=1)                  # a partner is one's alone
    assert scored([2, 1, 3], [1, 2, 1, 3], f=30 / 39, chunks=1, pairs=3)            # of two places the one that follows
    assert meteor_like([5, 6], [1, 2]) == meteor_like([], [1, 2]) == 0


def test_the_best_reference_counts_and_padding_does_not() -> None:
    captions = torch.tensor([[[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]], [[7, 0, 0, 0, 0], [8, 9, 7, 1, 2]]])       # (N, K, T)
    references = torch.tensor([[[1, 2, 3, 0], [3, 4, 5, 0]], [[7, 0, 0, 0], [0, 0, 0, 0]]])                # (N, R, T')
    found = by_meteor(captions, references, None)
    expected = [[meteor_like([1, 2], [1, 2, 3]), meteor_like([3, 4, 5], [3, 4, 5])],
                [meteor_like([7], [7]), meteor_like([8, 9, 7, 1, 2], [7])]]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64))


def test_stage_3_learns_by_it() -> None:
    """In the place of CIDEr-D: what the captions drawn of fifty scenes earn rises."""
    scenes, decoder = draw_scenes(50, "fifty"), small_decoder()
    fit(decoder, scenes, scenes, epochs=8)
    true = scenes.captions.unsqueeze(1)                                         # (N, 1, L), one caption of each
    model = SelfCritical(nn.Identity(), decoder, WORD_MAP, true)
    optimizer, earned = torch.optim.Adam(decoder.parameters(), lr=2e-3), []
    with mock.patch("training.self_critical.cider_d", by_meteor):
        for _ in range(20):
            losses = model(scenes.features, true)
            optimizer.zero_grad()
            losses.mean(losses, alpha_c=0.0).backward()
            optimizer.step()
            earned.append(float(losses.reward / losses.captions))
    print("mean reward by step:", *(f"{each:.2f}" for each in earned))
    assert sum(earned[-3:]) / 3 > sum(earned[:3]) / 3 + 0.03
    assert len(WORDS) == decoder.vocab_size
