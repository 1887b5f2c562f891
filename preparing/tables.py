"""Captions as text: a table, or lines `name#0<tab>caption`; and what is refused in the layouts of others."""
from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from safety.errors import InputError, UsageError, reason
from safety.vectors import CONTAINERS
from safety.words import normal, words_in

SPLITS = {"train": "TRAIN", "restval": "TRAIN", "val": "VAL", "test": "TEST"}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
FLICKR30K = {"image_name": "image", "comment": "caption"}  # what its results.csv calls the columns
FLICKR8K_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt",
                  "test": "Flickr_8k.testImages.txt"}
FLICKR8K_STRAY = "2258277193_586949ec62.jpg.1"  # Flickr8k.token.txt has captions of it, and nobody has the picture
TOKEN_LINE = re.compile(r"(?P<image>\S[^\t\r\n]*?)#\d+ *\t(?P<caption>.*)")
NEW_LINE = re.compile(r"\r\n|\r|\n")
EXCELS_SEPARATOR = re.compile(r'"?sep=."?\s*', re.IGNORECASE)  # what its tables may begin with
LACKS_A_BAR = re.compile(r"^([^|]+\|\s*\d+)\s+(?=[^|]+$)")  # one line of Flickr30k's: `2199200615.jpg| 4   A dog runs`
BY_SEED = "by a fixed seed, a tenth of the pictures each for VAL and TEST"
KARPATHY = ("Karpathy's layout", "It is a dict with a list `images`, each with filename, split and sentences, each of "
            "those with tokens")
# Files that are no text, by how they begin, and what to do with them.
BINARY = {**{begins: f"{kind}; unpack it" for begins, kind in CONTAINERS.items()},
          b"PK\x03\x04": "a workbook, or another archive; save its table as CSV, or unpack it",
          b"\xd0\xcf\x11\xe0": "a workbook of an older Excel; save its table as CSV",
          b"PAR1": "Parquet; save its table as CSV, as pandas.read_parquet(FILE).to_csv(NEW_FILE) does"}
# What other texts look like at their beginning, and what to do with them.
RESEMBLES = {
    r"\{.*\}\s*\n\s*\{": "this is JSON lines; write a table instead",
    r"(?i).*\bfile_name\b": "this looks like Hugging Face's metadata.csv; call its columns image and caption",
    r"(?i).*\burl\b": "this has addresses, and nothing is fetched; download the pictures, and name their files",
    r"\S+\.jpg\s+\S+\.jpg#\d": "these are Flickr8k's ratings of captions; give Flickr8k.token.txt",
    r"[^\s,;|]+\.jpe?g\s*($|[\r\n])": "this is a list of names; give Flickr8k.token.txt, beside which it is found",
}


def from_text(path: Path) -> dict[str, Any]:
    """Captions as text in Karpathy's layout.

    The key `splits` says where these come from: a column `split`; Flickr8k's lists of names, where they lie beside the
    file; or else a fixed seed, 80/10/10.
    """
    text = read_text(path)
    rows = read_tokens(path, text) if TOKEN_LINE.match(text.lstrip()) else read_rows(path, text)
    images: dict[str, dict[str, Any]] = {}
    for where, row in rows:
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
    if "split" in rows[0][1]:
        return {"images": list(images.values()), "splits": "from its column split"}
    if listed := by_lists(images, path.parent):
        rest = len(images) - len(listed)
        left_out = f" ({rest} pictures that are in none of them are left out)" if rest else ""
        return {"images": listed, "splits": f"from Flickr8k's lists of names beside it{left_out}"}
    stray = images.pop(FLICKR8K_STRAY, None)
    hold_out(list(images.values()))
    without = f" (without {FLICKR8K_STRAY}, of which Flickr8k has no picture)" if stray else ""
    return {"images": list(images.values()), "splits": f"{BY_SEED}{without}"}


# ---- the text, and its rows ------------------------------------------------------------------------------------------

def read_text(path: Path) -> str:
    """A file's text, in UTF-8 or, if it begins with a byte order mark that says so, UTF-16."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (--captions_csv)") from error
    if kind := next((kind for begins, kind in BINARY.items() if data.startswith(begins)), None):
        raise InputError(f"{path}: this is {kind}, and name that file")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(NEW_LINE.findall(data[:error.start].decode("latin-1"))) + 1
        raise InputError(f"{path}, line {line}: not text in UTF-8, or UTF-16 with a byte order mark ({error.reason}); "
                         "save it as UTF-8") from error
    if "\0" in text:
        line = len(NEW_LINE.findall(text[:text.index("\0")])) + 1
        raise InputError(f"{path}, line {line}: a zero byte, so this is UTF-16 without its byte order mark, or no "
                         "text; save it as UTF-8")
    return text


def resemblance(text: str) -> str:
    """What a text that is no captions looks like."""
    return next((f"; {hint}" for pattern, hint in RESEMBLES.items() if re.match(pattern, text)), "")


def read_tokens(path: Path, text: str) -> list[tuple[str, dict[str, str]]]:
    """Lines of Flickr's form, each with its place in the file."""
    rows = []
    for number, line in enumerate(NEW_LINE.split(text), 1):
        if line.strip():
            found = TOKEN_LINE.fullmatch(line.strip())
            if not found:
                raise InputError(f"{path}, line {number}: not name#number, a tab and a caption, as the lines before it "
                                 "are; fill it in, or delete the line")
            rows.append((f"{path}, line {number}", found.groupdict()))
    return rows


def read_rows(path: Path, text: str) -> list[tuple[str, dict[str, str]]]:
    """A table's rows by the names of their columns, each with its place in the file, which is where it begins."""
    lines = io.StringIO(text, newline="").readlines()
    if EXCELS_SEPARATOR.fullmatch(lines[0] if lines else ""):
        lines[0] = "\n"  # the next line shows which it is
    header = next((line for line in lines if line.strip()), "")
    separator = next((each for each in SEPARATORS if {"image", "caption"} <= set(columns_of(header, each))), None)
    if separator is None:
        raise InputError(f"{path}: no layout of captions that is known{resemblance(text.lstrip())}. Of a table the "
                         "first line names the columns image, caption and maybe split, separated by commas, semicolons "
                         "or tabs; each further line is a caption")
    # Flickr30k's bars come without any quoting: a quote at a caption's beginning is part of it.
    quoting = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
    columns = columns_of(header, separator)
    for name in ("image", "caption"):
        if columns.count(name) > 1:
            raise InputError(f"{path}: it has several columns {name}; give each caption a line of its own")
    if separator == "|" and "comment_number" in columns:
        lines = [LACKS_A_BAR.sub(r"\1| ", line) for line in lines]
    table = csv.reader(lines, delimiter=separator, quoting=quoting, skipinitialspace=True, strict=True)
    rows, line = [], 1
    try:
        for row in table:
            if any(row) or len(row) > 1:  # else a line of white space
                rows.append((f"{path}, line {line}", row))
            line = table.line_num + 1
    except csv.Error as error:
        where, why = wrong_field("".join(lines[line - 1:]), line, separator)
        raise InputError(f"{path}, line {where}: not a table, {why or reason(error)}") from error
    for where, row in rows:
        if len(row) != len(columns):
            remedy = "cannot be quoted, so replace them" if separator == "|" else "needs quotes around it"
            raise InputError(f"{where}: not {len(columns)} values; a caption with {SEPARATORS[separator]} {remedy}")
    if len(rows) < 2:
        raise InputError(f"{path}: only the line that names the columns image, caption and maybe split; each further "
                         "line is a caption")
    return [(where, dict(zip(columns, row, strict=True))) for where, row in rows[1:]]


def columns_of(header: str, separator: str) -> list[str]:
    """The names of the columns, ours for Flickr30k's."""
    names = next(csv.reader([header[:1000]], delimiter=separator, skipinitialspace=True), [])
    return [FLICKR30K.get(name.strip().lower(), name.strip().lower()) for name in names]


def wrong_field(text: str, line: int, separator: str) -> tuple[int, str | None]:
    """The line in which the field begins at which csv stopped, and why, for a text that begins with its row."""
    quoted, end = r'"[^"]*(?:""[^"]*)*"', rf"(?:{re.escape(separator)}|\r\n|\r|\n|\Z)"
    field = re.compile(rf'(?: *{quoted}|(?! *")[^{re.escape(separator)}\r\n]*){end}')
    limit, at = csv.field_size_limit(), 0
    while at < len(text) and (found := field.match(text, at)) and len(found[0]) <= limit:
        at = found.end()
    line += len(NEW_LINE.findall(text[:at]))
    if at == len(text):
        return line, None
    if found:
        return line, f"a value of more than {limit:,} characters begins here; is a quote missing, or out of place?"
    remedy = 'put quotes around the whole value, and write "" for each quote within it'
    if closed := re.compile(f" *{quoted}").match(text, at):
        last = line + len(NEW_LINE.findall(closed[0]))
        return line, f"the quote that opens here ends in line {last} before the value does; {remedy}"
    return line, f"the quote that opens here is never closed; close it, or {remedy}"


# ---- splits ----------------------------------------------------------------------------------------------------------

def by_lists(images: dict[str, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The pictures that are in Flickr8k's lists of names, in the lists' order, which is that of Karpathy's JSON."""
    listed: dict[str, dict[str, Any]] = {}
    for split, name in FLICKR8K_LISTS.items():
        if (folder / name).is_file():
            for picture in map(str.strip, NEW_LINE.split(read_text(folder / name))):
                if picture in images and picture not in listed:
                    listed[picture] = {**images[picture], "split": split, "imgid": len(listed)}
    return list(listed.values())


def hold_out(images: list[dict[str, Any]]) -> None:
    """Moves a tenth of the images to val and a tenth to test; of few images one each."""
    Random(0).shuffle(images)
    tenth = max(len(images) // 10, min(len(images) // 3, 1))
    for i, image in enumerate(images[:2 * tenth]):
        image["split"] = "val" if i < tenth else "test"


# ---- what is refused in others' JSON ---------------------------------------------------------------------------------

@contextmanager
def naming_layout_errors(source: Path | str, layout: tuple[str, str] = KARPATHY) -> Iterator[None]:
    """Turns whatever a JSON in another layout leads to into an error that names the file."""
    name, wanted = layout
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if error.args == ("filepath",):
            raise UsageError(f"{source}: its pictures have no 'filepath', as COCO's have; for other data, as of "
                             "--captions_csv, choose a name with --dataset NAME") from error
        raise InputError(f"{source}: not in {name}, {reason(error)}. {wanted}") from error


def checked_tokens(tokens: Any) -> list[str]:
    """A sentence's tokens, if they are strings, each in its one spelling."""
    if not isinstance(tokens, list) or not all(isinstance(word, str) for word in tokens):
        raise TypeError(f"tokens {tokens!r} is no list of words")
    return [normal(word) for word in tokens]
