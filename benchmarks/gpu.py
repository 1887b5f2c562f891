"""What a GPU makes of this project, in one command of some minutes; no data are needed.

    python benchmarks/gpu.py                  # prints tables, and writes all figures into gpu.json
    python benchmarks/gpu.py --tiny           # a dry run of some seconds, on a CPU too

First the gradients of a small model, on the card and on the CPU, in float64. Then each kind of training step: that it
never waits for the GPU; how long the CPU takes to ask for it; its kernels, and how long they take by themselves; its
memory, and what share of the card's own rate of matrix products it reaches; in bfloat16 and float16, and with
--compile. Then training with the loading of its data, and the search. Pictures, captions and weights are drawn from
fixed seeds.
"""
from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # where the scripts are; was this folder

import torch  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train  # noqa: E402
from benchmarks import ours  # noqa: E402
from benchmarks.data import make_data  # noqa: E402
from benchmarks.proofs import compare_training  # noqa: E402
from benchmarks.setting import BEAM_SIZE, NAME, Setting, flop_rate, now  # noqa: E402
from caption import Search, caption_pixels  # noqa: E402
from datasets import CaptionDataset  # noqa: E402
from safety.files import atomic_write  # noqa: E402
from utils import PRECISIONS  # noqa: E402

STEPS = {  # kind: stage, whether features are kept, captions in a batch
    "stage 1, features kept, batch 80": (1, True, 80), "stage 1, features kept, batch 400": (1, True, 400),
    "stage 1, batch 80": (1, False, 80), "stage 2, batch 32": (2, False, 32)}
COMPILED = ("stage 1, features kept, batch 400", "stage 2, batch 32")  # each takes a minute to compile
SEARCHED = (32, 128)  # pictures at once
MEASURED = ("bfloat16", "float16")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: cuda if there is one)")
    parser.add_argument("--json", default="gpu.json", metavar="FILE", help="all figures (default: gpu.json)")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to see that it runs")
    return parser


def make_setting(device: str, folder: Path, tiny: bool) -> Setting:
    sizes = {"encoder": "resnet18", "width": 8, "vocabulary": 60, "pictures": 12, "our_steps": 1, "warm_up": 1}
    if not tiny:
        sizes = {"encoder": "resnet101", "width": 512, "vocabulary": 9490, "pictures": 400, "our_steps": 30,
                 "warm_up": 5}
    return Setting(folder, device, "float32", encoder_weights=None, batch_size=(80, 32), steps=1, searched=1,
                   proof_pictures=2, **sizes)


# ---- a step ----------------------------------------------------------------------------------------------------------

def measure_step(setting: Setting, kind: str, compiled: bool = False) -> dict[str, float | None]:
    """Figures of a training step done again and again; those that only a GPU has are None elsewhere."""
    stage, features_kept, batch_size = STEPS[kind]
    setting = setting._replace(batch_size=(batch_size, batch_size))
    run = ours.make_run(setting, setting.precision)
    run.args.compile = compiled
    models = ours.load_training(setting, run, stage)
    batch = next(iter(ours.load_batches(setting, run, models, stage, features_kept)))
    step = partial(train.train_step, run, models, batch)
    counter = FlopCounterMode(display=False)
    with nullcontext() if compiled else counter:  # under a counter PyTorch 2.11 seems to compile nothing
        step()
    for _ in range(setting.warm_up):
        step()
    gpu = torch.device(setting.device).type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, host_seconds = time_step(step, setting)
    captions = len(batch[1].flatten(0, -2))
    kernels, kernel_seconds = time_kernels(step) if gpu else (None, None)
    return {"captions/s": captions / seconds, "ms": 1e3 * seconds, "host ms": 1e3 * host_seconds, "kernels": kernels,
            "kernels' ms": 1e3 * kernel_seconds if gpu else None,
            "peak MB": torch.cuda.max_memory_allocated() / 1e6 if gpu else None,
            "FLOP/s": None if compiled else counter.get_total_flops() / seconds}


def time_step(step: Callable[[], Any], setting: Setting) -> tuple[float, float]:
    """Seconds that a step takes, and those in which the CPU asks for it. A step that waits for the GPU is an error."""
    began = now(setting.device)
    if torch.device(setting.device).type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(setting.our_steps):
            step()
    finally:
        if torch.device(setting.device).type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    asked = time.perf_counter() - began
    return (now(setting.device) - began) / setting.our_steps, asked / setting.our_steps


def time_kernels(step: Callable[[], Any]) -> tuple[int, float]:
    """How many kernels a step is, and the seconds that they need by themselves: a GPU that waits for nothing."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
    kernels = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(each.count for each in kernels), sum(each.self_device_time_total for each in kernels) / 1e6


# ---- all of it -------------------------------------------------------------------------------------------------------

def measure_search(setting: Setting, n: int) -> float:
    """Pictures a second, from bytes to words."""
    run = ours.make_run(setting, setting.precision)
    model = ours.load_training(setting, run, 1, "speaker").captioner
    images = CaptionDataset(setting.data, NAME, "TRAIN").images
    pixels = torch.stack([torch.from_numpy(images[i % len(images)].copy()) for i in range(n)])
    work = partial(caption_pixels, model, pixels, Search(BEAM_SIZE), with_alphas=False)
    work()
    began, rounds = now(setting.device), max(1, setting.our_steps // 6)
    for _ in range(rounds):
        work()
    return rounds * n / (now(setting.device) - began)


def gradients(device: str) -> float:
    """The largest relative difference between the norms of gradients, of this device and the CPU, in float64.

    Of a small model. Through the ReLUs of 101 random layers a change of 1e-7 moves gradients by one in a thousand.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        setting = make_setting(device, Path(folder), tiny=True)
        make_data(setting)
        both = [ours.training_proof(setting._replace(device=each), 2, "float64") for each in ("cpu", device)]
    return compare_training(*both, "float64")["largest_difference"]


def measure(setting: Setting, show: Callable[[str], None]) -> dict[str, Any]:
    """All figures, by precision."""
    device = torch.device(setting.device)
    report: dict[str, Any] = {"gradients": gradients(setting.device)}
    show(f"gradients: equal to the CPU's to {report['gradients']:.1e}")
    for precision in MEASURED:
        own = setting._replace(precision=precision)
        size = 8192 if device.type == "cuda" else 256
        matrix = torch.randn(size, size, device=device, dtype=PRECISIONS[precision])
        figures: dict[str, Any] = {"matrix product": max(
            flop_rate(lambda matrix=matrix: matrix @ matrix, 2, own.our_steps, own.device) for _ in range(5))}
        report[precision] = figures
        kinds = [(kind, False) for kind in STEPS] + [(kind, True) for kind in COMPILED if precision == "bfloat16"
                                                     and device.type == "cuda"]
        for kind, compiled in kinds:
            name = f"{kind}{', --compile' * compiled}"
            figures[name] = measure_step(own, kind, compiled)
            show(f"{precision}, {name}: {figures[name]['captions/s']:.5g} captions/s")
        stage, kept, batch_size = STEPS["stage 1, features kept, batch 400"]
        loaded = own._replace(batch_size=(batch_size, 32))
        figures["with loading"] = {"stage 1, features kept, batch 400": ours.training(loaded, stage, kept),
                                   "stage 2, batch 32": ours.training(loaded, 2)}
        figures["search"] = {f"{n} pictures": measure_search(own, n) for n in SEARCHED}
        show(f"{precision}, with loading and search: {figures['with loading']} {figures['search']}")
    return report


def column(report: dict[str, Any]) -> str:
    """The figures as Markdown, for benchmarks/README.md: a row a step, the precisions beside each other."""
    lines = [f"{report['device']}, torch {report['torch']}:", "",
             "| | precision | captions/s | ms | CPU asks, ms | kernels | alone, ms | peak MB | of the matrix rate |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for precision in [each for each in PRECISIONS if each in report]:
        figures = report[precision]
        for name, row in figures.items():
            if isinstance(row, dict) and "ms" in row:
                share = "" if row["FLOP/s"] is None else f"{row['FLOP/s'] / figures['matrix product']:.0%}"
                numbers = ["" if row[key] is None else f"{row[key]:.4g}"
                           for key in ("captions/s", "ms", "host ms", "kernels", "kernels' ms", "peak MB")]
                lines.append(f"| {name} | {precision} | {' | '.join(numbers)} | {share} |")
        rates = [f"{name} with loading {rate:.4g} captions/s" for name, rate in figures["with loading"].items()]
        rates += [f"beam {BEAM_SIZE}, {name} at once {rate:.4g} pictures/s" for name, rate in figures["search"].items()]
        lines.append(f"| {'; '.join(rates)} | {precision} | | | | | | | |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Measures, writes the JSON file, prints the table and returns the report."""
    began = time.monotonic()
    gpu = torch.device(args.device).type == "cuda"
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        setting = make_setting(args.device, Path(folder), args.tiny)
        make_data(setting)
        report = {"device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
                  "torch": torch.__version__, "tiny": args.tiny,
                  **measure(setting, lambda line: print(line, file=sys.stderr, flush=True))}
    report["minutes"] = (time.monotonic() - began) / 60
    with atomic_write(args.json) as file:
        json.dump(report, file, indent=2)
    print(column(report))
    return report


if __name__ == "__main__":
    main(get_parser().parse_args())
