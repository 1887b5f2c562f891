"""Exercise 3, greedy search and a beam: see 3_search.md.

    python -m pytest -n0 exercises/3_search.py
"""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import caption
from models import DecoderWithAttention


def greedy(decoder: nn.Module, encoder_out: Tensor, word_map: dict[str, int], max_len: int) -> list[int]:
    """Always the most probable word, for one picture (1, P, C): ids from <start> to <end>, or of max_len words."""
    raise NotImplementedError("exercise 3, the first part")


def beam(decoder: nn.Module, encoder_out: Tensor, word_map: dict[str, int], k: int,
         max_len: int) -> tuple[float, list[int]]:
    """The best caption that a beam of k finds for one picture: its log-probability and its ids, <start> first.

    One that ended goes before all that did not.
    """
    raise NotImplementedError("exercise 3, the second part")


# ---- the check -------------------------------------------------------------------------------------------------------

WORD_MAP = {word: i for i, word in enumerate(["<pad>", *"abcdefgh", "<unk>", "<start>", "<end>"])}


def babbler(seed: int) -> tuple[DecoderWithAttention, Tensor]:
    """A decoder with large random weights, whose captions are as different as its pictures: one picture."""
    torch.manual_seed(seed)
    decoder = DecoderWithAttention(4, 4, 8, len(WORD_MAP), encoder_dim=4).eval().requires_grad_(False)
    for each in decoder.parameters():
        nn.init.normal_(each)
    return decoder, torch.randn(1, 6, 4)


def from_caption_py(decoder: nn.Module, picture: Tensor, k: int, max_len: int) -> caption.Caption:
    search = caption.Search(beam_size=k, max_len=max_len, forbidden=())
    [[best]] = caption.beam_search(decoder, picture, WORD_MAP, search)
    return best


def test_greedy_search_is_that_of_caption_py() -> None:
    """For 30 pictures, of which some never come to an end."""
    lengths = set()
    for seed in range(30):
        decoder, picture = babbler(seed)
        found = greedy(decoder, picture, WORD_MAP, max_len=9)
        assert found == from_caption_py(decoder, picture, 1, 9).sequence
        lengths.add((len(found), found[-1] == WORD_MAP["<end>"]))
    assert {True, False} == {ended for _, ended in lengths} and len(lengths) > 4


def test_the_beam_is_that_of_caption_py() -> None:
    for seed in range(36):
        decoder, picture = babbler(seed)
        k = (1, 2, 4)[seed % 3]
        log_prob, found = beam(decoder, picture, WORD_MAP, k, max_len=6)
        best = from_caption_py(decoder, picture, k, 6)
        assert found == best.sequence
        assert log_prob == pytest.approx(best.log_prob, abs=1e-4)


def test_a_beam_that_holds_everything_finds_the_best_of_all() -> None:
    """Of all captions of up to two words. That the greedy one is another is what a beam is for."""
    better = 0
    for seed in range(20):
        decoder, picture = babbler(seed)
        log_prob, _ = beam(decoder, picture, WORD_MAP, 200, max_len=2)
        narrow = from_caption_py(decoder, picture, 1, 2)
        assert not narrow.finished or log_prob >= narrow.log_prob - 1e-4
        better += narrow.finished and log_prob > narrow.log_prob + 1e-4
    assert better > 0
