"""Whether both sides computed the same. What differs raises ProofError, and the benchmark stops."""
from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from benchmarks.setting import NAME

TOLERANCE = 1e-5  # relative
GPU_FLOAT32 = 1e-4  # there other algorithms and layouts sum 101 layers in another order


class ProofError(Exception):
    """Both sides did not compute the same."""


def compare_training(baseline: dict[str, float], ours: dict[str, float], dtype: str,
                     tolerance: float = TOLERANCE) -> dict[str, float]:
    """Losses and gradient norms within the relative tolerance of each other.

    In float64 the gradient of each parameter; one that is less than a hundredth of all is compared to that hundredth.
    In float32 the decoder's gradients all together: those of the attention are small differences of large numbers, and
    of the encoder's million ReLUs some are so near to zero that the order of a summation switches them. There the
    difference is float32's, and the comparison in float64 shows that nothing else is.

    Returns:
        The loss, the norm of all gradients compared, and the largest relative differences.
    """
    if baseline.keys() != ours.keys():
        raise ProofError(f"gradients of other parameters: {sorted(baseline.keys() ^ ours.keys())}")
    names = [name for name in baseline if name.startswith(("encoder.", "decoder.")[dtype == "float32":])]
    norms = [float(np.linalg.norm([side[name] for name in names])) for side in (baseline, ours)]
    differences = {"loss": abs(ours["loss"] - baseline["loss"]) / abs(baseline["loss"]),
                   "gradient_norm": abs(norms[1] - norms[0]) / norms[0]}
    if dtype == "float64":
        differences |= {name: abs(ours[name] - baseline[name]) / max(baseline[name], norms[0] / 100) for name in names}
    wrong = {name: value for name, value in differences.items() if not value <= tolerance}  # not of NaN either
    if wrong:
        worst = max(wrong, key=wrong.__getitem__)
        raise ProofError(f"{len(wrong)} of {len(differences)} numbers of a training step differ by more than "
                         f"{tolerance:g}, {worst} most, by {wrong[worst]:.2g} (loss {baseline['loss']:.7g} and "
                         f"{ours['loss']:.7g}, norm of all gradients {norms[0]:.7g} and {norms[1]:.7g})")
    return {"loss": ours["loss"], "loss_difference": differences["loss"], "gradient_norm": norms[1],
            "gradient_norm_difference": differences["gradient_norm"], "gradients": len(names),
            "largest_difference": max(differences.values())}


def compare_captions(baseline: list[list[int]], ours: list[list[int]]) -> dict[str, float]:
    """The same words in every caption. Returns how many there are, and their mean length."""
    wrong = [i for i, pair in enumerate(zip(baseline, ours, strict=True)) if pair[0] != pair[1]]
    if wrong:
        raise ProofError(f"{len(wrong)} of {len(baseline)} captions differ; that of picture {wrong[0]} is "
                         f"{baseline[wrong[0]]} and {ours[wrong[0]]}")
    return {"captions": len(ours), "mean_words": float(np.mean([len(each) - 2 for each in ours]))}


def compare_files(baseline: Path, ours: Path) -> dict[str, int]:
    """Equal word maps, captions and lengths, and equal pixels. Returns how many files there are and how many pictures.

    Only ours has the REFERENCES beside them.
    """
    names = [f"WORDMAP_{NAME}.json"] + [f"{split}_{kind}_{NAME}.json" for split in ("TRAIN", "VAL", "TEST")
                                        for kind in ("CAPTIONS", "CAPLENS")]
    for name in names:
        if json.loads((baseline / name).read_text()) != json.loads((ours / name).read_text()):
            raise ProofError(f"{name} is not the same")
    archives, pictures = [f"{split}_IMAGES_{NAME}.hdf5" for split in ("TRAIN", "VAL", "TEST")], 0
    for name in archives:
        with h5py.File(baseline / name, "r") as theirs, h5py.File(ours / name, "r") as own:
            if theirs["images"].shape != own["images"].shape:
                raise ProofError(f"{name} holds pictures {theirs['images'].shape} and {own['images'].shape}")
            for i in range(len(own["images"])):
                if not np.array_equal(theirs["images"][i], own["images"][i]):
                    raise ProofError(f"picture {i} of {name} has other pixels")
            pictures += len(own["images"])
    return {"files": len(names) + len(archives), "pictures": pictures}
