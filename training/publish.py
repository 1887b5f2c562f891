"""A checkpoint made small enough to give away: nothing of the optimizers, and each weight in 16 or 8 bits.

    python training/publish.py BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar coco.pth.tar --bits 8

All scripts read the result like any other checkpoint; train.py can go on from its weights, but not from its epoch.
"""
from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the scripts are; was this folder

from torch import Tensor

from safety.checkpoints import load_checkpoint, save_checkpoint
from safety.errors import UsageError, run_script


def shrunk(checkpoint: dict[str, Any], bits: int) -> dict[str, Any]:
    """The parts that captions need, with weights of 16 bits, or of 8 beside a scale for each row."""
    kept = {part: checkpoint[part] for part in ("word_map", "model", "preprocessing", "scores")}
    weights = {part: checkpoint[part] for part in ("encoder", "decoder")}
    if bits == 16:
        return kept | {part: {name: each.half() if each.is_floating_point() else each
                              for name, each in state.items()} for part, state in weights.items()}
    rows = {part: {name: in_8_bits(each) for name, each in state.items() if each.is_floating_point() and each.dim() > 1}
            for part, state in weights.items()}
    return kept | {part: state | {name: row for name, (row, _) in rows[part].items()}
                   for part, state in weights.items()} | {
        "scales": {part: {name: scale for name, (_, scale) in each.items()} for part, each in rows.items()}}


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (R, ...) as whole numbers from -127 to 127, and the scale (R, 1, ...) that takes each row back."""
    scale = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).float() / 127
    return (weight / scale.clamp(min=1e-30)).round().char(), scale


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of train.py, or of the original tutorial")
    parser.add_argument("file", metavar="FILE", help="to write; must not be there")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=16, help="of each weight (default: 16)")
    return parser


def main(args: argparse.Namespace) -> str:
    """Writes the file, prints its size and returns its digest."""
    if Path(args.file).exists():
        raise UsageError(f"{args.file}: is there already; name another file, or remove it")
    save_checkpoint(args.file, shrunk(load_checkpoint(args.checkpoint, mapped=False), args.bits))
    digest = hashlib.sha256(Path(args.file).read_bytes()).hexdigest()
    print(f"{args.file}: {Path(args.file).stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")
    return digest


if __name__ == "__main__":
    run_script(main, get_parser())
