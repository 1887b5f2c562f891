"""The whole tutorial in minutes on a CPU: draw a data set, prepare it, train in two stages, score, and look.

    pip install -r requirements.txt -r demo/requirements.txt
    python demo/demo.py

Everything goes into demo/output. Each step is the command that you would type for your own data. At the end two
questions that a table of scores leaves open: does the model use the pictures at all, and does it look at what it names?
The answers are also in demo/output/examination.json.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # where the scripts are; was this folder, whose demo.py would hide the folder demo

from caption import caption_images, load  # noqa: E402
from datasets import CaptionDataset  # noqa: E402
from demo.shapes import COLORS, draw_data_set, shape_of  # noqa: E402
from eval import bleu  # noqa: E402
from models import Caption  # noqa: E402
from safety.errors import InputError, run_script  # noqa: E402
from safety.files import atomic_write  # noqa: E402

NAME = "shapes_5_cap_per_img_0_min_word_freq"
# A small model for a small language, and higher learning rates than the defaults, to be done in minutes. The map is the
# one of stride 16, whose regions still know which of two shapes they are of.
TRAINING = ["--encoder", "efficientnet_lite0", "--encoder_stride", "16", "--encoded_image_size", "8", "--emb_dim", "64",
            "--attention_dim", "128", "--decoder_dim", "128", "--dropout", "0.2", "--decoder_lr", "8e-3", "4e-3",
            "--encoder_lr", "1e-4", "--schedule", "cosine", "--batch_size", "25", "--whole_images", "--cache_features"]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "demo" / "output", metavar="DIR",
                        help="where all files go; what is there of an earlier demo is replaced (default: demo/output)")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="scenes to train on (default: 1000)")
    parser.add_argument("--epochs", type=int, nargs=2, default=[12, 1], metavar="N", help="by stage (default: 12 1)")
    return parser


def call(script: str, *arguments: object) -> None:
    """Runs one of the scripts, and shows the command."""
    command = [script, *map(str, arguments)]
    print(f"\n$ python {' '.join(command)}", flush=True)
    # Waiting threads spin only briefly: on a busy machine the usual long spin takes four times as long.
    environment = {"GOMP_SPINCOUNT": "3000", **os.environ}
    status = subprocess.run([sys.executable, REPOSITORY / script, *command[1:]], env=environment).returncode
    if status:
        raise InputError(f"{script} ended with status {status}; what it said stands above")


class Look(NamedTuple):
    """Where the model looked while it named a shape, or a colour, that the scene holds."""

    on_it: bool             # did the highest weight fall on it?
    by_chance: float        # its part of the picture
    share: float | None     # its part of the weight on all shapes; None where there is no other kind of them
    area: float | None      # its part of their area


def looks(caption: Caption, objects: Sequence[dict], what: str = "shape") -> list[Look]:
    """For each shape, or color, that the caption names and the scene holds.

    A pixel of the map stands for a cell of the picture; it is on an object if it touches its box.
    """
    n = caption.alphas.shape[1]                                                 # of (words, n, n)
    starts, ends = np.arange(n) * 256 / n, np.arange(1, n + 1) * 256 / n
    cells = [np.outer((starts < bottom) & (ends > top), (starts < right) & (ends > left))
             for left, top, right, bottom in (each["box"] for each in objects)]
    on_any, found = np.any(cells, axis=0), []                                   # (n, n)
    for word, alpha in zip(caption.words, caption.alphas, strict=True):
        name = shape_of(word) if what == "shape" else word
        named = [cell for cell, each in zip(cells, objects, strict=True) if each[what] == name]
        if not named:
            continue
        on_it = np.any(named, axis=0)                                           # (n, n)
        alone = on_it.sum() == on_any.sum()
        found.append(Look(bool(on_it.flat[alpha.argmax()]), float(on_it.mean()),
                          None if alone else float(alpha[on_it].sum() / max(alpha[on_any].sum(), 1e-12)),
                          None if alone else float(on_it.sum() / on_any.sum())))
    return found


def things_named(words: Sequence[str]) -> list[tuple[str, str]]:
    """Colour and shape of each thing that a caption names: a colour and the next word for a shape, or, as in "the star
    is red", the one before."""
    shapes = [shape_of(word) for word in words]
    found = ((word, next(filter(None, shapes[i:]), next(filter(None, reversed(shapes[:i])), None)))
             for i, word in enumerate(words) if word in COLORS)
    return [(color, shape) for color, shape in found if shape]


def in_per_cent(looked: Sequence[Look], prefix: str) -> dict[str, float]:
    """The means of what `looks` found, by names for examination.json."""
    beside = [each for each in looked if each.share is not None]
    means = {"on_object": [each.on_it for each in looked], "by_chance": [each.by_chance for each in looked],
             "on_named": [each.share for each in beside], "on_named_by_chance": [each.area for each in beside]}
    return {prefix + name: 100 * float(np.mean(values)) if values else 0.0 for name, values in means.items()}


def examine(folder: Path) -> dict[str, float]:
    """BLEU-4 on the test scenes, and with the captions of other ones; and where it looked. All in per cent."""
    model = load(folder / f"BEST_checkpoint_{NAME}.pth.tar", device="cpu")
    data = json.loads((folder / "shapes" / "dataset_shapes.json").read_text())["images"]
    boxes = json.loads((folder / "shapes" / "boxes.json").read_text())
    names = [image["filename"] for image in data if image["split"] == "test"]
    references = CaptionDataset(folder / "data", NAME, "TEST").references(model.word_map)

    paths = [folder / "shapes" / "images" / name for name in names]
    found = [best for best, *_ in caption_images(model, paths, beam_size=1)]
    captions = [each.words for each in found]
    generator = torch.Generator().manual_seed(0)
    shuffled = [captions[i] for i in torch.randperm(len(captions), generator=generator).tolist()]
    shapes, colors = ([look for caption, name in zip(found, names, strict=True)
                       for look in looks(caption, boxes[name], what)] for what in ("shape", "color"))
    there = [thing in {(each["color"], each["shape"]) for each in boxes[name]}
             for words, name in zip(captions, names, strict=True) for thing in things_named(words)]
    return {"bleu4": bleu(references, captions)[3], "bleu4_blind": bleu(references, shuffled)[3],
            "things": len(there), "there": 100 * float(np.mean(there)) if there else 0.0,
            "shape_words": len(shapes), **in_per_cent(shapes, ""), **in_per_cent(colors, "color_")}


def main(args: argparse.Namespace) -> dict[str, float]:
    """Runs all steps; returns what `examine` found."""
    started = time.monotonic()
    folder = args.folder.resolve()
    try:
        shown = folder.relative_to(Path.cwd())
    except ValueError:
        shown = folder
    json_path = draw_data_set(folder / "shapes", train=args.train)
    for path in folder.glob(f"*{NAME}.pth.tar"):
        path.unlink()  # of an earlier demo
    data = ["--data_folder", shown / "data", "--data_name", NAME]
    best = shown / f"BEST_checkpoint_{NAME}.pth.tar"

    call("create_input_files.py", "--dataset", "shapes", "--captions", shown / "shapes" / json_path.name,
         "--image_folder", shown / "shapes" / "images", "--min_word_freq", 0, "--output_folder", shown / "data",
         "--overwrite")
    call("train.py", *data, "--output_folder", shown, *TRAINING, "--epochs", *args.epochs)
    call("eval.py", *data, "--checkpoint", best, "--out", shown, "--gallery", shown / "gallery.html")
    call("caption.py", "--img", shown / "shapes" / "images" / "shapes_test_0001.png", "--model", best,
         "--out", shown / "attention.png")
    found = examine(folder)
    with atomic_write(folder / "examination.json") as file:
        json.dump(found, file, indent=2)
    print(f"\nBLEU-4 on unseen scenes, greedy: {found['bleu4']:.1f}; of the same captions held against other scenes: "
          f"{found['bleu4_blind']:.1f}\n"
          f"of {found['things']} things it named by colour and shape, {found['there']:.0f} % were there\n"
          f"of {found['shape_words']} shapes it named, it looked at that shape "
          f"{found['on_object']:.0f} % of the time; by chance: {found['by_chance']:.0f} %\n"
          f"of the weight on all shapes, where there are several, the named one had {found['on_named']:.0f} %; by its "
          f"area: {found['on_named_by_chance']:.0f} %\n"
          f"curves: {shown / f'curves_{NAME}.png'}   where it looked: {shown / 'attention.png'}   "
          f"all of it took {(time.monotonic() - started) / 60:.1f} minutes\n"
          f"open in a browser, and point at the words: {shown / 'gallery.html'}")
    return found


if __name__ == "__main__":
    run_script(main, get_parser())
