"""Training in two stages: first the decoder on a frozen encoder, then both, from the best checkpoint of the first. A
third, only where it is asked for, rewards whole captions.

    python train.py                                        # both stages, on the GPU if there is one
    torchrun --nproc_per_node=8 train.py                   # eight GPUs, and a batch eight times as large
    python train.py @recipes/tuned.txt                     # flags from a file; those after it win
    python train.py --checkpoint auto                      # resumes the run in this folder, or begins one
    python train.py --stage 3 --checkpoint BEST_...        # self-critical training of what the others trained
    sbatch recipes/slurm.sh                                # two nodes of four GPUs under Slurm

Each epoch ends with a validation, a line in log_*.jsonl, the curves and the gaze as pictures, and a checkpoint. Ctrl-C,
SIGTERM and a terminal that goes away save one too, and say how to resume. Started like this, it resumes by itself where
a process failed (the variable lets restarted processes find each other):

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc_per_node=8 --max_restarts=3 train.py

Read a step first, then the epoch, the validation, the stages, what they are made of, and the flags.
"""
from __future__ import annotations

import argparse
import json
import math
import shlex
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nltk.translate import bleu_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_packed_sequence

import datasets
from caption import Captioner, Search, beam_search
from datasets import CaptionDataset, EpochSampler, Pictures, augment, encode, image_loader, loader_options
from eval import bad_endings, bleu, cider
from models import (
    ATTENTIONS,
    DECODERS,
    Decoded,
    DecoderWithAttention,
    HardAttention,
    Losses,
    build,
    caption_losses,
    teacher_forced,
)
from safety.checkpoints import load_weights, save_checkpoint
from safety.devices import cpu_advice
from safety.errors import InputError, UsageError, printable, reason, run_script
from safety.files import atomic_write
from safety.flags import integer, real
from safety.loader import Loader
from safety.pictures import check_pixels
from safety.restore import restore
from training.curves import draw_curves
from training.features import keep_features
from training.gaze import draw_gaze, shown_pictures
from training.progress import Progress, Watch, epoch_line, for_stage, mean_loss, tunes_encoder
from training.resume import (
    AUTO,
    GOES_ON,
    OutputFiles,
    claimed_output_folder,
    first_checkpoint,
    fits,
    launch_id,
    output_files,
    read_checkpoint,
    resume_command,
)
from training.self_critical import SAMPLES, SelfCritical
from utils import (
    World,
    add_device_flags,
    adjust_learning_rate,
    autocast,
    broadcast,
    gather_in_order,
    load_embeddings,
    loader_workers,
    progress_bar,
    setup_world,
    sum_over,
)

PATIENCE = 20                    # a stage ends after so many epochs without a better BLEU-4, stage 3 CIDEr
DECAY_EVERY, DECAY = 8, 0.8      # the learning rates shrink after so many, by this factor
WARM_UP = 100                    # steps in which --schedule cosine brings the learning rates up
VALIDATION_BATCH = 64            # pictures, with all their captions


class Run(NamedTuple):
    """What stays the same from beginning to end."""

    args: argparse.Namespace
    files: OutputFiles
    world: World                  # this process among others, and its device
    precision: str
    print0: Callable[..., None]   # print, on rank 0
    word_map: dict[str, int]
    train: CaptionDataset
    val: CaptionDataset
    val_references: list[list[list[str]]]


class Training(NamedTuple):
    """Models and optimizers of a stage."""

    model: nn.Module                              # TeacherForcing or SelfCritical; with several processes, wrapped
    captioner: Captioner                          # the same encoder and decoder
    optimizers: dict[str, torch.optim.Optimizer]  # "decoder", and "encoder" where it is tuned
    scaler: torch.amp.GradScaler                  # of float16's loss; in other precisions it does nothing
    arguments: dict[str, Any]                     # with which `models.build` builds encoder and decoder again


# A Progress says where a stage stands: `epoch` (how many are done), `step`, `sums` and `seconds` of the one under way,
# `best_bleu4` or `best_cider`, `epochs_since_improvement`, and `log`, a row for each epoch of all stages.


# ---- a step ----------------------------------------------------------------------------------------------------------

class TeacherForcing(nn.Module):
    """Pictures and captions to losses: the one module that DistributedDataParallel wraps. In stage 3 it is SelfCritical
    (training/self_critical.py), where the gradient of self-critical training is one line."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor, captions: Tensor, lengths: Tensor, sampling: float,
                label_smoothing: float) -> Losses:
        """Images (N, 3, 256, 256) bytes, or kept features; captions (N, L) or (N, 5, L); lengths (N, 1) or (N, 5)."""
        device = next(self.decoder.parameters()).device
        features = encode(self.encoder, self.decoder, images, device)           # (N, h, w, C)
        captions = captions.flatten(0, -2).to(device, non_blocking=True)        # (N, L) as it is, or (N * 5, L)
        decoded = teacher_forced(self.decoder, features, captions, lengths.view(-1, 1), sampling)
        attention = getattr(self.decoder, "attention", None)
        return caption_losses(decoded, label_smoothing, getattr(attention, "baseline", None))


def train_step(run: Run, training: Training, batch: tuple[Tensor, ...], sampling: float = 0.0,
               has_share: bool = True) -> Tensor:
    """One step of gradient descent.

    Args:
        sampling: see `teacher_forced`.
        has_share: False where the batch is a dummy item, because an epoch's last batch has none for this process.

    Returns:
        The sums of the batch over all processes, as `Losses` orders them.
    """
    images, captions, lengths = batch
    images = run.train.look_up(images)
    if run.args.augment and "encoder" in training.optimizers:                   # where it is tuned
        images = augment(images.to(run.world.device, non_blocking=True))
    with autocast(run.world.device, run.precision):
        losses = training.model(images, captions, lengths, sampling, run.args.label_smoothing)
    sums = sum_over(torch.stack(losses).detach().double() * has_share, run.world)   # of all processes
    loss = losses.mean(Losses(*sums), run.args.alpha_c) * has_share                 # this process's part of the mean
    loss = loss * run.world.size  # DistributedDataParallel takes the mean of the gradients; the parts must add up

    for optimizer in training.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    training.scaler.scale(loss).backward()  # in float16 small gradients would become 0, so the loss is scaled up
    for optimizer in training.optimizers.values():
        training.scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_value_(learning_parameters(training), run.args.grad_clip)
    for optimizer in training.optimizers.values():
        training.scaler.step(optimizer)  # leaves the step out where a gradient is infinite or NaN
    training.scaler.update()
    attention = getattr(training.captioner.decoder, "attention", None)
    if isinstance(attention, HardAttention) and attention.training:
        attention.move_baseline(sums[0] / sums[3])  # cross entropy, words
    return sums


def learning_parameters(training: Training) -> list[nn.Parameter]:
    return [each for optimizer in training.optimizers.values() for each in optimizer.param_groups[0]["params"]]


# ---- an epoch --------------------------------------------------------------------------------------------------------

def train_epoch(run: Run, training: Training, loader: Loader, progress: Progress) -> dict[str, Any]:
    """One pass over the captions, or what is left of it; returns the first half of the log's row."""
    args, sampler = run.args, loader.batch_sampler  # an EpochSampler
    epochs = for_stage(vars(args), "epochs", progress.stage)
    sampling = args.scheduled_sampling * progress.epoch / max(epochs - 1, 1)
    sampler.epoch, sampler.first_step = progress.epoch, progress.step  # as far as a run that is resumed had come
    training.model.train()
    # Gives the batches from first_step on, adds up their losses in progress.sums, shows them, saves from time to time,
    # and raises Stopped after Ctrl-C.
    with Watch(args, run.world, progress, sampler.steps, lambda: save(run, training, progress)) as watch:
        for step, batch in watch.batches(loader):
            # Seeded by its place, a step draws the same dropout whether or not the run was interrupted before it.
            place = (args.seed, progress.stage, progress.epoch, step, run.world.rank)
            torch.manual_seed(zlib.crc32(repr(place).encode()))
            if args.schedule == "cosine":
                share = cosine(progress.epoch * sampler.steps + step, epochs * sampler.steps)
                for name, rate in learning_rates(vars(args), progress.stage).items():
                    set_learning_rate(training, name, share * rate)
            watch.after_step(train_step(run, training, batch, sampling, sampler.has_share(step)))
    sums = Losses(*progress.sums)
    row = {"stage": progress.stage, "epoch": progress.epoch + 1, "train_loss": mean_loss(progress.sums, args.alpha_c),
           "captions_per_second": sums.captions / progress.seconds, "seconds": progress.seconds,
           "decoder_lr": training.optimizers["decoder"].param_groups[0]["lr"]}
    return row | ({"reward": sums.reward / sums.captions} if progress.stage == 3 else {})


def learning_rates(args: dict[str, Any], stage: int) -> dict[str, float]:
    """The rates at a stage's beginning, by optimizer; `args` are this run's flags, or those of a checkpoint's run."""
    rates = {"decoder": for_stage(args, "decoder_lr", stage)}
    return rates | {"encoder": args["encoder_lr"]} if tunes_encoder(args, stage) else rates


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step of a stage: up in a line, down along half a cosine (arXiv 1608.03983)."""
    return min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / steps)) / 2)


# ---- a validation ----------------------------------------------------------------------------------------------------

@torch.inference_mode()
def validate(model: Captioner, dataset: CaptionDataset, loader: Loader,
             world: World) -> tuple[Losses, float, list[list[str]]]:
    """What training asks after each epoch. Every picture is encoded once, for all its captions and for the search.

    Args:
        loader: the data set's `image_loader`.

    Returns:
        The sums of the losses with the true words as input, the tutorial's BLEU-4 of the words predicted that way, and
        for each picture a caption generated freely (beam 1), as words.
    """
    encoder, decoder, word_map, _ = model
    decoder.eval()
    sums = torch.zeros(len(Losses._fields), dtype=torch.float64, device=world.device)
    predicted, generated = [], []
    for images, captions, lengths in progress_bar(loader, "validation", "batch", world.rank == 0):
        with autocast(world.device, model.precision):
            features = encode(encoder, decoder, dataset.look_up(images), world.device)  # (N, h, w, C)
            captions = captions.flatten(0, 1).to(world.device)                          # (N * 5, L)
            decoded = teacher_forced(decoder, features, captions, lengths.view(-1, 1))
            found = beam_search(decoder, features, word_map, Search(beam_size=1), with_alphas=False)
        sums += torch.stack(caption_losses(decoded))
        words = predicted_words(decoded)
        predicted += [words[i:i + dataset.cpi] for i in range(0, len(words), dataset.cpi)]  # by picture
        generated += [best.words for best, *_ in found]
    sums = sum_over(sums, world)
    predicted, generated = gather_in_order(predicted, world), gather_in_order(generated, world)
    bleu4 = broadcast(teacher_forced_bleu(dataset, predicted, word_map) if world.rank == 0 else None, world)
    return Losses(*sums.tolist()), bleu4, generated


def predicted_words(decoded: Decoded) -> list[list[int]]:
    """For each caption the most probable word after each true one, as ids; captions as they were before the sorting."""
    predicted = decoded.scores._replace(data=decoded.scores.data.argmax(dim=1))
    words = pad_packed_sequence(predicted, batch_first=True)[0].tolist()
    return [words[i][:decoded.decode_lengths[i]] for i in decoded.order.argsort().tolist()]


def teacher_forced_bleu(dataset: CaptionDataset, predicted: list[list[list[int]]], word_map: dict[str, int]) -> float:
    """BLEU-4 as the original tutorial reports it: of predictions that were given the true words before each."""
    special = {word_map["<start>"], word_map["<pad>"]}
    true = [[word for word in caption if word not in special] for caption in dataset.captions.tolist()]
    # Each of a picture's five predictions is held against its five captions.
    references = [true[i:i + dataset.cpi] for i in range(0, len(true), dataset.cpi) for _ in range(dataset.cpi)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk's, of a model that has no 4-gram right yet
        return 100 * float(bleu_score.corpus_bleu(references, [words for picture in predicted for words in picture]))


def validate_epoch(run: Run, training: Training, loader: Loader) -> tuple[dict[str, Any], list[str]]:
    """The second half of the log's row, and lines with three captions to look at."""
    losses, bleu4_teacher_forced, captions = validate(training.captioner, run.val, loader, run.world)
    lines = [printable(f"  picture {i}: {' '.join(captions[i])}   (people: {' '.join(run.val_references[i][0])})")
             for i in shown_pictures(run.val)]
    even = 2 * math.log(training.arguments["encoded_image_size"])  # ln P: the entropy of a gaze that is even
    scores = run.world.rank == 0 and {"bleu4": bleu(run.val_references, captions)[3],
                                      "cider": cider(run.val_references, captions)[0]}
    return {"val_loss": mean_loss(losses, run.args.alpha_c), "val_cross_entropy": losses.cross_entropy / losses.words,
            "val_doubly_stochastic": losses.doubly_stochastic / losses.captions,
            "val_top5": 100 * losses.top5 / losses.words, "alpha_entropy": losses.entropy / losses.words,
            "alpha_entropy_even": even,
            **broadcast(scores, run.world), "bleu4_teacher_forced": bleu4_teacher_forced,
            "length": sum(map(len, captions)) / len(captions), "bad_endings": bad_endings(captions)}, lines


# ---- the stages ------------------------------------------------------------------------------------------------------

def run_stage(run: Run, progress: Progress, start: dict[str, Any] | None) -> None:
    """Epochs of training and validation until there is no more progress; `start` is the checkpoint to begin from."""
    args, world, stage = run.args, run.world, progress.stage
    epochs, tunes = for_stage(vars(args), "epochs", stage), tunes_encoder(vars(args), stage)
    training = build_training(run, stage, start)
    for dataset in (run.train, run.val):
        dataset.features = None
        if args.cache_features and not tunes:
            keep_features(dataset, training.captioner, args.workers, world.rank == 0)  # sets dataset.features
    loader, val_loader = training_loader(run, stage), image_loader(run.val, VALIDATION_BATCH, args.workers, world)
    if stage == 3 and progress.best_cider < 0:  # unknown; but no worse model may replace the one that it begins with
        progress.best_cider = validate_epoch(run, training, val_loader)[0]["cider"]
        if not run.files.best.exists():
            save(run, training, progress, improved=True)
    items = f"{SAMPLES} captions drawn of each of {run.train.n_images} pictures" if stage == 3 else (
        f"{len(run.train)} captions")
    run.print0(f"stage {stage} ({'encoder too' if tunes else 'decoder only'}): {items} in "
               f"{loader.batch_sampler.steps} batches, {world.size} x {world.device} in {run.precision}; begins at "
               f"epoch {progress.epoch + 1}, batch {progress.step + 1}; best {progress.best_shown} so far, "
               f"{progress.epochs_since_improvement} epochs without a better one")


    while progress.epoch < epochs and progress.epochs_since_improvement < PATIENCE:
        row = train_epoch(run, training, loader, progress)
        began = time.monotonic()
        scores, examples = validate_epoch(run, training, val_loader)
        row |= scores
        row["seconds"] += time.monotonic() - began
        # One epoch more is done: the row goes into progress.log, best and patience are brought up to date.
        improved = progress.finish_epoch(row)
        if args.schedule == "plateau" and not improved and progress.epochs_since_improvement % DECAY_EVERY == 0:
            for optimizer in training.optimizers.values():
                adjust_learning_rate(optimizer, DECAY)
        save(run, training, progress, improved)
        if world.rank == 0:
            draw_gaze(training.captioner, run.val, run.files.gaze, f"epoch {len(progress.log)}")
        run.print0("\n".join(examples))  # only now, with all in its files
        run.print0(epoch_line(row, progress, epochs))
    why = "all its epochs are done" if progress.epoch >= epochs else f"no better {progress.score} for {PATIENCE} epochs"
    run.print0(f"stage {stage} is over, {why}. Best {progress.best_shown}: {run.files.best}")


def training_loader(run: Run, stage: int) -> Loader:
    """Batches of captions, or of whole pictures; in stage 3 always of these, for each of which captions are drawn."""
    args, world, whole = run.args, run.world, run.args.whole_images or stage == 3
    items = Pictures(run.train) if whole else run.train
    captions_each = SAMPLES if stage == 3 else run.train.cpi if whole else 1
    order = 2 * args.seed + stage  # another in each stage
    # Of a picture the longest of its captions: it is decoded as long as that.
    bucket = args.bucket and stage < 3
    lengths = torch.from_numpy(run.train.caplens).view(-1, captions_each).amax(dim=1) if bucket else None
    batch_size = max(1, for_stage(vars(args), "batch_size", stage) // captions_each)
    sampler = EpochSampler(len(items), batch_size, order, world.rank, world.size, lengths)
    return Loader(items, batch_sampler=sampler, **loader_options(args.workers, world))


def save(run: Run, training: Training, progress: Progress, improved: bool = False) -> None:
    """Checkpoint, log and curves. The checkpoint last: a run killed before repeats the epoch, and writes all again."""
    if run.world.rank > 0:
        return
    encoder, decoder, *_ = training.captioner
    models = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    if not all(bool(each.isfinite().all()) for weights in models.values() for each in weights.values()):
        raise InputError(f"stage {progress.stage}, epoch {progress.epoch + 1}, batch {progress.step}: some weights are "
                         "NaN or infinite. The last checkpoint is good; resume from it with a lower learning rate")
    epoch_ended = progress.epoch > 0 and progress.step == 0  # else this is within an epoch, for a resume
    scores = progress.log[-1] if epoch_ended else {}  # a row of the log is of the weights at its epoch's end
    optimizers = {name: optimizer.state_dict() for name, optimizer in training.optimizers.items()}
    checkpoint = {**models, "word_map": run.word_map, "model": training.arguments,
                  "preprocessing": encoder.pixels.described(), "scores": scores,
                  "training": {**vars(progress), "optimizers": optimizers,
                               "scaler": training.scaler.state_dict(),  # of float16 alone; else empty
                               "args": vars(run.args), "world_size": run.world.size,
                               "launch": launch_id()}}  # by which processes that torchrun restarts know their own run
    if improved:
        save_checkpoint(run.files.best, checkpoint)
    if epoch_ended:
        with atomic_write(run.files.log) as file:
            file.writelines(json.dumps(row) + "\n" for row in progress.log)
        draw_curves(progress.log, run.files.curves)
    save_checkpoint(run.files.checkpoint, checkpoint)


# ---- models and optimizers -------------------------------------------------------------------------------------------

def build_training(run: Run, stage: int, start: dict[str, Any] | None) -> Training:
    """Models and optimizers, new ones or those of a checkpoint; the same on every process."""
    args, world = run.args, run.world
    torch.manual_seed(args.seed)
    if start:
        arguments = {**start["model"], "dropout": args.dropout}  # the others are fixed by the weights
        encoder, decoder = restore({**start, "model": arguments}, args.checkpoint or run.files.best)
    else:
        arguments, encoder, decoder = new_models(run)
    encoder.fine_tune(tunes_encoder(vars(args), stage))
    if args.freeze_embeddings:
        decoder.fine_tune_embeddings(False)
    encoder, decoder = encoder.to(world.device), decoder.to(world.device)
    if args.compile:
        encoder.resnet.compile()  # in place: the names of its weights stay
        decoder.step = torch.compile(decoder.step, dynamic=True)  # of ever fewer captions, by one program
    model: nn.Module = TeacherForcing(encoder, decoder)
    if stage == 3:
        captions = torch.from_numpy(run.train.captions).long().view(run.train.n_images, run.train.cpi, -1)
        model = SelfCritical(encoder, decoder, run.word_map, captions.to(world.device))
    if world.size > 1:
        model = DistributedDataParallel(model)  # gives all ranks the weights and buffers of rank 0
        model.broadcast_buffers = False  # not at every step again: BatchNorm is in eval mode

    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.Adam([each for each in {"encoder": encoder, "decoder": decoder}[name].parameters()
                                if each.requires_grad], lr=rate, fused=True)
        for name, rate in learning_rates(vars(args), stage).items()}
    scaler = torch.amp.GradScaler(world.device.type, enabled=run.precision == "float16")
    training = Training(model, Captioner(encoder, decoder, run.word_map, run.precision), optimizers, scaler, arguments)
    if start and start["training"]:  # the original tutorial's checkpoints, and published ones, have none
        for name in load_optimizers(training, start["training"], args, stage):
            run.print0(f"what the checkpoint says of the {name}'s Adam does not fit the weights, so it begins anew")
    return training


def load_optimizers(training: Training, before: dict[str, Any], args: argparse.Namespace, stage: int) -> list[str]:
    """Adam's averages and learning rates from a checkpoint; the rates only if the flags ask for the same as its did.
    A later stage takes those of the checkpoint that it begins from: stage 2 the decoder's, the encoder's being new.

    Returns:
        Those that do not fit, and begin anew: weights do not need them.
    """
    unfit = []
    if before.get("scaler"):
        training.scaler.load_state_dict(before["scaler"])
    for name, rate in learning_rates(vars(args), stage).items():
        if name in before["optimizers"]:
            if not fits(training.optimizers[name], before["optimizers"][name]):
                unfit.append(name)
                continue
            training.optimizers[name].load_state_dict(before["optimizers"][name])
            same_rate = learning_rates(before["args"], before["stage"])[name] == rate
            same_schedule = before["args"].get("schedule", args.schedule) == args.schedule
            if not (same_rate and same_schedule):  # else it stays where it had decayed to
                set_learning_rate(training, name, rate)
    return unfit


def set_learning_rate(training: Training, name: str, rate: float) -> None:
    training.optimizers[name].param_groups[0]["lr"] = rate


def new_models(run: Run) -> tuple[dict[str, Any], nn.Module, nn.Module]:
    """Arguments of `models.build`, and what it built: a pretrained encoder, and a decoder with random weights."""
    args = run.args
    embeddings = None
    if args.embeddings:
        embeddings, found = load_embeddings(args.embeddings, run.word_map)
        run.print0(f"{args.embeddings}: {found} of {len(run.word_map)} words found, in {embeddings.size(1)} dimensions")
    arguments = {"encoder": args.encoder, "encoded_image_size": args.encoded_image_size, "decoder": args.decoder,
                 "attention_dim": args.attention_dim, "decoder_dim": args.decoder_dim, "dropout": args.dropout,
                 "embed_dim": args.emb_dim if embeddings is None else embeddings.size(1),
                 "vocab_size": len(run.word_map)}
    for name, default in (("attention", "soft"), ("encoder_stride", 32)):
        if getattr(args, name) != default:  # else a checkpoint is as it was before there was a choice
            arguments[name] = getattr(args, name)
    if args.encoder_stride < 32:
        arguments["unit_features"] = True  # checkpoints of before this was found do not have it
    try:
        encoder, decoder = build(arguments, encoder_weights(args, run.world))
        size = broadcast(encoder.pixels.image_size, run.world)  # rank 0's, which alone has the weights
        if encoder.pixels.image_size != size:
            encoder, decoder = build(arguments, None, size)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--encoder {args.encoder} --encoder_weights {args.encoder_weights}: "
                         f"{reason(error)}") from error
    if embeddings is not None:
        decoder.load_pretrained_embeddings(embeddings)
    return {**arguments, "encoder_dim": encoder.encoder_dim}, encoder, decoder


def encoder_weights(args: argparse.Namespace, world: World) -> str | dict[str, Tensor] | None:
    """What --encoder_weights names, on rank 0: the others get its weights."""
    weights = args.encoder_weights
    if weights == "none" or world.rank > 0:
        return None
    return load_weights(weights) if Path(weights).is_file() else weights


# ---- the command -----------------------------------------------------------------------------------------------------

def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains, and returns the rows of the log."""
    check_arguments(args)
    world, precision = setup_world(args.device, args.precision)
    torch.backends.cudnn.benchmark = True  # on a GPU, tries each convolution's algorithms once, and takes the fastest
    if world.rank == 0:
        for line in cpu_advice(world.device, args.device, precision):
            print(line)
        if names := unused_flags(args):
            print(f"stage {args.stage} alone does not use {', '.join(names)}")
    word_map = datasets.load_word_map(args.data_folder, args.data_name)
    with claimed_output_folder(args, world) as checkpoint:
        # The checkpoint that the flag names or stands for, or after a restart by torchrun the run's own. In a copy:
        # `resume_command` is told of the flags as they were given.
        args = argparse.Namespace(**{**vars(args), "checkpoint": checkpoint,
                                     "workers": loader_workers(args.workers, world.device)})
        train, val = (CaptionDataset(args.data_folder, args.data_name, split) for split in ("TRAIN", "VAL"))
        if not (len(train) and len(val)):
            raise InputError(f"{args.data_folder}: the splits TRAIN and VAL need pictures, and one of them has none")
        check_pixels(train.images, str(train.path))
        return run_stages(Run(args, output_files(args), world, precision,
                              print if world.rank == 0 else lambda *_: None, word_map, train, val,
                              val.references(word_map)))


def run_stages(run: Run) -> list[dict[str, Any]]:
    """The stages that the flags ask for; returns the rows of the log.

    Without --checkpoint a stage begins anew, and of both stages the second from the best checkpoint of the first. With
    it, the checkpoint's own stage is resumed where it stopped; a later stage begins from its weights, and stage 3 from
    those of the best checkpoint beside it.
    """
    args = run.args
    # The defaults tell which flags were given: one that contradicts the checkpoint's model is refused. Without a
    # checkpoint start and progress are None.
    start, progress, messages = first_checkpoint(args, run.word_map, run.world, get_parser().get_default)
    for message in messages:
        run.print0(message)
    for stage in (1, 2) if args.stage == "both" else (int(args.stage),):
        if progress and stage < progress.stage:
            continue
        if progress and progress.stage < stage and args.stage in ("both", "3"):  # from the best checkpoint so far
            start = read_checkpoint(run.files.best, run.word_map, run.world)
            run.print0(f"stage {stage} begins with {run.files.best}")
            progress.best_bleu4 = start["scores"].get("bleu4", -1.0)  # somebody may have put another file there
        if not progress:  # from nothing, or from weights alone
            progress = Progress(stage)
        elif progress.stage < stage:  # else the checkpoint's own stage is resumed
            progress = Progress(stage, progress.best_bleu4, progress.log, best_cider=start["scores"].get("cider", -1.0))
        run_stage(run, progress, start)
    return progress.log


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses, before anything is loaded, flags that do not go together."""
    if args.decoder not in DECODERS:
        raise UsageError(f"--decoder {args.decoder}: there is {', '.join(DECODERS)}; docs/take_it_apart.md shows "
                         "how to add one")
    if args.attention != "soft" and not issubclass(DECODERS[args.decoder], DecoderWithAttention):
        raise UsageError(f"--attention {args.attention}: the decoder {args.decoder} is no DecoderWithAttention; leave "
                         "the flag out")
    for name in ("epochs", "batch_size", "decoder_lr"):
        if len(getattr(args, name)) > 3:
            raise UsageError(f"--{name} takes one number for stages 1 and 2, or one for each, and a third for stage 3")
    if args.freeze_embeddings and not args.embeddings and args.checkpoint in (None, AUTO):  # which may begin anew
        raise UsageError("--freeze_embeddings freezes pretrained embeddings; name their file with --embeddings")
    if (args.embeddings or args.freeze_embeddings) and not hasattr(DECODERS[args.decoder], "fine_tune_embeddings"):
        raise UsageError(f"--embeddings, --freeze_embeddings: the decoder {args.decoder} has no fine_tune_embeddings, "
                         "load_pretrained_embeddings; leave them out")
    if args.stage in GOES_ON and not args.checkpoint:
        raise UsageError(f"--stage {args.stage} goes on with what an earlier stage trained; name its best checkpoint "
                         "with --checkpoint")


def unused_flags(args: argparse.Namespace) -> list[str]:
    """Those that the chosen stage does not use: a recipe serves every stage."""
    if args.stage == "both":
        return []
    tunes = tunes_encoder(vars(args), int(args.stage))
    unused = ("cache_features",) if tunes else ("augment", "encoder_lr")
    if args.stage == "3":
        unused += ("alpha_c", "bucket", "label_smoothing", "scheduled_sampling")
    return [f"--{name}" for name in unused if getattr(args, name) != get_parser().get_default(name)]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [@FILE] [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@")  # python train.py @recipes/tuned.txt
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    add = parser.add_argument_group("as in the original tutorial").add_argument
    add("--data_folder", default="data", metavar="DIR", help="what create_input_files.py made (default: data)")
    add("--data_name", default="coco_5_cap_per_img_5_min_word_freq", metavar="NAME",
        help="base name of those files (default: coco_5_cap_per_img_5_min_word_freq)")
    add("--emb_dim", type=integer(1), default=512, metavar="N", help="dimensions of the word embeddings (default: 512)")
    add("--attention_dim", type=integer(1), default=512, metavar="N",
        help="dimensions of the attention network (default: 512)")
    add("--decoder_dim", type=integer(1), default=512, metavar="N", help="dimensions of the LSTM (default: 512)")
    add("--dropout", type=real(0, 1, "[)"), default=0.5, metavar="P", help="before the vocabulary layer (default: 0.5)")
    add("--epochs", type=integer(1), nargs="+", default=[20, 120], metavar="N",
        help="at most, by stage (default: 20 120 20)")
    add("--batch_size", type=integer(1), nargs="+", default=[80, 32], metavar="N",
        help="captions per process, by stage (default: 80 32 80)")
    add("--workers", type=integer(0), metavar="N",
        help="processes that read pictures (default: 4 at most for a GPU, 0 on a CPU)")
    add("--encoder_lr", type=real(0, ends="()"), default=1e-4, metavar="R",
        help="Adam's rate for the encoder (default: 1e-4)")
    add("--decoder_lr", type=real(0, ends="()"), nargs="+", default=[4e-4], metavar="R",
        help="Adam's rate for the decoder, by stage; one number is for stages 1 and 2, as is one of --epochs and "
        "--batch_size (default: 4e-4 4e-4 5e-5)")
    add("--grad_clip", type=real(0, ends="()"), default=5.0, metavar="G",
        help="each gradient is cut off at plus and minus this (default: 5)")
    add("--alpha_c", type=real(0), default=1.0, metavar="W", help="weight of the doubly stochastic term (default: 1)")
    add("--print_freq", type=integer(1), default=100, metavar="N",
        help="batches between two looks at the loss (default: 100)")
    add("--fine_tune_encoder", action=FineTuneEncoder, nargs=0, default=False,
        help="the same as --stage 2; with --stage 3, tune the encoder there too")
    add("--checkpoint", metavar="FILE|auto",
        help="resume from here, or, where it is of other data, begin from its weights; auto: resume the run's own in "
        "--output_folder, and begin where there is none")
    add_more_flags(parser)
    return parser


class FineTuneEncoder(argparse.Action):
    """Names stage 2, unless it is stage 3 that is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, *_: Any) -> None:
        args.fine_tune_encoder, args.stage = True, "3" if args.stage == "3" else "2"


def add_more_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data and model").add_argument
    add("--output_folder", default=".", metavar="DIR", help="checkpoints, log, curves (default: this folder)")
    add("--encoder", default="resnet101", metavar="NAME",
        help="a torchvision model, timm:NAME, efficientnet_lite0 or efficientnet_lite2 (default: resnet101)")
    add("--encoder_weights", default="IMAGENET1K_V1", metavar="NAME|FILE|none",
        help="torchvision's name (of timm's models the name tells them), a file, or none for random ones (default: "
        "IMAGENET1K_V1)")
    add("--encoder_stride", type=int, choices=(16, 32), default=32, metavar="16|32",
        help="pixels from one region of the encoder's map to the next; 32: its last map, 16: the last that fine "
        "(default: 32)")
    add("--encoded_image_size", type=integer(1, 256), default=14, metavar="N",
        help="the encoder's map is brought to N x N pixels (default: 14)")
    add("--decoder", default="lstm", metavar="NAME",
        help="lstm, or one that you add to models.DECODERS (default: lstm)")
    add("--attention", choices=tuple(ATTENTIONS), default="soft",
        help="soft: the weighted mean of all regions; hard: one region, drawn for each word; mean: none, all regions "
        "weigh the same (default: soft)")
    add("--embeddings", metavar="FILE", help="pretrained word vectors in GloVe's text format; sets --emb_dim")
    add("--freeze_embeddings", action="store_true", help="leave the pretrained word vectors as they are")
    add = parser.add_argument_group("training").add_argument
    add("--stage", choices=("1", "2", "3", "both"), default="both",
        help="1: decoder only; 2: fine-tuning of the encoder too, from --checkpoint; both in turn; 3: self-critical "
        "training, from the best checkpoint of the run that --checkpoint is of, or of other data from that file "
        "(default: both)")
    add("--whole_images", action="store_true",
        help="batches of pictures with all their captions: each picture is encoded once an epoch, not once a caption")
    add("--bucket", action="store_true",
        help="batches of captions of like length: fewer steps of decoding, another order")
    add("--cache_features", action="store_true",
        help="where it is frozen, keep what the encoder makes of each picture beside the data, and never encode it "
        "again")
    add("--scheduled_sampling", type=real(0, 1), default=0.0, metavar="P",
        help="probability of feeding the model's own word, reached linearly at a stage's last epoch (default: 0)")
    add("--label_smoothing", type=real(0, 1, "[)"), default=0.0, metavar="S",
        help="share of the true word's probability that the training target gives to all words alike (default: 0)")
    add("--schedule", choices=("plateau", "cosine"), default="plateau",
        help="learning rates fall where BLEU-4 (stage 3: CIDEr) stands still, or within 100 steps rise and then along "
        "half a cosine fall to 0 over a stage's epochs (default: plateau)")
    add("--augment", action="store_true",
        help="where the encoder is tuned, mirror, crop and recolour the pictures at random")
    add("--seed", type=integer(0, 2 ** 32 - 1), default=0, metavar="N",
        help="for first weights, order of captions and dropout (default: 0)")
    add = parser.add_argument_group("running").add_argument
    add("--checkpoint_minutes", type=real(0, math.inf), default=15, metavar="M",
        help="save within an epoch too (default: 15)")
    add_device_flags(add)
    add("--compile", action="store_true",
        help="torch.compile the encoder and a decoding step: some minutes at first; not always faster")


if __name__ == "__main__":
    run_script(main, get_parser(), resume_command)
