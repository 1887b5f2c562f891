"""What the exercises share: scenes of two shapes, drawn and kept in memory, and a loop that trains a small decoder.

A scene is one of demo/shapes.py's, and its caption says what is where: "a red star left of a blue heart", "a blue heart
above a red star". In place of an encoder the picture is made small, so that all of it is done in seconds: 8 x 8 regions
of 4 x 4 pixels. So colours are easily seen and shapes hardly, which no exercise minds.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from caption import Search, beam_search
from demo.shapes import COLORS, SHAPES, Thing, draw_scene
from models import Decoded, DecoderWithAttention, caption_losses, teacher_forced

WORDS = ("<pad>", "a", "left", "of", "above", *COLORS, *SHAPES, "<unk>", "<start>", "<end>")
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
REGIONS, FEATURES = 8, 50   # a map of 8 x 8; of each region 48 values of its pixels, and where it is


class Scenes(NamedTuple):
    features: Tensor    # (N, 8, 8, 50), what an encoder would make of the pictures
    captions: Tensor    # (N, 10), ids from <start> to <end>, then <pad>
    lengths: Tensor     # (N, 1)

    def some(self, index: Tensor) -> Scenes:
        return Scenes(*(each[index] for each in self))


@cache
def draw_scenes(n: int, split: str) -> Scenes:
    """Always the same n scenes of a split, whose name may be any."""
    maps, captions = [], []
    for picture, things in two_different(n, split):
        small = np.asarray(picture.reduce(8), dtype=np.float32) / 64                        # (32, 32, 3)
        small = small - np.median(small, axis=(0, 1))                                       # the background is near 0
        maps.append(small.reshape(REGIONS, 4, REGIONS, 4, 3).swapaxes(1, 2).reshape(REGIONS, REGIONS, -1))
        captions.append(torch.tensor([WORD_MAP[word] for word in ("<start>", *say(*things), "<end>")]))
    across = torch.linspace(-3, 3, REGIONS).expand(n, REGIONS, REGIONS)
    place = torch.stack([across, across.transpose(1, 2)], dim=3)                            # (N, 8, 8, 2)
    return Scenes(torch.cat([torch.from_numpy(np.stack(maps)), place], dim=3), pad_sequence(captions, True),
                  torch.tensor([[len(each)] for each in captions]))


def two_different(n: int, split: str) -> Iterator[tuple[Any, list[Thing]]]:
    """Pictures of n scenes with a pair of things that differ."""
    rng = random.Random(split)
    while n > 0:
        picture, things = draw_scene(rng, held_out=False, kinds={"one": 30, "pair": 50, "group": 20})
        if len(things) == 2 and things[0][:2] != things[1][:2]:
            yield picture, things
            n -= 1


def say(first: Thing, second: Thing) -> list[str]:
    """demo/shapes.py places the first of a pair left of the second, or above it."""
    relation = ["left", "of"] if first.box[2] <= second.box[0] else ["above"]
    return ["a", first.color, first.shape, *relation, "a", second.color, second.shape]


def small_decoder(kind: type[nn.Module] = DecoderWithAttention, seed: int = 0) -> nn.Module:
    """One for the scenes, with the same first weights at every call."""
    torch.manual_seed(seed)
    return kind(32, 32, 64, len(WORDS), encoder_dim=FEATURES, dropout=0.0)


def fit(decoder: nn.Module, train: Scenes, val: Scenes, epochs: int, seed: int = 0,
        term: Callable[[Decoded], Tensor] | None = None) -> list[dict[str, Any]]:
    """Trains the decoder, and returns a row an epoch, with keys as in train.py's log: the cross entropy of a word.

    Args:
        term: what is added to the loss in training, of what the decoder makes of a batch.
    """
    torch.manual_seed(seed)
    optimizer, rows = torch.optim.Adam(decoder.parameters(), lr=0.01), []
    for epoch in range(1, epochs + 1):
        sums = torch.zeros(2)
        decoder.train()
        for index in torch.randperm(len(train.captions)).split(20):
            decoded = teacher_forced(decoder, *train.some(index))
            losses = caption_losses(decoded)
            loss = losses.mean(losses, alpha_c=0.0)
            optimizer.zero_grad()
            (loss if term is None else loss + term(decoded)).backward()
            optimizer.step()
            sums += torch.stack([losses.cross_entropy, losses.words]).detach()
        rows.append({"stage": 1, "epoch": epoch, "train_loss": float(sums[0] / sums[1]),
                     "val_loss": validate(decoder, val)})
    return rows


@torch.no_grad()
def validate(decoder: nn.Module, scenes: Scenes) -> float:
    """The cross entropy of a word."""
    losses = caption_losses(teacher_forced(decoder.eval(), *scenes))
    return float(losses.cross_entropy / losses.words)


def colours_right(decoder: nn.Module, scenes: Scenes) -> float:
    """The share of scenes of which the greedy caption names both colours, in their order."""
    found = beam_search(decoder.eval(), scenes.features, WORD_MAP, Search(beam_size=1, max_len=10), with_alphas=False)
    colours = [[[word for word in words if word in COLORS] for words in captions] for captions in (
        [best.words for best, *_ in found], [[WORDS[i] for i in ids] for ids in scenes.captions.tolist()])]
    return sum(ours == true for ours, true in zip(*colours, strict=True)) / len(scenes.captions)
