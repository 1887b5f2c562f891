"""Picture files to one array of pixels in an HDF5 file, by several workers at once."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from datasets import IMAGE_SIZE, read_image
from safety.errors import InputError, printable
from safety.files import naming_write_errors
from safety.hdf5 import open_hdf5
from safety.loader import Loader
from safety.pictures import check_pixels, counted, is_one_colour, unreadable_error
from utils import progress_bar


class PixelWriter(Dataset):
    """Item i is a job: picture i goes to its place in the file. A worker returns the error, or whether the picture
    is of one colour.

    Speed: each worker writes its own pictures, as one process that wrote for all would hold them up.
    """

    def __init__(self, archive: Path, offset: int, paths: Sequence[Path]) -> None:
        self.archive, self.offset, self.paths = archive, offset, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> InputError | OSError | bool:
        try:
            pixels = read_image(self.paths[i])
            with open(self.archive, "r+b") as file:
                file.seek(self.offset + i * pixels.size)
                file.write(pixels.tobytes())
        except (InputError, OSError) as error:  # raised here, it would arrive as a worker's whole traceback
            return error
        return is_one_colour(pixels)


def write_images(archive: Path, split: str, paths: Sequence[Path], image_ids: Sequence[int], attributes: dict[str, Any],
                 workers: int, skip_unreadable: bool = False) -> set[Path]:
    """Writes `images`, (I, 3, 256, 256) uint8, and `image_ids`, (I,); refuses pictures that are damaged or blank.

    Returns:
        Pictures that could not be read; they are left out, if that is wanted and others remain.
    """
    with naming_write_errors(archive), open(archive, "wb") as file:
        file.truncate(len(paths) * (3 * IMAGE_SIZE ** 2 + 8) + 10_000)  # where that fails, HDF5 would crash
    with naming_write_errors(archive), open_hdf5(archive, "w") as file:
        file.attrs.update(attributes)
        file["image_ids"] = np.array(image_ids, dtype=np.int64)
        images = file.create_dataset("images", (len(paths), 3, IMAGE_SIZE, IMAGE_SIZE), dtype="uint8")
        if not paths:
            return set()
        images[0] = 0  # with the first write HDF5 sets aside one block of the file for all pixels
        writer = PixelWriter(archive, images.id.get_offset(), paths)
    # A DataLoader reads but little ahead, and ends at a bad picture or Ctrl-C, where multiprocessing's pool may hang.
    loader = Loader(writer, batch_size=16, collate_fn=list, num_workers=workers)
    results: list[InputError | OSError | bool] = []
    with progress_bar(None, split, "picture", total=len(paths)) as bar:
        for batch in loader:
            results += batch
            bar.update(len(batch))
            for result in batch:
                if isinstance(result, OSError):
                    with naming_write_errors(archive):
                        raise result
    unreadable = {path: result for path, result in zip(paths, results, strict=True) if isinstance(result, InputError)}
    if unreadable:
        kept = [i for i, path in enumerate(paths) if path not in unreadable]
        if not (skip_unreadable and kept):
            raise unreadable_error(list(unreadable.items()), others_exist=bool(kept))
        print(printable(f"{split}: {counted(list(unreadable), 'left out, which cannot be read')}"))
        write_images(archive, split, [paths[i] for i in kept], [image_ids[i] for i in kept], attributes, workers)
        return set(unreadable)
    with open_hdf5(archive) as file:
        check_pixels(file["images"], f"{split} ({paths[0]}, ...)")
    if blank := [path for path, result in zip(paths, results, strict=True) if result]:
        print(printable(f"{split}: {counted(blank, 'of one colour; look at them')}"))
    return set()
