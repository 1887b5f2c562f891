"""Draws the diagrams of README.md, RESULTS.md and docs/.

    python img/draw.py

Colours mean the same in all: blue the picture and its features, orange attention, green words, grey the LSTM. Gazes and
the tree of the beam search are of a real run of the demo, which record.py put into demo.json; the curves, and what is
said of the photographs in photographs/, of models of Flickr8k, in photos.json.
"""
from __future__ import annotations

import argparse
import io
import json
import math
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # where the scripts are

# First: where MPLBACKEND names what is not installed, matplotlib cannot be imported.
import drawing  # noqa: E402, F401, I001
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Polygon  # noqa: E402

from demo.shapes import draw_scene, five_captions  # noqa: E402
from drawing.panels import fit, panel  # noqa: E402
from safety.errors import run_script  # noqa: E402
from safety.files import atomic_write  # noqa: E402
from training.curves import draw_curves  # noqa: E402

RECORD, PHOTOS = REPOSITORY / "img" / "demo.json", REPOSITORY / "img" / "photos.json"
PHOTOGRAPHS = REPOSITORY / "img" / "photographs"
SCENE = 1   # of the demo's test split: the one that the demo itself shows
LEAD = 0    # the first, for docs/captions.md
TREE = 5    # the first of a single thing: its caption is short, so that the tree of a search fits on a page
INK, QUIET, LINE = "#2f3542", "#7d8797", "#b9c1cd"
Color = tuple[str, str]  # of a panel and of its border
BLUE, ORANGE = ("#e4edf8", "#5b7db1"), ("#fdead6", "#d0812f")
GREEN, GREY = ("#e3f2e8", "#559b6d"), ("#eceff3", "#8b95a5")
Point = tuple[float, float]


# ---- pens ------------------------------------------------------------------------------------------------------------

def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A white page, measured in inches from its lower left corner."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, size: float = 11, color: str = INK, **more: Any) -> None:
    """Words around (x, y)."""
    if "\n" not in text and "va" not in more:  # centred as capitals are, so that all words beside stand level
        y, more["va"] = y - 0.36 * size / 72, "baseline"
    axes.text(x, y, text, **{"size": size, "color": color, "ha": "center", "va": "center", "linespacing": 1.35, **more})


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: Color, size: float = 11) -> None:
    """A rounded panel around (x, y)."""
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, linewidth=1.3, facecolor=color[0],
                                  edgecolor=color[1], boxstyle="round,pad=0,rounding_size=0.08"))
    write(axes, x, y, text, size)


def arrow(axes: Axes, start: Point, end: Point, color: str = QUIET, bend: float = 0, style: str = "-") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 0,
                                              "shrinkB": 0, "connectionstyle": f"arc3,rad={bend}", "linestyle": style})


def slab(axes: Axes, x: float, y: float, width: float, side: float, color: Color) -> None:
    """A feature map: as high as it is wide in pixels, as thick as it has channels."""
    slant = 0.35 * side
    for corners in ([(0, 0), (width, 0), (width, side), (0, side)],
                    [(width, 0), (width + slant, slant), (width + slant, side + slant), (width, side)],
                    [(0, side), (width, side), (width + slant, side + slant), (slant, side + slant)]):
        axes.add_patch(Polygon([(x + dx - slant / 2, y + dy - (side + slant) / 2) for dx, dy in corners],
                               facecolor=color[0], edgecolor=color[1], linewidth=1.1))


def picture(axes: Axes, x: float, y: float, side: float, pixels: np.ndarray, alpha: np.ndarray | None = None) -> None:
    """A square picture around (x, y), dark where the weights `alpha` (n, n) are small."""
    if alpha is not None:
        light = Image.fromarray((255 * alpha / alpha.max()).astype(np.uint8)).resize(pixels.shape[1::-1], 3)
        pixels = (pixels * (0.2 + 0.8 * np.asarray(light)[..., None] / 255)).astype(np.uint8)
    inset = axes.inset_axes((x - side / 2, y - side / 2, side, side), transform=axes.transData)
    inset.imshow(pixels)
    inset.set_axis_off()


def scene(index: int) -> tuple[np.ndarray, list[str]]:
    """A scene of the demo's test split, (256, 256, 3), and its captions."""
    random = Random(f"0 test {index}")
    image, things = draw_scene(random, held_out=index % 2 == 0)
    return np.asarray(image), five_captions(things, random)


# ---- the model -------------------------------------------------------------------------------------------------------

def draw_encoder(_: dict[str, Any]) -> Figure:
    figure, axes = sheet(11, 3.7)
    picture(axes, 0.95, 2.15, 1.5, scene(SCENE)[0])
    write(axes, 0.95, 0.95, "picture\n3 x 256 x 256", 10)
    stages = [(2.35, "stem", 64, 64, 0.1), (3.6, "block 1", 256, 64, 0.16), (4.95, "block 2", 512, 32, 0.26),
              (6.25, "block 3", 1024, 16, 0.42), (7.6, "block 4", 2048, 8, 0.7)]
    for x, name, channels, pixels, width in stages:
        slab(axes, x - width / 2, 2.15, width, 0.36 * math.log2(pixels) - 0.75, BLUE)
        write(axes, x, 0.95, f"{name}\n{channels} x {pixels} x {pixels}", 10)
    slab(axes, 9.35, 2.15, 0.7, 0.36 * math.log2(14) - 0.6, BLUE)
    write(axes, 9.7, 0.95, "features\n14 x 14 x 2048", 10, weight="bold")
    write(axes, 9.7, 0.45, "(channels last)", 10, QUIET)
    for start, end in ((1.75, 2.0), (2.8, 3.15), (4.1, 4.5), (5.4, 5.8), (6.75, 7.1)):
        arrow(axes, (start, 2.15), (end, 2.15))
    arrow(axes, (8.25, 2.15), (9.1, 2.15))
    write(axes, 8.65, 2.55, "pool\nto 14 x 14", 9.5, QUIET)
    for left, right, text in ((1.85, 4.15, "frozen in both stages"), (4.3, 8.2, "frozen in stage 1, tuned in stage 2")):
        axes.plot((left, left, right, right), (0.6, 0.5, 0.5, 0.6), color=LINE, linewidth=1.3)
        write(axes, (left + right) / 2, 0.28, text, 10, QUIET)
    write(axes, 5, 3.45, "ResNet-101 without its classifier", 12, weight="bold")
    write(axes, 5, 3.2, "channels x height x width", 10, QUIET)
    return figure


def draw_decoder(record: dict[str, Any], attention: bool) -> Figure:
    """The LSTM unrolled over the first words of a caption; they come out, and go in again at the next step."""
    figure, axes = sheet(11, 4.4 if attention else 3.6)
    lstm, top = (2.35, 3.75) if attention else (1.5, 2.9)
    columns, heights = (2.9, 5.0, 7.1, 9.2), (0.45, 1.3)  # of the steps; of features and attention
    for x, word in zip((1.75, 3.95, 6.05, 8.15, 10.25), ["<start>", *record["words"][:3], record["words"][3] + " ..."],
                       strict=True):
        box(axes, x, top, 1.15, 0.42, word, GREEN)
    for t, x in enumerate(columns):
        box(axes, x, lstm, 1.1, 0.6, "LSTM", GREY)
        arrow(axes, (x - 0.75 if t else x - 0.85, top - 0.22), (x - 0.3, lstm + 0.31), GREEN[1])
        arrow(axes, (x + 0.3, lstm + 0.31), (x + 0.75, top - 0.22), GREEN[1])
        if t < 3:
            arrow(axes, (x + 0.56, lstm), (x + 1.54, lstm), GREY[1])
            write(axes, x + 1.05, lstm + 0.17, f"$h_{t + 1},\\,c_{t + 1}$", 10, QUIET)
        if attention:
            box(axes, x, heights[1], 1.1, 0.5, "attention", ORANGE)
            arrow(axes, (x, heights[0] + 0.26), (x, heights[1] - 0.26), BLUE[1])
            arrow(axes, (x, heights[1] + 0.26), (x, lstm - 0.31), ORANGE[1])
            if t < 3:
                arrow(axes, (x + 0.4, lstm - 0.31), (x + 1.54, heights[1] + 0.1), GREY[1], style=(0, (3, 2)))
    if attention:
        box(axes, 5.5, heights[0], 9.6, 0.5, "features, 14 x 14 x 2048: the same at every step", BLUE)
        box(axes, 1.05, lstm, 0.95, 0.6, "mean", BLUE)
        arrow(axes, (1.05, heights[0] + 0.26), (1.05, lstm - 0.31), BLUE[1])
        arrow(axes, (1.93, lstm - 0.02), (2.34, heights[1] + 0.1), GREY[1], style=(0, (3, 2)))
    else:
        box(axes, 1.05, lstm, 0.95, 0.6, "mean", BLUE)
        box(axes, 1.05, 0.4, 1.6, 0.45, "features", BLUE)
        arrow(axes, (1.05, 0.63), (1.05, lstm - 0.31), BLUE[1])
        write(axes, 6.05, 0.55, "after its first state the LSTM never sees the picture again", 11, QUIET)
    arrow(axes, (1.54, lstm), (2.34, lstm), GREY[1])
    write(axes, 1.93, lstm + 0.17, "$h_0,\\,c_0$", 10, QUIET)
    return figure


def draw_attention_network(record: dict[str, Any]) -> Figure:
    """With the letters of models.py, as the weights drawn are the demo's and not the default model's."""
    figure, axes = sheet(11, 4.15)
    box(axes, 1.15, 2.85, 1.8, 0.8, "features $a$\nP x C", BLUE)
    box(axes, 1.15, 1.3, 1.8, 0.8, "state $h_{t-1}$\nD", GREY)
    box(axes, 3.35, 2.85, 1.7, 0.8, "linear $W_a$\nP x A", ORANGE)
    box(axes, 3.35, 1.3, 1.7, 0.8, "linear $W_h$\nA", ORANGE)
    box(axes, 5.25, 2.05, 1.3, 0.8, "+, ReLU\nP x A", ORANGE)
    box(axes, 6.95, 2.05, 1.3, 0.8, "linear $w$\nP x 1", ORANGE)
    box(axes, 8.55, 2.05, 1.1, 0.8, "softmax\nP", ORANGE)
    alpha = np.array(record["alphas"][-2])  # of the last word, before <end>
    inset = axes.inset_axes((9.55, 1.45, 1.2, 1.2), transform=axes.transData)
    inset.imshow(alpha, cmap="Oranges")
    inset.set(xticks=[], yticks=[])
    for side in inset.spines.values():
        side.set_color(ORANGE[1])
    write(axes, 10.15, 1.2, "weights $\\alpha_t$, sum 1\n(here P is 8 x 8)", 10, va="top")
    for start, end in (((2.06, 2.85), (2.49, 2.85)), ((2.06, 1.3), (2.49, 1.3)), ((5.91, 2.05), (6.29, 2.05)),
                       ((7.61, 2.05), (7.99, 2.05)), ((9.11, 2.05), (9.5, 2.05))):
        arrow(axes, start, end)
    arrow(axes, (4.21, 2.75), (4.59, 2.3))
    arrow(axes, (4.21, 1.4), (4.59, 1.8))
    axes.plot((1.15, 1.15), (3.26, 3.75), color=BLUE[1], linewidth=1.4)
    axes.plot((10.15, 10.15), (2.7, 3.75), color=ORANGE[1], linewidth=1.4)
    arrow(axes, (1.14, 3.75), (2.99, 3.75), BLUE[1])
    arrow(axes, (10.16, 3.75), (8.61, 3.75), ORANGE[1])
    box(axes, 5.8, 3.75, 5.6, 0.42, "weighted sum of the P rows: the context, C", BLUE)
    write(axes, 2.3, 0.45, "$W_a a$ is computed once a picture, the rest at every step", 10, QUIET)
    return figure


def draw_model(record: dict[str, Any]) -> Figure:
    """All of it, on a scene of the demo with the gaze that its model really had."""
    figure, axes = sheet(11, 4.2)
    pixels = scene(SCENE)[0]
    picture(axes, 0.95, 2.55, 1.5, pixels)
    write(axes, 0.95, 1.6, "picture", 10)
    box(axes, 2.5, 2.55, 1.05, 0.6, "encoder", BLUE)
    slab(axes, 3.5, 2.55, 0.5, 0.6, BLUE)
    write(axes, 3.8, 1.85, "features", 10)
    arrow(axes, (1.73, 2.55), (1.95, 2.55))
    arrow(axes, (3.05, 2.55), (3.36, 2.55))
    columns = np.linspace(5.1, 10.4, len(record["words"]))
    step = columns[1] - columns[0]
    side, lstm, wide = (min(usual, step - 0.06) for usual in (1.25, 0.95, 1.2))
    for t, (x, word, alpha) in enumerate(zip(columns, record["words"], record["alphas"], strict=True)):
        picture(axes, x, 2.55, side, pixels, np.array(alpha))
        box(axes, x, 1.3, lstm - 0.1, 0.5, "LSTM", GREY)
        arrow(axes, (x, 1.91), (x, 1.56), ORANGE[1])
        box(axes, x, 0.4, wide - 0.06, 0.42, word, GREEN)
        arrow(axes, (x, 1.04), (x, 0.63), GREEN[1])
        if t:
            arrow(axes, (x - step + lstm / 2 - 0.04, 1.3), (x - lstm / 2 + 0.04, 1.3), GREY[1])
            arrow(axes, (x - step + lstm / 3, 1.56), (x - side / 3, 1.9), GREY[1], style=(0, (3, 2)))
            arrow(axes, (x - step + wide / 2 - 0.1, 0.62), (x - lstm / 4, 1.04), GREEN[1])
    box(axes, 7.75, 3.75, 6.1, 0.42, "attention: the features, weighed anew for each word", ORANGE)
    for x in columns:
        arrow(axes, (x, 3.53), (x, 3.2), ORANGE[1])
    axes.plot((3.8, 3.8), (3.02, 3.75), color=BLUE[1], linewidth=1.4)
    arrow(axes, (3.8, 3.75), (4.68, 3.75), BLUE[1])
    box(axes, 3.67, 0.4, 1.2, 0.42, "<start>", GREEN)
    arrow(axes, (4.28, 0.45), (4.95, 1.04), GREEN[1])
    return figure


def draw_beam_search(record: dict[str, Any]) -> Figure:
    """The tree of a real search: what went on, what was struck out, what ended."""
    levels = record["tree"]
    rows = max(map(len, levels))
    figure, axes = sheet(11, 0.42 * rows + 1.1)
    columns = np.linspace(2.05, 10.25, len(levels))
    middle = 0.21 * rows + 0.45
    places = {(-1, 0): (0.65, middle)}
    box(axes, 0.65, middle, 0.95, 0.36, "<start>", GREEN, 10)
    for t, (x, level) in enumerate(zip(columns, levels, strict=True)):
        write(axes, x, 0.42 * rows + 0.85, f"step {t + 1}", 10, QUIET)
        for i, (parent, word, log_prob, fate) in enumerate(level):
            y = middle + 0.42 * ((len(level) - 1) / 2 - i)
            went_on = fate != "dropped"
            from_x, from_y = places[t - 1, parent]
            axes.plot((from_x + (0.48 if t == 0 else 0.63), x - 0.63), (from_y, y), zorder=0,
                      color=GREEN[1] if went_on else LINE, linewidth=1.6 if went_on else 0.9)
            color = {"dropped": ("white", LINE), "ended": ORANGE, "kept": GREEN}[fate]
            box(axes, x, y, 1.26, 0.34, "", color)
            write(axes, x - 0.57, y, word, 10, INK if went_on else QUIET, ha="left")
            write(axes, x + 0.57, y, f"{log_prob:.2f}".replace("-", "\u2212"), 9, INK if went_on else QUIET, ha="right")
            if not went_on:
                axes.plot((x - 0.58, x + 0.58), (y, y), color=QUIET, linewidth=1)
            places[t, i] = (x, y)
    write(axes, 5.5, 0.2, "number: log-probability of the caption so far    green: kept    orange: ended, a finished "
          "caption    struck out: not among the best", 9.5, QUIET)
    return figure


# ---- data and training -----------------------------------------------------------------------------------------------

def draw_files(_: dict[str, Any]) -> Figure:
    figure, axes = sheet(11, 4.1)
    box(axes, 1.75, 2.25, 3.0, 3.2, "", BLUE)
    picture(axes, 1.75, 2.45, 1.9, scene(SCENE)[0])
    write(axes, 1.75, 3.62, "IMAGES .hdf5", 11, weight="bold")
    write(axes, 1.75, 1.07, "M x 3 x 256 x 256 bytes\ncaption $i$ is of picture $i$ // 5", 10)
    box(axes, 6.1, 2.25, 5.0, 3.2, "", GREEN)
    write(axes, 6.1, 3.62, "CAPTIONS .json", 11, weight="bold")
    words = [["<start>", *each.split(), "<end>"] for each in scene(SCENE)[1]]
    own = dict.fromkeys(word for line in words for word in line[1:-1])
    word_map = {word: index for index, word in enumerate(["<pad>", *own, "<unk>", "<start>", "<end>"])}
    longest = max(map(len, words))
    for row, line in enumerate(words):
        for column in range(longest):
            index = word_map[line[column]] if column < len(line) else 0
            write(axes, 4.0 + 4.2 * column / (longest - 1), 3.15 - 0.38 * row, str(index), 11, INK if index else LINE)
    write(axes, 6.1, 1.07, f"5 M x 52 word numbers, 0 is <pad>\n(of this picture, the first {longest} columns)", 10)
    box(axes, 9.7, 2.25, 1.7, 3.2, "", GREEN)
    for row, line in enumerate(words):
        write(axes, 9.7, 3.15 - 0.38 * row, str(len(line)), 11)
    write(axes, 9.7, 3.62, "CAPLENS .json", 11, weight="bold")
    write(axes, 9.7, 1.07, "5 M lengths,\n<start>, <end> too", 10)
    examples = (*dict.fromkeys(words[0][1:-1]), "<unk>", "<start>", "<end>", "<pad>")
    shown = ", ".join(f"{word}: {word_map[word]}" for word in examples)
    box(axes, 5.4, 0.33, 10.3, 0.42, "", GREEN)
    write(axes, 0.5, 0.33, "WORDMAP .json", 11, weight="bold", ha="left")
    write(axes, 2.2, 0.33, f"{{{shown}, ...}}", 11, ha="left")
    return figure


def draw_batches(_: dict[str, Any]) -> Figure:
    """Captions of six scenes sorted by length, and the sizes that pack_padded_sequence gives to the steps."""
    captions = [["<start>", *scene(index)[1][0].split(), "<end>"] for index in (8, 15, 22, 2, 5, 27)]
    captions = sorted(captions, key=len, reverse=True)
    lengths = [len(each) - 1 for each in captions]
    padded = torch.zeros(len(captions), lengths[0])
    sizes = torch.nn.utils.rnn.pack_padded_sequence(padded, lengths, batch_first=True).batch_sizes.tolist()
    width = 9.4 / lengths[0]
    figure, axes = sheet(11, 0.5 * len(captions) + 1.5)
    for row, caption in enumerate(captions):
        y = 0.5 * (len(captions) - row) + 0.5
        for t, word in enumerate(caption[1:]):
            box(axes, 1.45 + width * (t + 0.5), y, width - 0.08, 0.38, word, GREEN, 9.5)
        write(axes, 0.72, y, f"{lengths[row]} steps", 10, QUIET)
    for t, size in enumerate(sizes):
        x = 1.45 + width * (t + 0.5)
        write(axes, x, 0.5 * len(captions) + 1.05, f"step {t + 1}", 10, QUIET)
        write(axes, x, 0.5, f"{size}", 12, weight="bold")
    write(axes, 0.72, 0.5, "in the batch", 10, QUIET)
    write(axes, 5.5, 0.15, "the words to predict; a caption that has ended takes no part in later steps", 10, QUIET)
    return figure


def gazes(image: str | Path | Image.Image, said: dict[str, Any], large: int = 244, small: int = 122,
          across: int = 5) -> Image.Image:
    """A picture over its caption, and where the model looked for each word: there it is bright."""
    whole = panel(fit(image, large), said["words"])
    looks = [panel(fit(image, small), [word], alpha=np.array(alpha))
             for word, alpha in zip(said["words"], said["alphas"], strict=True)]
    below = max(each.height for each in looks)
    row = Image.new("RGB", (large + 6 + across * small, max(whole.height, math.ceil(len(looks) / across) * below)),
                    "white")
    row.paste(whole, (0, 0))
    for i, look in enumerate(looks):
        row.paste(look, (large + 6 + i % across * small, i // across * below))
    return row


def draw_photos(record: dict[str, Any]) -> Image.Image:
    rows = [gazes(PHOTOGRAPHS / name, said) for name, said in record.items()]
    page = Image.new("RGB", (rows[0].width, sum(row.height + 12 for row in rows)), "white")
    y = 0
    for row in rows:
        page.paste(row, (0, y))
        y += row.height + 12
    return page


DRAWINGS = {"encoder": draw_encoder, "decoder": partial(draw_decoder, attention=False),
            "decoder_attention": partial(draw_decoder, attention=True), "attention_network": draw_attention_network,
            "model": draw_model, "beam_search": draw_beam_search, "files": draw_files, "batches": draw_batches}


def main(args: argparse.Namespace) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    photos = json.loads(PHOTOS.read_text(encoding="utf-8"))
    draw_curves(photos["log"], args.out / "curves.png")
    with atomic_write(args.out / "attention.png", "wb") as file:
        gazes(Image.fromarray(scene(LEAD)[0]), record["lead"], 170, 136).quantize(256).save(file, "PNG", optimize=True)
    with atomic_write(args.out / "photos.jpg", "wb") as file:
        draw_photos(photos["photos"]).save(file, "JPEG", quality=66)
    for name, draw in DRAWINGS.items():
        drawn = io.BytesIO()
        draw(record).savefig(drawn, format="png", dpi=args.dpi)
        with Image.open(drawn) as image, atomic_write(args.out / f"{name}.png", "wb") as file:
            image.convert("RGB").quantize(128).save(file, "PNG", optimize=True)  # flat colours: a third of the bytes


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "img", metavar="DIR", help="(default: img)")
    parser.add_argument("--dpi", type=int, default=110, metavar="N", help="pixels an inch (default: 110)")
    return parser


if __name__ == "__main__":
    run_script(main, get_parser())
