"""Finding pictures, and what to say of those that are not there, cannot be read, or are no pictures any more."""
from __future__ import annotations

import glob
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from safety.errors import InputError, printable

NO_PICTURES = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}  # a program, and what Pillow only recognises


@cache
def picture_suffixes() -> frozenset[str]:
    """The endings of file names, as ".jpg", by which a folder's pictures are known: those that Pillow reads here."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items()
                     if kind in Image.OPEN and kind not in NO_PICTURES)


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files as they are named, pictures of folders, and what patterns match."""
    found: list[Path] = []
    for pattern in patterns:
        path, rest = Path(pattern), ""
        if not pattern.strip():  # as of a variable of the shell that is not set; Path takes it for this folder
            raise InputError("--img: an empty name; name pictures, or . for this folder's")
        if path.is_file():
            paths = [path]
        elif path.is_dir():
            paths, rest = pictures_of(path)
        elif path.exists() or pattern == "-":
            raise InputError(f"--img {pattern}: a pipe, and a picture is read more than once; save it, and name the "
                             "file")
        else:
            paths = [Path(each) for each in sorted(glob.glob(pattern, recursive=True)) if Path(each).is_file()]
            rest = "" if paths else there_instead(path)
        if not paths:
            raise InputError(f"--img {pattern}: no picture there{rest}")
        if rest:
            print(printable(f"--img {pattern}: {len(paths)} pictures{rest}"), file=sys.stderr)
        found += paths
    return list(dict.fromkeys(found))


def pictures_of(folder: Path) -> tuple[list[Path], str]:
    """A folder's pictures, known by their endings, and what to say of the rest."""
    paths, rest = [], Counter()
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("."):  # "._photo.jpg" too, in which macOS keeps what it knows of photo.jpg
            rest["hidden"] += 1
        elif not path.is_file():
            rest["folders" if path.is_dir() else "dead links"] += 1
        elif suffix not in picture_suffixes():
            rest[suffix or "without an ending"] += 1
        else:
            paths.append(path)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(rest.items()))
    return paths, f"; passed over: {counts}; name files to have them read all the same" if rest else ""


def check_paths(paths: Sequence[Path], image_folder: Path, source: str) -> None:
    """All pictures must exist, and their names must stay in the folder, as a stranger's file may name any other that
    the user may read. Links are followed: what is in the folder its owner has put there."""
    missing = [path for path in paths if is_too_long(path) or not path.is_file()]
    if missing:
        names = ", ".join(f"{path}{there_instead(path)}" for path in missing[:5])
        raise InputError(f"{len(missing)} of {len(paths)} pictures are missing: {names}"
                         f"{', ...' if len(missing) > 5 else ''}. Looked under {image_folder}; say where they are with "
                         "--image_folder")
    root, resolved = image_folder.resolve(), cache(Path.resolve)
    for path in paths:
        folder = image_folder.absolute() if path.is_absolute() else image_folder
        inside = path.is_relative_to(folder)
        if ".." in (path.relative_to(folder) if inside else path).parts:
            raise InputError(f"{path} leads to {path.resolve()} by way of '..'; names in {source} begin in "
                             f"--image_folder {image_folder} and stay there: write them without")
        known = inside or path.resolve().is_relative_to(root) or any(resolved(each) == root for each in path.parents)
        if not known:
            raise InputError(f"{path} leads to {path.resolve()}, outside {image_folder}; if that is meant, name a "
                             "folder that holds all pictures with --image_folder")


def there_instead(path: Path) -> str:
    """What to say after the name of a missing picture: a link to nothing, or the same spelled otherwise."""
    if is_too_long(path):
        return " (longer than a file's name can be)"
    if (encoding := sys.getfilesystemencoding()) != "utf-8" and not str(path).isascii():
        return f" (names of files are taken to be in {encoding}; if they are in UTF-8, set PYTHONUTF8=1)"
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            return f" ({link} is a link to {link.readlink()}, which is not there)"
    found = Path(path.anchor)
    for part in str(path.relative_to(path.anchor)).replace("\\", "/").split("/"):
        if not (found / part).exists():
            try:
                part = next(each.name for each in found.iterdir() if spelling(each.name) == spelling(part))
            except (OSError, StopIteration):  # it cannot be looked into, or has nothing of the kind
                return ""
        found /= part
    if found == path:  # a folder
        return ""
    same = unicodedata.normalize("NFC", str(path)) == unicodedata.normalize("NFC", str(found))
    return f" (there is {found}{', its accents in another form of Unicode' if same else ''}: name both alike)"


def is_too_long(path: Path) -> bool:
    """Whether no file can be called so; as where a caption stands in a name's place."""
    return any(len(part.encode("utf-8", "replace")) > 255 for part in path.parts)


def spelling(name: str) -> str:
    """What is equal of names that differ only in upper and lower case and in the form of their accents."""
    return unicodedata.normalize("NFC", name).casefold()


def counted(paths: Sequence[Path | str], what: str) -> str:
    """"3 pictures WHAT: " and their names, of many the first ones."""
    return (f"{len(paths)} picture{'s' * (len(paths) > 1)} {what}: {', '.join(map(str, paths[:5]))}"
            f"{', ...' * (len(paths) > 5)}")


def unreadable_error(unreadable: Sequence[tuple[Path, InputError]], others_exist: bool) -> InputError:
    """What to say of pictures that `read_image` refused: all of the first, the names of a few more, and the flag that
    leaves them out where others exist."""
    (_, first), *more = unreadable
    names = f" (and {len(more)} more: {', '.join(str(path) for path, _ in more[:5])}{', ...' * (len(more) > 5)})"
    flag = "; --skip_unreadable leaves out what cannot be read"
    return InputError(f"{first}{names if more else ''}{flag if others_exist else ''}")


def is_one_colour(pixels: np.ndarray) -> bool:
    """Whether a picture (3, 256, 256) is of one colour, or nearly so: nothing is to be seen in it.

    Within a sixteenth of the range is, for instance, what Pillow leaves of 12 bits stored as 16 in each of three
    channels.
    """
    return int(np.ptp(pixels, axis=(1, 2)).max()) < 16


def check_pixels(images: Sequence[np.ndarray], where: str) -> None:
    """Stops where pictures are nearly black or nearly constant, before days are spent on them.

    The commonest cause: floats from 0 to 1 (as scikit-image's resize gives) stored as bytes, which makes them 0 or 1.
    """
    sample = [np.asarray(images[i]) for i in np.linspace(0, len(images) - 1, min(len(images), 64)).astype(int)]
    spread = float(np.median([picture.std() for picture in sample]))
    mean = float(np.mean([picture.mean() for picture in sample]))
    if mean < 4 or spread < 4:
        raise InputError(f"{where}: the pictures are nearly black or constant (mean {mean:.2f}, spread {spread:.2f} of "
                         "255; photographs have about 115 and 60). Were floats from 0 to 1 stored as bytes? Mend "
                         "them and make the files again with create_input_files.py --overwrite")
