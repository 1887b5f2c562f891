"""Pictures lit where the model looked, each over its caption: single panels, an animation, a sheet of many."""
from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from datasets import AnyPicture, read_rgb
from drawing.fonts import font_file
from models import Caption

DARK = 0.2  # of a pixel's brightness, where the model does not look at all
SCALE = "Bright is where the model looked: full at a word's highest weight, a fifth where it has none."  # in all files


def fit(image: AnyPicture, size: int) -> Image.Image:
    """A picture in RGB, upright, its longer side this long."""
    picture = read_rgb(image)
    scale = size / max(picture.size)
    return picture.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.LANCZOS)


def light(alpha: np.ndarray) -> Image.Image:
    """Weights (n, n) as n x n greys, by which a picture is multiplied: white where the model looks most."""
    return Image.fromarray((255 * (DARK + (1 - DARK) * alpha / alpha.max())).astype(np.uint8))


def enlarge(alpha: np.ndarray, size: int, smooth: bool) -> np.ndarray:
    """Weights (n, n) to (size, size), by a Gaussian pyramid or pixel by pixel."""
    from skimage.transform import pyramid_expand, resize
    factor = size / alpha.shape[0]
    if smooth:
        return resize(pyramid_expand(alpha, upscale=factor, sigma=factor / 3), (size, size))
    return resize(alpha, (size, size), order=0)


def panel(picture: Image.Image, words: Sequence[str], now: int | None = None, alpha: np.ndarray | None = None,
          smooth: bool = True) -> Image.Image:
    """A picture, lit where the model looks, over its caption: the word of now on a block of colour (large enough to
    be among a GIF's 256 colours), those to come pale."""
    if alpha is not None:
        lights = light(alpha).resize(picture.size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
        picture = ImageChops.multiply(picture, lights.convert("RGB"))
    size = max(14, max(picture.size) // 20)
    width, margin, line = max(picture.width, 8 * size), size // 2, 3 * size // 2
    words = ["".join(each if each.isprintable() else "?" for each in word) for word in words]
    fonts = [ImageFont.truetype(font_file(word), size) for word in words]
    places, x, y = [], margin, picture.height + margin
    for word, font in zip(words, fonts, strict=True):
        if x > margin and x + font.getlength(word) > width - margin:
            x, y = margin, y + line
        places.append((x, y))
        x += font.getlength(f"{word} ")
    canvas = Image.new("RGB", (width, y + line), "white")
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    for i, (word, font, place) in enumerate(zip(words, fonts, places, strict=True)):
        if i == now:
            x, y = place
            pen.rectangle((x - 3, y - 1, x + font.getlength(word) + 2, y + 5 * size // 4), "#b4441c")
        pen.text(place, word, "white" if i == now else "black" if now is None or i < now else "#b8b4ae", font)
    return canvas


def write_gif(file: IO[bytes], image: AnyPicture, caption: Caption, smooth: bool = True) -> None:
    """The gaze moves word by word: the picture alone, a frame for each word, and the picture with all that was said."""
    picture, words = fit(image, 400), caption.words
    looks = [panel(picture, words, i, alpha, smooth) for i, alpha in enumerate(caption.alphas)]
    frames = [panel(picture, words, -1), *looks, panel(picture, words)]
    note = panel(Image.new("RGB", (frames[0].width, 1), "white"), SCALE.split(), -1)  # pale
    first, *others = (stacked(frame, note) for frame in frames)
    first.save(file, "GIF", save_all=True, append_images=others, loop=0,
               duration=[1000, *[700] * len(looks), 2000])  # milliseconds


def stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    both = Image.new("RGB", (upper.width, upper.height + lower.height))
    both.paste(upper, (0, 0))
    both.paste(lower, (0, upper.height))
    return both


def draw_sheet(images: Sequence[Image.Image], captions: Sequence[Caption], title: str) -> Image.Image:
    """Small panels of square pictures, a row for each: the picture under the title, then its first 15 words."""
    rows = [[panel(small, [title]), *(panel(small, [word], alpha=alpha) for word, alpha
                                      in zip(caption.words[:15], caption.alphas[:15], strict=True))]
            for small, caption in zip([fit(image, 128) for image in images], captions, strict=True)]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for y, row in enumerate(rows):
        for x, each in enumerate(row):
            sheet.paste(each, (x * width, y * height))
    return sheet
