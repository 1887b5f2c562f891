"""A data set's thirteen files in a folder: written once, and whole or not at all.

They are written into a temporary folder, which becomes the ready folder once all are complete; only then do they move
to their places. A run that is killed in between leaves the rest to the next run.
"""
from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import IMAGE_SIZE
from safety.errors import InputError
from safety.files import naming_write_errors, remove_stale, temporary_folder
from safety.hdf5 import open_hdf5

JSON_FILES = ("CAPTIONS", "CAPLENS", "REFERENCES")


def input_hash(image_folder: Path, pictures: Sequence[Any], *settings: Any) -> str:
    """A hash of all that the files are made from: what was read of the captions, the pictures' sizes, and settings.

    In whatever layout the same captions were, it is the same.
    """
    sha = hashlib.sha256(repr((str(image_folder.resolve()), settings)).encode())
    for each in pictures:  # create_input_files.Picture
        name, size = os.path.relpath(each.path, image_folder), each.path.stat().st_size
        sha.update(repr((name, size, each.image_id, each.split, each.references)).encode())
    return sha.hexdigest()


def is_done(folder: Path, base: str, made_from: str, overwrite: bool, pictures: Sequence[Any] = ()) -> bool:
    """Whether all files exist and were made from this input; refuses to touch those of another."""
    texts = [folder / f"{split}_{kind}_{base}.json" for split in ("TRAIN", "VAL", "TEST") for kind in JSON_FILES]
    archives = [folder / f"{split}_IMAGES_{base}.hdf5" for split in ("TRAIN", "VAL", "TEST")]
    exist = [path.exists() for path in (folder / f"WORDMAP_{base}.json", *texts, *archives)]
    if overwrite or not any(exist):
        return False
    since = ""
    if all(exist):
        try:
            inputs = set()
            for path in archives:
                with open_hdf5(path) as file:
                    inputs.add(file.attrs.get("made_from"))
            if inputs == {made_from}:
                return True
            since = changed_since(folder, base, pictures)
        except (OSError, TypeError, ValueError) as error:  # damaged: as good as made from something else
            if getattr(error, "errno", None):
                raise  # the system's refusal: it says nothing of what is in the files
    raise InputError(f"{folder} holds files named {base} that are not whole or were made from other pictures, captions "
                     f"or settings{since}; replace them with --overwrite, or name another --output_folder")


def changed_since(folder: Path, base: str, pictures: Sequence[Any]) -> str:
    """How many pictures and captions were added or taken away since the files were made."""
    before = [captions for split in ("TRAIN", "VAL", "TEST")
              for captions in json.loads((folder / f"{split}_REFERENCES_{base}.json").read_bytes())]
    changes = {"pictures": len(pictures) - len(before),
               "captions": sum(len(each.references) for each in pictures) - sum(map(len, before))}
    words = [f"{abs(change)} {what} {'more' if change > 0 else 'fewer'}" for what, change in changes.items() if change]
    return f" (there are {' and '.join(words)} now)" if pictures and words else ""


def finish_killed_run(folder: Path, base: str, made_from: str) -> bool:
    """Removes what killed runs left half-written. True if one had got all files ready: they are in their places now."""
    remove_stale(folder / base)
    if not ready_folder(folder, base, made_from).exists():
        return False
    publish(folder, base, made_from)
    return True


@contextmanager
def whole_folder(folder: Path, base: str, made_from: str) -> Iterator[Path]:
    """A temporary folder to write the files into; afterwards all of them move to their places."""
    with temporary_folder(folder / base) as partial:
        yield partial
        partial.replace(ready_folder(folder, base, made_from))
    publish(folder, base, made_from)


def ready_folder(folder: Path, base: str, made_from: str) -> Path:
    return folder / f".{base}.{made_from[:16]}.ready"


def publish(folder: Path, base: str, made_from: str) -> None:
    """Moves the files that are ready to their places."""
    ready = ready_folder(folder, base, made_from)
    for other in set(folder.glob(f".{glob.escape(base)}.*.ready")) - {ready}:  # of a killed run, and now replaced
        shutil.rmtree(other, ignore_errors=True)
    for path in sorted(ready.iterdir(), key=lambda path: path.suffix == ".hdf5"):  # last those that hold the hash
        path.replace(folder / path.name)
    ready.rmdir()
    is_done(folder, base, made_from, overwrite=False)  # raises where a killed run's files were deleted since


def check_space(folder: Path, n_pictures: int) -> None:
    """Makes the folder, and refuses it if the files will not fit."""
    with naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    needed, usage = n_pictures * (3 * IMAGE_SIZE ** 2 + 4000), shutil.disk_usage(folder)
    if needed > usage.free and usage.total:  # some network folders tell nothing
        raise InputError(f"{folder}: {needed / 1e9:.2f} GB are needed and {usage.free / 1e9:.2f} GB free; make space, "
                         "or name another --output_folder")
    print(f"{n_pictures} pictures need {needed / 1e9:.2f} GB in {folder}, {usage.free / 1e9:.1f} GB are free")


def write_json(path: Path, value: Any) -> None:
    with naming_write_errors(path):
        path.write_text(json.dumps(value), encoding="utf-8")  # five times as fast as json.dump
