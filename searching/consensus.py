"""Of a beam's captions the one that is most like the others."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from models import Caption


def by_consensus(captions: Sequence[Caption]) -> list[Caption]:
    """A beam's captions, the one that is most like all of them first (minimum Bayes risk, Kumar and Byrne 2004).

    The most probable caption may be an odd one, while the others agree on something else. So each finished one votes
    for all that are similar to it, itself included, with the fourth root of its probability, an exponent found by
    trial. Two captions' similarity: the words that are in both, in any order, counted twice, divided by the words of
    both together. An empty caption is similar to none. Unfinished ones come last, and have no vote.
    """
    bags = [Counter(each.words) for each in captions]
    highest = max((each.log_prob for each in captions if each.finished), default=0.0)
    votes = [math.exp((each.log_prob - highest) / 4) if each.finished else 0.0 for each in captions]

    def rank(i: int) -> tuple[bool, float]:
        support = sum(vote * 2 * (bags[i] & other).total() / max(bags[i].total() + other.total(), 1)
                      for other, vote in zip(bags, votes, strict=True))
        return not captions[i].finished, -support

    return [captions[i] for i in sorted(range(len(bags)), key=rank)]
