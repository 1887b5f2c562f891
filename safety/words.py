"""What a word is, at every way in: tables, JSON files, references, word maps; and one spelling for each."""
from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from safety.errors import InputError

# What editors and phones write in place of ASCII's ' " - and ...
APOSTROPHES = "\u2018\u2019\u201a\u201b\u2032\u2039\u203a\u02bc\u00b4\u05f3\uff07"
QUOTES = "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u05f4\uff02"
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
TO_ASCII = str.maketrans({**dict.fromkeys(APOSTROPHES, "'"), **dict.fromkeys(QUOTES, '"'),
                          **dict.fromkeys(DASHES, "-"), "\u2026": "..."})
IN_WORDS = "\u00b7\u055b\u055c\u055e"  # Catalan's dot and Armenian's marks stand amid a word
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation + IN_WORDS)
NOT_IN_WORDS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # white space, control characters, half characters
# What Unicode says to show nothing for, beside its format characters: joiners, fillers and variation selectors.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
RULE = "a word is not empty, and has no white space or control character in it"


@lru_cache(1 << 16)
def normal(text: str) -> str:
    """The one spelling of a word: accents composed (NFC), typographic marks as ASCII's, invisible characters gone.

    ASCII stays as it is. Invisible are Unicode's format characters, such as soft hyphens and spaces of no width, and
    its variation selectors.
    """
    if text.isascii():
        return text
    visible = "".join(each for each in text if unicodedata.category(each) != "Cf" and not INVISIBLE.match(each))
    return unicodedata.normalize("NFC", visible).translate(TO_ASCII)


def words_in(caption: str) -> list[str]:
    """A caption as people write it to words: in lower case and without punctuation, as in Karpathy's files.

    ASCII's punctuation vanishes ("dog's" becomes "dogs"). That of other scripts, such as the Arabic or the Chinese
    comma, separates words.
    """
    text = normal(caption.lower()).translate(WITHOUT_PUNCTUATION)
    return "".join(" " if unicodedata.category(each)[0] == "P" else each for each in text).split()


@lru_cache(1 << 16)
def is_word(text: str) -> bool:
    return bool(text) and not NOT_IN_WORDS.search(text)


def is_caption(words: Any) -> bool:
    """Whether it is a list of words, and not an empty one."""
    return isinstance(words, list) and bool(words) and all(isinstance(each, str) and is_word(each) for each in words)


def check_vocabulary(words: Iterable[str], path: str | Path) -> None:
    """Refuses a word map that holds something else than words."""
    for word in words:
        if not is_word(word):
            raise InputError(f"{path}: {word!r} is no word ({RULE}); make it again with create_input_files.py "
                             "--overwrite")
