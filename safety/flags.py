"""Numbers on the command line, with the range on the flag's own line: `type=integer(1)`, `type=real(0, 1, "[)")`; and
names there that argparse would misread."""
from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from glob import glob

RANGES = {"[]": "from {low:g} to {high:g}", "[)": "from {low:g} to below {high:g}",
          "(]": "above {low:g}, up to {high:g}", "()": "above {low:g} and below {high:g}",
          "[": "of {low:g} or more", "(": "above {low:g}"}
STAGE_3 = {"epochs": 20, "batch_size": 80, "decoder_lr": 5e-5}  # of train.py, where a flag has no third number


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """For argparse's `type=`: a whole number from low to high, both allowed; without high, of low or more."""
    wanted = f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{text}: {wanted}")
        return number

    return parse


def real(low: float, high: float | None = None, ends: str = "[]") -> Callable[[str], float]:
    """For argparse's `type=`: a number from low to high, never NaN; infinite only where high is said to be.

    Args:
        ends: "[]", "[)", "(]" or "()", as intervals are written.
    """
    wanted = (RANGES[ends[0]] if high in (None, math.inf) else RANGES[ends]).format(low=low, high=high)
    limit = sys.float_info.max if high is None else high

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        above = number > low or (number == low and ends[0] == "[")
        below = number < limit or (number == limit and ends[1] == "]")
        if not (above and below):
            raise argparse.ArgumentTypeError(f"{text}: a number {wanted}")
        return number

    return parse


def misread(arguments: Sequence[str], parser: argparse.ArgumentParser) -> str | None:
    """What to say of an address, which nobody fetches, or of a file's name that argparse would take for flags, as
    "-mountain.jpg" for `-m ountain.jpg`; None where there is none."""
    for word in arguments:
        name = word.partition("=")[2] if word.startswith("--") else word
        if re.match(r"\w\w+://", name):
            return f"{name}: addresses are not fetched; save what is there, and name the file"
        # -iphoto.jpg may mean photo.jpg, and -i'*.jpg' all that are there.
        like_a_file = re.fullmatch(r"-[^-.\d].*\.\w+", word) and not (os.path.lexists(word[2:]) or glob(word[2:]))
        if (word.startswith("-") and word.split("=")[0] not in parser._option_string_actions
                and (os.path.lexists(word) or like_a_file)):
            return f"{word}: a file whose name begins with - needs ./ before it: ./{word}"
    return None
