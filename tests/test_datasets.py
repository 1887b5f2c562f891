"""datasets.py: any picture file to the right pixels, prepared folders to the right batches, wrong ones to one line."""
from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ENCODER, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resized_crop

import datasets
from caption import Captioner
from datasets import (
    CaptionDataset,
    EpochSampler,
    Pictures,
    augment,
    crop,
    encode,
    image_loader,
    load_word_map,
    normalize,
    read_image,
    read_word_map,
    reverse,
    words_of,
)
from models import DecoderWithAttention, Encoder
from safety.errors import InputError
from safety.modes import NO_DATA, SAMPLE_FORMAT
from safety.pictures import check_pixels, is_one_colour
from training import features as features_module
from training.features import Features, keep_features
from utils import World, autocast

BASE = "old_2_cap_per_img_0_min_word_freq"
CPU = torch.device("cpu")
WORDS = {"a": 1, "dog": 2, "runs": 3, "<unk>": 4, "<start>": 5, "<end>": 6, "<pad>": 0}


# ---- pictures --------------------------------------------------------------------------------------------------------

def save(path: Path, picture: Image.Image, **options) -> Path:
    picture.save(path, **options)
    return path


def grey(value: int, dtype: type) -> Image.Image:
    return Image.fromarray(np.full((4, 4), value, dtype))


def palette(*colors: tuple[int, int, int]) -> Image.Image:
    """Every pixel is the second colour."""
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([channel for color in colors for channel in color])
    return picture


RED_GREEN = palette((255, 0, 0), (0, 255, 0))
PICTURES = {
    "RGB": (Image.new("RGB", (4, 4), (1, 2, 3)), "png", {}, (1, 2, 3)),
    "one pixel": (Image.new("RGB", (1, 1), (1, 2, 3)), "png", {}, (1, 2, 3)),
    "L": (Image.new("L", (4, 4), 7), "png", {}, (7, 7, 7)),
    "LA, half clear": (Image.new("LA", (4, 4), (7, 128)), "png", {}, (131, 131, 131)),
    "RGBA, clear": (Image.new("RGBA", (4, 4), (7, 8, 9, 0)), "png", {}, (255, 255, 255)),
    "RGBA, opaque": (Image.new("RGBA", (4, 4), (7, 8, 9, 255)), "png", {}, (7, 8, 9)),
    "RGB with a clear colour": (Image.new("RGB", (4, 4), (1, 2, 3)), "png", {"transparency": (1, 2, 3)}, (255,) * 3),
    "P": (RED_GREEN, "png", {}, (0, 255, 0)),
    "P, colour 1 clear": (RED_GREEN, "png", {"transparency": 1}, (255, 255, 255)),
    "P, colour 0 clear": (RED_GREEN, "png", {"transparency": 0}, (0, 255, 0)),
    "P, each colour with its alpha": (RED_GREEN, "png", {"transparency": b"\xff\x80"}, (127, 255, 127)),
    "CMYK": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "tiff", {}, (0, 255, 255)),
    "CMYK as JPEG": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "jpg", {"quality": 100}, (0, 255, 255)),
    "1, white": (Image.new("1", (4, 4), 1), "png", {}, (255, 255, 255)),
    "1, black": (Image.new("1", (4, 4), 0), "png", {}, (0, 0, 0)),
    "16 bits, white": (grey(65535, np.uint16), "png", {}, (255, 255, 255)),
    "16 bits, black": (grey(255, np.uint16), "png", {}, (0, 0, 0)),
    "16 bits, of 8 bits times 257": (grey(200 * 257, np.uint16), "png", {}, (200, 200, 200)),
    "16 bits, of 8 bits times 256": (grey(200 * 256, np.uint16), "png", {}, (200, 200, 200)),
    "16 bits, big end first": (grey(200 * 256, ">u2"), "tiff", {}, (200, 200, 200)),
    "I, of 16 bits": (grey(200 * 257, np.int32), "tiff", {}, (200, 200, 200)),
    "I, below and above": (grey(-5, np.int32), "tiff", {}, (0, 0, 0)),
    "F": (grey(150.4, np.float32), "tiff", {}, (150, 150, 150)),
    "F, below": (grey(-9, np.float32), "tiff", {}, (0, 0, 0)),
    "F, above": (grey(300, np.float32), "tiff", {}, (255, 255, 255)),
    "LAB": (Image.new("LAB", (4, 4), (128, 128, 128)), "tiff", {}, (119, 119, 119)),
}


@pytest.mark.parametrize("picture, suffix, options, color", PICTURES.values(), ids=PICTURES)
def test_every_mode_becomes_its_colour(tmp_path, picture, suffix, options, color):
    pixels = read_image(save(tmp_path / f"x.{suffix}", picture, **options))
    assert (pixels.shape, pixels.dtype) == ((3, 256, 256), np.uint8)
    assert np.abs(pixels.astype(int) - np.reshape(color, (3, 1, 1))).max() <= (picture.mode in ("CMYK", "LAB"))


PHOTO = np.asarray(Image.linear_gradient("L")).astype(float)                    # 0 to 255, all of them
DEEP = {
    "floats to 1": (PHOTO / 255, "f4"), "floats from -1": (PHOTO / 127.5 - 1, "f4"), "floats to 255": (PHOTO, "f4"),
    "floats to 65535": (PHOTO * 257, "f4"), "floats of 12 bits": (PHOTO * 16, "f4"),
    "floats to 1e9": (PHOTO * 4e6, "f4"),
    "floats a little beyond 0 and 1": (PHOTO / 250 - 0.01, "f4"), "floats to 1e-6": (PHOTO / 255e6, "f4"),
    "kelvins": (273 + PHOTO / 10, "f4"), "a hole of -3e38": (None, "f4"),
    "8 bits in 16": (PHOTO, "u2"), "10 bits in 16": (PHOTO * 4, "u2"), "12 bits in 16": (PHOTO * 16, "u2"),
    "14 bits in 16": (PHOTO * 64, "u2"), "16 bits": (PHOTO * 257, "u2"), "12 bits, big end first": (PHOTO * 16, ">u2"),
    "a narrow part of 16 bits": (29_000 + PHOTO * 4, "u2"), "Hounsfield's": (PHOTO * 16 - 1024, "i4"),
    "8 bits in 32": (PHOTO, "i4"), "16 bits in 32": (PHOTO * 257, "i4"), "24 bits in 32": (PHOTO * 65793, "i4"),
    "32 bits": (PHOTO * 2 ** 23, "i4"), "32 bits around 0": ((PHOTO - 128) * 2 ** 24, "i4"),
    "a mask of 0 and 1": (None, "u2"), "16 bits with a sign": (PHOTO * 128, "i2"),
    "12 bits in 16 with a sign": (PHOTO * 16, "i2"),
}


@pytest.mark.parametrize("values, kind", DEEP.values(), ids=DEEP)
def test_deeper_pictures_are_brought_to_bytes_by_their_own_range(tmp_path, values, kind):
    expected = PHOTO
    if values is None and kind == "u2":
        values, expected = PHOTO > 127, (PHOTO > 127) * 255.0
    elif values is None:
        values, expected = np.where(PHOTO < 1, -3e38, PHOTO), np.where(PHOTO < 1, 0, 255)
    if kind == "i2":  # which Pillow reads from files alone
        pictures = [with_a_sign(tmp_path / "x.tiff", values.astype(kind))]
    else:
        picture = Image.fromarray(values.astype(kind))
        pictures = [picture, save(tmp_path / "x.tiff", picture)]
    for each in pictures:
        assert np.abs(read_image(each).astype(float) - expected).max() <= 1


def with_a_sign(path, values):
    """A TIFF of numbers of 16 bits, which its tag says to have a sign."""
    file = save(path, Image.fromarray(values.view("u2")), tiffinfo={SAMPLE_FORMAT: 1}).read_bytes()
    unsigned, signed = (struct.pack("<HHII", SAMPLE_FORMAT, 3, 1, kind) for kind in (1, 2))
    assert file.count(unsigned) == 1
    path.write_bytes(file.replace(unsigned, signed))
    return path


@pytest.mark.parametrize("value", [0, -30_000, 30_000])
def test_one_number_with_a_sign_is_one_colour(tmp_path, value):
    pixels = read_image(with_a_sign(tmp_path / "x.tiff", np.full((9, 9), value, "i2")))
    assert np.all(pixels == max(value, 0) // 256)


@pytest.mark.parametrize("bits, kind", [(12, "u2"), (12, "i4"), (0, "f4")])
def test_a_few_hot_pixels_do_not_darken_the_others(tmp_path, bits, kind):
    values = PHOTO * (16 if bits else 1 / 255)
    hot = np.random.default_rng(1).random(values.shape) < 0.0005
    assert 0 < hot.sum() < hot.size / 1000
    picture = Image.fromarray(np.where(hot, 65535, values).astype(kind))
    assert np.abs(read_image(picture).astype(float) - np.where(hot, 255, PHOTO)).max() <= 1


@pytest.mark.parametrize("kind", ["stars", "a marker", "stars that are saturated"])
def test_small_bright_things_stay_bright(kind):
    """Only what no thing can be, single pixels that are all saturated, is a fault of the sensor."""
    values, rng = PHOTO / 4, np.random.default_rng(1)
    for y, x in rng.integers(1, 255, (9, 2)):
        size = 2 if kind == "stars that are saturated" else 1
        values[y:y + size, x:x + size] = 65535 if size == 2 else rng.integers(30_000, 60_000)
    if kind == "a marker":
        values = PHOTO / 4
        values[9:14, 9:14] = 65535
    picture = Image.fromarray(values.astype("u2"))
    assert np.array_equal(read_image(picture)[0], np.asarray(picture) >> 8)


@pytest.mark.parametrize("told, gap", [(None, -9999), ("-3.4e38", -3.4e38), ("-32768", -32768), ("none", -9999),
                                         ("nan", np.nan)])
def test_where_nothing_was_measured_the_rest_is_seen(tmp_path, told, gap):
    gaps = np.zeros(PHOTO.shape, bool)
    gaps[:50] = True
    picture = Image.fromarray(np.where(gaps, gap, PHOTO / 255).astype("f4"))
    path = save(tmp_path / "x.tiff", picture, tiffinfo={NO_DATA: told} if told else {})
    expected = np.where(gaps, PHOTO[50:].min(), PHOTO)
    assert np.abs(read_image(path).astype(float) - expected).max() <= 1


def test_clear_parts_of_16_bits_are_on_white(tmp_path):
    values = (PHOTO * 257).astype("u2")
    path = save(tmp_path / "x.png", Image.fromarray(values))
    file = path.read_bytes()
    number = struct.pack(">H", int(values[9, 9]))
    clear = struct.pack(">I", 2) + b"tRNS" + number + struct.pack(">I", zlib.crc32(b"tRNS" + number))
    path.write_bytes(file[:33] + clear + file[33:])
    expected = np.where(values == values[9, 9], 255, PHOTO)
    assert np.abs(read_image(path).astype(float) - expected).max() <= 1


PARTS = {"0 to 1": (1 / 510, "f4"), "8 bits": (1 / 2, "u2"), "12 bits": (8, "u2"), "16 bits": (128, "i4")}


@pytest.mark.parametrize("scale, kind", PARTS.values(), ids=PARTS)
def test_a_darker_picture_stays_darker(tmp_path, scale, kind):
    """One that fills half of its range is not stretched."""
    picture = Image.fromarray(((PHOTO + 50) * scale).astype(kind))
    assert np.abs(read_image(picture).astype(float) - (PHOTO + 50) / 2).max() <= 1


def test_numbers_without_a_sign_keep_their_highest_bit(tmp_path):
    """Pillow has no mode for 32 bits without a sign, and so a TIFF's brightest pixels are negative."""
    picture = Image.fromarray((PHOTO * 2 ** 23).astype("i4"))
    file = save(tmp_path / "x.tiff", picture).read_bytes()
    signed, unsigned = (struct.pack("<HHII", SAMPLE_FORMAT, 3, 1, kind) for kind in (2, 1))
    path, pixels = tmp_path / "unsigned.tiff", (PHOTO * 2 ** 24).astype("<u4").tobytes()
    path.write_bytes(file.replace(signed, unsigned).replace(picture.tobytes(), pixels))
    with Image.open(path) as opened:
        assert opened.getextrema()[0] < 0, "the test is real"
    assert np.abs(read_image(path).astype(float) - PHOTO).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    path = save(tmp_path / "x.tiff", Image.fromarray(np.where(PHOTO > 254, value, PHOTO).astype(np.float32)))
    with refused(str(path), "cannot be read", "some of its numbers are not finite"):
        read_image(path)


def test_16_bits_that_are_full_lose_the_lower_8(tmp_path):
    """As ever: nothing is rounded or stretched."""
    values = np.random.default_rng(0).integers(0, 65536, (256, 256), dtype=np.uint16)
    assert np.array_equal(read_image(save(tmp_path / "x.png", Image.fromarray(values)))[0], values >> 8)


@pytest.mark.parametrize("spread, found", [(0, True), (15, True), (16, False), (255, False)])
def test_a_picture_of_one_colour_is_known(spread, found):
    pixels = np.full((3, 256, 256), 9, np.uint8)
    pixels[1] = 200  # one colour may have any three values
    pixels[2, 7, 7] = 9 + spread if spread < 200 else 255
    pixels[2, 8, 8] = pixels[2, 7, 7] - spread
    assert is_one_colour(pixels) is found


def test_a_palette_with_clear_colours_is_on_white():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 255, 200, 0, 0, 0], "RGBA")
    assert (read_image(picture) == 255).all()


def test_pixels_are_pillows_bilinear_resize(tmp_path):
    picture = Image.effect_noise((300, 200), 80).convert("RGB")
    expected = np.array(picture.resize((256, 256), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(read_image(save(tmp_path / "x.png", picture)), expected)
    assert np.array_equal(read_image(str(save(tmp_path / "grey.png", picture.convert("L")))), expected)


def test_pictures_in_memory_are_read_as_files_are(tmp_path):
    picture = Image.effect_noise((300, 200), 80).convert("RGB")
    pixels = np.array(picture)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = read_image(save(tmp_path / "x.png", picture))
    for each in (picture, pixels, channels_first, channels_first.contiguous()):
        assert np.array_equal(read_image(each), expected)
    assert picture.getpixel((0, 0)) == tuple(pixels[0, 0]), "it is still open"


@pytest.mark.parametrize("picture, words", [
    (np.zeros((9, 9, 3), np.float32), ("a picture given as ndarray", "float32, and not uint8")),
    (torch.zeros(3, 9, 9), ("a picture given as Tensor", "float32, and not uint8")),
    (np.zeros((3, 9, 8), np.uint8), ("a picture given as ndarray",)),
    (torch.zeros(9, 8, 3, dtype=torch.uint8), ("a picture given as Tensor",)),
    (None, ("a picture given as NoneType",))],
    ids=["floats", "a tensor of floats", "channels first", "a tensor with channels last", "nothing"])
def test_what_is_no_picture_in_memory_is_named(picture, words):
    with refused(*words, "cannot be read"):
        read_image(picture)


def corners(pixels: np.ndarray) -> str:
    """Left top, right top, left bottom, right bottom: a letter each."""
    names = {(255, 0, 0): "r", (0, 255, 0): "g", (0, 0, 255): "b", (255, 255, 255): "w"}
    return "".join(names[tuple(pixels[:, y, x].tolist())] for y in (0, -1) for x in (0, -1))


@pytest.mark.parametrize("orientation, expected", [(1, "rgbw"), (2, "grwb"), (3, "wbgr"), (4, "bwrg"), (5, "rbgw"),
                                                   (6, "brwg"), (7, "wgbr"), (8, "gwrb")])
def test_pictures_are_turned_as_exif_says(tmp_path, orientation, expected):
    four = Image.fromarray(np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert corners(read_image(save(tmp_path / "x.png", four.resize((40, 20), 0), exif=exif))) == expected


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    path = save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert corners(read_image(path)) == "rrrr"


@pytest.mark.parametrize(("suffix", "options"), [
    ("png", {}), ("tiff", {"compression": "tiff_lzw"}), ("gif", {}), ("jp2", {})])
def test_damaged_pixels_are_refused(tmp_path, suffix, options):
    """Pillow would then give those that it had not come to as black."""
    path = save(tmp_path / f"x.{suffix}", Image.effect_noise((64, 64), 60), **options)
    file = path.read_bytes()
    middle = len(file) // 2
    end = b"" if suffix == "jp2" else b"\xff" * (middle // 2) + file[middle + middle // 2:]  # JPEG 2000 forgives more
    path.write_bytes(file[:middle] + end)
    with refused(str(path), "cannot be read"):
        read_image(path)


@pytest.mark.parametrize("content", ["truncated", b"", b"no picture at all", None])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif"])
def test_what_is_no_whole_picture_is_named(tmp_path, content, suffix):
    path = save(tmp_path / f"x.{suffix}", Image.effect_noise((64, 64), 60))
    if content == "truncated":
        content = path.read_bytes()[:1500]
    path.unlink() if content is None else path.write_bytes(content)
    with refused(str(path), "no such picture" if content is None else "cannot be read"):
        read_image(path)


def test_a_folder_and_a_decompression_bomb_are_named(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", Image.new("L", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for each in (tmp_path, path):
        with refused(str(each), "cannot be read"):
            read_image(each)


@pytest.mark.parametrize("error", [RuntimeError("decoder"), struct.error("4 bytes"), IndexError("3"), TypeError("no")])
def test_whatever_a_decoder_raises_names_the_picture(tmp_path, monkeypatch, error):
    """Of damaged files AVIF's decoder raises RuntimeError, others other things."""
    path = save(tmp_path / "x.png", Image.new("L", (4, 4)))
    monkeypatch.setattr(Image.Image, "resize", lambda *_: (_ for _ in ()).throw(error))
    with refused(str(path), str(error)):
        read_image(path)


def test_normalize_is_the_plain_formula_and_leaves_the_bytes():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    floats = normalize(images, torch.device("cpu"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.numpy().transpose(0, 2, 3, 1) / 255 - mean) / std
    assert floats.dtype == torch.float32
    np.testing.assert_allclose(floats.numpy().transpose(0, 2, 3, 1), expected, rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_a_mistake_of_scale_is_measured():
    noise = np.random.default_rng(0).integers(0, 256, (100, 3, 8, 8), dtype=np.uint8)
    dark = np.where(np.arange(100).reshape(100, 1, 1, 1) % 3 == 0, 0, noise)
    for fine in (noise, dark, noise[:1]):
        check_pixels(fine, "here")
    with refused("here", "mean 0.", "spread 0.", "--overwrite"):
        check_pixels((noise / 255).round().astype(np.uint8), "here")
    with refused("here", "mean 255.00", "spread 0.00"):
        check_pixels(np.full_like(noise, 255), "here")


def test_augmented_pictures_are_parts_of_themselves_half_of_them_mirrored(monkeypatch):
    monkeypatch.setattr(datasets, "COLOUR_CHANGES", (0, 0, 0))
    across = torch.arange(64, dtype=torch.uint8).expand(400, 3, 64, 64)         # dark on the left, bright on the right
    changed = augment(across)
    assert (changed.shape, changed.dtype) == (across.shape, across.dtype)
    widths = (changed[:, 0, 32].amax(1) - changed[:, 0, 32].amin(1).int()).abs() + 1.0  # columns that are seen
    assert 64 * (0.5 / 1.1) ** 0.5 - 2 < widths.min() < 50 and widths.max() == 64
    mirrored = changed[:, 0, 32, 0] > changed[:, 0, 32, -1]
    assert 150 < int(mirrored.sum()) < 250
    torch.manual_seed(1)
    one = augment(across)
    torch.manual_seed(1)
    assert torch.equal(one, augment(across)) and not torch.equal(one, changed)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("box", [(0, 0, 64, 48), (10, 3, 50, 40), (21, 0, 43, 37)])  # top, left, height, width
def test_a_part_is_enlarged_as_torchvision_does(box, mirrored):
    """But for its border, where torchvision sees nothing beyond the part and we see the picture."""
    pictures = torch.randint(0, 256, (2, 3, 64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = resized_crop(pictures.float(), *box, [64, 48], antialias=True)
    shares = [torch.full((2,), number / size) for number, size in zip(box, (64, 48, 64, 48), strict=True)]
    one = crop(pictures.float(), *shares, torch.tensor([mirrored, mirrored]))
    one = one.flip(3) if mirrored else one
    assert (one - expected)[:, :, 2:-2, 2:-2].abs().max() < 1e-2
    assert (one.round() - expected.round())[:, :, 2:-2, 2:-2].abs().max() <= 1


def test_augmenting_takes_as_many_operations_whatever_the_batch():
    class Counting(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.operations += not operation.is_view
            return operation(*args, **(kwargs or {}))

    counts = set()
    for n in (1, 16):
        with Counting() as counting:
            augment(torch.zeros(n, 3, 32, 32, dtype=torch.uint8))
        counts.add(counting.operations)
    assert len(counts) == 1 and max(counts) <= 60


def test_augmented_pictures_change_their_colours_a_little():
    def spread(values: torch.Tensor) -> list[float]:
        return [values.min().item(), values.max().item()]

    grey = augment(torch.full((400, 3, 8, 8), 100, dtype=torch.uint8)).float()
    assert torch.equal(grey, grey[:, :1, :1, :1].expand_as(grey))               # nothing else changes in these
    assert spread(grey) == pytest.approx([70, 130], abs=3)
    red = torch.tensor([150, 50, 50], dtype=torch.uint8)[:, None, None].expand(400, 3, 8, 8)
    one = augment(red).float()[:, :, 0, 0]                                      # (400, 3)
    away = (one[:, 0] - one[:, 1]) / one.mean(1)                                # 1.2 at first; contrast changes it, too
    assert spread(away) == pytest.approx([0.8 * 0.7 * 1.2, 1.2 * 1.3 * 1.2], abs=0.2)
    halves = torch.tensor([80, 120], dtype=torch.uint8).repeat_interleave(32).expand(400, 3, 64, 64)
    seen = augment(halves).float()
    highest, lowest = seen.amax((1, 2, 3)), seen.amin((1, 2, 3))
    assert spread((highest - lowest) / (highest + lowest)) == pytest.approx([0.7 * 0.2, 1.3 * 0.2], abs=0.03)


# ---- prepared folders ------------------------------------------------------------------------------------------------

CAPTIONS = {"TRAIN": [[5, 1, 2, 6, 0], [5, 4, 3, 2, 6], [5, 2, 6, 0, 0], [5, 1, 2, 3, 6]],
            "VAL": [[5, 1, 4, 6, 0], [5, 2, 3, 6, 0]]}


def pixels_of(split: str) -> np.ndarray:
    n = len(CAPTIONS[split]) // 2
    return np.random.default_rng(n).integers(0, 256, (n, 3, 256, 256), dtype=np.uint8)


def put(folder: Path, kind: str, content: object) -> None:
    (folder / f"{kind}_{BASE}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def archive(folder: Path, split: str = "TRAIN") -> Path:
    return folder / f"{split}_IMAGES_{BASE}.hdf5"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder as the original tutorial's own script writes it, and nothing else in it."""
    put(tmp_path, "WORDMAP", WORDS)
    for split, captions in CAPTIONS.items():
        put(tmp_path, f"{split}_CAPTIONS", captions)
        put(tmp_path, f"{split}_CAPLENS", [sum(index > 0 for index in caption) for caption in captions])
        with h5py.File(archive(tmp_path, split), "a") as h:
            h.attrs["captions_per_image"] = 2
            images = h.create_dataset("images", (len(captions) // 2, 3, 256, 256), dtype="uint8")
            for i, pixels in enumerate(pixels_of(split)):
                images[i] = pixels
    return tmp_path


def store_in_chunks(folder: Path) -> None:
    for split in CAPTIONS:
        with h5py.File(archive(folder, split), "a") as h:
            del h["images"]
            h.create_dataset("images", data=pixels_of(split), chunks=(1, 3, 256, 256), compression="gzip")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_folder_of_the_tutorials_own_script_works(old, chunked):
    if chunked:
        store_in_chunks(old)
    dataset = CaptionDataset(old, BASE, "VAL")
    image, caption, length, all_captions = dataset[1]
    assert torch.equal(image, torch.from_numpy(pixels_of("VAL")[0]))
    assert (caption.tolist(), length.tolist(), all_captions.tolist()) == (CAPTIONS["VAL"][1], [4], CAPTIONS["VAL"])
    assert (dataset.cpi, dataset.n_images, dataset.image_ids) == (2, 1, [0])
    assert np.array_equal(CaptionDataset(str(old), BASE, "TRAIN").images[:], pixels_of("TRAIN"))


@pytest.mark.parametrize("split", ["TRAIN", "VAL", "TEST"])
def test_items_are_the_tutorials(prepared, split):
    """In its order: picture, caption, length and, but for TRAIN, all captions; caption i is of picture i // 5."""
    dataset = CaptionDataset(prepared.folder, prepared.name, split)
    names = [each["filename"] for each in json.loads(prepared.json_path.read_text())["images"]
             if each["split"] == split.lower()]
    captions = json.loads((prepared.folder / f"{split}_CAPTIONS_{prepared.name}.json").read_text())
    assert len(dataset) == 5 * len(names) == len(captions)
    for i in (0, 4, 5, len(dataset) - 1):
        image, caption, length, *rest = dataset[i]
        assert (image.shape, image.dtype) == ((3, 256, 256), torch.uint8)
        assert np.array_equal(image.numpy(), read_image(prepared.pictures / names[i // 5]))
        assert (caption.dtype, caption.tolist()) == (torch.int64, captions[i])
        assert (length.dtype, length.tolist()) == (torch.int64, [sum(index > 0 for index in captions[i])])
        assert [each.tolist() for each in rest] == ([] if split == "TRAIN" else [captions[i // 5 * 5:i // 5 * 5 + 5]])
        assert all(each.dtype == torch.int64 for each in rest)


def test_transform_is_applied_to_the_picture(old):
    plain, turned = (CaptionDataset(old, BASE, "TRAIN", transform) for transform in (None, lambda image: image.flip(2)))
    assert torch.equal(turned[2][0], plain[2][0].flip(2))
    assert torch.equal(turned[2][1], plain[2][1])


def test_items_are_copies(old):
    dataset = CaptionDataset(old, BASE, "TRAIN")
    image, caption, _ = dataset[0]
    assert not np.shares_memory(image.numpy(), dataset.images)  # a write to the mapped file would end the process
    caption.zero_()
    assert dataset[0][1].tolist() == CAPTIONS["TRAIN"][0]


@pytest.mark.parametrize("n_words, dtype", [(2 ** 15 - 1, np.int16), (2 ** 15, np.int32)])
def test_captions_of_coco_are_compact(old, n_words, dtype):
    """All that is kept for each caption, as its pickle shows, times COCO's 566,435 is below 150 MB."""
    n, word_map = 1000, {**WORDS, **{f"w{i}": i for i in range(len(WORDS), n_words)}}
    put(old, "WORDMAP", word_map)
    put(old, "TRAIN_CAPTIONS", [[5, *[n_words - 1] * 50, 6]] * n)
    put(old, "TRAIN_CAPLENS", [52] * n)
    with h5py.File(archive(old), "w") as h:
        h.attrs["captions_per_image"] = 2
        h.create_dataset("images", (n // 2, 3, 256, 256), dtype="uint8")
    dataset = CaptionDataset(old, BASE, "TRAIN")
    assert (dataset.captions.dtype, dataset.captions.shape, dataset.captions.nbytes) == (dtype, (n, 52),
                                                                                         n * 52 * dtype().nbytes)
    assert len(pickle.dumps(dataset)) / n * 566_435 < 150e6
    assert dataset.captions[0, 1] == n_words - 1


def test_references_are_what_people_wrote(prepared):
    data = json.loads(prepared.json_path.read_text())["images"]
    written = [[sentence["tokens"] for sentence in each["sentences"]] for each in data if each["split"] == "test"]
    dataset = CaptionDataset(prepared.folder, prepared.name, "TEST")
    assert dataset.references(load_word_map(prepared.folder, prepared.name)) == written


def test_references_of_old_folders_are_decoded_and_unknown_words_match_nothing(old):
    references = CaptionDataset(old, BASE, "VAL").references(WORDS)
    assert references == [[["a", "<unknown>"], ["dog", "runs"]]]
    generated = words_of([5, 1, 4, 6, 0], reverse(WORDS))
    assert generated == ["a", "<unk>"] and generated not in references[0]


# ---- processes -------------------------------------------------------------------------------------------------------

def batches(dataset: CaptionDataset, workers: int = 0, start: str | None = None) -> list[list[torch.Tensor]]:
    return list(DataLoader(dataset, 2, num_workers=workers, multiprocessing_context=start))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of every fork beside threads
@pytest.mark.parametrize("workers, start, chunked", [(2, "fork", False), (2, "fork", True), (1, "spawn", True)])
def test_workers_give_the_same_batches(old, workers, start, chunked):
    """Also when the parent has opened the pictures before."""
    if chunked:
        store_in_chunks(old)
    for split in CAPTIONS:
        dataset = CaptionDataset(old, BASE, split)
        expected = batches(dataset)
        if (start, split) == ("spawn", "VAL"):
            continue  # one start of Python and PyTorch is enough
        found = batches(dataset, workers, start)
        assert len(found) == len(expected) == len(CAPTIONS[split]) // 2
        assert all(torch.equal(a, b) for one, other in zip(found, expected, strict=True)
                   for a, b in zip(one, other, strict=True))


def test_what_another_process_opened_is_not_used(old):
    dataset = CaptionDataset(old, BASE, "TRAIN")
    dataset._opened = {os.getpid() + 1: "a handle that crossed over"}
    assert np.array_equal(dataset.images[0], pixels_of("TRAIN")[0])


def test_pictures_are_opened_once(old):
    dataset = CaptionDataset(old, BASE, "TRAIN")
    assert dataset.images is dataset.images


@pytest.mark.parametrize("chunked", [False, True])
def test_pickling_drops_the_open_file(old, chunked):
    if chunked:
        store_in_chunks(old)
    dataset = CaptionDataset(old, BASE, "TRAIN")
    before = dataset[3]
    pickled = pickle.dumps(dataset)
    again = pickle.loads(pickled)
    assert len(pickled) < 3 * 256 * 256
    assert dataset._opened and not again._opened
    assert all(torch.equal(a, b) for a, b in zip(again[3], before, strict=True))


@pytest.mark.parametrize("world_size", [1, 3])
def test_image_loader_deals_each_picture_once(prepared, world_size):
    dataset = CaptionDataset(prepared.folder, prepared.name, "TEST")
    dealt = [torch.cat([batch[0] for batch in image_loader(dataset, 2, 0, World(rank, world_size, CPU))])
             for rank in range(world_size)]
    found = [dealt[i % world_size][i // world_size] for i in range(dataset.n_images)]
    assert sum(map(len, dealt)) == dataset.n_images
    assert np.array_equal(torch.stack(found).numpy(), dataset.images[:])


# ---- features that are kept ----------------------------------------------------------------------------------------

@pytest.fixture
def copied(prepared, tmp_path) -> CaptionDataset:
    """A data set that may be written beside."""
    shutil.copytree(prepared.folder, tmp_path / "data")
    return CaptionDataset(tmp_path / "data", prepared.name, "TEST")


def kept_files(dataset: CaptionDataset) -> list[str]:
    return sorted(path.name for path in dataset.path.parent.iterdir() if "FEATURES" in path.name)


def captioner_of(encoder: Encoder, precision: str = "float32", map_size: int | None = 4) -> Captioner:
    decoder = DecoderWithAttention(4, 4, 4, len(WORDS), encoder.encoder_dim, map_size=map_size)
    return Captioner(encoder, decoder, WORDS, precision)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("map_size", [4, None])
def test_kept_features_are_what_the_encoder_gives(copied, precision, dtype, map_size):
    encoder, pictures = Encoder(4, ENCODER), torch.stack([copied.picture(i) for i in range(7)])
    model = captioner_of(encoder, precision, map_size)
    assert pictures.dtype == torch.uint8
    keep_features(copied, model, 0, show=False)
    kept = torch.stack([copied.picture(i) for i in range(7)])
    with torch.inference_mode(), autocast(CPU, precision):
        expected = encode(encoder, model.decoder, pictures, CPU)
        assert encode(encoder, model.decoder, kept, CPU) is kept
    assert kept.dtype == dtype and kept.shape[1:3] == ((8, 8) if map_size else (4, 4))
    torch.testing.assert_close(kept, expected.to(dtype))
    image, _, length, _ = copied[8]
    assert torch.equal(image, kept[1]) and length == copied.caplens[8]


def test_kept_features_reach_worker_processes(copied):
    keep_features(copied, captioner_of(Encoder(4, ENCODER)), 0, show=False)
    assert copied[0][0].is_floating_point()  # the map is open in this process
    loader = DataLoader(Pictures(copied), 3, num_workers=1, multiprocessing_context="spawn")
    pictures = torch.cat([batch[0] for batch in loader])
    assert torch.equal(pictures, torch.stack([copied.picture(i) for i in range(7)]))
    assert len(pickle.dumps(copied)) < 100_000  # without the features


def test_stale_features_are_never_used(copied):
    """Other weights, pixels, precision or map: another file."""
    encoder = Encoder(4, ENCODER)
    keep_features(copied, captioner_of(encoder), 0, show=False)
    first = kept_files(copied)
    copied.features = None
    keep_features(copied, captioner_of(encoder), 0, show=False)
    assert kept_files(copied) == first and len(first) == 1
    for changes in range(1, 5):
        copied.features = None
        if changes == 1:
            with torch.no_grad():
                next(encoder.parameters())[0] += 1e-3
        elif changes == 2:
            os.utime(copied.path, ns=(0, 0))
        model = captioner_of(encoder, "bfloat16" if changes == 3 else "float32", None if changes == 4 else 4)
        keep_features(copied, model, 0, show=False)
        assert len(kept_files(copied)) == 1 + changes


def test_an_interrupted_file_of_features_is_gone_on_with(copied, monkeypatch):
    """Whole batches on the disk are not encoded again; what follows them at its end is, to be the same bits."""
    encoder, grid = Encoder(4, ENCODER), Encoder.grid
    encoded: list[int] = []

    def stop_at_third(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return grid(self, images)

    monkeypatch.setattr(features_module, "FEATURES_AT_ONCE", 2)
    monkeypatch.setattr(Encoder, "grid", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        keep_features(copied, captioner_of(encoder), 0, show=False)
    assert copied.features is None
    [partial] = copied.path.parent.glob(".*FEATURES*")
    size = partial.stat().st_size // 4
    with open(partial, "ab") as file:
        file.write(bytes(size) + b"torn")
    keep_features(copied, captioner_of(encoder), 0, show=False)
    assert encoded == [1, 2, 2, 2, 1, 2, 1]  # the first of each for the shape
    assert copied.features.path.stat().st_size == 7 * size
    kept = torch.stack([copied.picture(i) for i in range(7)])
    copied.features = None
    pictures = torch.stack([copied.picture(i) for i in range(7)])
    torch.testing.assert_close(kept, encode(encoder, captioner_of(encoder).decoder, pictures, CPU))


def test_features_may_be_larger_than_memory(tmp_path):
    """A file with holes, which takes no space."""
    size = 256 * 2048
    features = Features(tmp_path / "features.bin", 10 ** 6, (1, 256, 2048), torch.bfloat16)
    with open(features.path, "wb") as file:
        file.truncate(features.n_bytes)
        file.seek((10 ** 6 - 1) * 2 * size)
        file.write(torch.full((size,), 3.0, dtype=torch.bfloat16).view(torch.uint8).numpy())
    assert features.n_bytes > 10 ** 12
    assert torch.equal(features[10 ** 6 - 1], torch.full((1, 256, 2048), 3.0, dtype=torch.bfloat16))
    assert not features[0].any()


def test_features_that_do_not_fit_on_the_disk_are_refused(copied, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"leave out --cache_features"):
        keep_features(copied, captioner_of(Encoder(4, ENCODER)), 0, show=False)
    assert not kept_files(copied)


def test_a_decoder_gets_the_map_that_it_asks_for():
    """Its encoder's own, where it pools by itself and the encoder has it; else what the encoder's forward gives."""
    pictures, encoder = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8), Encoder(4, ENCODER)
    pools, does_not = captioner_of(encoder).decoder, captioner_of(encoder, map_size=None).decoder
    assert torch.equal(encode(encoder, pools, pictures, CPU), encoder.grid(normalize(pictures, CPU)))
    for own, decoder in ((encoder, does_not), (encoder, nn.Identity()), (nn.AvgPool2d(32), pools)):
        assert torch.equal(encode(own, decoder, pictures, CPU), own(normalize(pictures, CPU)))


# ---- what does not fit -----------------------------------------------------------------------------------------------

def other_archive(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with h5py.File(archive(folder), "a") as h:
            change(h)
    return write


def images_of(shape: tuple[int, ...], dtype: str = "uint8") -> Callable[[Path], None]:
    def change(h: h5py.File) -> None:
        del h["images"]
        h.create_dataset("images", shape, dtype=dtype)
    return other_archive(change)


MISFITS = {
    "more pictures": images_of((3, 3, 256, 256)),
    "smaller pictures": images_of((2, 3, 224, 224)),
    "channels last": images_of((2, 256, 256, 3)),
    "pictures of floats": images_of((2, 3, 256, 256), "float32"),
    "one caption each": other_archive(lambda h: h.attrs.modify("captions_per_image", 1)),
    "fewer captions": lambda folder: put(folder, "TRAIN_CAPTIONS", CAPTIONS["TRAIN"][:2]),
    "fewer lengths": lambda folder: put(folder, "TRAIN_CAPLENS", [4, 5]),
    "other lengths": lambda folder: put(folder, "TRAIN_CAPLENS", [4, 4, 4, 4]),
    "a smaller vocabulary": lambda folder: put(folder, "WORDMAP", {"<unk>": 1, "<start>": 2, "<end>": 3, "<pad>": 0}),
}
UNREADABLE = {
    "no pictures inside": other_archive(lambda h: h.pop("images")),
    "no captions_per_image": other_archive(lambda h: h.attrs.pop("captions_per_image")),
    "a cut archive": lambda folder: os.truncate(archive(folder), 5000),
    "an empty archive": lambda folder: os.truncate(archive(folder), 0),
    "no archive at all": lambda folder: archive(folder).write_text("version https://git-lfs.github.com/spec/v1"),
    "uneven captions": lambda folder: put(folder, "TRAIN_CAPTIONS", [[5, 6]] * 3 + [[5]]),
    "captions of words": lambda folder: put(folder, "TRAIN_CAPTIONS", [["a", "dog"]] * 4),
    "a huge index": lambda folder: put(folder, "TRAIN_CAPTIONS", [[5, 2 ** 40]] * 4),
    "no lengths": lambda folder: put(folder, "TRAIN_CAPLENS", [None] * 4),
}


@pytest.mark.parametrize("change, part", [(change, "do not belong together") for change in MISFITS.values()]
                         + [(change, "cannot be read") for change in UNREADABLE.values()], ids=[*MISFITS, *UNREADABLE])
def test_files_that_do_not_fit_are_refused(old, change, part):
    change(old)
    with refused(str(archive(old)), part, "create_input_files.py --overwrite"):
        CaptionDataset(old, BASE, "TRAIN")


@pytest.mark.parametrize("name", [f"TRAIN_CAPTIONS_{BASE}.json", f"TRAIN_CAPLENS_{BASE}.json",
                                  f"TRAIN_IMAGES_{BASE}.hdf5"])
def test_a_missing_file_is_named(old, name):
    (old / name).unlink()
    with refused(str(old / name), "no such file", "create_input_files.py"):
        CaptionDataset(old, BASE, "TRAIN")


def test_references_of_other_pictures_are_refused(old):
    put(old, "TRAIN_REFERENCES", [[["a"]]] * 3)
    with refused(f"TRAIN_REFERENCES_{BASE}.json", "3 pictures", "2"):
        CaptionDataset(old, BASE, "TRAIN").references(WORDS)


def test_an_unknown_split_is_named(old):
    with refused("train", "TRAIN, VAL and TEST"):
        CaptionDataset(old, BASE, "train")


@pytest.mark.parametrize("ask", [lambda folder: CaptionDataset(folder, BASE, "TRAIN"),
                                 lambda folder: load_word_map(folder, BASE)])
def test_without_data_the_two_commands_are_told(tmp_path, ask):
    with pytest.raises(InputError) as caught:
        ask(tmp_path / "nowhere")
    first, prepare, train = str(caught.value).splitlines()
    assert BASE in first and str(tmp_path / "nowhere") in first and "--data_folder" in first
    assert prepare.split()[:2] == ["python", "create_input_files.py"] and train.split() == ["python", "train.py"]


def test_another_name_is_told_what_there_is(old):
    with refused("coco_5", str(old), f"--data_name {BASE}"):
        load_word_map(old, "coco_5")


@pytest.mark.parametrize("content, part", [
    ("{", "not a JSON file"), ([1, 2], "not a word map"), ({"a": 1}, "lacks"), ({**WORDS, "x": 9}, "not 0 to 7"),
    ({**WORDS, "x": 3}, "each once"), ({**WORDS, "x": "7"}, "not 0 to 7"), ({**WORDS, "x": None}, "not 0 to 7")])
def test_a_wrong_word_map_is_named(tmp_path, content, part):
    put(tmp_path, "WORDMAP", content)
    with refused(f"WORDMAP_{BASE}.json", part):
        load_word_map(tmp_path, BASE)


def test_a_word_map_comes_back_as_written(old):
    path = old / f"WORDMAP_{BASE}.json"
    assert read_word_map(path) == load_word_map(str(old), BASE) == WORDS
    path.write_text(json.dumps(WORDS), encoding="utf-8-sig")  # as Windows' editors save it
    assert read_word_map(path) == WORDS


def test_words_of_leaves_out_what_is_never_said():
    assert words_of([5, 1, 2, 4, 6, 0, 0], reverse(WORDS)) == ["a", "dog", "<unk>"]
    assert words_of([5, 6], reverse(WORDS)) == []


# ---- the order of an epoch -------------------------------------------------------------------------------------------

some_items = st.integers(1, 40)
some_size = st.integers(1, 12)
a_few = st.integers(1, 4)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def ranks(items: int, batch: int, world: int, seed: int = 0) -> list[EpochSampler]:
    return [EpochSampler(items, batch, seed, rank, world) for rank in range(world)]


@given(some_items, some_size, a_few)
@quick
def test_an_epoch_holds_every_item_once(items, batch, world):
    """Over all ranks, without the dummy items, of which has_share() tells; no rank is ever given nothing."""
    samplers, seen = ranks(items, batch, world), []
    for sampler in samplers:
        steps = list(sampler)
        assert len(steps) == len(sampler) == len(samplers[0]) and all(steps)
        seen += [i for step, share in enumerate(steps) if sampler.has_share(step) for i in share]
    assert sorted(seen) == list(range(items))


@given(some_items, some_size, a_few)
@quick
def test_processes_together_take_what_one_would(items, batch, world):
    """The union over `world` processes of a step is the batch of one process with `world` times the batch size."""
    alone = list(EpochSampler(items, batch * world, 0))
    together: list[list[int]] = [[] for _ in alone]
    for sampler in ranks(items, batch, world):
        for step, share in enumerate(sampler):
            together[step] += share if sampler.has_share(step) else []
    assert list(map(sorted, together)) == list(map(sorted, alone))


@given(some_items, some_size, a_few, st.integers(0, 50))
@quick
def test_an_epoch_can_resume_at_any_step(items, batch, world, step):
    for sampler in ranks(items, batch, world):
        whole = list(sampler)
        sampler.first_step = min(step, len(whole))
        assert list(sampler) == whole[sampler.first_step:]
        assert len(sampler) == len(whole) - sampler.first_step


@given(some_items, some_size, a_few, st.integers(0, 50))
@quick
def test_batches_of_like_length_hold_every_item_once(items, batch, world, step):
    """On any number of processes, before a resume and after it, and the short batch comes last."""
    lengths = torch.randint(3, 20, (items,), generator=torch.Generator().manual_seed(items))
    seen = []
    for rank in range(world):
        sampler = EpochSampler(items, batch, 0, rank, world, lengths)
        whole = list(sampler)
        assert [len(share) for share in whole] == [len(share) for share in EpochSampler(items, batch, 0, rank, world)]
        seen += [i for step, share in enumerate(whole) if sampler.has_share(step) for i in share]
        sampler.first_step = min(step, len(whole))
        assert list(sampler) == whole[sampler.first_step:]
    assert sorted(seen) == list(range(items))


def test_batches_of_like_length_are_decoded_in_few_steps_and_come_in_any_order():
    lengths = torch.randint(5, 25, (4000,), generator=torch.Generator().manual_seed(0))
    sampler = EpochSampler(4000, 20, 0, lengths=lengths)
    batches = [lengths[batch] for batch in sampler]
    assert max(int(batch.amax() - batch.amin()) for batch in batches[:-1]) <= 3
    longest = [int(batch.amax()) for batch in batches]
    assert 14 < sum(longest) / len(longest) < 15.5                              # their mean is 14.5; drawn singly 23.6
    changes = sum(one != other for one, other in itertools.pairwise(longest))
    assert changes > 0.9 * len(longest)  # not sorted: long ones follow short ones
    first = list(sampler)
    sampler.epoch = 1
    assert list(sampler) != first


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int, batch: int = 7) -> list[int]:
        sampler = EpochSampler(50, batch, seed)
        sampler.epoch = epoch
        return [i for captions in sampler for i in captions]

    before = torch.get_rng_state()
    first = order(3, 1)
    torch.manual_seed(99)
    assert order(3, 1) == order(3, 1, batch=50) == first != list(range(50))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    torch.set_rng_state(before)
    order(3, 1)
    assert torch.equal(torch.get_rng_state(), before)  # dropout's random numbers are not used up


def test_batches_are_of_the_asked_size():
    assert [len(captions) for captions in EpochSampler(50, 16, 0)] == [16, 16, 16, 2]
    assert [len(captions) for captions in EpochSampler(50, 16, 0, rank=1, world_size=2)] == [16, 9]
