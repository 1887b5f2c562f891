"""Pictures and captions: one picture file to pixels, and the prepared data set to batches.

    dataset = CaptionDataset("data", "coco_5_cap_per_img_5_min_word_freq", "TRAIN")
    image, caption, length = dataset[0]      # (3, 256, 256) uint8, (L,) int64, (1,) int64

Pixels stay bytes until they are on the device that needs them: `normalize` makes floats of a whole batch there.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from safety.checkpoints import check_word_map
from safety.errors import InputError, UsageError, reason
from safety.signals import ignore_signals
from utils import World

IMAGE_SIZE = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, which every encoder was trained with
PREPROCESSING = {"image_size": IMAGE_SIZE, "mean": list(MEAN), "std": list(STD)}  # what a checkpoint records
DATA_HINT = """Two commands make and use a data set, once its pictures and Karpathy's dataset_coco.json are here:
  python create_input_files.py --dataset coco --karpathy_json_path dataset_coco.json --image_folder .
  python train.py"""


def open_image(image: str | Path | Image.Image) -> AbstractContextManager[Image.Image]:
    """A picture file, opened for a while; or a picture that Pillow opened already, which stays open."""
    return nullcontext(image) if isinstance(image, Image.Image) else Image.open(image)


def read_image(path: str | Path | Image.Image) -> np.ndarray:
    """A picture file, or a picture, to pixels (3, 256, 256), uint8, RGB: the one way into every script.

    Any mode that Pillow reads: turned as its EXIF data say, 16 bits brought to 8, transparent parts on white, of an
    animation the first frame. Resized, without keeping the aspect ratio, by Pillow's bilinear filter.

    Raises:
        InputError: the file is no picture, or is damaged.
    """
    try:
        with open_image(path) as picture:
            picture = to_rgb(picture).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
            return np.array(picture).transpose(2, 0, 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such picture") from error
    except Exception as error:  # a damaged picture can fail in any way
        raise InputError(f"{path}: this picture cannot be read ({reason(error)}); replace it, or leave it "
                         "out") from error


def all_unreadable(unreadable: Sequence[tuple[Path, InputError]]) -> InputError:
    """What to say of several pictures that `read_image` refused: all of the first, and the names of a few more."""
    (_, first), *others = unreadable
    names = ", ".join(str(path) for path, _ in others[:5])
    return InputError(f"{first} (and {len(others)} more: {names}{', ...' if others[5:] else ''})" if others else
                      str(first))


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, upright."""
    if picture.format == "EPS":
        raise ValueError("EPS is a program for PostScript, and is not run")  # Pillow would call Ghostscript
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits a pixel, in Pillow's modes I;16 and I
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def normalize(images: Tensor, device: torch.device) -> Tensor:
    """Bytes (N, 3, H, W) to the floats that encoders expect, on the device."""
    images = images.to(device, non_blocking=True).float().div_(255)
    # Made on the device: a copy to it would wait for all that it still has to do.
    mean, std = (torch.stack([images.new_full((1, 1), value) for value in values]) for values in (MEAN, STD))
    return images.sub_(mean).div_(std)


def augment(images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) uint8, changed at random so that no epoch sees the same.

    Half of them are mirrored; of each a part, 50 to 100 % of it, is enlarged again; brightness and contrast change by
    up to 30 %, saturation by up to 20 %, and hue not at all: captions name colours.
    """
    from torchvision.transforms.v2 import ColorJitter, Compose, RandomHorizontalFlip, RandomResizedCrop  # slow
    change = Compose([RandomHorizontalFlip(), RandomResizedCrop(images.shape[-2:], scale=(0.5, 1), ratio=(0.9, 1.1)),
                      ColorJitter(brightness=0.3, contrast=0.3, saturation=0.2)])
    return torch.stack([change(image) for image in images])


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


def load_word_map(data_folder: str | Path, data_name: str) -> dict[str, int]:
    """The vocabulary, word to index.

    Raises:
        InputError: no prepared data in the folder (the message says how to make them), or a damaged word map.
    """
    if Path(data_name).name != data_name:
        raise UsageError(f"--data_name {data_name}: a name, not a path; say where it is with --data_folder")
    path = Path(data_folder) / f"WORDMAP_{data_name}.json"
    if not path.is_file():
        found = sorted(each.name[len("WORDMAP_"):-len(".json")] for each in Path(data_folder).glob("WORDMAP_*.json"))
        hint = f"There is: --data_name {' or '.join(found)}" if found else DATA_HINT
        raise InputError(f"no data set {data_name} in {data_folder} (--data_folder, --data_name). {hint}")
    return read_word_map(path)


def read_word_map(path: str | Path) -> dict[str, int]:
    """A word map from its file."""
    word_map = read_json(path)
    check_word_map(word_map, path)
    return word_map


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without Windows' byte order mark
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; make it with create_input_files.py") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file ({reason(error)}); get or make it again") from error


def reverse(word_map: dict[str, int]) -> dict[int, str]:
    return {index: word for word, index in word_map.items()}


def words_of(sequence: Sequence[int], rev_word_map: dict[int, str]) -> list[str]:
    """The words of a caption, without <start>, <end> and <pad>."""
    words = [rev_word_map[index] for index in sequence]
    return [word for word in words if word not in {"<start>", "<end>", "<pad>"}]


def own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """What the file itself holds under this name: HDF5 can also point into any other file that the user may read."""
    own = isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Dataset)
    if not own or file[name].external or file[name].is_virtual:
        raise ValueError(f"its {name} are not in the file itself")
    return file[name]


class CaptionDataset(Dataset):
    """The captions of a split with their pictures, caption by caption.

    Args:
        data_folder, data_name: where create_input_files.py put the files, and their base name.
        split: "TRAIN", "VAL" or "TEST".
        transform: applied to the picture, (3, 256, 256) uint8.

    Raises:
        InputError: a file is missing, or the files do not belong together.
    """

    def __init__(self, data_folder: str | Path, data_name: str, split: str,
                 transform: Callable[[Tensor], Tensor] | None = None) -> None:
        if split not in {"TRAIN", "VAL", "TEST"}:
            raise InputError(f"no split {split}; there are TRAIN, VAL and TEST")
        folder = Path(data_folder)
        self.split, self.transform = split, transform
        self.path = folder / f"{split}_IMAGES_{data_name}.hdf5"
        references = folder / f"{split}_REFERENCES_{data_name}.json"
        self.references_path = references if references.is_file() else None
        self.features: Sequence[Tensor] | None = None  # instead of the pictures, see training/features.py
        self._open: tuple[int, Any] | None = None  # (process, pictures)
        n_words = len(load_word_map(folder, data_name))
        captions = read_json(folder / f"{split}_CAPTIONS_{data_name}.json")
        lengths = read_json(folder / f"{split}_CAPLENS_{data_name}.json")
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; make it with create_input_files.py")
        try:
            self.captions = np.array(captions, dtype=np.int32).reshape(len(captions), -1 if captions else 0)
            self.caplens = np.array(lengths, dtype=np.int32).reshape(len(lengths))    # (captions,)
            with h5py.File(self.path, "r") as file:
                self.cpi = int(file.attrs["captions_per_image"])
                self.n_images, *shape = (images := own_dataset(file, "images")).shape
                pixels = f"{images.dtype} {tuple(shape)}"
                ids = own_dataset(file, "image_ids") if "image_ids" in file else np.arange(len(captions) // self.cpi)
                fitting_ids = ids.shape == (self.n_images,) and ids.dtype.kind in "iu"
                self.image_ids = ids[:].tolist() if fitting_ids else []
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another program is writing it; try again when it is done") from error
        except (OSError, KeyError, ValueError, TypeError, ArithmeticError) as error:
            raise InputError(f"{self.path}, or the captions beside it, cannot be read ({reason(error)}); make them "
                             "again with create_input_files.py --overwrite") from error
        lowest, highest = int(self.captions.min(initial=0)), int(self.captions.max(initial=0))
        if (pixels != f"uint8 {(3, IMAGE_SIZE, IMAGE_SIZE)}" or lowest < 0 or highest >= n_words or not fitting_ids
                or not self.n_images * self.cpi == len(captions) == len(lengths) or self.caplens.min(initial=2) < 2
                or np.any((self.captions > 0).sum(-1) != self.caplens)):  # <pad> is 0
            raise InputError(f"{self.path} holds {self.n_images} pictures, {pixels}, {self.cpi} captions each; beside "
                             f"it are {len(captions)} captions of words from {lowest} to {highest}, {len(lengths)} "
                             f"lengths and {n_words} words. They do not belong together; make them again with "
                             "create_input_files.py --overwrite")
        if n_words <= np.iinfo(np.int16).max:
            self.captions = self.captions.astype(np.int16)

    @property
    def images(self) -> Any:
        """All pictures, (I, 3, 256, 256) uint8, indexed like an array but read when asked for.

        An HDF5 handle must not cross into another process, so each process maps the file when it first needs it. The
        block of pixels is contiguous, and a memory map reads it without HDF5's lock and bookkeeping.
        """
        if self._open is None or self._open[0] != os.getpid():
            try:
                with h5py.File(self.path, "r") as file:
                    offset, shape = file["images"].id.get_offset(), file["images"].shape
                pictures = (np.memmap(self.path, np.uint8, "r", offset, shape) if offset is not None
                            else h5py.File(self.path, "r")["images"])  # somebody stored them in chunks
            except OSError as error:
                raise InputError(f"{self.path} cannot be read any more ({error}); bring it back, and go on from the "
                                 "last checkpoint") from error
            self._open = (os.getpid(), pictures)
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def __len__(self) -> int:
        return len(self.captions)

    def picture(self, i: int) -> Tensor:
        """Picture (3, 256, 256) uint8; or its features (h, w, C), where they are kept."""
        if self.features is None:
            image = torch.from_numpy(np.array(self.images[i]))
            return image if self.transform is None else self.transform(image)
        return self.features[i]

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        """Picture (3, 256, 256) uint8, caption (L,) and length (1,); for VAL and TEST all its captions (5, L) too."""
        image = self.picture(i // self.cpi)
        caption, length = torch.from_numpy(self.captions[i]).long(), torch.tensor([int(self.caplens[i])])
        if self.split == "TRAIN":
            return image, caption, length
        first = i // self.cpi * self.cpi
        return image, caption, length, torch.from_numpy(self.captions[first:first + self.cpi]).long()

    def references(self, word_map: dict[str, int]) -> list[list[list[str]]]:
        """For each picture all that people wrote of it, as words.

        Folders made by the original tutorial hold only encoded captions; the words that are <unk> there become one
        that no caption can match.
        """
        if self.references_path:
            references = read_json(self.references_path)
            try:
                words = all(type(word) is str for picture in references for caption in picture for word in caption)
                fitting = words and len(references) == self.n_images and all(references)
            except TypeError:
                fitting = False
            if not fitting:
                count = len(references) if isinstance(references, list) else "no"
                raise InputError(f"{self.references_path} is of {count} pictures, or of other than words; {self.path} "
                                 f"holds {self.n_images}; make them again with create_input_files.py --overwrite")
            return references
        words = reverse(word_map) | {word_map["<unk>"]: "<unknown>"}
        sentences = [words_of(caption, words) for caption in self.captions.tolist()]
        return [sentences[i:i + self.cpi] for i in range(0, len(sentences), self.cpi)]


class Pictures(Dataset):
    """The pictures of a split, each once with all its captions: picture, captions (5, L), lengths (5,)."""

    def __init__(self, dataset: CaptionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.n_images

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        own = slice(i * self.dataset.cpi, (i + 1) * self.dataset.cpi)
        captions = torch.from_numpy(self.dataset.captions[own]).long()
        lengths = torch.from_numpy(self.dataset.caplens[own]).long()
        return self.dataset.picture(i), captions, lengths


class EpochSampler(Sampler[list[int]]):
    """Batches of an epoch in an order that depends on seed and epoch alone, so that a run can be taken up anywhere.

    A batch of all processes together is `batch_size * world_size` items, dealt to them like cards. The epoch's last
    batch may have fewer items than there are processes: then the others get one whose loss must not count.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.batch_size = batch_size * world_size
        self.steps = -(-length // self.batch_size)
        self.epoch, self.first_step = 0, 0

    def counts(self, step: int) -> bool:
        """Whether this process's share of a step is its own, and not a stopgap at the epoch's end."""
        return self.rank < self.length - step * self.batch_size

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        for step in range(self.first_step, self.steps):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            yield (batch[self.rank::self.world_size] if self.counts(step) else batch[:1]).tolist()


def image_loader(dataset: CaptionDataset, batch_size: int, workers: int, world: World) -> DataLoader:
    """Batches of pictures, each once, of this process's share: every world_size-th picture from the rank-th on."""
    share = torch.utils.data.Subset(Pictures(dataset), range(world.rank, dataset.n_images, world.size))
    return DataLoader(share, batch_size, num_workers=workers, worker_init_fn=ignore_signals,
                      pin_memory=world.device.type == "cuda")


def encode(encoder: nn.Module, pictures: Tensor, device: torch.device) -> Tensor:
    """Features (N, h, w, C) of pictures (N, 3, 256, 256), unless they are features already."""
    if pictures.dtype == torch.uint8:
        return encoder.grid(normalize(pictures, device))
    return pictures.to(device, non_blocking=True)
