"""This project's speed beside that of a literal version of the tutorial, with the proof that both compute the same.

    python benchmarks/run.py                                   # everything, on this machine's best device
    python benchmarks/run.py --only stage1 evaluation --rounds 3 --json speed.json

Pictures, captions and weights are drawn from fixed seeds into a temporary folder; nothing is downloaded. Each side
runs in a process of its own, in turn with the other. First both compute the same in float32, or the benchmark stops;
then ours runs in --precision, the baseline in float32. The ratio is the median of the rounds' own ratios.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # where the scripts are; was this folder

import torch  # noqa: E402

from benchmarks.data import make_data  # noqa: E402
from benchmarks.proofs import (  # noqa: E402
    GPU_FLOAT32,
    TOLERANCE,
    ProofError,
    compare_captions,
    compare_files,
    compare_training,
)
from benchmarks.setting import Setting  # noqa: E402
from safety.devices import cpu_has_bfloat16  # noqa: E402
from safety.processes import cores  # noqa: E402
from utils import PRECISIONS, choose_precision  # noqa: E402

COCO = {  # work: what it is on COCO's Karpathy splits, and how many of its units that takes
    "preparation": ("all files, 24 GB of pixels", 123_287),
    "stage1_features_kept": ("an epoch of stage 1, 31 GB of features kept", 566_435),
    "stage1": ("an epoch of stage 1", 566_435),
    "stage2": ("an epoch of stage 2", 566_435),
    "evaluation": ("the test split, beam 5", 5_000),
}
Ask = Callable[..., Any]  # (side, name of a function of baseline.py and ours.py, its arguments) -> its result
WORKS = {  # work: unit, and what is counted
    "stage1_features_kept": ("captions/s", "training on a frozen encoder whose features are on disk, with loading"),
    "stage1": ("captions/s", "training on a frozen encoder, with loading"),
    "stage2": ("captions/s", "training of decoder and encoder, with loading"),
    "evaluation": ("pictures/s", "of a split, beam 5; the baseline searches each of them five times, as the tutorial"),
    "preparation": ("pictures/s", "from JPEG files to the training files"),
    "memory": ("MB", ""),  # by stage and device, see memory_counted
    "cold_caption": ("s", "from the command to the caption of one picture, files in the system's cache"),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(WORKS), default=list(WORKS), metavar="WORK", help=" ".join(WORKS))
    add("--rounds", type=int, default=5, metavar="N", help="each is one turn of both (default: 5)")
    add("--json", metavar="FILE", help="all figures, into a file")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=tuple(PRECISIONS), help="of ours (default: the fastest that the device has)")
    add("--encoder", default="resnet101", metavar="NAME", help="a ResNet of torchvision (default: resnet101)")
    add("--encoder_weights", default="none", metavar="NAME|none", help="torchvision's name (default: none, random)")
    add("--width", type=int, default=512, help="of embedding, attention and LSTM (default: 512)")
    add("--vocabulary", type=int, default=9490, metavar="WORDS", help="(default: 9490, as COCO's)")
    add("--batch_size", type=int, nargs=2, default=(80, 32), metavar="N", help="captions, by stage (default: 80 32)")
    add("--pictures", type=int, metavar="N", help="drawn; two thirds to train on (default: cpu 600, cuda 1600)")
    add("--steps", type=int, metavar="N", help="of the baseline, timed in a round (default: cpu 2, cuda 20)")
    add("--our_steps", type=int, metavar="N", help="of ours, timed in a round (default: cpu 4, cuda 60)")
    add("--warm_up", type=int, metavar="N", help="steps of a round before its clock starts (default: cpu 1, cuda 4)")
    add("--searched", type=int, metavar="N", help="pictures that the baseline searches in a round; ours searches all "
        "of the test split (default: cpu 3, cuda 20)")
    add("--proof_pictures", type=int, default=2, metavar="N", help="with all their captions (default: 2)")
    return parser


def fastest_precision(device: torch.device) -> str:
    """On a CPU not what the scripts take by themselves, which is float32, the exact one."""
    if device.type == "cpu":
        return "bfloat16" if cpu_has_bfloat16() else "float32"
    return choose_precision(device, None)


def make_setting(args: argparse.Namespace, folder: Path) -> Setting:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"pictures": (600, 1600), "steps": (2, 20), "our_steps": (4, 60), "warm_up": (1, 4), "searched": (3, 20)}
    chosen = {name: default[torch.device(device).type == "cuda"] if getattr(args, name) is None else getattr(args, name)
              for name, default in sizes.items()}
    if min(args.rounds, args.proof_pictures, args.width, *args.batch_size, *chosen.values()) < 1:
        raise ValueError("all sizes and --rounds are 1 or more")
    n_test = chosen["pictures"] - chosen["pictures"] * 2 // 3 - 2
    if max(chosen["searched"], args.proof_pictures) > n_test:
        raise ValueError(f"of {chosen['pictures']} --pictures the test split has {n_test}, fewer than --searched or "
                         "--proof_pictures asks for")
    weights = None if args.encoder_weights == "none" else args.encoder_weights
    precision = args.precision or fastest_precision(torch.device(device))
    return Setting(folder, device, precision, args.encoder, weights, args.width, args.vocabulary,
                   batch_size=tuple(args.batch_size), proof_pictures=args.proof_pictures, **chosen)


def call(side: str, function: str, arguments: tuple[Any, ...]) -> Any:
    """Runs a function of one side, in that side's process, and leaves the device to the other."""
    from benchmarks import baseline, ours
    try:
        return getattr({"baseline": baseline, "ours": ours}[side], function)(*arguments)
    finally:
        torch.cuda.empty_cache()


def start_workers_by(method: str) -> None:
    """Lets the loaders of a side start their workers as they do in a script; a spawned process would spawn them."""
    multiprocessing.set_start_method(method, force=True)


@contextmanager
def two_processes() -> Iterator[Ask]:
    """A fresh process for each side: what one sets (TF32, the allocator) or keeps is nothing to the other."""
    start = {"mp_context": multiprocessing.get_context("spawn"), "initializer": start_workers_by,
             "initargs": (multiprocessing.get_start_method(),)}
    with ProcessPoolExecutor(1, **start) as baseline, ProcessPoolExecutor(1, **start) as ours:
        def ask(side: str, function: str, *arguments: Any) -> Any:
            return {"baseline": baseline, "ours": ours}[side].submit(call, side, function, arguments).result()
        yield ask


def ask_both(ask: Ask, function: str, *arguments: Any) -> list[Any]:
    return [ask(side, function, *arguments) for side in ("baseline", "ours")]


# ---- the works: each proves that both sides compute the same, and then yields a pair of figures for each round -------

def prove_training(ask: Ask, setting: Setting, proofs: dict[str, Any], stage: int, features_kept: bool = False) -> None:
    for dtype in ("float32",) if features_kept else ("float32", "float64"):  # features are kept in float32
        name = f"stage{stage}{'_features_kept' if features_kept else ''}_{dtype}"
        if name not in proofs:
            pair = ask_both(ask, "training_proof", setting, stage, dtype, features_kept)
            on_gpu = torch.device(setting.device).type == "cuda" and dtype == "float32"
            proofs[name] = compare_training(*pair, dtype, GPU_FLOAT32 if on_gpu else TOLERANCE)


def training(setting: Setting, rounds: int, proofs: dict[str, Any], stage: int,
             features_kept: bool = False) -> Iterator[list[float]]:
    with two_processes() as ask:
        prove_training(ask, setting, proofs, stage, features_kept)
        for _ in range(rounds):
            yield [ask("baseline", "training", setting, stage),
                   ask("ours", "training", setting, stage, features_kept)]


def evaluation(setting: Setting, rounds: int, proofs: dict[str, Any]) -> Iterator[list[float]]:
    with two_processes() as ask:
        proofs["evaluation"] = compare_captions(*ask_both(ask, "evaluation_proof", setting))
        for _ in range(rounds):
            yield ask_both(ask, "evaluation", setting)


def preparation(setting: Setting, rounds: int, proofs: dict[str, Any]) -> Iterator[list[float]]:
    folder = setting.folder / "prepared"
    with two_processes() as ask:
        ask("baseline", "prepare", setting, folder)
        proofs["preparation"] = compare_files(folder, setting.data)
        for _ in range(rounds):
            pair = []
            for side in ("baseline", "ours"):
                shutil.rmtree(folder)
                pair.append(ask(side, "preparation", setting, folder))
            yield pair
    shutil.rmtree(folder)


def memory(setting: Setting, rounds: int, proofs: dict[str, Any], stage: int) -> Iterator[list[float]]:
    with two_processes() as ask:
        prove_training(ask, setting, proofs, stage)
    for _ in range(rounds):
        with two_processes() as ask:  # fresh ones, as only what a process grows by is seen
            yield [count / 1e6 for count in ask_both(ask, "memory", setting, stage)]


def cold_caption(setting: Setting, rounds: int, proofs: dict[str, Any]) -> Iterator[list[float]]:
    picture = setting.pictures_folder / "000000.jpg"
    with two_processes() as ask:
        checkpoints = dict(zip(("baseline", "ours"), ask_both(ask, "save_checkpoint", setting), strict=True))
        exact = setting._replace(device="cpu")  # on a GPU the baseline's convolutions are in TF32
        captions = {side: ask(side, "cold_caption", exact, path, picture,
                              *(["--precision", "float32"] if side == "ours" else []))[1]
                    for side, path in checkpoints.items()}
        if captions["baseline"] != captions["ours"]:
            raise ProofError(f"the scripts' captions differ: {captions}")
        proofs["cold_caption"] = captions["ours"]
        for _ in range(rounds):
            yield [ask(side, "cold_caption", setting, path, picture)[0] for side, path in checkpoints.items()]


def rounds_of(work: str, setting: Setting, rounds: int, proofs: dict[str, Any]) -> dict[str, Iterator[list[float]]]:
    """The rows of the table that a work fills, and each row's rounds."""
    if work.startswith("stage"):
        return {work: training(setting, rounds, proofs, int(work[5]), work.endswith("features_kept"))}
    if work == "memory":
        return {f"memory_stage{stage}": memory(setting, rounds, proofs, stage) for stage in (1, 2)}
    return {work: {"evaluation": evaluation, "preparation": preparation,
                   "cold_caption": cold_caption}[work](setting, rounds, proofs)}


# ---- the report ------------------------------------------------------------------------------------------------------

def figures_of(work: str, pairs: list[list[float]], counted: str) -> dict[str, Any]:
    """The rounds of a row, their medians, and the median of their ratios, ours to the baseline's."""
    baseline, ours = (list(side) for side in zip(*pairs, strict=True))
    return {"unit": WORKS[work][0], "counted": counted, "baseline": statistics.median(baseline),
            "ours": statistics.median(ours), "ratio": statistics.median(b / a for a, b in pairs),
            "baseline_rounds": baseline, "our_rounds": ours}


def memory_counted(setting: Setting, row: str) -> str:
    what = ("all that PyTorch held on the device" if torch.device(setting.device).type == "cuda" else
            "what the process grew by, with models and batch loaded: activations, gradients, Adam's averages")
    return f"peak of two training steps of stage {row[-1]}: {what}"


def machine(setting: Setting) -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    on_gpu = torch.device(setting.device).type == "cuda"
    return {"cpu": cpu, "cores": cores(), "gpu": torch.cuda.get_device_name(setting.device) if on_gpu else None,
            "torch": torch.__version__, "python": platform.python_version(), "commit": commit.stdout.strip() or None}


def markdown(rows: list[list[str]]) -> str:
    """A table, the first row its head, aligned so that it reads well as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return "\n".join(lines)


def shares(rates: dict[str, float], precision: str) -> str:
    """What share of the device's own matrix rate our works reach."""
    limit = rates["matrix product"]
    return (f"{limit / 1e12:.3g} TFLOP/s in a product of two large matrices of {precision}. Of that, ours reaches: "
            f"{', '.join(f'{rate / limit:.0%} ({name})' for name, rate in rates.items() if rate != limit)}.")


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures and what was counted, and what they mean for COCO."""
    rows = [[name, *(f"{row[key]:.4g}" for key in ("baseline", "ours", "ratio")), row["unit"]]
            for name, row in figures.items()]
    notes = [f"{name}: {row['counted']}" for name, row in figures.items()]
    hours = [[what, *(f"{count / rate / 3600:.3g}" for rate in (figures[work]["baseline"], figures[work]["ours"],
                                                                 8 * figures[work]["ours"]))]
             for work, (what, count) in COCO.items() if work in figures]
    coco = ["COCO on this machine, in hours, calculated from the rates above; on eight such devices if none waits for "
            "another:", "", markdown([["COCO", "baseline", "ours", "ours on eight"], *hours])] if hours else []
    return "\n".join([markdown([["work", "baseline", "ours", "ratio", "unit"], *rows]), "", *notes, "The ratio is ours "
                      "to the baseline's: of rates higher is better, of memory and cold_caption lower.", "", *coco])


def report_of(setting: Setting, rounds: int, figures: dict[str, dict[str, Any]], proofs: dict[str, Any],
              rates: dict[str, float]) -> dict[str, Any]:
    """What goes into the JSON file."""
    ratios = {work: max((row["ratio"] for name, row in figures.items()
                         if name == work or (work == "memory" and name.startswith("memory"))), default=None)
              for work in WORKS}  # of memory the worse stage; None: not run
    settings = {name: value for name, value in setting._asdict().items() if name != "folder"}
    return {"machine": machine(setting), "ratios": ratios, "figures": figures, "proofs": proofs, "flop_rates": rates,
            "setting": {**settings, "rounds": rounds}}


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the works, prints the table, and returns what goes into the JSON file."""
    figures: dict[str, dict[str, Any]] = {}
    proofs: dict[str, Any] = {}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        setting = make_setting(args, Path(folder))
        print(f"drawing {setting.pictures} pictures", file=sys.stderr, flush=True)
        make_data(setting)
        if any(work.startswith("stage") for work in args.only):
            with two_processes() as ask:
                rates = ask("ours", "arithmetic", setting)
        for work in args.only:
            for row, pairs in rounds_of(work, setting, args.rounds, proofs).items():
                done = []
                for pair in pairs:
                    done.append(pair)
                    print(f"{row}, round {len(done)} of {args.rounds}: baseline {pair[0]:.4g}, ours {pair[1]:.4g} "
                          f"{WORKS[work][0]}", file=sys.stderr, flush=True)
                counted = memory_counted(setting, row) if work == "memory" else WORKS[work][1]
                figures[row] = figures_of(work, done, counted)
            report = report_of(setting, args.rounds, figures, proofs, rates)
            if args.json:  # after each work, so that what stops a later one does not lose it
                Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    print(table(figures))
    if rates:
        print(f"\n{shares(rates, setting.precision)}")
    return report


if __name__ == "__main__":
    try:
        main(get_parser().parse_args())
    except (ProofError, ValueError) as error:
        sys.exit(f"run.py: {error}")
