"""Exercise 3, greedy search and a beam: see 3_search.md.

    python -m pytest -n0 exercises/3_search.py
"""
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import caption
from models import Annotations, DecoderWithAttention


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


class Table(nn.Module):
    """A decoder without a picture: each word's probabilities, by the word before it."""

    def __init__(self, **probabilities: dict[str, float]) -> None:
        super().__init__()
        self.vocab_size, self.fc = len(WORD_MAP), nn.Identity()
        self.table = torch.full((self.vocab_size, self.vocab_size), 1e-9)
        for last, nexts in probabilities.items():
            for word, probability in nexts.items():
                self.table[WORD_MAP.get(last, WORD_MAP["<start>"]), WORD_MAP[word]] = probability

    def start(self, encoder_out: Tensor) -> tuple[Annotations, tuple[Tensor, ...]]:
        return Annotations(encoder_out, encoder_out, None), (torch.zeros(len(encoder_out), 1),)

    def step(self, words: Tensor, _: Annotations,
             state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return self.table[words].log(), torch.ones(len(words), 1), state


def found_in(table: Table, k: int) -> str:
    log_prob, ids = beam(table, torch.zeros(1, 1, 1), WORD_MAP, k, max_len=5)
    best = from_caption_py(table, torch.zeros(1, 1, 1), k, 5)
    assert ids == best.sequence and log_prob == pytest.approx(best.log_prob, abs=1e-4)
    return " ".join(best.words)


def test_a_wider_beam_finds_what_a_narrow_one_has_lost() -> None:
    """The best is "a d", 0.7 * 0.35. A beam of two ends once at the beginning, and has then room for "a c" alone."""
    table = Table(start={"a": 0.7, "<end>": 0.1, "b": 0.09}, a={"c": 0.4, "d": 0.35}, d={"<end>": 1.0},
                  c=dict.fromkeys("efgh", 0.2), b={"<end>": 0.1})
    assert [found_in(table, k) for k in (2, 3)] == ["", "a d"]
    ids = greedy(table, torch.zeros(1, 1, 1), WORD_MAP, max_len=2)
    assert ids == [WORD_MAP[word] for word in ("<start>", "a", "c")]


def test_what_has_ended_goes_first() -> None:
    """Though it has a probability of 0.1 and the endless "a a a a a" one of 0.9."""
    assert found_in(Table(start={"a": 0.9, "<end>": 0.1}, a={"a": 1.0}), 2) == ""


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
