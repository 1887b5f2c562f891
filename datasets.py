"""Pictures and captions: one picture file to pixels, and the prepared data set to batches.

    dataset = CaptionDataset("data", "coco_5_cap_per_img_5_min_word_freq", "TRAIN")
    image, caption, length = dataset[0]      # (3, 256, 256) uint8, (L,) int64, (1,) int64

Pixels stay bytes until they are on the device that needs them: `normalize` makes floats of a whole batch there.
"""
from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, Subset

from encoders.trunk import IMAGENET, Pixels
from safety.checkpoints import check_word_map
from safety.errors import InputError, UsageError, reason
from safety.hdf5 import open_array, open_hdf5, own_array, own_ids
from safety.loader import Loader
from safety.metadata import without_metadata, without_warnings
from safety.modes import to_rgb
from safety.pictures import there_instead
from safety.words import RULE, check_vocabulary, is_caption
from utils import World  # rank, size (how many processes) and device

IMAGE_SIZE = 256
COLOUR_CHANGES = (0.3, 0.3, 0.2)  # most that `augment` changes brightness, contrast and saturation
DATA_HINT = """Two commands make and use a data set, once its pictures and Karpathy's dataset_coco.json are here:
  python create_input_files.py --dataset coco --captions dataset_coco.json --image_folder .
  python train.py"""


AnyPicture = str | Path | Image.Image | np.ndarray | Tensor  # a file; Pillow's; (H, W, 3) uint8; (3, H, W) uint8


def open_image(image: AnyPicture) -> AbstractContextManager[Image.Image]:
    """A picture file, opened for a while; or a picture that is in memory already, which stays there."""
    if isinstance(image, (str, Path)):
        return Image.open(image)
    if isinstance(image, Image.Image):
        return nullcontext(image)
    pixels = image.movedim(0, -1).cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.dtype != np.uint8:
        raise TypeError(f"its numbers are {pixels.dtype}, and not uint8, 0 to 255")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise TypeError(f"its shape is {tuple(image.shape)}, and not (H, W, 3) of an array or (3, H, W) of a tensor")
    return nullcontext(Image.fromarray(pixels))


def read_image(path: AnyPicture) -> np.ndarray:
    """A picture file, or a picture, to pixels (3, 256, 256), uint8, RGB: the one way into every script.

    Any mode that Pillow reads: turned as its EXIF data say, deeper ones brought to 8 bits, transparent parts on white,
    of an animation the first frame. Resized, without keeping the aspect ratio, by Pillow's bilinear filter.

    Raises:
        InputError: the file is no picture, or is damaged.
    """
    try:
        picture = read_rgb(path).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        return np.array(picture).transpose(2, 0, 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such picture{there_instead(Path(path))}") from error
    except Exception as error:  # a damaged picture can fail in any way
        name = path if isinstance(path, (str, Path)) else f"a picture given as {type(path).__name__}"
        raise InputError(f"{name}: this picture cannot be read ({reason(error)}); replace it, or leave it "
                         "out") from error


def read_rgb(image: AnyPicture) -> Image.Image:
    """A picture as RGB, upright. Its metadata cannot cost the pixels: where reading fails, it is tried without them."""
    with without_warnings():
        try:
            with open_image(image) as picture:
                return to_rgb(picture)
        except Exception:
            if not isinstance(image, (str, Path)):
                raise
            with suppress(Exception), Image.open(io.BytesIO(without_metadata(image))) as picture:
                return to_rgb(picture)
            raise


def normalize(images: Tensor, device: torch.device, pixels: Pixels = IMAGENET) -> Tensor:
    """Bytes (N, 3, 256, 256) to the floats that an encoder expects, on the device, and of the size that it expects."""
    images = images.to(device, non_blocking=True).float().div_(255)
    if pixels.image_size != IMAGE_SIZE:
        images = F.interpolate(images, [pixels.image_size] * 2, mode="bilinear", antialias=True)
    # (3, 1, 1), made on the device: copying them there would wait for a GPU.
    mean, std = (torch.stack([images.new_full((1, 1), each) for each in values]) for values in pixels[1:])
    return images.sub_(mean).div_(std)


def augment(images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) uint8, changed at random so that no epoch sees the same.

    Half of them are mirrored; of each a part, 50 to 100 % of it, is enlarged again; brightness and contrast change by
    up to 30 %, saturation by up to 20 %, and hue not at all: captions name colours. All are changed at once, which on a
    GPU takes as many operations as one picture would.
    """
    def between(low: float, high: float) -> Tensor:
        return torch.empty(len(images), device=images.device).uniform_(low, high)

    area, aspect = between(0.5, 1), between(-0.1, 0.1).exp()                    # width / height, 0.9 to 1.1
    height, width = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    top, left = between(0, 1) * (1 - height), between(0, 1) * (1 - width)
    pixels = crop(images.float(), top, left, height, width, mirrored=between(0, 1) < 0.5)
    brightness, contrast, saturation = (between(1 - most, 1 + most).view(-1, 1, 1, 1) for most in COLOUR_CHANGES)
    pixels.mul_(brightness).clamp_(0, 255)
    mean = grey(pixels).mean(dim=(2, 3), keepdim=True)                          # (N, 1, 1, 1)
    torch.lerp(mean, pixels, contrast, out=pixels).clamp_(0, 255)
    torch.lerp(grey(pixels), pixels, saturation, out=pixels).clamp_(0, 255)
    return pixels.round_().to(torch.uint8)


def crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, mirrored: Tensor) -> Tensor:
    """A part of each picture (N, 3, H, W), enlarged to its size; where it lies as shares of the picture, (N,) each."""
    zero = torch.zeros_like(top)
    x = torch.where(mirrored, -width, width)
    # From a place in the result to one in the picture, both from -1 to 1.
    transform = torch.stack([x, zero, 2 * left + width - 1, zero, height, 2 * top + height - 1], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)    # (N, H, W, 2)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def grey(images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) to their luminance (N, 1, H, W), after the television standard BT.601."""
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def load_word_map(data_folder: str | Path, data_name: str) -> dict[str, int]:
    """The vocabulary, word to index.

    Raises:
        InputError: no prepared data in the folder (the message says how to make them), or a damaged word map.
    """
    if Path(data_name).name != data_name:
        raise UsageError(f"--data_name {data_name}: a name, not a path; say where it is with --data_folder")
    path = Path(data_folder) / f"WORDMAP_{data_name}.json"
    if not path.is_file():
        found = sorted(other.name[len("WORDMAP_"):-len(".json")] for other in path.parent.glob("WORDMAP_*.json"))
        hint = f"There is: --data_name {' or '.join(found)}" if found else DATA_HINT
        raise InputError(f"no data set {data_name} in {data_folder} (--data_folder, --data_name). {hint}")
    return read_word_map(path)


def read_word_map(path: str | Path) -> dict[str, int]:
    """A word map from its file."""
    word_map = read_json(path)
    check_word_map(word_map, path)
    check_vocabulary(word_map, path)  # not of a checkpoint, which may be older than this rule
    return word_map


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())  # with or without Windows' byte order mark, or in its UTF-16
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


class CaptionDataset(Dataset):
    """The captions of a split with their pictures, caption by caption.

    Args:
        data_folder, data_name: where create_input_files.py put the files, and their base name.
        split: "TRAIN", "VAL" or "TEST".
        transform: applied to the picture, bytes to bytes (3, 256, 256); not used by our scripts.

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
        self.features: Any = None  # with train.py --cache_features training/features.py's, in the pictures' place
        self._opened: dict[int, Any] = {}  # the pictures' file, by process
        n_words = len(load_word_map(folder, data_name))
        captions = read_json(folder / f"{split}_CAPTIONS_{data_name}.json")
        lengths = read_json(folder / f"{split}_CAPLENS_{data_name}.json")
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; make it with create_input_files.py")
        try:
            self.captions = np.array(captions, dtype=np.int32).reshape(len(captions), -1 if captions else 0)
            self.caplens = np.array(lengths, dtype=np.int32).reshape(len(lengths))    # (captions,)
            with open_hdf5(self.path) as file:
                self.cpi = int(file.attrs["captions_per_image"])
                images = own_array(file, "images")  # not by a link of HDF5, which may lead to any other file
                self.n_images = len(images)
                self.image_ids = own_ids(file, len(images), len(captions) // self.cpi)  # or None, if they do not fit
                pixels = f"{images.dtype} {images.shape[1:]}"  # checked, and shown if wrong, by `_misfit`
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another program is writing it; try again when it is done") from error
        except (OSError, KeyError, ValueError, TypeError, ArithmeticError) as error:
            if getattr(error, "errno", None):
                raise  # the system's refusal: it says nothing of what is in the file
            raise InputError(f"{self.path}, or the captions beside it, cannot be read ({reason(error)}); make them "
                             "again with create_input_files.py --overwrite") from error
        if misfit := self._misfit(pixels, n_words):
            raise InputError(f"{self.path} and the captions beside it do not belong together: {misfit}; make them "
                             "again with create_input_files.py --overwrite")
        if n_words <= np.iinfo(np.int16).max:
            self.captions = self.captions.astype(np.int16)  # half the memory

    def _misfit(self, pixels: str, n_words: int) -> str | None:
        """What is wrong with the files, if each of them can be read but they were not made together."""
        if pixels != f"uint8 {(3, IMAGE_SIZE, IMAGE_SIZE)}":
            return f"pictures are {pixels}, not uint8 {(3, IMAGE_SIZE, IMAGE_SIZE)}"
        if not self.n_images * self.cpi == len(self.captions) == len(self.caplens):
            return (f"{self.n_images} pictures of {self.cpi} captions each, but {len(self.captions)} captions and "
                    f"{len(self.caplens)} lengths")
        if self.image_ids is None:
            return f"image_ids are not {self.n_images} whole numbers"
        lowest, highest = int(self.captions.min(initial=0)), int(self.captions.max(initial=0))
        if lowest < 0 or highest >= n_words:
            return f"words from {lowest} to {highest}, but a word map of {n_words}"
        if self.caplens.min(initial=2) < 2 or np.any((self.captions > 0).sum(-1) != self.caplens):  # <pad> is 0
            return "lengths are not those of the captions"
        return None

    @property
    def images(self) -> Any:
        """All I pictures, (I, 3, 256, 256) uint8, indexed like an array but read when asked for.

        An HDF5 handle must not cross into another process, so each process opens the file when it first needs it.
        """
        process = os.getpid()
        if process not in self._opened:
            self._opened = {process: open_array(self.path, "images")}
        return self._opened[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return len(self.captions)

    def picture(self, i: int) -> Tensor:
        """Picture i, (3, 256, 256) uint8; where features are kept, these (h, w, C), or its number for `look_up`."""
        if self.features is not None:
            return self.features[i]
        image = torch.from_numpy(np.array(self.images[i]))
        return image if self.transform is None else self.transform(image)

    def look_up(self, pictures: Tensor) -> Tensor:
        """A batch of what `picture` gave: of numbers (N,) the features (N, h, w, C), and all else as it is."""
        return pictures if self.features is None else self.features.look_up(pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        """Picture (3, 256, 256) uint8, caption (L,) and length (1,): what train.py takes, without --whole_images. Of
        VAL and TEST all captions of the picture (5, L) too, as in the original; our validation takes `Pictures`."""
        image = self.picture(i // self.cpi)
        caption, length = torch.from_numpy(self.captions[i]).long(), torch.tensor([int(self.caplens[i])])
        if self.split == "TRAIN":
            return image, caption, length
        start = i // self.cpi * self.cpi
        return image, caption, length, torch.from_numpy(self.captions[start:start + self.cpi]).long()

    def references(self, word_map: dict[str, int]) -> list[list[list[str]]]:
        """For each picture all that people wrote of it, as words.

        Folders made by the original tutorial hold only encoded captions; the words that are <unk> there become one
        that no caption can match, and captions without a word are left out.
        """
        if self.references_path is None:
            words = reverse(word_map) | {word_map["<unk>"]: "<unknown>"}
            sentences = [words_of(caption, words) for caption in self.captions.tolist()]
            references = [list(filter(None, sentences[i:i + self.cpi])) for i in range(0, len(sentences), self.cpi)]
        else:
            references = read_json(self.references_path)
        if not isinstance(references, list) or len(references) != self.n_images:
            count = len(references) if isinstance(references, list) else "no"
            raise InputError(f"{self.references_path} holds captions of {count} pictures; {self.path} holds "
                             f"{self.n_images}; make them again with create_input_files.py --overwrite")
        for image_id, captions in zip(self.image_ids, references, strict=True):
            if not isinstance(captions, list) or not captions or not all(map(is_caption, captions)):
                raise InputError(f"{self.references_path or self.path}: picture {image_id} has no captions, or "
                                 f"something other than words in them, {captions!r:.200} ({RULE}); make the files "
                                 "again with create_input_files.py --overwrite")
        return references


class Pictures(Dataset):
    """The pictures of a split, each once with all its captions: picture, captions (5, L), lengths (5,). For validation,
    eval.py, and train.py --whole_images."""

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
    """Batches of an epoch in an order that depends on seed and epoch alone, so that a run can resume at any step.

    A step takes `batch_size` items for each rank: rank r gets items r, r + W, r + 2W, ... of the W ranks' batch. The
    epoch's last batch may have fewer items than there are ranks: the others get a dummy item, since gradients are
    averaged over all ranks, and its loss must not count.

    Args:
        lengths: of the items' captions (length,). With them a batch's items are of like length: 50 batches at a time
            are sorted, so that a batch is decoded in few steps, and the batches are then shuffled.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1,
                 lengths: Tensor | None = None) -> None:
        self.length, self.seed, self.rank, self.world_size, self.lengths = length, seed, rank, world_size, lengths
        self.global_batch_size = batch_size * world_size
        self.steps = -(-length // self.global_batch_size)
        self.epoch, self.first_step = 0, 0

    def has_share(self, step: int) -> bool:
        """Whether this rank has items of its own in a step, and not a dummy."""
        return self.rank < self.length - step * self.global_batch_size

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        places = range(self.steps)
        if self.lengths is not None:
            order = torch.cat([part[self.lengths[part].argsort(descending=True, stable=True)]
                               for part in order.split(50 * self.global_batch_size)])
            # The last batch, which may be short, stays the last.
            places = [*torch.randperm(self.steps - 1, generator=generator).tolist(), self.steps - 1]
        batches = order.split(self.global_batch_size)
        for step in range(self.first_step, self.steps):
            batch = batches[places[step]]
            yield (batch[self.rank::self.world_size] if self.has_share(step) else batch[:1]).tolist()


def image_loader(dataset: CaptionDataset, batch_size: int, workers: int, world: World) -> Loader:
    """Batches of this rank's share of the pictures, each once: every world.size-th picture from the rank-th on."""
    share = Subset(Pictures(dataset), range(world.rank, dataset.n_images, world.size))
    return Loader(share, batch_size, **loader_options(workers, world))


def loader_options(workers: int, world: World) -> dict[str, Any]:
    """Of every loader of an epoch: its workers live as long as it does."""
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": world.device.type == "cuda"}


def encode(encoder: nn.Module, decoder: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """What a decoder looks at: bytes (N, 3, 256, 256) to features (N, h, w, C). Features that are cached already stay.

    A decoder that pools by itself (`map_size`) gets the encoder's own map, if that encoder gives it (`grid`). Pictures
    are made what the encoder expects (`pixels`), or if it does not say, 256 x 256, normalised as ImageNet's. An
    ensemble (`encodes`) gets the bytes: each of its models has an encoder of its own.
    """
    if images.is_floating_point() or getattr(decoder, "encodes", False):
        return images.to(device, non_blocking=True)
    images = normalize(images, device, getattr(encoder, "pixels", IMAGENET))
    if getattr(decoder, "map_size", None) and hasattr(encoder, "grid"):
        return encoder.grid(images)
    return encoder(images)
