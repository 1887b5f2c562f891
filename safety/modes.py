"""Pictures of any mode, depth and orientation to what all encoders take: upright RGB of 8 bits."""
from __future__ import annotations

from contextlib import suppress

import numpy as np
from PIL import Image

from safety.metadata import ORIENTATION, orientation

SAMPLE_FORMAT = 339  # the number of a TIFF's tag: 1 if its numbers have no sign
WHITE_IS_0 = 262    # of another: 0 if its lowest number is white; of 8 bits Pillow knows that itself
TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
    start=2))  # by EXIF's number for how the camera was held


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, upright."""
    if picture.format == "EPS":
        raise ValueError("EPS is a program for PostScript, and is not run")  # Pillow would call Ghostscript
    picture.load()  # by which Pillow turns a TIFF itself
    exif = picture.info.get("exif")
    turn = orientation(exif) if isinstance(exif, bytes) else 0
    with suppress(Exception):  # Pillow looks in other places, too, and may find anything there
        turn = turn or picture.getexif().get(ORIENTATION)
    if picture.mode.startswith(("I", "F")):  # one channel of 16 or 32 bits
        pixels = np.asarray(picture)
        if picture.mode == "I" and getattr(picture, "tag_v2", {SAMPLE_FORMAT: 2}).get(SAMPLE_FORMAT, 1) in {1, (1,)}:
            pixels = pixels.view(np.uint32)  # a TIFF's, whose highest bit Pillow takes for a sign
        inverted = getattr(picture, "tag_v2", {}).get(WHITE_IS_0) == 0  # as in X-rays
        picture = Image.fromarray(255 - to_bytes(pixels) if inverted else to_bytes(pixels))
    if turn in TURNS:
        picture = picture.transpose(TURNS[turn])
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Deeper pixels, (H, W), to bytes by their own range, as files do not tell it.

    The range begins at 0 and ends at 1 (of floats), or at the highest number of 8, 10, 12, 14 or 16 bits, whichever
    first holds all values; where none does, or all lie within a sixteenth of it, it is from the lowest to the highest.
    A picture of one value has no range, and is taken for one of 16 bits, or of floats from 0 to 255.
    """
    low, high, integer = np.float64(pixels.min()), np.float64(pixels.max()), pixels.dtype.kind in "iu"
    if not np.isfinite([low, high]).all():
        raise ValueError("some of its numbers are not finite")
    if low == high:
        return (pixels.clip(0, 65535) >> 8 if integer else pixels.clip(0, 255)).astype(np.uint8)
    bits = next((bits for bits in (8, 10, 12, 14, 16) if high < 2 ** bits), 0)
    top = 1 if high <= 1 and not integer else 2 ** bits - 1
    if low >= 0 and bits and high - low >= top / 16:
        if integer:
            return (pixels >> bits - 8).astype(np.uint8)
        low, high = np.float64(0), np.float64(top)
    return ((pixels - low) * (255 / (high - low))).round().astype(np.uint8)
