"""HDF5 files of strangers, in several processes, and on file systems without locks or memory maps."""
from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from safety.errors import InputError


def open_hdf5(path: Path, mode: str = "r") -> h5py.File:
    """Opens a file under HDF5's lock; without it, where the file system has none.

    Raises:
        BlockingIOError: another program is writing it.
        OSError: with an errno the system refused it, without one it is damaged.
    """
    try:
        return h5py.File(path, mode)
    except BlockingIOError:
        raise
    except OSError:  # whatever the file system says of locks; another reason is there again
        return h5py.File(path, mode, locking=False)


def own_array(file: h5py.File, name: str) -> h5py.Dataset:
    """What the file itself holds under this name: HDF5 can also point into any other file that the user may read."""
    own = isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Dataset)
    if not own or file[name].external or file[name].is_virtual:
        raise ValueError(f"its {name} are not in the file itself")
    return file[name]


def own_ids(file: h5py.File, n_images: int, n_numbered: int) -> list[int] | None:
    """The pictures' ids, in the original tutorial's files their numbers; None if there is not one for each picture."""
    ids = own_array(file, "image_ids") if "image_ids" in file else np.arange(n_numbered)
    return ids[:].tolist() if ids.shape == (n_images,) and ids.dtype.kind in "iu" else None


def open_array(path: Path, name: str) -> Any:
    """Opens an array for reading: without HDF5's lock and bookkeeping, where it is one block of the file.

    What it gives must not cross into another process.
    """
    try:
        with open_hdf5(path) as file:
            offset, shape, dtype = file[name].id.get_offset(), file[name].shape, file[name].dtype
        if offset is not None:  # else somebody stored it in chunks
            with suppress(OSError):  # a file system without memory maps
                return np.memmap(path, dtype, "r", offset, shape)
        return open_hdf5(path)[name]
    except OSError as error:
        raise InputError(f"{path} cannot be read any more ({error}); bring it back, and resume from the last "
                         "checkpoint") from error
