"""Picture files to one array of pixels in an HDF5 file, by several workers at once."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from datasets import IMAGE_SIZE, read_image
from safety.errors import InputError
from safety.files import naming_write_errors
from safety.hdf5 import open_hdf5
from safety.pictures import check_pixels, unreadable_error
from safety.signals import ignore_signals
from utils import progress_bar


class PixelWriter(Dataset):
    """Item i is a job: picture i goes to its place in the file. A worker gives back the error, or None.

    Speed: each worker writes its own pictures, as one process that wrote for all would hold them up.
    """

    def __init__(self, archive: Path, offset: int, paths: Sequence[Path]) -> None:
        self.archive, self.offset, self.paths = archive, offset, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> InputError | OSError | None:
        try:
            pixels = read_image(self.paths[i])
            with open(self.archive, "r+b") as file:
                file.seek(self.offset + i * pixels.size)
                file.write(pixels.tobytes())
        except (InputError, OSError) as error:  # raised here, it would arrive as a worker's whole traceback
            return error
        return None


def write_images(archive: Path, split: str, paths: Sequence[Path], image_ids: Sequence[int],
                 attributes: dict[str, Any], workers: int) -> None:
    """Writes `images`, (I, 3, 256, 256) uint8, and `image_ids`, (I,); refuses pictures that are damaged or blank."""
    with naming_write_errors(archive), open_hdf5(archive, "w") as file:
        file.attrs.update(attributes)
        file["image_ids"] = np.array(image_ids, dtype=np.int64)
        images = file.create_dataset("images", (len(paths), 3, IMAGE_SIZE, IMAGE_SIZE), dtype="uint8")
        if not paths:
            return
        images[0] = 0  # with the first write HDF5 sets aside one block of the file for all pixels
        writer = PixelWriter(archive, images.id.get_offset(), paths)
    # A DataLoader reads but little ahead, and ends at a bad picture or Ctrl-C, where multiprocessing's pool may hang.
    loader = DataLoader(writer, batch_size=16, collate_fn=list, num_workers=workers, worker_init_fn=ignore_signals)
    errors: list[InputError | OSError | None] = []
    with progress_bar(None, split, "picture", total=len(paths)) as bar:
        for batch in loader:
            errors += batch
            bar.update(len(batch))
            for error in batch:
                if isinstance(error, OSError):
                    with naming_write_errors(archive):
                        raise error
    if any(errors):
        raise unreadable_error([(path, error) for path, error in zip(paths, errors, strict=True) if error])
    with open_hdf5(archive) as file:
        check_pixels(file["images"], f"{split} ({paths[0]}, ...)")
