"""What both sides of the benchmark are given, and how both are measured."""
from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NAME = "synthetic_5_cap_per_img_0_min_word_freq"  # the prepared files' base name
CAPTIONS_PER_IMAGE = 5
BEAM_SIZE = 5


class Setting(NamedTuple):
    """Sizes and places; goes to the processes of both sides as it is."""

    folder: Path                  # temporary; holds all that is drawn, prepared and saved
    device: str
    precision: str                # of ours, when it is timed; the baseline's is float32
    encoder: str                  # a ResNet of torchvision
    encoder_weights: str | None   # torchvision's name, or None for random ones
    width: int                    # of word embedding, attention and LSTM
    vocabulary: int               # words, the four special ones included
    pictures: int                 # drawn; two thirds to train on
    batch_size: tuple[int, int]   # captions, by stage
    steps: int                    # of the baseline that are timed
    our_steps: int                # of ours
    warm_up: int                  # steps before the clock starts
    searched: int                 # pictures that the baseline searches; ours searches the whole split
    proof_pictures: int           # pictures with all their captions in the batch of the proof

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def pictures_folder(self) -> Path:
        return self.folder / "pictures"

    @property
    def json_path(self) -> Path:
        return self.folder / "dataset_synthetic.json"

    @property
    def weights_path(self) -> Path:
        return self.folder / "weights.pt"

    def word_map(self) -> dict[str, int]:
        return json.loads((self.data / f"WORDMAP_{NAME}.json").read_text())

    def decoder_arguments(self, encoder_dim: int) -> dict[str, int]:
        return {"attention_dim": self.width, "embed_dim": self.width, "decoder_dim": self.width,
                "vocab_size": self.vocabulary, "encoder_dim": encoder_dim}


def now(device: str) -> float:
    """Seconds, after all that the device was told to do is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(steps: Iterator[int], warm_up: int, count: int, device: str) -> float:
    """Captions a second of `count` training steps; each item of the iterator does a step and says its captions."""
    for _ in range(warm_up):
        next(steps)
    began = now(device)
    captions = sum(next(steps) for _ in range(count))
    return captions / (now(device) - began)


def flop_rate(step: Callable[[], Any], warm_up: int, count: int, device: str) -> float:
    """Operations a second of a step done again and again: those of its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    for _ in range(warm_up):
        step()
    began = now(device)
    for _ in range(count):
        step()
    return count * counter.get_total_flops() / (now(device) - began)


def to_float64(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A hook before the trunk: every second pixel of each row and column, as float64 is slow."""
    return (inputs[0][..., ::2, ::2].double(),)


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """The highest memory while `work` ran: on CUDA all that PyTorch held there, else what the process grew by.

    Called in a process that did nothing else before. Linux's own mark of the highest resident memory is taken
    (VmHWM), set back to the present first: that of getrusage counts the process that started this one as well.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, AttributeError):  # another allocator than glibc's
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed and kept before would hide what the work takes of it
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: the peak of memory is measured on Linux, or on CUDA")
