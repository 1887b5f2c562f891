"""The features of a frozen encoder, computed once and kept beside the pictures (train.py --cache_features)."""
from __future__ import annotations

import glob
import hashlib
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from caption import Captioner
from datasets import CaptionDataset, Pictures, encode
from encoders.trunk import IMAGENET
from safety.errors import InputError
from safety.files import lock, naming_write_errors, replace_open, sync
from safety.loader import Loader
from utils import PRECISIONS, autocast, progress_bar

FEATURES_AT_ONCE = 32  # pictures encoded between two writes


class Features:
    """The features of all pictures of a split, (h, w, C) each, in a file that is read through a memory map if possible.

    Where a GPU has the room, they are copied into its memory: then an item is a picture's number, for `look_up`.
    """

    def __init__(self, path: Path, n_images: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, (n_images, *shape), dtype
        self.n_bytes = math.prod(self.shape) * dtype.itemsize
        self._read: Callable[[int], np.ndarray] | None = None
        self.on_device: Tensor | None = None  # all of them (I, h, w, C)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> Tensor:
        return self.read(i) if self.on_device is None else torch.tensor(i)

    def look_up(self, items: Tensor) -> Tensor:
        """The features (N, h, w, C) of a batch of items."""
        if self.on_device is None:
            return items
        return self.on_device[items.to(self.on_device.device, non_blocking=True)]

    def copy_to(self, device: torch.device) -> None:
        """Into the memory of a GPU, if they take less than half of what is free there."""
        if device.type == "cuda" and self.n_bytes < torch.cuda.mem_get_info(device)[0] / 2:
            rows = torch.empty(self.shape, dtype=self.dtype, device=device)
            for i, row in enumerate(rows):
                row.copy_(self.read(i))
            self.on_device = rows

    def read(self, i: int) -> Tensor:
        try:
            self._read = self._read or self._reader()
            return torch.from_numpy(self._read(i)).view(self.dtype).view(self.shape[1:])
        except OSError as error:
            raise InputError(f"{self.path} cannot be read any more ({error}); resume from the last checkpoint, "
                             "which makes it again if it is gone") from error

    def _reader(self) -> Callable[[int], np.ndarray]:
        """What reads the bytes of picture i."""
        if self.path.stat().st_size < self.n_bytes:
            raise InputError(f"{self.path} is damaged, it is too short; delete it, and resume from the last "
                             "checkpoint, which makes it again")
        size = self.n_bytes // len(self)
        try:  # read-only: Linux refuses a writable map that is larger than its memory
            mapped = np.memmap(self.path, np.uint8, "r", shape=(len(self), size))
            return lambda i: np.array(mapped[i])
        except OSError:  # a file system without memory maps
            return lambda i: np.fromfile(self.path, np.uint8, size, offset=i * size)

    def __getstate__(self) -> dict[str, Any]:
        numbers = None if self.on_device is None else torch.empty(0)
        return {**self.__dict__, "_read": None, "on_device": numbers}  # a worker maps the file itself, or gives numbers


def keep_features(dataset: CaptionDataset, model: Captioner, workers: int, show: bool = True) -> None:
    """Encodes each picture once, into a file beside the pictures; from then on the data set gives these features.

    A frozen encoder gives the same features every epoch. They are kept in the run's own precision, so that nothing
    that is computed from them changes. The file's name holds a hash of the encoder, the precision and the pictures'
    file (not of the device); an unfinished file is continued. Of several processes on a machine the first encodes, and
    the others wait for the file.

    Raises:
        InputError: too little space on the disk.
    """
    shape = encode_batch(model, dataset.picture(0).unsqueeze(0)).shape[1:]
    dtype = PRECISIONS[model.precision]
    file, expected = dataset.path.stat(), getattr(model.encoder, "pixels", IMAGENET)
    pooled = "" if getattr(model.decoder, "map_size", None) else " pooled"  # see `datasets.encode`
    digest = hashlib.sha256(repr((str(model.encoder) + pooled, expected.described(), dtype, file.st_size,
                                  file.st_mtime_ns)).encode())
    for tensor in model.encoder.state_dict().values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    name = dataset.path.stem.replace("_IMAGES_", "_FEATURES_")
    path = dataset.path.with_name(f"{name}_{digest.hexdigest()[:16]}.bin")
    others = [each for each in path.parent.glob(f"*{glob.escape(name)}_*") if path.name not in each.name]
    if others and show:  # not deleted: another run may be using them
        print(f"features of other encoders, precisions or pictures take {sum(each.stat().st_size for each in others):,}"
              f" bytes; delete what no run needs: {' '.join(map(str, others))}")
    features = Features(path, dataset.n_images, shape, dtype)
    if os.environ.get("LOCAL_RANK", "0") == "0" and not path.is_file():
        _write_features(features, dataset, model, workers, show)
    while not path.is_file():
        time.sleep(0.2)
    features.copy_to(next(model.decoder.parameters()).device)
    dataset.features = features


@torch.inference_mode()
def encode_batch(model: Captioner, images: Tensor) -> Tensor:
    """Bytes (N, 3, 256, 256) to features (N, h, w, C)."""
    device = next(model.decoder.parameters()).device
    with autocast(device, model.precision):
        return encode(model.encoder, model.decoder, images, device)


def _write_features(features: Features, dataset: CaptionDataset, model: Captioner, workers: int, show: bool) -> None:
    partial = features.path.with_name(f".{features.path.name}.{platform.node()}.part")
    size = features.n_bytes // len(features)
    done = partial.stat().st_size // size if partial.is_file() else 0
    free = shutil.disk_usage(partial.parent).free
    if features.n_bytes - done * size > free:
        raise InputError(f"the features of {dataset.path} need {features.n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                         f"are free in {partial.parent}; make room, or leave out --cache_features")
    with naming_write_errors(partial):
        file = open(partial, "ab")
    with file:
        lock(file)  # waits while another run on this machine writes it
        if features.path.is_file():
            return  # that run wrote it all
        done = file.tell() // size // FEATURES_AT_ONCE * FEATURES_AT_ONCE  # batches as in one go, for the same bits
        file.truncate(done * size)
        rest = Subset(Pictures(dataset), range(done, dataset.n_images))
        bar = progress_bar(None, f"features, {dataset.split}", "picture", show, total=dataset.n_images, initial=done)
        for pictures, *_ in Loader(rest, FEATURES_AT_ONCE, num_workers=workers):
            rows = encode_batch(model, pictures)
            with naming_write_errors(partial):
                file.write(rows.to(features.dtype).cpu().contiguous().view(torch.uint8).numpy())
                file.flush()
                sync(file)  # what the file's length promises is on the disk
            bar.update(len(pictures))
        bar.close()
        replace_open(file, features.path)
