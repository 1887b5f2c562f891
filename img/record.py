"""Takes what is real in the pages' pictures from trained models, into JSON files from which draw.py draws.

    python img/record.py demo/output                        # a run of the demo's diagrams
    python img/record.py --photographs                     # what the model in the box says of those in photographs/
    python img/record.py --log log_....jsonl               # a run's curves
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # where the scripts are

from caption import PRETRAINED, Captioner, Search, beam_search, caption_images, load  # noqa: E402
from datasets import encode, read_image, reverse  # noqa: E402
from demo.demo import NAME  # noqa: E402
from img.draw import LEAD, PHOTOGRAPHS, PHOTOS, RECORD, SCENE, TREE  # noqa: E402
from models import DecoderWithAttention  # noqa: E402
from safety.checkpoints import load_checkpoint  # noqa: E402
from safety.errors import InputError, run_script  # noqa: E402
from safety.files import atomic_write  # noqa: E402
from safety.restore import restore  # noqa: E402

BEAM_SIZE = 3


@torch.inference_mode()
def grow(decoder: DecoderWithAttention, features: torch.Tensor, word_map: dict[str, int], beam_size: int,
         max_len: int = 51) -> list[list[tuple[int, str, float, str]]]:
    """A beam search prefix by prefix, slow and simple, which keeps what `beam_search` throws away.

    Returns:
        For each step the candidates, best first: parent (its place in the step before), word, log-probability, and
        whether it was "kept", "ended" or "dropped".
    """
    words = reverse(word_map)
    alive, levels = [(0, [word_map["<start>"]], 0.0)], []
    while alive and len(levels) < max_len:
        candidates = []
        for place, sequence, total in alive:
            scores = decoder(features, torch.tensor([[*sequence, 0]]), torch.tensor([[len(sequence) + 1]]))[0][0, -1]
            log_probs = scores.log_softmax(0)
            log_probs[[word_map[word] for word in ("<start>", "<pad>", "<unk>")]] = -torch.inf
            best = log_probs.topk(beam_size)
            candidates += [(total + value, place, [*sequence, index])
                           for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        candidates.sort(key=lambda each: -each[0])
        level, going_on = [], []
        for rank, (total, place, sequence) in enumerate(candidates):
            word = words[sequence[-1]]
            fate = "dropped" if rank >= beam_size else "ended" if word == "<end>" else "kept"
            level.append((place, word, total, fate))
            if fate == "kept":
                going_on.append((rank, sequence, total))
        beam_size -= sum(fate == "ended" for *_, fate in level)
        levels.append(level)
        alive = going_on
    return levels


def rounded(alphas: np.ndarray) -> list[list[list[float]]]:
    """Weights (T, n, n) as lists, in as many digits as a picture needs."""
    return [[[round(weight, 4) for weight in row] for row in alpha] for alpha in alphas.tolist()]


def log_of(path: Path) -> list[dict[str, float]]:
    """What the curves show of a run's log."""
    keys = ("stage", "epoch", "train_loss", "val_loss", "bleu4", "bleu4_teacher_forced")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: round(row[key], 4) for key in keys} for row in rows]


def captions_of_photographs() -> dict[str, dict[str, list]]:
    """As `python caption.py --img img/photographs` finds them."""
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    return {path.name: {"words": best.words, "alphas": rounded(best.alphas)}
            for path, (best, *_) in zip(paths, caption_images(load(PRETRAINED), paths), strict=True)}


def main(args: argparse.Namespace) -> None:
    if args.photographs or args.log:
        content = json.loads(PHOTOS.read_text(encoding="utf-8"))
        if args.photographs:
            content["photos"] = captions_of_photographs()
        if args.log:
            content["log"] = log_of(args.log)
        with atomic_write(PHOTOS) as file:
            file.write(json.dumps(content) + "\n")
    if args.folder:
        record_demo(args.folder)


@torch.inference_mode()
def record_demo(folder: Path) -> None:
    log = folder / f"log_{NAME}.jsonl"
    if not log.is_file():
        raise InputError(f"{log}: no such file; run the demo first, python demo/demo.py")
    checkpoint = load_checkpoint(folder / f"BEST_checkpoint_{NAME}.pth.tar")
    (encoder, decoder), word_map = restore(checkpoint), checkpoint["word_map"]
    pixels = [read_image(folder / "shapes" / "images" / f"shapes_test_{index:04d}.png") for index in (SCENE, TREE)]
    features, of_tree = (encode(encoder, decoder, torch.from_numpy(each).unsqueeze(0), torch.device("cpu"))
                         for each in pixels)                                    # (1, h, w, C)
    tree = grow(decoder, of_tree, word_map, BEAM_SIZE)
    [[best]] = beam_search(decoder, features, word_map, Search(BEAM_SIZE))
    [[lead]] = caption_images(Captioner(encoder, decoder, word_map),
                              [folder / "shapes" / "images" / f"shapes_test_{LEAD:04d}.png"], beam_size=BEAM_SIZE)
    content = {"log": log_of(log),
               "words": [*best.words, "<end>"],
               "alphas": rounded(best.sequence_alphas[1:]),
               "lead": {"words": lead.words, "alphas": rounded(lead.alphas)},
               "tree": [[(place, word, round(total, 2), fate) for place, word, total, fate in level] for level in tree]}
    with atomic_write(RECORD) as file:
        file.write(json.dumps(content) + "\n")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the demo's, usually demo/output")
    parser.add_argument("--photographs", action="store_true", help="caption those in img/photographs")
    parser.add_argument("--log", type=Path, metavar="FILE", help="of a run on photographs, for the curves")
    return parser


if __name__ == "__main__":
    run_script(main, get_parser())
