"""Where a run of train.py stands, and the watch over an epoch: its losses, its progress bar, when to save and stop."""
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models import Losses
from safety.errors import InputError
from safety.flags import STAGE_3
from safety.signals import SIGNALS, Stopped, handle_signals
from utils import World, any_signal, progress_bar

SIGNAL_STEPS = 10  # of several GPUs, from one look for signals to the next: it takes 2 to 4 % of a short step


def no_losses() -> list[float]:
    return [0.0] * len(Losses._fields)


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint's `training` holds beside the optimizers and the flags."""

    stage: int
    best_bleu4: float = -1.0
    log: list[dict[str, Any]] = field(default_factory=list)     # a row for each epoch of all stages
    epochs_since_improvement: int = 0
    epoch: int = 0                                              # epochs of this stage that are done
    step: int = 0                                               # batches of the next one that are done
    sums: list[float] = field(default_factory=no_losses)        # of those, as `Losses` orders them
    seconds: float = 0.0                                        # that they took
    best_cider: float = -1.0                                    # which stage 3 goes by

    @property
    def score(self) -> str:
        """What decides which epoch is the best."""
        return "CIDEr" if self.stage == 3 else "BLEU-4"

    @property
    def best_shown(self) -> str:
        return f"CIDEr {max(self.best_cider, 0):.3f}" if self.stage == 3 else f"BLEU-4 {max(self.best_bleu4, 0):.2f}"

    def __post_init__(self) -> None:
        self.sums = self.sums + no_losses()[len(self.sums):]  # an older checkpoint's lack the last ones

    def restart_epoch(self) -> None:
        self.step, self.sums, self.seconds = 0, no_losses(), 0.0

    def finish_epoch(self, row: dict[str, Any]) -> bool:
        """Adds an epoch's row to the log; returns whether it is the best so far."""
        name = "cider" if self.stage == 3 else "bleu4"
        best = getattr(self, f"best_{name}")
        improved = row[name] > best
        self.epochs_since_improvement = 0 if improved else self.epochs_since_improvement + 1
        setattr(self, f"best_{name}", max(row[name], best))
        self.log = [*self.log, row]
        self.epoch += 1
        self.restart_epoch()
        return improved


def for_stage(args: dict[str, Any], name: str, stage: int) -> Any:
    """A flag's value for a stage: the stage's own, or the one for stages 1 and 2.

    Stage 3 never takes another's: a rate that is right for cross entropy ruins it.
    """
    if stage == 3:
        return args[name][2] if len(args[name]) > 2 else STAGE_3[name]
    return args[name][min(stage, len(args[name])) - 1]


def tunes_encoder(args: dict[str, Any], stage: int) -> bool:
    return stage == 2 or (stage == 3 and args["fine_tune_encoder"])


def epoch_line(row: dict[str, Any], progress: Progress, epochs: int) -> str:
    """What an epoch that is over says of itself."""
    learnt, best = f"train loss {row['train_loss']:.3f}", f"best {progress.best_bleu4:.2f}"
    if progress.stage == 3:
        learnt = f"reward {row['reward']:.3f}"
        best = (f"CIDEr {row['cider']:.3f}, {row['length']:.1f} words, {row['bad_endings']:.1f} % bad endings, "
                f"best {progress.best_cider:.3f}")
    return (f"stage {progress.stage}, epoch {progress.epoch} of {epochs}: {learnt}, val loss {row['val_loss']:.3f} "
            f"({row['val_cross_entropy']:.3f} words, {row['val_doubly_stochastic']:.3f} attention), top-5 "
            f"{row['val_top5']:.1f} %, entropy {row['alpha_entropy']:.2f} of at most "
            f"{row['alpha_entropy_even']:.2f}, BLEU-4 {row['bleu4']:.2f} generated "
            f"({row['bleu4_teacher_forced']:.2f} teacher-forced), {best}, {row['seconds']:.0f} s")


def mean_loss(sums: list[float], alpha_c: float, where: str = "") -> float:
    """The loss per word and caption. Raises InputError where it is NaN or infinite."""
    totals = Losses(*sums)
    loss = totals.mean(totals, alpha_c)
    if not math.isfinite(loss):
        raise InputError(f"{where}the loss is {loss} (of words {totals.cross_entropy / totals.words}, of attention "
                         f"{alpha_c * totals.doubly_stochastic / totals.captions}): is a learning rate too high? The "
                         "last checkpoint is good; resume from it with a lower one")
    return loss


class Watch:
    """Watches over an epoch: `batches` gives what is left of it, and `after_step` takes what a step returned.

    Within it signals wait for the end of a step; on several GPUs, whose steps are short, of every tenth and of the
    last. A checkpoint is saved every --checkpoint_minutes, after the last step (validation takes a while, too) and
    before the epoch is stopped.
    """

    def __init__(self, args: argparse.Namespace, world: World, progress: Progress, steps: int,
                 save: Callable[[], None]) -> None:
        self.args, self.world, self.progress, self.steps, self.save = args, world, progress, steps, save
        self.pending: list[Tensor] = []     # sums of batches that were not looked at yet: a look waits for the GPU
        self.first_step = progress.step
        self.signal_steps = SIGNAL_STEPS if world.size > 1 and world.device.type == "cuda" else 1
        self.waited = 0.0                   # for data

    def __enter__(self) -> Watch:
        self.stack = ExitStack()
        self.stack.enter_context(handle_signals(lambda _: None))
        name = f"stage {self.progress.stage}, epoch {self.progress.epoch + 1}"
        self.bar = self.stack.enter_context(progress_bar(None, name, "batch", self.world.rank == 0, total=self.steps,
                                                         initial=self.first_step))
        self.began = self.saved = self.ready = time.monotonic()
        self.seconds_before = self.progress.seconds
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def batches(self, loader: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        for step, batch in enumerate(loader, self.first_step):
            self.waited += time.monotonic() - self.ready
            yield step, batch
        if SIGNALS:  # one that came after the last step
            raise Stopped(SIGNALS[0])
        self.progress.seconds = self.seconds_before + time.monotonic() - self.began

    def after_step(self, sums: Tensor) -> None:
        """Takes a step's sums over all processes. Raises Stopped where a signal asks for it, once all is saved."""
        self.pending.append(sums)
        self.progress.step += 1
        self.ready = time.monotonic()
        last = self.progress.step == self.steps
        # By the step's number, as all ranks must ask together.
        stopped = any_signal(self.world) if last or self.progress.step % self.signal_steps == 0 else 0
        due = stopped or last or self.ready - self.saved > 60 * self.args.checkpoint_minutes
        shown = {}
        if due or (self.progress.step - 1) % self.args.print_freq == 0:
            shown = self.look_at_losses()
        if due:
            self.save()
            self.saved = time.monotonic()
        self.bar.update()  # after the checkpoint, as is all that is printed
        if shown:
            self.bar.set_postfix(shown)
        if stopped:
            any_signal(self.world)  # waits until rank 0 has saved
            raise Stopped(stopped)

    def look_at_losses(self) -> dict[str, str]:
        """Adds up the sums that are pending; returns what to show of them."""
        progress, alpha_c = self.progress, self.args.alpha_c
        for i, sums in enumerate(torch.stack(self.pending).tolist(), progress.step + 1 - len(self.pending)):
            mean_loss(sums, alpha_c, f"stage {progress.stage}, epoch {progress.epoch + 1}, batch {i}: ")
            progress.sums = [total + value for total, value in zip(progress.sums, sums, strict=True)]
        self.pending = []
        spent = time.monotonic() - self.began
        progress.seconds = self.seconds_before + spent
        loss, totals = mean_loss(progress.sums, alpha_c), Losses(*progress.sums)
        return {**({"reward": f"{totals.reward / totals.captions:.3f}"} if progress.stage == 3 else
                   {"loss": f"{loss:.3f}"}),
                "captions/s": f"{totals.captions / progress.seconds:.0f}",
                "waiting for data": f"{self.waited / spent:.0%}"}
