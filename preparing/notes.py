"""What the summary says of a data set beside its size: what is left out, repeated or unknown, and what changes that."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preparing.tables import SPLITS
from safety.pictures import counted


def about_left_out(other_splits: Counter[str], without: Sequence[Path], lengths: Sequence[Sequence[int]],
                   max_len: int) -> list[str]:
    """Of pictures and captions that are in no file.

    Args:
        other_splits: how many pictures each of them has.
        without: pictures without a caption.
        lengths: of each other picture the lengths of its captions, in words.
    """
    notes = []
    if other_splits:
        names = ", ".join(f"{name} ({count})" for name, count in other_splits.items())
        notes.append(f"{other_splits.total()} pictures left out: of the splits {names}; those that are read are "
                     f"{', '.join(SPLITS)}, so rename them to keep the pictures")
    if without:
        notes.append(f"{counted(without, 'left out, without captions')}; write some to keep them")
    every = [n for own in lengths for n in own]
    longer = [n for n in every if n > max_len]
    if longer:
        gone = sum(min(own) > max_len for own in lengths)
        notes.append(f"{gone} pictures, {len(longer)} of {len(every)} captions left out: longer than {max_len} words; "
                     f"--max_len {max(longer)} keeps all")
    return notes


def about_twice(listed: Mapping[Path, Sequence[str | None]]) -> list[str]:
    """Of pictures that are there more than once; `listed` has each time the split, or None if it has no captions."""
    twice = {path: sorted({*splits} - {None}) for path, splits in listed.items() if len(splits) > 1}
    across = {path: splits for path, splits in twice.items() if len(splits) > 1}
    notes = []
    if across:
        named = [f"{path} ({', '.join(splits)})" for path, splits in across.items()]
        notes.append(f"warning: {counted(named, 'in several splits')}; keep each in one, or the model is scored on "
                     "pictures that it was trained on")
    if within := [path for path in twice if path not in across]:
        notes.append(f"{counted(within, 'listed more than once')}; put all captions of a picture together")
    return notes


def about_pictures(pictures: Sequence[Any], captions_per_image: int, source: str) -> list[str]:
    """Of captions that are in the files more than once, or only among the references, and of splits without pictures.

    Args:
        pictures: create_input_files.Picture.
    """
    counts, notes = [len(picture.captions) for picture in pictures], []
    if fewer := [n for n in counts if n < captions_per_image]:
        notes.append(f"{len(fewer)} pictures have fewer than {captions_per_image} captions, so that "
                     f"{sum(captions_per_image - n for n in fewer)} captions are repetitions; --captions_per_image "
                     f"{min(fewer)} repeats none")
    if more := [n for n in counts if n > captions_per_image]:
        notes.append(f"{len(more)} pictures have more than {captions_per_image} captions, of which "
                     f"{sum(n - captions_per_image for n in more)} are not trained on; --captions_per_image "
                     f"{max(more)} takes all")
    for split, script in (("VAL", "train.py"), ("TEST", "eval.py, without --split VAL,")):
        if not any(picture.split == split for picture in pictures):
            notes.append(f"{split} is empty, and {script} needs pictures there: in {source} give some the split "
                         f"{split.lower()}")
    return notes


def about_words(word_freq: Counter[str], word_map: dict[str, int],
                min_word_freq: int | None = None) -> list[str]:
    """Of the vocabulary, and whether captions can be learnt with it; `min_word_freq` is None of a given one."""
    unknown = sum(count for word, count in word_freq.items() if word not in word_map)
    once = sum(count == 1 for word, count in word_freq.items() if word in word_map)
    notes = [f"vocabulary: {len(word_map)} words with the 4 special ones; {100 * unknown / word_freq.total():.2f} % of "
             "all words are <unk>"]
    if unknown and min_word_freq is not None:
        notes[0] += f", as they occur {min_word_freq} times or less; --min_word_freq 0 keeps all"
    rare = 100 * (unknown + once) / word_freq.total()
    if rare > 25:
        notes.append(f"warning: {rare:.0f} % of all words are <unk> or occur only once, so a model will say little or "
                     "nothing. More captions help, and in languages that are written without spaces (Chinese, "
                     "Japanese, Thai) spaces between the words")
    return notes
