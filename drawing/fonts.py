"""Fonts that have a word's letters: matplotlib's own, or else one of the machine's."""
from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tqdm import tqdm


@cache
def font_file(word: str) -> str:
    """The first font that has all letters of a word. Where none has, that is said once."""
    letters = {ord(each) for each in word if each.isprintable()}
    for path in fonts():
        if letters <= letters_of(path):
            return path
    say_that_letters_are_missing()
    return next(fonts())


def fonts() -> Iterator[str]:
    """Matplotlib's font, which has most alphabets, and then the machine's, the upright ones of normal weight first."""
    from matplotlib import get_data_path  # here and below: a caption alone need not wait for it
    yield str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    yield from fonts_of_the_machine()


@cache
def fonts_of_the_machine() -> list[str]:
    from matplotlib.font_manager import findSystemFonts
    # Emoji are pictures, which are not drawn here, and a "last resort" has a box for every letter.
    found = [path for path in findSystemFonts() if not re.search("emoji|lastresort", path, re.IGNORECASE)]
    return sorted(found, key=lambda path: (not re.search("regular", path, re.IGNORECASE), path))


@cache
def letters_of(path: str) -> frozenset[int]:
    """The letters that a font has, of any size; none, if it cannot be read."""
    from matplotlib.ft2font import FT2Font
    try:
        font = FT2Font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):
        return frozenset()


@cache
def say_that_letters_are_missing() -> None:
    tqdm.write("no font of this machine has all letters of these captions: figures show boxes in their place. An .html "
               "page shows the letters; so do figures, once such a font is installed (Noto has one for every script)",
               file=sys.stderr)
