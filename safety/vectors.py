"""Files of word vectors as they are published: what separates a word from its numbers, and what is no text at all."""
from __future__ import annotations

from pathlib import Path

from safety.errors import InputError

CONTAINERS = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "compressed by gzip", b"BZh": "compressed by bzip2",
              b"\xfd7zXZ": "compressed by xz", b"7z\xbc\xaf": "a 7-Zip archive"}  # by how they begin


def fields(line: str) -> list[str]:
    """What spaces and tabs separate. Other white space does not: words of GloVe's largest file have some in them."""
    return [*filter(None, line.strip().replace("\t", " ").split(" "))] or [""]


def check_text(beginning: bytes, path: str | Path) -> None:
    """Refuses word vectors in other files than text."""
    for begins, kind in CONTAINERS.items():
        if beginning.startswith(begins):
            raise InputError(f"--embeddings {path} is {kind}; unpack it, and name the text file that was in it")
    if b"\0" in beginning:
        raise InputError(f"--embeddings {path} is binary, or text in UTF-16; get or save the vectors as text in UTF-8, "
                         "GloVe's .txt or the .vec of word2vec and fastText")
