"""How a run of train.py is stopped and taken up again: whose output folder it is, and what it may go on from."""
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
from pathlib import Path
from typing import IO, Any

from safety.checkpoints import load_checkpoint
from safety.errors import InputError
from safety.files import atomic_write, lock, naming_write_errors, remove_stale, unwritable
from utils import World, broadcast, gather

CLAIM_SECONDS = 10  # to wait until another run leaves the folder
UNBEGUN = {"step": 0, "sums": [0.0] * 5, "seconds": 0.0}  # of an epoch: batches seen, what `measure` gave, time
# Flags that may change without a word: they do not change what is learned, or (the model's) the checkpoint has them.
HARMLESS = {"data_folder", "output_folder", "checkpoint", "checkpoint_minutes", "workers", "device", "stage",
            "print_freq", "epochs", "encoder", "encoder_weights", "encoded_image_size", "embeddings", "emb_dim",
            "attention_dim", "decoder_dim"}


def output_path(args: argparse.Namespace, prefix: str, suffix: str = ".pth.tar") -> Path:
    return Path(args.output_folder) / f"{prefix}{args.data_name}{suffix}"


@contextmanager
def own_place(args: argparse.Namespace, world: World) -> Iterator[None]:
    """Keeps the output folder for this run. The first process decides for all what it goes on from, and refuses a
    folder that is not its own, or in which another run is at work.

    Where a process fails, torchrun starts all again by the same command: that goes on from the run's own checkpoint.
    """
    restarted = any(gather(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", world))
    refusal = held = None
    if world.rank == 0:
        there = output_path(args, "checkpoint_")
        if restarted and there.exists() and (load_checkpoint(there)["training"] or {}).get("launch") == launch():
            args.checkpoint = str(there)
        refusal = why_not_here(args, there)
        made = not there.parent.exists()
        if not refusal:
            with naming_write_errors(there):
                there.parent.mkdir(parents=True, exist_ok=True)
                held = claim(there.with_name(f".{there.name}.run.tmp"))
            if not held:
                refusal = f"another run is at work on {there}; let it end, or name another --output_folder"
        remove_stale(output_path(args, "BEST_checkpoint_"))  # the other files are written, and so tidied, every epoch
        elastic = os.environ.get
        if elastic("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and elastic("TORCHELASTIC_USE_AGENT_STORE") == "True":
            print("restarted processes will not find each other (PyTorch's issue 135712); start with "
                  "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone (several nodes: --rdzv_backend=c10d)")
    args.checkpoint, refusal = broadcast((args.checkpoint, refusal), world)
    try:
        if refusal:
            raise InputError(refusal)
        yield
    finally:
        if held:
            with suppress(OSError):  # Windows lets nobody remove an open file
                Path(held.name).unlink()  # closing it is not enough: a DataLoader's process may have it, too
            held.close()
            if made:
                with suppress(OSError):  # it is not empty
                    there.parent.rmdir()


def why_not_here(args: argparse.Namespace, there: Path) -> str | None:
    """Why the folder of the run's checkpoint cannot be its own; None if it can."""
    held = [each for each in (there, output_path(args, "BEST_checkpoint_")) if each.exists()]
    if held and not args.checkpoint:
        return (f"{held[0]} holds a run already: go on with --checkpoint {held[0]}, or name another --output_folder "
                "for a new one")
    if there.exists() and there.parent.resolve() != Path(args.checkpoint).parent.resolve():
        return f"{there} belongs to another run than {args.checkpoint}; name another --output_folder"
    return unwritable(there.parent)  # better now than after the first epoch


def claim(path: Path) -> IO[str] | None:
    """Opens and locks a file, or gives up: of a run that was killed, the processes that read hold it some seconds."""
    tries_until = time.monotonic() + CLAIM_SECONDS
    while True:
        file = open(path, "w")
        if lock(file, wait=False) and os.fstat(file.fileno()).st_nlink:  # else its holder just removed it
            return file
        file.close()
        if time.monotonic() > tries_until:
            return None
        time.sleep(0.2)


def launch() -> str | None:
    """What all processes have in common that one torchrun command starts, and starts again."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {platform.node()} {os.getppid()}"


def how_to_go_on(args: argparse.Namespace) -> str:
    """What a stopped run says last: where it stands, and the command that takes it up again."""
    there = output_path(args, "checkpoint_")
    again = "stopped before the first checkpoint; the same command starts again"
    if not there.exists():
        return again
    if args.stage == "2":
        with suppress(InputError):  # a damaged one is named when it is taken up
            if load_checkpoint(there)["training"]["stage"] == 1:  # its last epoch; the flags name the best
                return again
    command = sys.orig_argv
    if "LOCAL_WORLD_SIZE" in os.environ:
        nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        command = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *sys.argv]
        command[1:1] = [f"--nnodes={nodes}", "..."] if nodes > 1 else []
    if command[-2:] != ["--checkpoint", str(there)]:
        command = [*command, "--checkpoint", str(there)]
    return f"stopped; the run stands in {there}, go on with: {shlex.join(command)}"


def read_checkpoint(path: str | Path, word_map: dict[str, int], world: World) -> dict[str, Any]:
    """A checkpoint, read by the first process for all (other nodes need not see the file)."""
    state = broadcast(load_checkpoint(path, word_map) if world.rank == 0 else None, world)
    if state["word_map"] != word_map:
        raise InputError(f"{path} was trained with {len(state['word_map'])} words, the data have {len(word_map)}, "
                         "or others in another order; train on the data that it was made for")
    return state


def check_model(start: dict[str, Any], args: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Refuses a checkpoint of another model than the flags ask for; a flag at its default asks for none."""
    model = {**start["model"], "emb_dim": args.emb_dim if args.embeddings else start["model"].get("embed_dim")}
    for name in ("encoder", "encoded_image_size", "emb_dim", "attention_dim", "decoder_dim"):
        if getattr(args, name) not in (model.get(name), default(name)):
            raise InputError(f"{args.checkpoint} holds a model with --{name} {model.get(name)}, and not "
                             f"{getattr(args, name)}; go on with the same, or without the flag")


def take_up(start: dict[str, Any], args: argparse.Namespace, world: World) -> list[str]:
    """Makes a checkpoint's `training` fit these flags, or refuses it. Returns what to say of that."""
    training = start["training"]
    if training["stage"] == 2 and args.stage == "1":
        raise InputError(f"{args.checkpoint} is in stage 2 already; go on without --stage 1")
    before, said = training["args"], []
    if before["freeze_embeddings"] != args.freeze_embeddings:  # who learns
        raise InputError(f"{args.checkpoint} was made with --freeze_embeddings {before['freeze_embeddings']}; "
                         "go on with the same")
    if world.rank == 0:
        check_not_behind(training, args)
        keep_best(start, args)
        keep_log(training, args)
    training["best_bleu4"] = broadcast(training["best_bleu4"], world)
    stood = batches_of(before, training["stage"], training["world_size"])
    stands = batches_of(vars(args), training["stage"], world.size)
    others = ", ".join(f"{name} {stood[name]}" for name in stood if stood[name] != stands[name])
    if others and training["step"]:
        training |= UNBEGUN
        said.append(f"its batches were others ({others}), so epoch {training['epoch'] + 1} begins again")
    elif stood["processes"] != stands["processes"]:
        said.append(f"going on with another number of processes than before ({stood['processes']}), and so with other "
                    "batches; the learning rates stay")
    harmless = HARMLESS - ({"epochs"} if args.schedule == "cosine" or args.scheduled_sampling else set())
    changed = [f"--{name} {value} (was {before[name]})" for name, value in vars(args).items()
               if name not in harmless and value != before.get(name, value)]
    if changed:
        said.append(f"going on with other flags than before: {', '.join(changed)}")
    return said


def batches_of(args: dict[str, Any], stage: int, world_size: int) -> dict[str, Any]:
    """What decides which captions the n-th batch of an epoch holds."""
    return {"--batch_size": of_stage(args["batch_size"], stage), "--whole_images": args["whole_images"],
            "--seed": args["seed"], "processes": world_size}


def check_not_behind(training: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuses to go back in a run's own folder, where the next checkpoint would replace the newer one."""
    there = output_path(args, "checkpoint_")
    newest = training
    if there.exists():
        with suppress(InputError):  # a damaged one may be replaced
            newest = load_checkpoint(there)["training"] or training
    place, newest_place = ([each[name] for name in ("stage", "epoch", "step")] for each in (training, newest))
    if place < newest_place and not (args.stage == "2" and newest["stage"] == 1):  # whose best stage 2 begins from
        raise InputError(f"{there} is further (stage {newest['stage']}, {newest['epoch']} epochs done) than "
                         f"{args.checkpoint}, and would be replaced; go on with --checkpoint {there}, or name another "
                         "--output_folder")


def keep_log(training: dict[str, Any], args: argparse.Namespace) -> None:
    """Where stage 2 begins from the best epoch of stage 1, the log keeps those after it."""
    log = output_path(args, "log_", ".jsonl")
    if training["stage"] == 1 and args.stage == "2" and log.is_file():
        with suppress(ValueError, TypeError, KeyError):  # a damaged one begins anew
            rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            rows = [row for row in rows if row["stage"] == 1]
            if rows[:len(training["log"])] == training["log"]:
                training["log"] = rows


def keep_best(start: dict[str, Any], args: argparse.Namespace) -> None:
    """Brings the best checkpoint along into a new output folder, where no later epoch may be better."""
    best = output_path(args, "BEST_checkpoint_")
    source = Path(args.checkpoint).with_name(best.name)
    if not source.is_file():
        source = Path(args.checkpoint)
        start["training"]["best_bleu4"] = start["scores"].get("bleu4", -1.0)
    if not best.exists():
        with open(source, "rb") as weights, atomic_write(best, "wb") as file:
            shutil.copyfileobj(weights, file)
    elif not output_path(args, "checkpoint_").exists() and not filecmp.cmp(source, best, shallow=False):
        raise InputError(f"{best} belongs to another run than {args.checkpoint}; name another --output_folder")


def stage_state(stage: int, start: dict[str, Any] | None) -> dict[str, Any]:
    """Where the stage stands: where a checkpoint of the same stage left it, or at its beginning."""
    before = start["training"] if start and start["training"] else {"stage": 0, "log": [], "best_bleu4": -1.0}
    if before["stage"] == stage:
        others = {"optimizers", "args", "world_size", "launch"}
        return {name: value for name, value in before.items() if name not in others}
    return {**UNBEGUN, "stage": stage, "epoch": 0, "epochs_since_improvement": 0, "best_bleu4": before["best_bleu4"],
            "log": before["log"]}


def of_stage(values: list[Any], stage: int) -> Any:
    """One value for both stages, or the stage's own."""
    return values[min(stage, len(values)) - 1]
