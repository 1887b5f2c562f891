"""CIDEr-D of captions as ids, the reward of self-critical training (Vedantam et al. 2014, arXiv 1411.5726).

pycocoevalcap computes the same from strings, in a loop over captions and dictionaries; here all of a batch is computed
at once, on the device that has the captions. Letters: N pictures, K captions to be judged and R references of each, T
ids of a padded caption, G = T - n + 1 n-grams.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ORDERS, SIGMA = (1, 2, 3, 4), 6.0  # of the n-grams; of the Gaussian that punishes another length


class Frequencies(NamedTuple):
    """How rare the n-grams of the training captions are."""

    vocab_size: int
    pictures: int
    n_grams: list[Tensor]   # for each order, (X,) int64: padding and those that occur, as numbers, ascending
    idf: list[Tensor]       # (X,) float64: log of pictures / pictures in whose captions it occurs; 0 of padding


def n_grams(captions: Tensor, n: int, vocab_size: int) -> Tensor:
    """Of ids (..., T), padded by 0, the n-grams (..., G), as numbers; -1 where one would reach into the padding."""
    windows = captions.unfold(-1, n, 1)                                         # (..., G, n)
    number = torch.zeros_like(windows[..., 0])
    for i in range(n):
        number = number * vocab_size + windows[..., i]  # in 64 bits up to 55,000 words
    return number.masked_fill(windows[..., -1] == 0, -1)


def frequencies(references: Tensor, vocab_size: int) -> Frequencies:
    """Of all training captions (I, R, T)."""
    found, idf = [], []
    for n in ORDERS:
        numbers = n_grams(at_least_four(references), n, vocab_size).flatten(1).sort(dim=1).values
        first = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True) & (numbers >= 0)  # once for each picture
        number, count = numbers[first].unique(return_counts=True)
        found.append(F.pad(number, (1, 0), value=-1))
        idf.append(F.pad(math.log(len(references)) - count.double().log(), (1, 0)))
    return Frequencies(vocab_size, len(references), found, idf)


def cider_d(captions: Tensor, references: Tensor, rare: Frequencies) -> Tensor:
    """How good captions (N, K, T) are, held against what people said of the same pictures (N, R, T): (N, K), 0 to 10.

    For each order, the cosine between the captions' vectors of n-grams, each as often as it occurs times its idf; what
    a caption repeats more often than the reference counts no more than there.
    """
    captions, references = at_least_four(captions), at_least_four(references)
    total = 0.0
    for i, n in enumerate(ORDERS):
        ours, theirs = n_grams(captions, n, rare.vocab_size), n_grams(references, n, rare.vocab_size)
        our_idf, their_idf = (idf_of(each, rare, i) for each in (ours, theirs))                 # (N, K, G), (N, R, G)
        our_count, their_count = count(ours, ours), count(theirs, theirs)                       # of each n-gram
        in_theirs = count(ours.unsqueeze(2), theirs.unsqueeze(1))                               # (N, K, R, G)
        # A sum over distinct n-grams is one over all, each divided by how often it occurs.
        clipped = torch.minimum(our_count.unsqueeze(2), in_theirs) * in_theirs / our_count.unsqueeze(2)
        product = (clipped * our_idf.square().unsqueeze(2)).sum(dim=3)                          # (N, K, R)
        our_norm, their_norm = ((counts * idf.square()).sum(dim=2).sqrt()
                                for counts, idf in ((our_count, our_idf), (their_count, their_idf)))
        norm = our_norm.unsqueeze(2) * their_norm.unsqueeze(1)                                  # (N, K, R)
        total = total + torch.where(norm > 0, product / norm, 0.0)
    lengths = ((each != 0).sum(dim=2).sub(1).clamp(min=0) for each in (captions, references))   # in pairs of words
    our_length, their_length = lengths
    other_length = (our_length.unsqueeze(2) - their_length.unsqueeze(1)).double()
    return (10 / len(ORDERS) * total * torch.exp(-other_length ** 2 / (2 * SIGMA ** 2))).mean(dim=2)


def at_least_four(captions: Tensor) -> Tensor:
    """Padded so far that there are n-grams of all orders."""
    return F.pad(captions, (0, max(0, ORDERS[-1] - captions.size(-1))))


def count(numbers: Tensor, among: Tensor) -> Tensor:
    """How often each of the n-grams (..., G) is among others (..., G'), at least once where it is itself padding."""
    return (numbers.unsqueeze(-1) == among.unsqueeze(-2)).sum(dim=-1).double()


def idf_of(numbers: Tensor, rare: Frequencies, i: int) -> Tensor:
    """Of n-grams of the i-th order: 0 of padding, and the highest of one that no training caption has."""
    known = rare.n_grams[i]
    place = torch.searchsorted(known, numbers).clamp(max=len(known) - 1)
    return torch.where(known[place] == numbers, rare.idf[i][place], math.log(rare.pictures))
