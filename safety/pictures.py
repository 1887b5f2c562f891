"""What to say of pictures that cannot be read, or that are no pictures any more."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from safety.errors import InputError


def unreadable_error(unreadable: Sequence[tuple[Path, InputError]]) -> InputError:
    """What to say of several pictures that `read_image` refused: all of the first, and the names of a few more."""
    (_, first), *others = unreadable
    names = ", ".join(str(path) for path, _ in others[:5])
    return InputError(f"{first} (and {len(others)} more: {names}{', ...' if others[5:] else ''})" if others else
                      str(first))


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
