"""Pictures of any mode, depth and orientation to what all encoders take: upright RGB of 8 bits."""
from __future__ import annotations

from contextlib import suppress

import numpy as np
from PIL import Image

from safety.metadata import ORIENTATION, orientation

# The numbers of a TIFF's tags.
SAMPLE_FORMAT = 339  # 1 if its numbers have no sign, 2 if they have one
BITS = 258
WHITE_IS_0 = 262    # 0 if its lowest number is white; of 8 bits Pillow knows that itself
NO_DATA = 42113     # a number, as text: that of pixels for which nothing was measured
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
    start=2))  # by EXIF's number for how the camera was held


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, upright."""
    if picture.format == "EPS":
        raise ValueError("EPS is a program for PostScript, and is not run")  # Pillow would call Ghostscript
    try:
        picture.load()  # by which Pillow turns a TIFF itself
    except ValueError:  # of damaged pixels it is an OSError
        if getattr(picture, "tile", True):
            raise
        picture.load()  # all pixels were read before, and too long a text behind them failed
    exif = picture.info.get("exif")
    turn = orientation(exif) if isinstance(exif, bytes) else 0
    with suppress(Exception):  # Pillow looks in other places, too, and may find anything there
        turn = turn or picture.getexif().get(ORIENTATION)
    if picture.mode.startswith(("I", "F")):  # one channel of 16 or 32 bits
        picture = Image.fromarray(deep_to_bytes(picture))
    if turn in TURNS:
        picture = picture.transpose(TURNS[turn])
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def deep_to_bytes(picture: Image.Image) -> np.ndarray:
    """A picture of one channel of 16 or 32 bits to bytes (H, W), with what its file tells of the numbers."""
    pixels, tags = np.asarray(picture), getattr(picture, "tag_v2", {SAMPLE_FORMAT: 2})
    if picture.mode == "I" and tags.get(SAMPLE_FORMAT, 1) in {1, (1,)}:
        pixels = pixels.view(np.uint32)  # a TIFF's, whose highest bit Pillow takes for a sign
    elif picture.mode == "I" and tags.get(BITS) in {16, (16,)}:
        pixels = pixels.astype(np.int16)
    gap = -9999.0  # where no tag tells, as most maps have it
    with suppress(ValueError, TypeError):
        gap = float(tags.get(NO_DATA, gap))
    gaps = np.isnan(pixels) if np.isnan(gap) else pixels == gap
    if gaps.any() and not gaps.all():
        pixels = np.where(gaps, pixels[~gaps].min(), pixels)
    found = to_bytes(pixels)
    if tags.get(WHITE_IS_0) == 0:  # as in X-rays
        found = 255 - found
    clear = picture.info.get("transparency")  # a PNG's: one of the numbers
    return np.where(pixels == clear, np.uint8(255), found) if isinstance(clear, int) else found


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Deeper pixels, (H, W), to bytes by their own range, as files do not tell it.

    The range begins at 0 and ends at 1 (of floats), or at the highest number of 8, 10, 12, 14 or 16 bits, whichever
    first holds all values; where none does, or all lie within a sixteenth of it, it is from the lowest to the highest.
    Numbers of 16 bits with a sign have 15 at most. Where all but a thousandth of the values lie within the lowest
    sixteenth, and the others are single pixels of one value, these are faults of a sensor, and count as the highest of
    those; stars, lamps and markers stay. A picture of one value has no range, and is taken for one of 16 bits, or of
    floats from 0 to 255.
    """
    low, high, integer = np.float64(pixels.min()), np.float64(pixels.max()), pixels.dtype.kind in "iu"
    if not np.isfinite([low, high]).all():
        raise ValueError("some of its numbers are not finite")
    if low == high:
        return np.full(pixels.shape, np.clip(low, 0, 65535) // 256 if integer else np.clip(low, 0, 255), np.uint8)
    sound = pixels <= low + (high - low) / 16
    if 0.999 * pixels.size <= np.count_nonzero(sound) and pixels[sound].max() > low and are_faults(~sound, pixels):
        pixels = np.minimum(pixels, pixels[sound].max())
        high = np.float64(pixels.max())
    bits = next((bits for bits in (8, 10, 12, 14, 15 if pixels.dtype == np.int16 else 16) if high < 2 ** bits), 0)
    top = 1 if high <= 1 and not integer else 2 ** bits - 1
    if low >= 0 and bits and high - low >= top / 16:
        if integer:
            return (pixels >> bits - 8).astype(np.uint8)
        low, high = np.float64(0), np.float64(top)
    return ((pixels - low) * (255 / (high - low))).round().astype(np.uint8)


def are_faults(bright: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether the bright ones (H, W) of the pixels all have one value, and none has another beside it."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(bright, 1), (3, 3))[bright]    # (bright ones, 3, 3)
    return bool(np.ptp(pixels[bright]) == 0 and around.sum(axis=(1, 2)).max() == 1)
