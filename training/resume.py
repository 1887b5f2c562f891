"""How a run of train.py is resumed: whose output folder it is, what it may resume from, and the command to say so."""
from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from safety.checkpoints import load_checkpoint
from safety.errors import InputError
from safety.files import atomic_write, lock, naming_write_errors, remove_stale, unwritable
from training.progress import Progress, for_stage
from utils import World, broadcast, gather

AUTO = "auto"  # --checkpoint auto, see `checkpoint_to_resume`
GOES_ON = {"2": 2, "3": 3}  # --stage: those that begin from the best checkpoint of an earlier stage
LOCK_SECONDS = 10  # to wait until another run leaves the folder
# Flags that may change without a word: they do not change what is learned, or (the model's) the checkpoint has them.
FREE_TO_CHANGE = {"data_folder", "output_folder", "checkpoint", "checkpoint_minutes", "workers", "device", "compile",
                  "stage", "print_freq", "epochs", "decoder", "encoder", "encoder_weights", "encoder_stride",
                  "encoded_image_size", "embeddings", "emb_dim", "attention_dim", "decoder_dim", "attention"}
# What a resume reads of a checkpoint's `training`, of the `args` therein and of each row of its `log`.
TOLD = {"stage": int, "best_bleu4": Real, "log": list, "epochs_since_improvement": int, "epoch": int, "step": int,
        "sums": list, "seconds": Real, "optimizers": dict, "args": dict, "world_size": int, "best_cider": Real}
FLAGS = {"data_name": str, "freeze_embeddings": bool, "batch_size": list, "whole_images": bool, "seed": int,
         "decoder_lr": list, "encoder_lr": Real}
DRAWN = {"stage", "train_loss", "val_loss", "bleu4", "bleu4_teacher_forced"}


class OutputFiles(NamedTuple):
    """What a run writes, by --output_folder and --data_name."""

    folder: Path
    name: str

    def path(self, prefix: str, suffix: str) -> Path:
        return self.folder / f"{prefix}_{self.name}{suffix}"

    checkpoint = property(lambda self: self.path("checkpoint", ".pth.tar"))
    best = property(lambda self: self.path("BEST_checkpoint", ".pth.tar"))
    log = property(lambda self: self.path("log", ".jsonl"))
    curves = property(lambda self: self.path("curves", ".png"))
    gaze = property(lambda self: self.path("gaze", ".png"))


def output_files(args: argparse.Namespace) -> OutputFiles:
    return OutputFiles(Path(args.output_folder), args.data_name)


# ---- the output folder -----------------------------------------------------------------------------------------------

@contextmanager
def claimed_output_folder(args: argparse.Namespace, world: World) -> Iterator[str | None]:
    """Keeps the output folder for this run; gives the checkpoint to resume from, the same on all ranks.

    Rank 0 decides for all, and refuses a folder that belongs to another run, or in which another run is at work. Where
    a process fails, torchrun starts all of them again by the same command: that resumes from the run's own checkpoint.
    """
    files = output_files(args)
    restarted = any(gather(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", world))
    resumed_from = refusal = held = None
    if world.rank == 0:
        path = files.checkpoint
        resumed_from = checkpoint_to_resume(args, restarted)
        refusal = conflict(args, resumed_from)
        created = not files.folder.exists()
        if not refusal:
            with naming_write_errors(path):
                files.folder.mkdir(parents=True, exist_ok=True)
                held = lock_folder(path.with_name(f".{path.name}.run.tmp"))
            resumed_from = checkpoint_to_resume(args, restarted)  # again: who held it may have saved a checkpoint
            refusal = (conflict(args, resumed_from) if held else
                       f"another run is at work on {path}; let it end, or name another --output_folder")
        remove_stale(files.best)  # the other files are written, and so tidied up after, every epoch
        warn_of_lost_restarts()
    resumed_from, refusal = broadcast((resumed_from, refusal), world)
    try:
        if refusal:
            raise InputError(refusal)
        yield resumed_from
    finally:
        if held:
            with suppress(OSError):  # Windows lets nobody remove an open file
                Path(held.name).unlink()  # closing it is not enough: a DataLoader's worker may have it, too
            held.close()
            if created:
                with suppress(OSError):  # it is not empty
                    files.folder.rmdir()


def checkpoint_to_resume(args: argparse.Namespace, restarted: bool) -> str | None:
    """The checkpoint that a run begins from; None if it begins anew.

    `--checkpoint auto` stands for the run's own checkpoint, if there is one; of `--stage 2` or `3`, until that has one
    itself, for the best of the stage before. So a job that a cluster starts again is the same command.
    """
    files = output_files(args)
    path = files.checkpoint
    if args.checkpoint == AUTO:
        if args.stage in GOES_ON and (not path.exists() or in_earlier_stage(path, args.stage)):
            path = files.best
        return str(path) if path.exists() else None
    if restarted and launch_id() and path.exists() and training_of(path).get("launch") == launch_id():
        return str(path)
    return args.checkpoint


def training_of(path: Path) -> dict[str, Any]:
    """What a checkpoint tells of its run: nothing, if it is damaged, which is said when it is resumed."""
    with suppress(InputError):
        training = load_checkpoint(path)["training"]
        return training if isinstance(training, dict) else {}
    return {}


def in_earlier_stage(path: Path, stage: str) -> bool:
    """Whether a checkpoint is of a stage before --stage."""
    return stage in GOES_ON and training_of(path).get("stage", GOES_ON[stage]) < GOES_ON[stage]


def conflict(args: argparse.Namespace, resumed_from: str | None) -> str | None:
    """Why a run cannot have the folder; None if it can."""
    files = output_files(args)
    if args.stage in GOES_ON and not resumed_from:
        return (f"{files.best} is not there, and --stage {args.stage} goes on with what an earlier stage trained; "
                "train that first, or name its best checkpoint with --checkpoint")
    existing = [path for path in (files.checkpoint, files.best) if path.exists()]
    if existing and not resumed_from:
        return (f"{existing[0]} holds a run already: resume it with --checkpoint {existing[0]}, or name another "
                "--output_folder for a new one")
    if files.checkpoint.exists() and files.folder.resolve() != Path(resumed_from).parent.resolve():
        return f"{files.checkpoint} belongs to another run than {resumed_from}; name another --output_folder"
    return unwritable(files.folder)  # better now than after the first epoch


def lock_folder(path: Path) -> IO[str] | None:
    """Opens and locks a file, or gives up: the DataLoader workers of a run that was killed hold it some seconds."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        file = open(path, "w")
        if lock(file, wait=False) and os.fstat(file.fileno()).st_nlink:  # else its holder just removed it
            return file
        file.close()
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)


def launch_id() -> str | None:
    """What all processes have in common that one torchrun command starts, and starts again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {platform.node()} {os.getppid()}"


def warn_of_lost_restarts() -> None:
    if (os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
            and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        print("restarted processes will not find each other (PyTorch's issue 135712); start with "
              "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone (several nodes: --rdzv_backend=c10d)")


def resume_command(args: argparse.Namespace) -> str:
    """What a stopped run says last: which checkpoint has it, and the command that resumes it."""
    path = output_files(args).checkpoint
    again = "stopped before the first checkpoint; the same command starts again"
    if not path.exists():
        return again
    if in_earlier_stage(path, args.stage):  # its last epoch; the flags name the best
        return again
    command = sys.orig_argv
    if {"TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        command = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *sys.argv]
        command[1:1] = [f"--nnodes={nodes}", "..."] if nodes > 1 else []
    if args.checkpoint != AUTO and command[-2:] != ["--checkpoint", str(path)]:
        command = [*command, "--checkpoint", str(path)]
    return f"stopped; the run is in {path}, resume it with: {shlex.join(command)}"


# ---- the checkpoint --------------------------------------------------------------------------------------------------

def read_checkpoint(path: str | Path, word_map: dict[str, int], world: World) -> dict[str, Any]:
    """A checkpoint, read by rank 0 for all (other nodes need not see the file)."""
    state = broadcast(load_checkpoint(path, word_map, mapped=False) if world.rank == 0 else None, world)
    check_told(state, path)
    if state["word_map"] != word_map:
        raise InputError(f"{path} was trained with {len(state['word_map'])} words, the data have {len(word_map)}, "
                         "or others in another order; prepare these data with its words by create_input_files.py "
                         f"--word_map {path}, or train on those that it was made for")
    return state


def check_told(state: dict[str, Any], path: str | Path) -> None:
    """Refuses to resume from a checkpoint that tells of its run otherwise than train.py does; captions need none of
    that, so they do not ask."""
    scores, training = state["scores"], state["training"]
    wrong = [] if isinstance(scores, dict) and all(
        isinstance(scores.get(name, 0.0), Real) for name in ("bleu4", "cider")) else ["scores"]
    if training is not None:
        told = {"best_cider": -1.0, **training} if isinstance(training, dict) else {}  # which older ones do not tell
        wrong += [name for name, kind in TOLD.items() if not isinstance(told.get(name), kind)]
        if not wrong:
            wrong += [name for name, kind in FLAGS.items() if not isinstance(told["args"].get(name), kind)]
            wrong += [f"row {i} of log" for i, row in enumerate(told["log"], 1)
                      if not isinstance(row, dict) or not DRAWN <= row.keys()]
    if wrong:
        raise InputError(f"{path}: what it tells of {', '.join(wrong)} is not what train.py writes; get the file "
                         "again, or name another")


def first_checkpoint(args: argparse.Namespace, word_map: dict[str, int], world: World, default: Callable[[str], Any],
                     ) -> tuple[dict[str, Any] | None, Progress | None, list[str]]:
    """The checkpoint to resume from, if one is named, how far it is, and what to say of the flags."""
    if args.checkpoint is None:
        return None, None, []
    start, files, messages = read_checkpoint(args.checkpoint, word_map, world), output_files(args), []
    check_model(start, args, default)
    if start["training"] and (before := start["training"]["args"]["data_name"]) != args.data_name:
        messages.append(f"{args.checkpoint} was trained on {before}: with its weights, training on {args.data_name} "
                        "begins anew")
        start["training"] = None  # its epochs and its best score are of other pictures
    if start["training"]:
        return start, *check_resume(start, args, world)
    for path in (files.best, files.checkpoint):
        if path.exists() and (path == files.best or path.resolve() != Path(args.checkpoint).resolve()):
            raise InputError(f"{path} would be overwritten, as {args.checkpoint} tells no score to beat on these data; "
                             "name another --output_folder")
    return start, None, messages


def check_model(start: dict[str, Any], args: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Refuses a checkpoint of another model than the flags ask for; a flag at its default asks for none."""
    model = {"decoder": "lstm", "attention": "soft", "encoder_stride": 32, **start["model"]}
    model["emb_dim"] = args.emb_dim if args.embeddings else model.get("embed_dim")
    for name in ("encoder", "encoder_stride", "encoded_image_size", "decoder", "attention", "emb_dim", "attention_dim",
                 "decoder_dim"):
        if getattr(args, name) not in (model.get(name), default(name)):
            raise InputError(f"{args.checkpoint} holds a model with --{name} {model.get(name)}, and not "
                             f"{getattr(args, name)}; resume with the same, or without the flag")


def check_resume(start: dict[str, Any], args: argparse.Namespace, world: World) -> tuple[Progress, list[str]]:
    """How far a checkpoint's run is, and what to say of the flags that it is resumed with; or refuses these."""
    training, files, messages = start["training"], output_files(args), []
    progress = Progress(**{each.name: training[each.name] for each in fields(Progress) if each.name in training})
    if progress.stage > (2 if args.stage == "both" else int(args.stage)):
        raise InputError(f"{args.checkpoint} is in stage {progress.stage} already; resume with --stage "
                         f"{progress.stage}")
    before = training["args"]
    if before["freeze_embeddings"] != args.freeze_embeddings:  # which parameters learn
        raise InputError(f"{args.checkpoint} was made with --freeze_embeddings {before['freeze_embeddings']}; "
                         "resume with the same")
    if world.rank == 0:
        check_not_behind(progress, args)
        progress.best_bleu4, progress.best_cider = copy_best(start, args.checkpoint, files)
        progress.log = extend_log(progress, args.stage, files)
    progress.best_bleu4, progress.best_cider = broadcast((progress.best_bleu4, progress.best_cider), world)
    then = batches_of(before, progress.stage, training["world_size"])
    now = batches_of(vars(args), progress.stage, world.size)
    others = ", ".join(f"{name} {then[name]}" for name in then if then[name] != now[name])
    if others and progress.step:
        progress.restart_epoch()
        messages.append(f"its batches were others ({others}), so epoch {progress.epoch + 1} begins again")
    elif then["processes"] != now["processes"]:
        messages.append(f"resumed with another number of processes than before ({then['processes']}), and so with "
                        "other batches; the learning rates stay")
    free = FREE_TO_CHANGE - ({"epochs"} if args.schedule == "cosine" or args.scheduled_sampling else set())
    if progress.stage < 3:  # where it only names stage 2
        free = free | {"fine_tune_encoder"}
    changed = [f"--{name} {value} (was {before[name]})" for name, value in vars(args).items()
               if name not in free and value != before.get(name, value)]
    if changed:
        messages.append(f"resumed with other flags than before: {', '.join(changed)}")
    return progress, messages


def batches_of(args: dict[str, Any], stage: int, processes: int) -> dict[str, Any]:
    """What decides which captions the n-th batch of an epoch holds."""
    whole, bucket = stage == 3 or args["whole_images"], stage < 3 and args.get("bucket", False)
    return {"--batch_size": for_stage(args, "batch_size", stage), "--whole_images": whole, "--bucket": bucket,
            "--seed": args["seed"], "processes": processes}


def check_not_behind(progress: Progress, args: argparse.Namespace) -> None:
    """Refuses to go back in a run's own folder, where the next checkpoint would replace the newer one."""
    path, newest = output_files(args).checkpoint, vars(progress)
    if path.exists():
        newest = {**newest, **training_of(path)}  # a damaged one may be replaced
    here, furthest = ([each[name] for name in ("stage", "epoch", "step")] for each in (vars(progress), newest))
    if here < furthest and not in_earlier_stage(path, args.stage):  # whose best this stage begins from
        raise InputError(f"{path} is further (stage {newest['stage']}, {newest['epoch']} epochs done) than "
                         f"{args.checkpoint}, and would be replaced; resume with --checkpoint {path}, or name another "
                         "--output_folder")


def extend_log(progress: Progress, stage: str, files: OutputFiles) -> list[dict[str, Any]]:
    """The log up to a checkpoint. Where a stage begins from the best epoch of an earlier one, those after it are kept.
    """
    if progress.stage < GOES_ON.get(stage, 0) and files.log.is_file():
        with suppress(ValueError, TypeError, KeyError):  # a damaged one begins anew
            rows = [json.loads(line) for line in files.log.read_text(encoding="utf-8").splitlines()]
            rows = [row for row in rows if row["stage"] < GOES_ON[stage]]
            if rows[:len(progress.log)] == progress.log:
                return rows
    return progress.log


def copy_best(start: dict[str, Any], resumed_from: str, files: OutputFiles) -> list[float]:
    """Copies the best checkpoint into a new output folder, where no later epoch may be better; returns its BLEU-4 and,
    where stage 3 chose it, its CIDEr (-1: not known)."""
    source = Path(resumed_from).with_name(files.best.name)
    best = [start["training"].get(f"best_{name}", -1.0) for name in ("bleu4", "cider")]
    if not source.is_file():
        source, best = Path(resumed_from), [start["scores"].get(name, -1.0) for name in ("bleu4", "cider")]
    if not files.best.exists():
        with open(source, "rb") as weights, atomic_write(files.best, "wb") as file:
            shutil.copyfileobj(weights, file)
    elif not files.checkpoint.exists() and not filecmp.cmp(source, files.best, shallow=False):
        raise InputError(f"{files.best} belongs to another run than {resumed_from}; name another --output_folder")
    return best


def fits(optimizer: torch.optim.Optimizer, state: Any) -> bool:
    """Whether a state is one of Adam, with averages of the same shapes."""
    try:
        (group,), parameters = state["param_groups"], optimizer.param_groups[0]["params"]
        return len(group["params"]) == len(parameters) and all(
            parameters[i].shape == each[average].shape for i, each in state["state"].items()
            for average in ("exp_avg", "exp_avg_sq"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):  # another optimizer's, or none
        return False
