"""Training in two stages: first the decoder on a frozen encoder, then both, from the best checkpoint of the first.

    python train.py                                        # both stages, on the GPU if there is one
    torchrun --nproc_per_node=8 train.py                   # eight GPUs, and a batch eight times as large
    python train.py @recipes/tuned.txt                     # flags from a file; those after it win
    python train.py --checkpoint checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar             # go on

Each epoch ends with a validation, a line in log_*.jsonl, the curves and the gaze as pictures, and a checkpoint. Ctrl-C
and SIGTERM save one too, and say how to go on. Started like this, it goes on by itself where a process failed:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc_per_node=8 --max_restarts=3 train.py
"""
from __future__ import annotations

import argparse
import json
import math
import shlex
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from caption import Captioner, caption_images
from datasets import (
    PREPROCESSING,
    CaptionDataset,
    EpochSampler,
    Pictures,
    augment,
    check_pixels,
    encode,
    load_word_map,
)
from drawing.panels import draw_sheet
from eval import bleu, measure, validate
from models import DecoderWithAttention, Encoder, build_models
from safety.checkpoints import save_checkpoint
from safety.errors import InputError, UsageError, printable, reason, run_script
from safety.files import atomic_write
from safety.signals import SIGNALS, Stopped, handle_signals, ignore_signals
from training.curves import draw_curves
from training.features import keep_features
from training.resume import (
    UNBEGUN,
    check_model,
    how_to_go_on,
    launch,
    of_stage,
    output_path,
    own_place,
    read_checkpoint,
    stage_state,
    take_up,
)
from utils import (
    World,
    adjust_learning_rate,
    autocast,
    broadcast_tensors,
    first_signal,
    load_embeddings,
    loader_workers,
    progress,
    setup_world,
    sum_gradients,
)

PATIENCE = 20                    # a stage ends after so many epochs without a better BLEU-4
DECAY_EVERY, DECAY = 8, 0.8      # the learning rates shrink after so many, by this factor
WARM_UP = 100                    # steps in which --schedule cosine brings the learning rates up


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [@FILE] [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     fromfile_prefix_chars="@")  # python train.py @recipes/tuned.txt
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    add = parser.add_argument_group("data").add_argument
    add("--data_folder", default="data", metavar="DIR", help="what create_input_files.py made (default: data)")
    add("--data_name", default="coco_5_cap_per_img_5_min_word_freq", metavar="NAME",
        help="base name of those files (default: coco_5_cap_per_img_5_min_word_freq)")
    add("--output_folder", default=".", metavar="DIR", help="checkpoints, log, curves (default: this folder)")
    add = parser.add_argument_group("model").add_argument
    add("--encoder", default="resnet101", metavar="NAME",
        help="a convolutional torchvision model, efficientnet_lite0 or efficientnet_lite2 (default: resnet101)")
    add("--encoder_weights", default="IMAGENET1K_V1", metavar="NAME|FILE|none",
        help="torchvision's name, a file, or none for random ones (default: IMAGENET1K_V1)")
    add("--encoded_image_size", type=int, default=14, metavar="N",
        help="the encoder's map is brought to N x N pixels (default: 14)")
    add("--emb_dim", type=int, default=512, metavar="N", help="size of the word embeddings (default: 512)")
    add("--attention_dim", type=int, default=512, metavar="N", help="size of the attention network (default: 512)")
    add("--decoder_dim", type=int, default=512, metavar="N", help="size of the LSTM (default: 512)")
    add("--dropout", type=float, default=0.5, metavar="P", help="before the vocabulary layer (default: 0.5)")
    add("--embeddings", metavar="FILE", help="pretrained word vectors in GloVe's text format; sets --emb_dim")
    add("--freeze_embeddings", action="store_true", help="leave the pretrained word vectors as they are")
    add = parser.add_argument_group("training").add_argument
    add("--stage", choices=("1", "2", "both"), default="both",
        help="1: decoder only; 2: fine-tuning of the encoder too, from --checkpoint; both in turn (default: both)")
    add("--fine_tune_encoder", action="store_const", const="2", dest="stage", help="the same as --stage 2")
    add("--epochs", type=int, nargs="+", default=[20, 120], metavar="N", help="at most, by stage (default: 20 120)")
    add("--batch_size", type=int, nargs="+", default=[80, 32], metavar="N",
        help="captions per process, by stage (default: 80 32)")
    add("--whole_images", action="store_true",
        help="batches of pictures with all their captions: each picture is encoded once an epoch, not once a caption")
    add("--cache_features", action="store_true",
        help="in stage 1, keep what the encoder makes of each picture beside the data, and never encode it again")
    add("--encoder_lr", type=float, default=1e-4, metavar="R", help="Adam's rate for the encoder (default: 1e-4)")
    add("--decoder_lr", type=float, nargs="+", default=[4e-4], metavar="R",
        help="Adam's rate for the decoder, by stage (default: 4e-4 in both)")
    add("--grad_clip", type=float, default=5.0, metavar="G",
        help="each gradient is cut off at plus and minus this (default: 5)")
    add("--alpha_c", type=float, default=1.0, metavar="W", help="weight of the doubly stochastic term (default: 1)")
    add("--scheduled_sampling", type=float, default=0.0, metavar="P",
        help="probability of feeding the model's own word, reached linearly at a stage's last epoch (default: 0)")
    add("--label_smoothing", type=float, default=0.0, metavar="S",
        help="share of the true word's probability that the training target gives to all words alike (default: 0)")
    add("--schedule", choices=("plateau", "cosine"), default="plateau",
        help="learning rates fall where BLEU-4 stands still, or within 100 steps rise and then along half a "
        "cosine fall to 0 over a stage's epochs (default: plateau)")
    add("--augment", action="store_true", help="in stage 2, mirror, crop and recolour the pictures at random")
    add("--seed", type=int, default=0, metavar="N",
        help="for first weights, order of captions and dropout (default: 0)")
    add = parser.add_argument_group("running").add_argument
    add("--checkpoint", metavar="FILE", help="go on from here")
    add("--checkpoint_minutes", type=float, default=15, metavar="M", help="save within an epoch too (default: 15)")
    add("--workers", type=int, metavar="N", help="processes reading pictures (default: 1 for a GPU, 0 on a CPU)")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=("bfloat16", "float32"),
        help="of matrix products (default: bfloat16 on a GPU that has it, else float32)")
    add("--print_freq", type=int, default=100, metavar="N", help="batches between two looks at the loss (default: 100)")
    return parser


class Run(NamedTuple):
    """What stays the same from beginning to end."""

    args: argparse.Namespace
    world: World
    precision: str
    say: Callable[..., None]      # print, on rank 0
    word_map: dict[str, int]
    train: CaptionDataset
    val: CaptionDataset
    val_references: list[list[list[str]]]


class Learner(NamedTuple):
    """What learns, and what teaches it."""

    encoder: Encoder
    decoder: DecoderWithAttention
    optimizers: dict[str, torch.optim.Optimizer]  # "decoder", and "encoder" in stage 2
    arguments: dict[str, Any]                     # rebuild encoder and decoder


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains, and returns the rows of the log."""
    check_arguments(args)
    world, precision = setup_world(args.device, args.precision)
    with own_place(args, world):
        return run_stages(args, world, precision)


def run_stages(args: argparse.Namespace, world: World, precision: str) -> list[dict[str, Any]]:
    """The stages that the flags ask for, from the checkpoint on that they name; returns the rows of the log."""
    args.workers = loader_workers(args.workers, world.device)
    word_map = load_word_map(args.data_folder, args.data_name)
    train, val = (CaptionDataset(args.data_folder, args.data_name, split) for split in ("TRAIN", "VAL"))
    if not (len(train) and len(val)):
        raise InputError(f"{args.data_folder}: the splits TRAIN and VAL need pictures, and one of them has none")
    check_pixels(train.images, str(train.path))
    run = Run(args, world, precision, print if world.rank == 0 else lambda *_: None, word_map, train, val,
              val.references(word_map))

    start = first_checkpoint(run)
    begun = start["training"]["stage"] if start and start["training"] else 0
    rows: list[dict[str, Any]] = []
    for stage in (1, 2) if args.stage == "both" else (int(args.stage),):
        if stage < begun:
            continue
        if stage == 2 and args.stage == "both" and begun < 2:
            start = read_checkpoint(output_path(args, "BEST_checkpoint_"), word_map, world)
            # With the epochs after the best one; and its own score, should it be another checkpoint in its place.
            start["training"] |= {"log": rows, "best_bleu4": start["scores"].get("bleu4", -1.0)}
        rows = run_stage(stage, start, run)
    return rows


def check_arguments(args: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is loaded."""
    for name in ("epochs", "batch_size", "decoder_lr"):
        values = getattr(args, name)
        if len(values) > 2 or min(values) <= 0:
            raise UsageError(f"--{name} takes one number for both stages or two, one for each, above 0")
    sizes = ("emb_dim", "attention_dim", "decoder_dim", "encoded_image_size", "print_freq")
    if min(getattr(args, name) for name in sizes) < 1 or (args.workers or 0) < 0 or args.encoded_image_size > 256:
        raise UsageError(f"--{', --'.join(sizes)} are 1 or more, --workers 0 or more, --encoded_image_size 256 or less")
    if not (0 <= args.dropout < 1 and 0 <= args.label_smoothing < 1 and 0 <= args.scheduled_sampling <= 1):
        raise UsageError("--dropout and --label_smoothing are from 0 to below 1, --scheduled_sampling from 0 to 1")
    if not (all(0 < rate < math.inf for rate in (args.encoder_lr, *args.decoder_lr, args.grad_clip))
            and 0 <= args.alpha_c < math.inf and 0 <= args.checkpoint_minutes and 0 <= args.seed < 2 ** 32):
        raise UsageError("--encoder_lr, --decoder_lr and --grad_clip are above 0, --alpha_c and --checkpoint_minutes "
                         "0 or more, --seed from 0 to 4294967295")
    if args.freeze_embeddings and not args.embeddings and not args.checkpoint:
        raise UsageError("--freeze_embeddings freezes pretrained embeddings; name their file with --embeddings")
    if args.augment and args.stage == "1":
        raise UsageError("--augment changes the pictures of stage 2, and --stage 1 leaves that out")
    if args.stage == "2" and not args.checkpoint:
        raise UsageError("--stage 2 fine-tunes what stage 1 trained; name its best checkpoint with --checkpoint")


def first_checkpoint(run: Run) -> dict[str, Any] | None:
    """The checkpoint to go on from, if one is named. Says which flags are not those that it was made with."""
    if run.args.checkpoint is None:
        return None
    start = read_checkpoint(run.args.checkpoint, run.word_map, run.world)
    check_model(start, run.args, get_parser().get_default)
    best = output_path(run.args, "BEST_checkpoint_")
    if start["training"]:
        for line in take_up(start, run.args, run.world):
            run.say(line)
    elif best.exists():  # and the first epoch, whatever it scores, would replace it
        raise InputError(f"{best} would be overwritten, as {run.args.checkpoint} tells no score to beat; name another "
                         "--output_folder")
    return start


def run_stage(stage: int, start: dict[str, Any] | None, run: Run) -> list[dict[str, Any]]:
    """Epochs of training and validation until there is no more progress; returns the rows of the log."""
    args, world = run.args, run.world
    epochs, batch_size = of_stage(args.epochs, stage), of_stage(args.batch_size, stage)
    learner = make_learner(stage, start, run)
    state = stage_state(stage, start)
    for dataset in (run.train, run.val):
        dataset.features = None
        if args.cache_features and stage == 1:
            keep_features(dataset, learner.encoder, world.device, run.precision, args.workers, world.rank == 0)
    items, at_once = (Pictures(run.train), run.train.cpi) if args.whole_images else (run.train, 1)
    sampler = EpochSampler(len(items), max(1, batch_size // at_once), 2 * args.seed + stage, world.rank,
                           world.size)
    loader = DataLoader(items, batch_sampler=sampler, num_workers=args.workers,
                        worker_init_fn=ignore_signals, pin_memory=world.device.type == "cuda")
    run.say(f"stage {stage} ({'encoder too' if stage == 2 else 'decoder only'}): {len(run.train)} captions in "
            f"{sampler.steps} batches, {world.size} x {world.device} in {run.precision}; begins at epoch "
            f"{state['epoch'] + 1}, batch {state['step'] + 1}; best BLEU-4 so far "
            f"{max(state['best_bleu4'], 0):.2f}, {state['epochs_since_improvement']} epochs without a better one")

    while state["epoch"] < epochs and state["epochs_since_improvement"] < PATIENCE:
        row = train_epoch(run, learner, loader, sampler, state, epochs)
        began = time.monotonic()
        row |= validate_epoch(run, learner, batch_size)
        row["seconds"] += time.monotonic() - began
        improved = row["bleu4"] > state["best_bleu4"]
        state |= {**UNBEGUN, "epoch": state["epoch"] + 1,
                  "epochs_since_improvement": 0 if improved else state["epochs_since_improvement"] + 1,
                  "best_bleu4": max(row["bleu4"], state["best_bleu4"]), "log": [*state["log"], row]}
        if not improved and state["epochs_since_improvement"] % DECAY_EVERY == 0:
            for optimizer in learner.optimizers.values():
                adjust_learning_rate(optimizer, DECAY)
        save(run, learner, state, improved)
        draw_gaze(run, learner, f"epoch {len(state['log'])}")
        run.say(f"stage {stage}, epoch {state['epoch']} of {epochs}: train loss {row['train_loss']:.3f}, val loss "
                f"{row['val_loss']:.3f} ({row['val_cross_entropy']:.3f} words, {row['val_doubly_stochastic']:.3f} "
                f"attention), top-5 {row['val_top5']:.1f} %, BLEU-4 {row['bleu4']:.2f} generated "
                f"({row['bleu4_teacher_forced']:.2f} teacher-forced), best {state['best_bleu4']:.2f}, "
                f"{row['seconds']:.0f} s")
    why = "all its epochs are done" if state["epoch"] >= epochs else f"no better BLEU-4 for {PATIENCE} epochs"
    run.say(f"stage {stage} is over, {why}. Best BLEU-4 {state['best_bleu4']:.2f}: "
            f"{output_path(args, 'BEST_checkpoint_')}")
    return state["log"]


def learning_rates(args: dict[str, Any], stage: int) -> dict[str, float]:
    """By optimizer, as the flags want them at a stage's beginning."""
    return {"decoder": of_stage(args["decoder_lr"], stage), "encoder": args["encoder_lr"]}


def make_learner(stage: int, start: dict[str, Any] | None, run: Run) -> Learner:
    """Models and optimizers, new ones or those of a checkpoint; the same on every process."""
    args, world = run.args, run.world
    torch.manual_seed(args.seed)
    weights = start or new_models(run)
    arguments = {**weights["model"], "dropout": args.dropout}
    encoder, decoder = build_models({**weights, "model": arguments}, args.checkpoint or f"--encoder {args.encoder}")
    encoder.fine_tune(stage == 2)
    decoder.fine_tune_embeddings(not args.freeze_embeddings)
    encoder, decoder = encoder.to(world.device), decoder.to(world.device)
    broadcast_tensors([*encoder.state_dict().values(), *decoder.state_dict().values()], world)
    rates = learning_rates(vars(args), stage)
    learning: dict[str, torch.nn.Module] = {"decoder": decoder} | ({"encoder": encoder} if stage == 2 else {})
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rates[name], fused=True)
        for name, model in learning.items()}
    before = start["training"] if start else None
    for name in optimizers.keys() & (before["optimizers"] if before else {}):
        optimizers[name].load_state_dict(before["optimizers"][name])
        wanted = learning_rates(before["args"], before["stage"])[name], before["args"].get("schedule", args.schedule)
        if wanted != (rates[name], args.schedule):  # else as far down as it was
            optimizers[name].param_groups[0]["lr"] = rates[name]
    return Learner(encoder, decoder, optimizers, arguments)


def new_models(run: Run) -> dict[str, Any]:
    """An encoder with pretrained weights and a decoder with random ones, as a checkpoint holds them."""
    args = run.args
    weights: Any = args.encoder_weights
    if weights == "none" or run.world.rank > 0:  # rank 0's weights go to the others
        weights = None
    elif Path(weights).is_file():
        try:
            weights = dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # a file that is something else can fail in any way
            raise InputError(f"--encoder_weights {weights}: not a state dict of a classifier "
                             f"({reason(error)})") from error
    try:
        encoder = Encoder(args.encoded_image_size, args.encoder, weights)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--encoder {args.encoder} --encoder_weights {args.encoder_weights}: "
                         f"{reason(error)}") from error
    embed_dim = args.emb_dim
    if args.embeddings:
        embeddings, found = load_embeddings(args.embeddings, run.word_map)
        embed_dim = embeddings.size(1)
        run.say(f"{args.embeddings}: {found} of {len(run.word_map)} words found, with {embed_dim} numbers each")
    arguments = {"attention_dim": args.attention_dim, "embed_dim": embed_dim, "decoder_dim": args.decoder_dim,
                 "vocab_size": len(run.word_map), "encoder_dim": encoder.encoder_dim, "dropout": args.dropout}
    decoder = DecoderWithAttention(**arguments)
    if args.embeddings:
        decoder.load_pretrained_embeddings(embeddings)
    return {"model": {"encoder": args.encoder, "encoded_image_size": encoder.enc_image_size, **arguments},
            "encoder": encoder.state_dict(), "decoder": decoder.state_dict()}


def train_epoch(run: Run, learner: Learner, loader: DataLoader, sampler: EpochSampler, state: dict[str, Any],
                epochs: int) -> dict[str, Any]:
    """One pass over the captions, or what is left of it; returns the first half of the log's row."""
    args, stage, epoch = run.args, state["stage"], state["epoch"]
    sampling = args.scheduled_sampling * epoch / max(epochs - 1, 1)
    sampler.epoch, sampler.first_step = epoch, state["step"]
    learner.decoder.train()
    sums, rates = state["sums"], learning_rates(vars(args), stage)
    unseen: list[Tensor] = []  # each batch's own, not yet added
    saved = ready = time.monotonic()
    resumed, began, waited = ready, ready - state["seconds"], 0.0
    bar = progress(None, f"stage {stage}, epoch {epoch + 1}", "batch", run.world.rank == 0, total=sampler.steps,
                   initial=sampler.first_step)
    with handle_signals(lambda _: None), bar:  # they wait for the end of a step
        for step, batch in enumerate(loader, sampler.first_step):
            waited += time.monotonic() - ready
            # Seeded by its place, a step draws the same dropout whether or not the run was interrupted before it.
            torch.manual_seed(zlib.crc32(repr((args.seed, stage, epoch, step, run.world.rank)).encode()))
            if args.schedule == "cosine":
                share = cosine(epoch * sampler.steps + step, epochs * sampler.steps)
                for name, optimizer in learner.optimizers.items():
                    optimizer.param_groups[0]["lr"] = share * rates[name]
            unseen.append(train_step(run, learner, batch, sampling, sampler.counts(step)))
            bar.update()
            ready = time.monotonic()
            stopped = first_signal(run.world)
            last = step + 1 == sampler.steps  # validation takes a while, too
            due = stopped or last or ready - saved > 60 * args.checkpoint_minutes
            if due or step % args.print_freq == 0:
                for i, each in enumerate(torch.stack(unseen).tolist(), step + 2 - len(unseen)):  # waits for the GPU
                    loss_of(each, args.alpha_c, f"stage {stage}, epoch {epoch + 1}, batch {i}: ")
                    sums = [total + value for total, value in zip(sums, each, strict=True)]
                unseen, seconds = [], time.monotonic() - began
                bar.set_postfix({"loss": f"{loss_of(sums, args.alpha_c):.3f}",
                                 "captions/s": f"{sums[4] / seconds:.0f}",
                                 "waiting for data": f"{waited / (ready - resumed):.0%}"})
            if due:
                save(run, learner, {**state, "step": step + 1, "sums": sums, "seconds": seconds})
                saved = time.monotonic()
            if stopped:
                first_signal(run.world)  # waits until rank 0 has saved
                raise Stopped(stopped)
    if SIGNALS:
        raise Stopped(SIGNALS[0])
    seconds = time.monotonic() - began
    return {"stage": stage, "epoch": epoch + 1, "train_loss": loss_of(sums, args.alpha_c),
            "captions_per_second": len(run.train) / seconds, "seconds": seconds,
            "decoder_lr": learner.optimizers["decoder"].param_groups[0]["lr"]}


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step of a stage: up in a line, down along half a cosine (arXiv 1608.03983)."""
    return min((step + 1) / WARM_UP, (1 + math.cos(math.pi * step / steps)) / 2)


def train_step(run: Run, learner: Learner, batch: tuple[Tensor, ...], sampling: float, counts: bool) -> Tensor:
    """One step of gradient descent; returns the batch's sums over all processes, as `measure` orders them."""
    pictures, captions, lengths = batch                                         # captions (N, L) or (N / 5, 5, L)
    device, args = run.world.device, run.args
    if args.augment and "encoder" in learner.optimizers:
        pictures = augment(pictures.to(device, non_blocking=True))
    captions = captions.flatten(0, -2).to(device, non_blocking=True)            # (N, L)
    with autocast(device, run.precision):
        features = encode(learner.encoder, pictures, device)                    # (N or N / 5, h, w, C)
        sums = measure(*learner.decoder.unroll(features, captions, lengths.view(-1, 1), sampling,
                                               learner.encoder.pooling(features)),
                       label_smoothing=args.label_smoothing) * counts
    totals = sums.detach().double()
    if run.world.size > 1:
        dist.all_reduce(totals)
    # Divided by what all processes hold, the processes' losses add up to the loss of the whole batch.
    loss = sums[0] / totals[3] + args.alpha_c * sums[1] / totals[4]

    parameters = [each for optimizer in learner.optimizers.values() for group in optimizer.param_groups
                  for each in group["params"]]
    for optimizer in learner.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if run.world.size > 1:
        sum_gradients(parameters)
    torch.nn.utils.clip_grad_value_(parameters, args.grad_clip)
    for optimizer in learner.optimizers.values():
        optimizer.step()
    return totals


def validate_epoch(run: Run, learner: Learner, batch_size: int) -> dict[str, Any]:
    """The second half of the log's row, with three captions to look at on the way."""
    sums, forced_bleu4, captions = validate(captioner(run, learner), run.val, run.world,
                                            max(1, batch_size // run.val.cpi), run.args.workers)
    for i in looked_at(run):
        run.say(printable(f"  picture {i}: {' '.join(captions[i])}   (people: {' '.join(run.val_references[i][0])})"))
    return {"val_loss": loss_of(sums, run.args.alpha_c), "val_cross_entropy": sums[0] / sums[3],
            "val_doubly_stochastic": sums[1] / sums[4], "val_top5": 100 * sums[2] / sums[3],
            "bleu4": bleu(run.val_references, captions)[3], "bleu4_teacher_forced": forced_bleu4}


def captioner(run: Run, learner: Learner) -> Captioner:
    return Captioner(learner.encoder, learner.decoder, run.word_map, run.precision)


def looked_at(run: Run) -> list[int]:
    """Three validation pictures, the same after every epoch."""
    return sorted({0, run.val.n_images // 3, 2 * run.val.n_images // 3})


def loss_of(sums: list[float], alpha_c: float, where: str = "") -> float:
    """The loss per word and caption, from the sums of `measure`. Raises InputError where it is no number."""
    words, attention = sums[0] / sums[3], alpha_c * sums[1] / sums[4]
    if not math.isfinite(words + attention):
        raise InputError(f"{where}the loss is {words + attention} (of words {words}, of attention {attention}): is a "
                         "learning rate too high? The last checkpoint is good; go on from it with a lower one")
    return words + attention


def save(run: Run, learner: Learner, state: dict[str, Any], improved: bool = False) -> None:
    """Checkpoint, log and curves. The checkpoint last: a run killed before repeats the epoch, and writes all again."""
    if run.world.rank > 0:
        return
    models = {"encoder": learner.encoder.state_dict(), "decoder": learner.decoder.state_dict()}
    if not all(bool(each.isfinite().all()) for weights in models.values() for each in weights.values()):
        raise InputError(f"stage {state['stage']}, epoch {state['epoch'] + 1}, batch {state['step']}: some weights are "
                         "no numbers. The last checkpoint is good; go on from it with a lower learning rate")
    scores = state["log"][-1] if state["log"] and not state["step"] else {}  # of these very weights
    optimizers = {name: optimizer.state_dict() for name, optimizer in learner.optimizers.items()}
    checkpoint = {**models, "word_map": run.word_map, "model": learner.arguments, "preprocessing": PREPROCESSING,
                  "scores": scores, "training": {**state, "optimizers": optimizers, "args": vars(run.args),
                                                 "launch": launch(), "world_size": run.world.size}}
    if improved:
        save_checkpoint(output_path(run.args, "BEST_checkpoint_"), checkpoint)
    if scores:  # an epoch is over
        with atomic_write(output_path(run.args, "log_", ".jsonl")) as file:
            file.writelines(json.dumps(row) + "\n" for row in state["log"])
        draw_curves(state["log"], output_path(run.args, "curves_", ".png"))
    save_checkpoint(output_path(run.args, "checkpoint_"), checkpoint)


def draw_gaze(run: Run, learner: Learner, title: str) -> None:
    """Where the model looks in three pictures, over the last epoch's, so that one can watch the gaze sharpen."""
    if run.world.rank > 0:
        return
    pictures = [Image.fromarray(run.val.images[i].transpose(1, 2, 0)) for i in looked_at(run)]
    found = caption_images(captioner(run, learner), pictures, 1)
    with atomic_write(output_path(run.args, "gaze_", ".png"), "wb") as file:
        draw_sheet(pictures, [best for best, *_ in found], title).save(file, "PNG")


if __name__ == "__main__":
    run_script(main, get_parser(), how_to_go_on)
