"""Captions for any picture, and where the model looked for each word.

    python caption.py --img photo.jpg --out photo_attention.png             # or .gif: the gaze moves word by word
    python caption.py --img holiday/ 'more/*.png' --out gallery.html        # one page; point at a word
    python caption.py --img holiday/ --beam_size 5 --n_best 3 --json captions.json

The checkpoint alone is enough; without --model, the one BEST_checkpoint_*.pth.tar in this folder is taken. In Python:

    from caption import caption_images, load
    model = load("BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar")
    for best, *others in caption_images(model, ["photo.jpg", picture], n_best=3):  # files, or Pillow's pictures
        print(" ".join(best.words), best.log_prob)
        print(best.alphas.shape)  # (words, 14, 14): for each word where the model looked
"""
from __future__ import annotations

import argparse
import gc
import glob
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":
    gc.disable()  # until the model is there: to look for garbage among half a million objects of PyTorch's takes 0.4 s

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets import all_unreadable, encode, read_image, read_word_map, reverse, words_of
from drawing.page import PAGES, html_figure, write_page
from drawing.panels import enlarge, fit, write_gif
from models import DecoderWithAttention, Encoder, Hypothesis, build_models
from safety.checkpoints import load_checkpoint
from safety.errors import InputError, UsageError, printable, run_script
from safety.files import atomic_write
from utils import autocast, progress, setup_world

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # what is taken from a folder


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s --img PATH [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to caption").add_argument
    add("--img", "-i", nargs="+", required=True, metavar="PATH",
        help="pictures, folders of pictures, or patterns like '*.jpg'")
    add("--model", "-m", "--checkpoint", metavar="FILE", help="(default: the BEST_checkpoint_* in this folder)")
    add("--word_map", "-wm", metavar="FILE", help="only for checkpoints that hold none (the original tutorial's)")
    add = parser.add_argument_group("search").add_argument
    add("--beam_size", "-b", type=int, default=5, metavar="K", help="hypotheses of the beam search (default: 5)")
    add("--n_best", type=int, default=1, metavar="N", help="captions for each picture (default: 1)")
    add_choice(add)
    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="PATH",
        help="where the model looked: an .html page, or a folder for .png files; for one picture a .png or .gif file")
    add("--dont_smooth", dest="smooth", action="store_false", help="show the attention's pixels as they are")
    add("--json", nargs="?", const="-", metavar="FILE", help="all results, into a file or instead of the lines")
    add = parser.add_argument_group("running").add_argument
    add("--batch_size", type=int, default=16, metavar="N", help="pictures at once (default: 16)")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=("bfloat16", "float32"),
        help="of matrix products (default: bfloat16 on a GPU that has it, else float32)")
    return parser


def add_choice(add: Callable[..., Any]) -> None:
    """The flags that caption.py and eval.py share: how captions are found and chosen."""
    add("--max_len", type=int, default=51, metavar="WORDS", help="longest caption, <end> included (default: 51)")
    add("--length_penalty", type=float, default=0.0, metavar="P",
        help="of the beam's captions the best by log-probability / words ** P, 0 to 2; longer with more (default: 0)")
    add("--consensus", action="store_true",
        help="of the beam's captions the one that is most like the others; best with --beam_size 20")


class Captioner(NamedTuple):
    """A model that captions: what `load` returns."""

    encoder: Encoder
    decoder: DecoderWithAttention
    word_map: dict[str, int]
    precision: str


class Caption(NamedTuple):
    """What the model says of a picture."""

    words: list[str]
    alphas: np.ndarray      # (len(words), n, n) float32: for each word where the model looked, weights that sum to 1
    log_prob: float         # of the whole sentence, its end included
    finished: bool          # False: max_len words, and no end


def load(model: str | Path, word_map: str | Path | None = None, device: str | None = None,
         precision: str | None = None) -> Captioner:
    """A checkpoint, ready to caption; arguments as the flags of the same names.

    Raises:
        InputError: no such file, no checkpoint that can be read safely, or no such device.
    """
    world, precision = setup_world(device, precision)
    checkpoint = load_checkpoint(model, read_word_map(word_map) if word_map else None)
    encoder, decoder = (each.to(world.device) for each in build_models(checkpoint, model))
    return Captioner(encoder, decoder, checkpoint["word_map"], precision)


def caption_images(model: Captioner, images: Sequence[str | Path | Image.Image], beam_size: int = 5,
                   max_len: int = 51, n_best: int = 1, batch_size: int = 16,
                   length_penalty: float = 0.0, consensus: bool = False) -> list[list[Caption]]:
    """For each picture, a file or one that Pillow opened, its n best captions, the best first.

    Arguments are as the flags of the same names; with `consensus` the length penalty has no effect.

    Raises:
        InputError: a picture cannot be read.
    """
    words = reverse(model.word_map)
    return [[to_caption(each, words) for each in hypotheses]
            for i in range(0, len(images), batch_size)
            for hypotheses in caption_paths(model, images[i:i + batch_size], beam_size, max_len, n_best,
                                            length_penalty, consensus)]


def to_caption(hypothesis: Hypothesis, rev_word_map: dict[int, str]) -> Caption:
    words = words_of(hypothesis.sequence, rev_word_map)
    alphas = to_grid(hypothesis.alphas)[1:1 + len(words)].numpy()  # the first is of <start>
    return Caption(words, alphas, hypothesis.log_prob, hypothesis.finished)


def caption_image_beam_search(encoder: Encoder, decoder: DecoderWithAttention, image_path: str | Path,
                              word_map: dict[str, int], beam_size: int = 3) -> tuple[list[int], list[Any]]:
    """The best caption of a picture.

    Returns:
        Indices of the words, from <start> to <end>, and for each the attention's weights, a list of n rows of n.
    """
    best = caption_paths(Captioner(encoder, decoder, word_map, "float32"), [image_path], beam_size)[0][0]
    return best.sequence, to_grid(best.alphas).tolist()


def caption_paths(model: Captioner, paths: Sequence[str | Path | Image.Image], beam_size: int = 5, max_len: int = 51,
                  n_best: int = 1, length_penalty: float = 0.0, consensus: bool = False) -> list[list[Hypothesis]]:
    """For each picture its n best captions, as the search finds them. Raises InputError where one cannot be read."""
    images = torch.from_numpy(np.stack([read_image(path) for path in paths]))   # (N, 3, 256, 256)
    return search(model, images, beam_size, max_len, n_best, length_penalty, consensus)


@torch.inference_mode()
def search(model: Captioner, images: Tensor, beam_size: int, max_len: int = 51, n_best: int = 1,
           length_penalty: float = 0.0, consensus: bool = False, with_alphas: bool = True) -> list[list[Hypothesis]]:
    """The n best captions of each of the pictures, (N, 3, 256, 256) uint8; see `beam_search` and `by_consensus`."""
    decoder = model.decoder.eval()
    device = decoder.fc.weight.device
    with autocast(device, model.precision):
        features = encode(model.encoder, images, device)                        # (N, h, w, C)
        found = decoder.beam_search(features, model.word_map, beam_size, max_len,
                                    n_best=beam_size if consensus else n_best, pooling=model.encoder.pooling(features),
                                    with_alphas=with_alphas, length_penalty=length_penalty)
    return [by_consensus(hypotheses)[:n_best] for hypotheses in found] if consensus else found


def by_consensus(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """A beam's captions, the one that is most like all of them first (minimum Bayes risk, Kumar and Byrne 2004).

    The most probable caption may be an odd one, while the others agree on something else. So each finished one votes
    for all that are like it, itself included, with the fourth root of its probability, an exponent found by trial. Two
    captions' likeness: the words that are in both, in any order, counted twice, divided by the words of both together.
    An empty caption is like none. Unfinished ones come last, and have no vote.
    """
    said = [Counter(each.sequence[1:len(each.sequence) - each.finished]) for each in hypotheses]  # no <start>, no <end>
    highest = max((each.log_prob for each in hypotheses if each.finished), default=0.0)
    votes = [math.exp((each.log_prob - highest) / 4) if each.finished else 0.0 for each in hypotheses]

    def rank(i: int) -> tuple[bool, float]:
        support = sum(vote * 2 * (said[i] & other).total() / max(said[i].total() + other.total(), 1)
                      for other, vote in zip(said, votes, strict=True))
        return not hypotheses[i].finished, -support

    return [hypotheses[i] for i in sorted(range(len(said)), key=rank)]


def to_grid(alphas: Tensor) -> Tensor:
    """Weights (len, P) as the square that the pixels form, (len, n, n)."""
    return alphas.unflatten(1, (math.isqrt(alphas.size(1)), -1))


# ---- where it looked -------------------------------------------------------------------------------------------------

def visualize_att(image_path: str | Path, seq: Sequence[int], alphas: Any, rev_word_map: dict[int, str],
                  smooth: bool = True) -> Figure:
    """Draws the picture once for each word, with the attention's weights over it (the paper's figure 3).

    Args:
        seq: indices of the words, <start> first.
        alphas: (len(seq), n, n), as `caption_image_beam_search` returns them.
        rev_word_map: index to word.
        smooth: enlarge the weights smoothly; else show the pixels as they are.

    Returns:
        A matplotlib figure, to be saved with `savefig`; no window is opened.
    """
    from matplotlib.figure import Figure  # these imports are not at the top: a caption alone need not wait for them
    size = 14 * 24
    picture = fit(image_path, size)
    words = [rev_word_map[index] for index in seq]
    rows = math.ceil(len(words) / 5)
    height = 3 * min(picture.height / picture.width, 1.5) + 0.4  # of a row, in inches; a panel is 3 wide
    figure = Figure(figsize=(15, height * rows), layout="constrained")
    whole = (0, picture.width, picture.height, 0)  # the weights are stretched over the picture, as the pixels were
    for i, (word, alpha) in enumerate(zip(words, np.asarray(alphas), strict=True), 1):
        axes = figure.add_subplot(rows, 5, i)
        axes.imshow(picture, extent=whole)
        axes.set_title(printable(word), fontsize=14, parse_math=False)  # a word may hold a $
        if word != "<start>":
            axes.imshow(enlarge(alpha, size, smooth), alpha=0.8, cmap="Greys_r", extent=whole)
        axes.axis("off")
    return figure


# ---- the command -----------------------------------------------------------------------------------------------------

def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files as they are named, pictures of folders, and what patterns match."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            paths = [path]
        elif path.is_dir():
            paths = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())
        else:
            paths = [Path(each) for each in sorted(glob.glob(pattern, recursive=True)) if Path(each).is_file()]
        if not paths:
            raise InputError(f"--img {pattern}: no picture there")
        found += paths
    return list(dict.fromkeys(found))


def find_model() -> Path:
    found = sorted(Path().glob("BEST_checkpoint_*.pth.tar"))
    if len(found) != 1:
        there = f"there are {', '.join(map(str, found))}" if found else "this folder has no BEST_checkpoint_*.pth.tar"
        raise InputError(f"say which model with --model FILE: {there}")
    return found[0]


def figure_paths(out: str, pictures: Sequence[Path]) -> list[Path]:
    """Where each picture's figure goes: one file, a page for all, or a folder of files."""
    suffix = Path(out).suffix.lower()
    if Path(out).is_dir() or suffix not in SUFFIXES | PAGES | {".pdf", ".svg", ".eps", ".mp4"}:
        paths = [Path(out) / f"{picture.stem}_attention.png" for picture in pictures]
    elif suffix in PAGES or (len(pictures) == 1 and suffix in {".png", ".gif"}):
        paths = [Path(out)]
    else:
        raise UsageError(f"--out {out}: for one picture a .png or .gif file, for several an .html file or a folder")
    lost = {path.resolve() for path in paths} & {picture.resolve() for picture in pictures}
    if lost or len(set(paths)) < len(paths):
        raise InputError(f"--out {out}: figures of pictures with the same name, or the picture itself, would be lost")
    return paths


def draw(path: Path, figure_path: Path, hypothesis: Hypothesis, rev_word_map: dict[int, str], smooth: bool) -> None:
    """Where the model looked in a picture, as a .gif or a .png file."""
    with atomic_write(figure_path, "wb") as file:
        if figure_path.suffix.lower() == ".gif":
            write_gif(file, path, to_caption(hypothesis, rev_word_map), smooth)
        else:
            figure = visualize_att(path, hypothesis.sequence, to_grid(hypothesis.alphas), rev_word_map, smooth)
            figure.savefig(file, format="png", dpi=80)


def check_choice(args: argparse.Namespace) -> None:
    """How the beam's captions are ranked, in caption.py and in eval.py."""
    if not 0 <= args.length_penalty <= 2:
        raise UsageError(f"--length_penalty {args.length_penalty:g}: from 0 to 2")
    if args.length_penalty and args.consensus:
        raise UsageError("--length_penalty and --consensus are two ways to choose among the beam's captions; name one")


def read_pictures(paths: Sequence[Path], unreadable: list[tuple[Path, InputError]]) -> dict[Path, Image.Image]:
    """What the model sees of each file, 256 x 256; files that cannot be read are put on the list."""
    pictures = {}
    for path in paths:
        try:
            pictures[path] = Image.fromarray(read_image(path).transpose(1, 2, 0))
        except InputError as error:
            unreadable.append((path, error))
    return pictures


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Captions pictures, prints and returns the results. Where some cannot be read, it fails after all others."""
    if min(args.beam_size, args.batch_size, args.max_len, args.n_best) < 1 or args.n_best > args.beam_size:
        raise UsageError("--beam_size, --batch_size, --max_len and --n_best are 1 or more; --n_best <= --beam_size")
    check_choice(args)
    if args.json and Path(args.json).suffix.lower() in SUFFIXES | PAGES:
        raise UsageError(f"--json {args.json}: the results would overwrite a picture or a page; name another file")
    pictures = find_pictures(args.img)
    figures = dict(zip(pictures, figure_paths(args.out, pictures), strict=False)) if args.out else {}
    page = any(path.suffix.lower() in PAGES for path in figures.values())
    model = load(args.model or find_model(), args.word_map, args.device, args.precision)
    gc.enable()

    results, shown, rev_word_map = [], [], reverse(model.word_map)
    unreadable: list[tuple[Path, InputError]] = []
    first_ones = range(0, len(pictures), args.batch_size)
    bar = progress(first_ones, "captions", "batch", len(first_ones) > 1)
    for i in bar:
        batch = read_pictures(pictures[i:i + args.batch_size], unreadable)
        found = caption_paths(model, list(batch.values()), args.beam_size, args.max_len, args.n_best,
                              args.length_penalty, args.consensus) if batch else []
        for path, hypotheses in zip(batch, found, strict=True):
            captions = [to_caption(each, rev_word_map) for each in hypotheses]
            results.append({"image": str(path), "captions": [
                {"caption": " ".join(each.words), "log_prob": each.log_prob, "finished": each.finished}
                for each in captions]})
            if args.json != "-":
                for each in captions:
                    bar.write(printable(f"{path}: {' '.join(each.words)}{'' if each.finished else ' ...'}"))
            if page:
                shown.append(html_figure(path, path.name, captions))
            elif figures:
                draw(path, figures[path], hypotheses[0], rev_word_map, args.smooth)
    if not results:
        raise all_unreadable(unreadable)
    if page:
        write_page(args.out, "What the model saw", {"": shown}, args.smooth)
    text = printable(json.dumps(results, indent=2, ensure_ascii=False))  # a file's name may hold what is no letter
    if args.json == "-":
        print(text)
    elif args.json:
        with atomic_write(args.json) as file:
            file.write(text + "\n")
    if unreadable:
        raise all_unreadable(unreadable)
    return results


if __name__ == "__main__":
    run_script(main, get_parser())
    os._exit(0)  # to take PyTorch's objects apart one by one would take 0.9 s
