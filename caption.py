"""Captions for any picture, and where the model looked for each word.

    python caption.py --img photo.jpg --out photo_attention.png
    python caption.py --img holiday/ 'more/*.png' --beam_size 5 --json captions.json

The checkpoint alone is enough; without --model, the one BEST_checkpoint_*.pth.tar in this folder is taken.
"""
from __future__ import annotations

import argparse
import glob
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets import encode, read_image, read_word_map, to_rgb, words_of
from models import DecoderWithAttention, Encoder, Hypothesis, build_models
from utils import (
    InputError,
    UsageError,
    autocast,
    load_checkpoint,
    printable,
    progress,
    run_script,
    setup_processes,
    whole_file,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # what is taken from a folder


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--img", "-i", nargs="+", required=True, metavar="PATH",
        help="pictures, folders of pictures, or patterns like '*.jpg'")
    add("--model", "-m", "--checkpoint", metavar="FILE", help="(default: the BEST_checkpoint_* in this folder)")
    add("--word_map", "-wm", metavar="FILE", help="only for checkpoints that hold none (the original tutorial's)")
    add("--beam_size", "-b", type=int, default=5, metavar="K", help="hypotheses of the beam search (default: 5)")
    add("--n_best", type=int, default=1, metavar="N", help="captions for each picture (default: 1)")
    add("--max_len", type=int, default=51, metavar="WORDS", help="longest caption, <end> included (default: 51)")
    add("--dont_smooth", dest="smooth", action="store_false", help="show the attention's pixels as they are")
    add("--out", metavar="PATH", help="attention pictures: a .png for one picture, else a folder for all")
    add("--json", nargs="?", const="-", metavar="FILE", help="all results, into a file or instead of the lines")
    add("--batch_size", type=int, default=16, metavar="N", help="pictures at once (default: 16)")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=("bfloat16", "float32"), help="(default: bfloat16 on a GPU that has it, else float32)")
    return parser


def caption_image_beam_search(encoder: Encoder, decoder: DecoderWithAttention, image_path: str | Path,
                              word_map: dict[str, int], beam_size: int = 3) -> tuple[list[int], list[Any]]:
    """The best caption of a picture.

    Returns:
        Indices of the words, from <start> to <end>, and for each the attention's weights, a list of n rows of n.
    """
    best = caption_paths(encoder, decoder, [image_path], word_map, beam_size)[0][0]
    return best.sequence, to_grid(best.alphas).tolist()


@torch.inference_mode()
def caption_paths(encoder: Encoder, decoder: DecoderWithAttention, paths: Sequence[str | Path],
                  word_map: dict[str, int], beam_size: int = 5, max_len: int = 51, n_best: int = 1,
                  precision: str = "float32") -> list[list[Hypothesis]]:
    """For each picture file its n best captions. Raises InputError where a picture cannot be read."""
    encoder.eval()
    decoder.eval()
    device = decoder.fc.weight.device
    images = torch.from_numpy(np.stack([read_image(path) for path in paths]))   # (N, 3, 256, 256)
    with autocast(device, precision):
        features = encode(encoder, images, device)                              # (N, h, w, C)
        return decoder.beam_search(features, word_map, beam_size, max_len, n_best=n_best,
                                   pooling=encoder.pooling(features))


def to_grid(alphas: Tensor) -> Tensor:
    """Weights (len, P) as the square that the pixels form, (len, n, n)."""
    return alphas.unflatten(1, (math.isqrt(alphas.size(1)), -1))


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
    with Image.open(image_path) as picture:
        picture = to_rgb(picture).resize((size, size), Image.Resampling.LANCZOS)
    words = [rev_word_map[index] for index in seq]
    rows = math.ceil(len(words) / 5)
    figure = Figure(figsize=(15, 3.4 * rows), layout="constrained")
    for i, (word, alpha) in enumerate(zip(words, np.asarray(alphas), strict=True), 1):
        axes = figure.add_subplot(rows, 5, i)
        axes.imshow(picture)
        axes.set_title(printable(word), fontsize=14, parse_math=False)  # a word may hold a $
        if word != "<start>":
            axes.imshow(enlarge(alpha, size, smooth), alpha=0.8, cmap="Greys_r")
        axes.axis("off")
    return figure


def enlarge(alpha: np.ndarray, size: int, smooth: bool) -> np.ndarray:
    """Weights (n, n) to (size, size), by a Gaussian pyramid or pixel by pixel."""
    from skimage.transform import pyramid_expand, resize
    factor = size / alpha.shape[0]
    if smooth:
        return resize(pyramid_expand(alpha, upscale=factor, sigma=factor / 3), (size, size))
    return resize(alpha, (size, size), order=0)


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
    """Where each picture's figure goes: one file, or a folder of files."""
    if Path(out).is_dir() or Path(out).suffix.lower() not in SUFFIXES:
        paths = [Path(out) / f"{picture.stem}_attention.png" for picture in pictures]
    elif len(pictures) == 1 and Path(out).suffix.lower() == ".png":
        paths = [Path(out)]
    else:
        raise UsageError(f"--out {out}: for one picture a .png file, for several a folder")
    if len(set(paths)) < len(paths) or {path.resolve() for path in paths} & {picture.resolve() for picture in pictures}:
        raise InputError(f"--out {out}: figures of pictures with the same name, or the picture itself, would be lost")
    return paths


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Captions pictures, prints and returns the results."""
    if min(args.beam_size, args.batch_size, args.max_len, args.n_best) < 1 or args.n_best > args.beam_size:
        raise UsageError("--beam_size, --batch_size, --max_len and --n_best are 1 or more; --n_best <= --beam_size")
    if args.json and Path(args.json).suffix.lower() in SUFFIXES:
        raise UsageError(f"--json {args.json}: the results would overwrite a picture; name another file")
    pictures = find_pictures(args.img)
    figures = figure_paths(args.out, pictures) if args.out else []
    processes, precision = setup_processes(args.device, args.precision)
    path = args.model or find_model()
    checkpoint = load_checkpoint(path, read_word_map(args.word_map) if args.word_map else None)
    encoder, decoder = (model.to(processes.device) for model in build_models(checkpoint, path))
    word_map = checkpoint["word_map"]
    rev_word_map = {index: word for word, index in word_map.items()}

    results = []
    first_ones = range(0, len(pictures), args.batch_size)
    bar = progress(first_ones, "captions", "batch", len(first_ones) > 1)
    for i in bar:
        batch = pictures[i:i + args.batch_size]
        captions = caption_paths(encoder, decoder, batch, word_map, args.beam_size, args.max_len, args.n_best,
                                 precision)
        for j, (path, hypotheses) in enumerate(zip(batch, captions, strict=True), i):
            results.append({"image": str(path), "captions": [
                {"caption": " ".join(words_of(each.sequence, word_map)), "log_prob": each.log_prob,
                 "finished": each.finished} for each in hypotheses]})
            if args.json != "-":
                for found in results[-1]["captions"]:
                    bar.write(printable(f"{path}: {found['caption']}{'' if found['finished'] else ' ...'}"))
            if figures:
                best = hypotheses[0]
                figure = visualize_att(path, best.sequence, to_grid(best.alphas), rev_word_map, args.smooth)
                with whole_file(figures[j], "wb") as file:
                    figure.savefig(file, format="png", dpi=80)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    if args.json == "-":
        print(printable(text))
    elif args.json:
        with whole_file(args.json) as file:
            file.write(text + "\n")
    return results


if __name__ == "__main__":
    run_script(main, get_parser())
