"""Names of pictures in a file of captions: where they may lead, and what is there where one is missing."""
from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from safety.errors import InputError


def check_paths(paths: Sequence[Path], image_folder: Path, source: Path) -> None:
    """All pictures must exist, and their names must stay in the folder, as a stranger's file may name any other that
    the user may read. Links are followed: what is in the folder its owner has put there."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(looked_for(path, image_folder) for path in missing[:5])
        raise InputError(f"{len(missing)} of {len(paths)} pictures are missing: {names}"
                         f"{', ...' if len(missing) > 5 else ''}. Looked under {image_folder}; say where they are with "
                         "--image_folder")
    for path in paths:
        folder = image_folder.absolute() if path.is_absolute() else image_folder
        inside = path.is_relative_to(folder)
        if ".." in (path.relative_to(folder) if inside else path).parts:
            raise InputError(f"{path} leads to {path.resolve()} by way of '..'; names in {source} begin in "
                             f"--image_folder {image_folder} and stay there: write them without")
        if not inside and not path.resolve().is_relative_to(image_folder.resolve()):
            raise InputError(f"{path} leads to {path.resolve()}, outside {image_folder}; if that is meant, name a "
                             "folder that holds all pictures with --image_folder")


def looked_for(path: Path, folder: Path) -> str:
    """A missing picture, and what is there instead: a link to nothing, or the same name spelled otherwise."""
    if path.is_symlink():
        return f"{path} (a link to {path.readlink()}, which is not there)"
    if not path.is_relative_to(folder):
        return str(path)
    found = folder
    for part in str(path.relative_to(folder)).replace("\\", "/").split("/"):
        alike = [each for each in found.iterdir() if spelling(each.name) == spelling(part)] if found.is_dir() else []
        if not alike:
            return str(path)
        found = next((each for each in alike if each.name == part), alike[0])
    same = unicodedata.normalize("NFC", str(path)) == unicodedata.normalize("NFC", str(found))
    return f"{path} (there is {found}{', its accents in another form of Unicode' if same else ''}: name both alike)"


def spelling(name: str) -> str:
    """What is equal of names that differ only in upper and lower case and in the form of their accents."""
    return unicodedata.normalize("NFC", name).casefold()
