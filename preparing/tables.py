"""Captions from files: a table of one's own, and what is refused in the layouts of others."""
from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from safety.errors import InputError, reason
from safety.words import normal, words_in

SPLITS = {"train": "TRAIN", "restval": "TRAIN", "val": "VAL", "test": "TEST"}


def from_csv(path: Path) -> dict[str, Any]:
    """A table of captions in Karpathy's layout; without a column `split`, 80/10/10 by a fixed seed."""
    columns, rows = read_rows(path)
    images: dict[str, dict[str, Any]] = {}
    for where, row in rows:
        if None in row or None in row.values():
            raise InputError(f"{where}: not {len(columns)} values; a caption with commas needs quotes around it")
        name, split = row["image"].strip(), row.get("split", "train").strip().lower()
        tokens = words_in(row["caption"])
        if not name or not tokens:
            raise InputError(f"{where}: no picture, or no word of caption; fill it in, or delete the line")
        if split not in SPLITS:
            raise InputError(f"{where}: the split {row['split']!r} is none of {', '.join(SPLITS)}")
        image = images.setdefault(name, {"filename": name, "imgid": len(images), "split": split, "sentences": []})
        if image["split"] != split:
            raise InputError(f"{where}: {name} is in two splits, {image['split']} and {split}; keep one")
        image["sentences"].append({"tokens": tokens})
    if "split" not in columns:
        hold_out(list(images.values()))
    return {"images": list(images.values())}


def read_rows(path: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The names of the columns, and each row with its place in the file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows = [(f"{path}, line {table.line_num}", row) for row in table]
            columns = list(table.fieldnames or [])
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (--captions_csv)") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table in UTF-8 ({error})") from error
    if not rows or not {"image", "caption"} <= set(columns):
        raise InputError(f"{path}: the first line names the columns image, caption and maybe split, separated by "
                         "commas; each further line is a caption")
    return columns, rows


def hold_out(images: list[dict[str, Any]]) -> None:
    """Moves a tenth of the images to val and a tenth to test; of few images one each."""
    Random(0).shuffle(images)
    tenth = max(len(images) // 10, min(len(images) // 3, 1))
    for i, image in enumerate(images[:2 * tenth]):
        image["split"] = "val" if i < tenth else "test"


@contextmanager
def naming_layout_errors(source: Path) -> Iterator[None]:
    """Turns whatever a JSON in another layout than Karpathy's leads to into an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        hint = " (only --dataset coco has it; for other data say --dataset NAME)" if error.args == ("filepath",) else ""
        raise InputError(f"{source}: not in Karpathy's layout, {reason(error)}{hint}. It is a dict with a list "
                         "`images`, each with filename, split and sentences, each of those with tokens") from error


def checked_tokens(tokens: Any) -> list[str]:
    """A sentence's tokens, if they are strings, each in its one spelling."""
    if not isinstance(tokens, list) or not all(isinstance(word, str) for word in tokens):
        raise TypeError(f"tokens {tokens!r} is no list of words")
    return [normal(word) for word in tokens]
