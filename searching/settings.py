"""What a search may be told: from Python its settings may be anything, and flags may contradict each other."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

from safety.errors import UsageError

SEARCHED = ("beam_size", "n_best", "length_penalty", "consensus")  # what only a beam uses
DRAWN = ("temperature", "seed")                                    # what only drawing uses


def check_search(search: Any, given: Collection[str] = ()) -> None:
    """Refuses a `Search` (caption.py) whose values make no sense.

    Args:
        given: its fields that the user named, even if with the value that they have anyway.
    """
    check_counts(beam_size=search.beam_size, max_len=search.max_len, n_best=search.n_best)
    check_counts(**{name: value for name in ("no_repeat", "sample") if (value := getattr(search, name)) != 0})
    check_range("length_penalty", search.length_penalty, 0, 2)
    check_range("temperature", search.temperature, 0.01, 100)
    if search.seed is not None and not (isinstance(search.seed, Integral) and 0 <= search.seed < 2 ** 63):
        raise UsageError("seed: a whole number of 0 or more")
    default = type(search)()
    for name in SEARCHED if search.sample else DRAWN:
        if name in given or getattr(search, name) != getattr(default, name):
            raise UsageError(f"--sample draws captions without a beam, which --{name} is for; leave out one of them"
                             if search.sample else f"--{name} is for captions that are drawn; say with --sample how "
                             "many, or leave it out")
    if not isinstance(search.forbidden, Collection):
        raise UsageError(f"forbidden={search.forbidden}: words, as (\"<unk>\", \"dog\"); () forbids none")
    if search.n_best > search.beam_size:
        raise UsageError(f"--n_best {search.n_best}: a beam of {search.beam_size} finds no more than that; widen it "
                         "with --beam_size")
    if search.length_penalty and search.consensus:
        raise UsageError("--length_penalty and --consensus are two ways to choose among the beam's captions; name one")


def check_counts(**values: Any) -> None:
    """Refuses what is no number of things, by the name of its setting."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name}={value if isinstance(value, Real) else type(value).__name__}: a whole number of "
                             "1 or more")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, Real) or not low <= value <= high:
        raise UsageError(f"{name}: a number from {low:g} to {high:g}")


def ids_of(forbidden: str | Iterable[str], word_map: dict[str, int]) -> list[int]:
    """Of the forbidden words; each must be one of the vocabulary, or it would be forbidden in vain."""
    words = [forbidden] if isinstance(forbidden, str) else list(forbidden)
    if unknown := [word for word in words if word not in word_map]:
        raise UsageError(f"forbidden {', '.join(map(repr, unknown[:5]))}: not among the model's {len(word_map)} "
                         "words, so it cannot come up; leave it out")
    return [word_map[word] for word in words]
