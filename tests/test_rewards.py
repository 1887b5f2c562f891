"""The reward of self-critical training against pycocoevalcap's."""
from __future__ import annotations

import random

import pytest
import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer

from training.rewards import cider_d, frequencies

VOCABULARY, END = 12, 11


def some_captions(rng: random.Random, pictures: int, each: int, width: int = 14) -> torch.Tensor:
    """Ids of captions of any length, which repeat themselves now and then; most have an <end>."""
    found = torch.zeros(pictures, each, width, dtype=torch.long)
    for row in found.view(-1, width):
        words = [rng.randint(1, 9) for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 12]))]
        words = (words + words[:3] * rng.randrange(2) + [END] * (rng.random() < 0.9))[:width]
        row[:len(words)] = torch.tensor(words, dtype=torch.long)
    return found


def text(caption: torch.Tensor) -> str:
    return " ".join(str(word) for word in caption.tolist() if word)


def expected(captions: torch.Tensor, references: torch.Tensor, k: int) -> list[float]:
    scorer = CiderScorer()
    for ours, theirs in zip(captions, references, strict=True):
        scorer += (text(ours[k]), [text(each) for each in theirs])
    return scorer.compute_score()[1].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_it_is_pycocoevalcaps(seed: int) -> None:
    rng = random.Random(seed)
    references, captions = some_captions(rng, 40, 5), some_captions(rng, 40, 3, width=20)
    captions[0, 0, :14] = references[0, 0]
    references[1, :, 0] = 10  # a word of one picture alone
    found = cider_d(captions, references, frequencies(references, VOCABULARY))
    assert found.shape == (40, 3) and found.max() > 1
    for k in range(3):
        assert found[:, k].tolist() == pytest.approx(expected(captions, references, k), abs=1e-6)


def test_a_batch_is_judged_by_all_training_captions() -> None:
    """The frequencies are those of the whole, and a picture's score does not depend on what else is in the batch."""
    rng = random.Random(0)
    references, captions = some_captions(rng, 30, 5), some_captions(rng, 30, 2)
    rare = frequencies(references, VOCABULARY)
    some = torch.tensor([3, 17, 4])
    torch.testing.assert_close(cider_d(captions[some], references[some], rare),
                               cider_d(captions, references, rare)[some])


def test_captions_of_one_word_have_a_score_too() -> None:
    """Shorter than the longest n-gram; a caption of nothing has none."""
    references = torch.tensor([[[1], [1]], [[2], [3]]])
    found = cider_d(torch.tensor([[[1], [0]], [[1], [2]]]), references, frequencies(references, 5))
    assert found[0].tolist() == pytest.approx([2.5, 0]) and found[1, 0] == 0 and found[1, 1] == pytest.approx(1.25)
