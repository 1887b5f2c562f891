"""Several models that find one caption together: to the search, a decoder like any other."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import encode
from safety.errors import InputError


class Members(NamedTuple):
    """What the models of an ensemble make of pictures."""

    annotations: tuple[Any, ...]    # each model's own
    state_sizes: tuple[int, ...]    # how many of the state's tensors are each model's

    def rows(self, index: Tensor | slice) -> Members:
        """Those of some of the pictures."""
        return self._replace(annotations=tuple(each.rows(index) for each in self.annotations))


class Ensemble(nn.Module):
    """A decoder whose probabilities, and whose gaze, are the mean of several decoders', each with its own encoder.

    Their shapes may differ, and so may their encoders; their vocabulary may not (`check_vocabularies`).
    """

    encodes = True  # `start` takes pictures, not features

    def __init__(self, encoders: Sequence[nn.Module], decoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)
        self.vocab_size = decoders[0].vocab_size
        self.fc = nn.Identity()  # the output of a step is the scores

    def start(self, images: Tensor) -> tuple[Members, tuple[Tensor, ...]]:
        """Before the first word: pictures (N, 3, 256, 256) uint8 to annotations and states, each model's in turn."""
        started = [decoder.start(encode(encoder, decoder, images, images.device))
                   for encoder, decoder in zip(self.encoders, self.decoders, strict=True)]
        seen, states = zip(*started, strict=True)
        return Members(seen, tuple(map(len, states))), sum(states, ())

    def step(self, words: Tensor, members: Members,
             state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One step of each: the logarithm of the mean probability of each word (R, V), alpha (R, P), the states."""
        log_probs, alphas, after = [], [], ()
        for decoder, seen, size in zip(self.decoders, *members, strict=True):
            output, alpha, own = decoder.step(words, seen, state[:size])
            log_probs.append(F.log_softmax(decoder.fc(output).float(), dim=1))
            alphas.append(alpha.float())
            state, after = state[size:], after + own
        mean = torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))
        return mean, mean_gaze(alphas), after


def mean_gaze(alphas: Sequence[Tensor]) -> Tensor:
    """The mean of the weights (R, P) of several models, on the finest of their maps, if these differ.

    A coarser map is enlarged as features are (`pooling_matrix` in models.py), and its weights made to sum to 1 again.
    """
    regions = max(alpha.size(1) for alpha in alphas)
    side = math.isqrt(regions)
    enlarged = []
    for alpha in alphas:
        if alpha.size(1) != regions:
            own = math.isqrt(alpha.size(1))
            if (own ** 2, side ** 2) != (alpha.size(1), regions):
                raise InputError(f"the models look at {alpha.size(1)} and at {regions} regions, which are no square "
                                 "maps, so their gaze has no mean; use models with maps of one size")
            alpha = F.adaptive_avg_pool2d(alpha.view(-1, 1, own, own), side).flatten(1)
            alpha = alpha / alpha.sum(dim=1, keepdim=True)
        enlarged.append(alpha)
    return torch.stack(enlarged).mean(dim=0)


def check_vocabularies(word_maps: Sequence[dict[str, int]], paths: Sequence[str | Path]) -> None:
    """Refuses models of which one means another word by the same number."""
    first, *others = word_maps
    for path, word_map in zip(paths[1:], others, strict=True):
        if word_map != first:
            word, _ = min(first.items() ^ word_map.items(), key=lambda item: item[1])
            raise InputError(f"{paths[0]} and {path}: their vocabularies differ ({len(first)} and {len(word_map)} "
                             f"words; {word!r} is not the same in both), so their probabilities have no mean; name "
                             "models that were trained on the same data")
