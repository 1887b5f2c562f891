"""What to say of pictures that cannot be read, or that are no pictures any more."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from safety.errors import InputError


def counted(paths: Sequence[Path], what: str) -> str:
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
