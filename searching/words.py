"""Words that are drawn instead of searched, and words that may not follow."""
from __future__ import annotations

import torch
from torch import Tensor


def draw(candidates: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One continuation of each hypothesis, drawn by its probability, in the form of `best_of` (caption.py).

    The largest of all log p - log x, with an exponentially distributed x for each, is a draw from p (Gumbel 1954). With
    a seed the x are the same for all pictures, so that what is drawn for one does not depend on those beside it.
    """
    _, k, v = candidates.shape
    x = (torch.empty_like(candidates) if generator is None else torch.empty(k, v)).exponential_(generator=generator)
    noise = x.clamp_(min=1e-30).log_().to(candidates.device, non_blocking=True)     # of 0 it would be -inf, a sum NaN
    word = (candidates / temperature - noise).argmax(dim=2)                     # (N, K)
    best = torch.arange(k, device=word.device) * v + word
    return candidates.flatten(1).gather(1, best), best


def forbid(scores: Tensor, words: Tensor, sequences: Tensor, no_repeat: int) -> None:
    """Makes -inf, in the scores (R, V) of what follows sequences (R, t), of these words, and of all with which a run of
    `no_repeat` words would come again."""
    scores.index_fill_(1, words, -torch.inf)
    if 0 < no_repeat <= sequences.size(1):
        runs = sequences.unfold(1, no_repeat, 1)                                # (R, runs, no_repeat)
        again = (runs[:, :, :-1] == runs[:, -1:, 1:]).all(dim=2)                # those that begin as the sequence ends
        scores.scatter_add_(1, runs[:, :, -1], scores.new_zeros(again.shape).masked_fill_(again, -torch.inf))
