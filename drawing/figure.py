"""Where the model looked in a picture, as a file: the paper's figure, a panel for each word, or an animation."""
from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets import AnyPicture
from drawing.fonts import font_file
from drawing.page import PAGES
from drawing.panels import DARK, SCALE, enlarge, fit, write_gif
from models import Caption
from safety.errors import InputError, UsageError, printable
from safety.files import atomic_write
from safety.pictures import picture_suffixes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def visualize_att(image_path: AnyPicture, seq: Sequence[int], alphas: Any, rev_word_map: dict[int, str],
                  smooth: bool = True) -> Figure:
    """Draws the picture once for each word, with the attention's weights over it (the paper's figure 3).

    Args:
        seq: ids of the words, <start> first.
        alphas: (len(seq), n, n), as `caption_image_beam_search` returns them.
        rev_word_map: id to word.
        smooth: enlarge the weights smoothly; else show the pixels as they are.

    Returns:
        A matplotlib figure, to be saved with `savefig`; no window is opened.
    """
    from matplotlib.figure import Figure  # these imports are not at the top: a caption alone need not wait for them
    from matplotlib.font_manager import FontProperties
    size = 14 * 24
    picture = fit(image_path, size)
    words = [printable(rev_word_map[index]) for index in seq]
    rows = math.ceil(len(words) / 5)
    height = 3 * min(picture.height / picture.width, 1.5) + 0.4  # of a row, in inches; a panel is 3 wide
    figure = Figure(figsize=(15, height * rows + 0.4), layout="constrained")
    whole = (0, picture.width, picture.height, 0)  # the weights are stretched over the picture, as the pixels were
    for i, (word, alpha) in enumerate(zip(words, np.asarray(alphas), strict=True), 1):
        axes = figure.add_subplot(rows, 5, i)
        axes.imshow(picture, extent=whole)
        font = FontProperties(fname=font_file(word), size=14)
        axes.set_title(word, font=font, parse_math=False)  # a word may hold a $
        if word != "<start>":
            lights = enlarge(alpha, size, smooth)
            shade = (1 - DARK) * (1 - lights / lights.max())  # from 0, not from the lowest: an even gaze looks even
            axes.imshow(np.zeros_like(shade), alpha=shade, cmap="Greys_r", vmin=0, vmax=1, extent=whole)
        axes.axis("off")
    figure.supxlabel(SCALE, fontsize=14)
    return figure


def figure_paths(out: str, pictures: Sequence[Path]) -> list[Path]:
    """Where each picture's figure goes: one file, a page for all, or a folder of files."""
    suffix = Path(out).suffix.lower()
    if Path(out).is_dir() or suffix not in picture_suffixes() | PAGES | {".pdf", ".svg", ".eps", ".mp4"}:
        paths = [Path(out) / f"{picture.stem}_attention.png" for picture in pictures]
    elif suffix in PAGES or (len(pictures) == 1 and suffix in {".png", ".gif"}):
        paths = [Path(out)]
    else:
        raise UsageError(f"--out {out}: for one picture a .png or .gif file, for several an .html file or a folder")
    lost = {path.resolve() for path in paths} & {picture.resolve() for picture in pictures}
    if lost or len(set(paths)) < len(paths):
        raise InputError(f"--out {out}: figures of pictures with the same name, or the picture itself, would be lost")
    return paths


def draw_figure(path: Path, figure_path: Path, caption: Caption, rev_word_map: dict[int, str], smooth: bool) -> None:
    """Where the model looked in a picture, as a .gif or a .png file."""
    with atomic_write(figure_path, "wb") as file:
        if figure_path.suffix.lower() == ".gif":
            write_gif(file, path, caption, smooth)
        else:
            figure = visualize_att(path, caption.sequence, caption.sequence_alphas, rev_word_map, smooth)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `font_file` has said so
                figure.savefig(file, format="png", dpi=80)
