"""This project's side of each work: all that the benchmark knows of the scripts' insides is here.

The functions are named as those of baseline.py. Each starts from the same weights and data.
"""
from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import train
from benchmarks.setting import (
    BEAM_SIZE,
    CAPTIONS_PER_IMAGE,
    NAME,
    Setting,
    flop_rate,
    now,
    peak_bytes,
    rate,
    to_float64,
)
from caption import Search
from create_input_files import create_input_files
from datasets import CaptionDataset, EpochSampler, Pictures, encode, load_word_map, loader_options
from eval import generate_captions
from models import Caption
from safety.loader import Loader
from safety.processes import cores
from training.features import keep_features
from training.progress import Progress, mean_loss
from training.resume import output_files
from utils import PRECISIONS, autocast, loader_workers, setup_world

REPOSITORY = Path(__file__).resolve().parent.parent
SEARCH_BATCH = 128  # pictures that evaluation searches at once


def make_run(setting: Setting, precision: str, **arguments: object) -> train.Run:
    """What train.py has before its first stage. Batches are of whole pictures with all their captions."""
    flags = {"data_folder": setting.data, "data_name": NAME, "output_folder": setting.folder / "ours",
             "encoder": setting.encoder, "encoder_weights": "none", "emb_dim": setting.width,
             "attention_dim": setting.width, "decoder_dim": setting.width, **arguments}
    args = train.get_parser().parse_args([*(f"--{name}={value}" for name, value in flags.items()), "--whole_images"])
    world, precision = setup_world(setting.device, precision)
    args.workers = loader_workers(args.workers, world.device)
    dataset = CaptionDataset(setting.data, NAME, "TRAIN")
    return train.Run(args, output_files(args), world, precision, lambda *_: None, load_word_map(setting.data, NAME),
                     dataset, dataset, [])


def load_training(setting: Setting, run: train.Run, stage: int, decoder_weights: str = "decoder") -> train.Training:
    """Models and optimizers of a stage, with the weights that the baseline has too."""
    training = train.build_training(run, stage, None)
    weights = torch.load(setting.weights_path, weights_only=True)
    encoder, decoder, *_ = training.captioner
    encoder.load_state_dict(weights["encoder"])
    decoder.load_state_dict(weights[decoder_weights])
    decoder.train()
    return training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the scripts' own words and progress bars out of the benchmark's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- training --------------------------------------------------------------------------------------------------------

def load_batches(setting: Setting, run: train.Run, models: train.Training, stage: int,
                 features_kept: bool = False) -> Loader:
    """Batches of an epoch, as train.run_stage makes them; the features, if they are kept, are computed first."""
    if features_kept:
        keep_features(run.train, models.captioner, run.args.workers, False)
    pictures = Pictures(run.train)
    sampler = EpochSampler(len(pictures), max(1, setting.batch_size[stage - 1] // CAPTIONS_PER_IMAGE), 0)
    return Loader(pictures, batch_sampler=sampler, **loader_options(run.args.workers, run.world))


def steps(setting: Setting, stage: int, features_kept: bool = False) -> Iterator[int]:
    """Training without end; each step says how many captions it took."""
    run = make_run(setting, setting.precision)
    models = load_training(setting, run, stage)
    loader = load_batches(setting, run, models, stage, features_kept)
    while True:
        for batch in loader:
            train.train_step(run, models, batch)
            yield batch[1].flatten(0, -2).size(0)
        loader.batch_sampler.epoch += 1


def training(setting: Setting, stage: int, features_kept: bool = False) -> float:
    """Captions a second."""
    return rate(steps(setting, stage, features_kept), setting.warm_up, setting.our_steps, setting.device)


def training_proof(setting: Setting, stage: int, dtype: str = "float32",
                   features_kept: bool = False) -> dict[str, float]:
    """Loss, and the norm of each gradient, of a step on the first pictures' captions without dropout.

    With `features_kept` the features come from the disk, kept there in float32.
    """
    run = make_run(setting, "float32", dropout=0.0)
    models = load_training(setting, run, stage)
    encoder, decoder, *_ = models.captioner
    if dtype == "float64":
        encoder.double().resnet.register_forward_pre_hook(to_float64)
        decoder.double()
    if features_kept:
        keep_features(run.train, models.captioner, 0, False)
    pictures = Pictures(run.train)
    items = [pictures[i] for i in range(setting.proof_pictures)]
    batch = tuple(torch.stack(each) for each in zip(*items, strict=True))
    totals = train.train_step(run, models, batch)
    gradients = {f"{model}.{name}": each.grad.norm().item() for model, module in
                 (("encoder", encoder), ("decoder", decoder))
                 for name, each in module.named_parameters() if each.grad is not None}
    return {"loss": mean_loss(totals.tolist(), run.args.alpha_c), **gradients}


def memory(setting: Setting, stage: int) -> int:
    """Bytes at the peak of two training steps: the second has Adam's averages too. For a process of its own."""
    run = make_run(setting, setting.precision)
    models = load_training(setting, run, stage)
    batch = next(iter(load_batches(setting, run, models, stage)))
    return peak_bytes(lambda: [train.train_step(run, models, batch) for _ in range(2)], setting.device)


def arithmetic(setting: Setting) -> dict[str, float]:
    """Operations a second: of a product of two large matrices, which is what the device can do, and of our works."""
    run, device = make_run(setting, setting.precision), torch.device(setting.device)
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=PRECISIONS[setting.precision])
    works: dict[str, Callable[[], object]] = {}
    for stage, kept, name in ((1, True, "decoder, a step of stage 1"), (2, False, "both, a step of stage 2")):
        models = load_training(setting, run, stage)
        batch = next(iter(load_batches(setting, run, models, stage, kept)))
        works[name] = partial(train.train_step, run, models, batch)
        run.train.features = None
    pixels = batch[0].to(device)
    if device.type == "cuda":
        pixels = pixels.repeat(20, 1, 1, 1)  # about as many as evaluation encodes at once

    def encode_pixels() -> None:
        with torch.no_grad(), autocast(device, setting.precision):
            encode(models.captioner.encoder, models.captioner.decoder, pixels, device)

    works["encoder, forward"] = encode_pixels
    measure = partial(flop_rate, warm_up=setting.warm_up, count=setting.our_steps, device=setting.device)
    return {"matrix product": max(measure(lambda: matrix @ matrix) for _ in range(20)),  # one takes a moment only
            **{name: measure(work) for name, work in works.items()}}


# ---- captions --------------------------------------------------------------------------------------------------------

def search(setting: Setting, precision: str, pictures: int | None = None) -> tuple[list[Caption], float]:
    """A caption for each of the first pictures (or all) of the test split, and the seconds that took."""
    run = make_run(setting, precision)
    models = load_training(setting, run, 1, "speaker")
    dataset = CaptionDataset(setting.data, NAME, "TEST")
    if pictures is not None:
        dataset.captions, dataset.n_images = dataset.captions[:CAPTIONS_PER_IMAGE * pictures], pictures
    began = now(setting.device)
    with quiet():
        found = generate_captions(models.captioner, dataset, Search(BEAM_SIZE), run.world, SEARCH_BATCH,
                                  run.args.workers)
    return found, now(setting.device) - began


def evaluation_proof(setting: Setting) -> list[list[int]]:
    """The captions of the first pictures, from <start> on, in float32."""
    return [each.sequence for each in search(setting, "float32", setting.proof_pictures)[0]]


def evaluation(setting: Setting) -> float:
    """Pictures of a split a second."""
    search(setting, setting.precision, SEARCH_BATCH if torch.device(setting.device).type == "cuda" else 1)
    found, seconds = search(setting, setting.precision)
    return len(found) / seconds


def save_checkpoint(setting: Setting) -> Path:
    """BEST_checkpoint_*, as train.py leaves it after a step of stage 2."""
    run = make_run(setting._replace(device="cpu"), "float32")
    models = load_training(setting, run, 2, "speaker")
    for optimizer in models.optimizers.values():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)  # Adam gets its averages, and the weights stay
        optimizer.step()
    train.save(run, models, Progress(2), improved=True)
    return run.files.best


def cold_caption(setting: Setting, checkpoint: Path, picture: Path, *flags: str) -> tuple[float, str]:
    """Seconds from the command to the caption, and the caption. In the script's own precision, unless flags say."""
    command = [sys.executable, REPOSITORY / "caption.py", "--img", picture, "--model", checkpoint,
               "--device", setting.device, "--beam_size", str(BEAM_SIZE), *flags]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout.strip().removeprefix(f"{picture}: ").removesuffix(" ...")


# ---- preparation -----------------------------------------------------------------------------------------------------

def prepare(setting: Setting, folder: Path) -> None:
    with quiet():
        name = create_input_files("synthetic", setting.json_path, setting.pictures_folder, CAPTIONS_PER_IMAGE, 0,
                                  folder, 50, workers=cores())
    assert name == NAME


def preparation(setting: Setting, folder: Path) -> float:
    """Pictures a second."""
    began = time.perf_counter()
    prepare(setting, folder)
    return setting.pictures / (time.perf_counter() - began)
