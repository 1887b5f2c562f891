"""Training from the command line's arguments to its files: two stages, exact resumes, several processes."""
from __future__ import annotations

import copy
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import ENCODER, Prepared, refused
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from tqdm import tqdm

import caption
import eval as evaluation
import train
from datasets import CaptionDataset, EpochSampler, Pictures, load_word_map, normalize
from models import DECODERS, Annotations, DecoderWithAttention, Encoder, Losses
from safety.checkpoints import load_checkpoint
from safety.errors import InputError
from safety.restore import restore
from safety.signals import Stopped
from training.gaze import draw_sheet
from training.progress import Progress, Watch
from training.resume import check_resume, claimed_output_folder, lock_folder, output_files
from utils import World


def flags(prepared: Prepared, folder: Path, *more: object) -> list[str]:
    """A tiny model on 80 captions in 4 batches."""
    values = ["--data_folder", prepared.folder, "--data_name", prepared.name, "--output_folder", folder,
              "--encoder", ENCODER, "--encoder_weights", "none", "--encoded_image_size", 4, "--emb_dim", 8,
              "--attention_dim", 8, "--decoder_dim", 16, "--batch_size", 20, "--whole_images", "--epochs", 2, 2,
              "--decoder_lr", 0.01, "--workers", 0, "--device", "cpu", *more]
    return [str(value) for value in values]


def run(prepared: Prepared, folder: Path, *more: object) -> list[dict[str, Any]]:
    return train.main(train.get_parser().parse_args(flags(prepared, folder, *more)))


def load(folder: Path, prepared: Prepared, prefix: str = "checkpoint_") -> dict[str, Any]:
    return torch.load(folder / f"{prefix}{prepared.name}.pth.tar", weights_only=True)


def same(one: Any, other: Any) -> bool:
    """Equality bit for bit of nested dicts, lists and tensors, but for times."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        timed = {"seconds", "captions_per_second"}
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one.keys() - timed)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, optimizers, log and best score; only the flags may differ."""
    for name in ("encoder", "decoder", "word_map", "model", "scores"):
        assert same(one[name], other[name]), name
    for name in one["training"].keys() - {"args", "seconds", "launch"}:
        assert same(one["training"][name], other["training"][name]), name


@pytest.fixture(scope="module")
def straight(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    run(prepared, folder)
    return folder


def test_both_stages_leave_log_curves_and_checkpoints(prepared: Prepared, straight: Path) -> None:
    rows = [json.loads(line) for line in (straight / f"log_{prepared.name}.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all({"train_loss", "val_loss", "bleu4", "seconds"} <= row.keys() for row in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    for row in rows:
        assert row["val_loss"] == pytest.approx(row["val_cross_entropy"] + row["val_doubly_stochastic"])
    with Image.open(straight / f"curves_{prepared.name}.png") as curves:
        assert curves.size[0] > curves.size[1] > 200
    best = load(straight, prepared, "BEST_checkpoint_")
    assert best["scores"]["bleu4"] == max(row["bleu4"] for row in rows)
    assert best["word_map"] == load_word_map(prepared.folder, prepared.name)
    assert best["preprocessing"]["image_size"] == 256
    assert sorted(path.name for path in straight.iterdir()) == sorted(
        f"{prefix}{prepared.name}{suffix}" for prefix, suffix in (
            ("checkpoint_", ".pth.tar"), ("BEST_checkpoint_", ".pth.tar"), ("log_", ".jsonl"), ("curves_", ".png"),
            ("gaze_", ".png")))


def test_a_finer_map_is_trained_kept_and_resumed(prepared: Prepared, tmp_path: Path, straight: Path) -> None:
    """Both stages, the first from kept features, stopped in between: the run that nothing stopped. And captions."""
    data = shutil.copytree(prepared.folder, tmp_path / "data")
    finer = ["--data_folder", data, "--encoder_stride", 16, "--cache_features", "--epochs", 1]
    run(prepared, tmp_path / "straight", *finer)
    run(prepared, tmp_path / "first", *finer, "--stage", 1)
    kept = max(data.glob("TRAIN_FEATURES_*.bin")).stat().st_size
    assert kept == 16 * 16 * 16 * 48 * 4  # pictures, the map, its channels, float32
    path = tmp_path / "first" / f"checkpoint_{prepared.name}.pth.tar"
    run(prepared, tmp_path / "first", *finer, "--checkpoint", path)
    whole, resumed = (load(tmp_path / each, prepared) for each in ("straight", "first"))
    assert_same_run(resumed, whole)
    assert (resumed["model"]["encoder_stride"], resumed["model"]["encoder_dim"]) == (16, 48)
    # Each region's features are of unit size; those of a checkpoint that is older than that stay as they were.
    (encoder, _), (before, _) = (restore({**resumed, "model": {**resumed["model"], "unit_features": unit}})
                                 for unit in (resumed["model"]["unit_features"], False))
    with torch.inference_mode():
        as_they_were = before.grid(pictures := torch.rand(1, 3, 256, 256))
        features = encoder.grid(pictures)
    assert as_they_were.std(dim=3).mean() < 0.1
    torch.testing.assert_close(features, nn.functional.layer_norm(as_they_were, (48,)))
    of_32 = straight / f"checkpoint_{prepared.name}.pth.tar"
    assert "encoder_stride" not in load(straight, prepared)["model"]  # as before there was a choice
    with refused("holds a model with --encoder_stride 32, and not 16"):
        run(prepared, tmp_path / "other", *finer, "--checkpoint", of_32)
    model = caption.load(path)
    [[best]] = caption.caption_images(model, sorted(prepared.pictures.iterdir())[:1])
    assert best.sequence_alphas.shape == (len(best.sequence), 4, 4)


def test_a_thread_can_train(prepared: Prepared, tmp_path: Path) -> None:
    """As a notebook or a server may; only the main thread can be sent signals."""
    tqdm.set_lock(threading.RLock())  # a signal of another test may have left tqdm's own to the main thread
    with ThreadPoolExecutor(1) as pool:
        [row] = pool.submit(run, prepared, tmp_path, "--stage", 1, "--epochs", 1).result()
    assert row["epoch"] == 1 and load(tmp_path, prepared)["training"]["epoch"] == 1


def test_the_gaze_is_drawn_after_each_epoch(prepared: Prepared, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same three pictures, by rank 0 alone."""
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr("training.gaze.draw_sheet", lambda *given: drawn.append(given) or draw_sheet(*given))
    row, _ = run(prepared, tmp_path, "--stage", 1)
    assert [title for *_, title in drawn] == ["epoch 1", "epoch 2"]
    images = CaptionDataset(prepared.folder, prepared.name, "VAL").images
    for pictures, captions, _ in drawn:
        assert [np.array_equal(picture, images[i].transpose(1, 2, 0))
                for picture, i in zip(pictures, (0, 2, 4), strict=True)] == [True] * 3
        assert [caption.alphas.shape for caption in captions] == [(len(each.words), 4, 4) for each in captions]
    assert len({captions[0].log_prob for _, captions, _ in drawn}) == 2, "of each epoch's own model"
    with Image.open(tmp_path / f"gaze_{prepared.name}.png") as gaze:
        assert gaze.format == "PNG"
        assert gaze.size[1] > 3 * 128

    monkeypatch.setattr(train, "train_epoch", lambda *_: dict(row))
    monkeypatch.setattr(train, "validate_epoch", lambda *_: (dict(row), []))
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(train, "broadcast", lambda value, _: value)
    second = setting_of(prepared, tmp_path / "other")._replace(world=World(1, 2, torch.device("cpu")))
    progress = Progress(1)
    train.run_stage(second, progress, None)
    assert progress.epoch == 2
    assert len(drawn) == 2 and not (tmp_path / "other").exists()


def test_a_frozen_encoder_is_frozen_bit_for_bit(prepared: Prepared, tmp_path: Path) -> None:
    """Parameters and BatchNorm's buffers, after training steps and validation."""
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1)
    torch.manual_seed(0)
    assert same(dict(Encoder(4, ENCODER).state_dict()), dict(load(tmp_path, prepared)["encoder"]))


def test_fine_tuning_changes_the_last_stages_alone(prepared: Prepared, straight: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(4, ENCODER)
    before, after = encoder.state_dict(), load(straight, prepared)["encoder"]
    encoder.fine_tune()
    tuned = {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed <= tuned  # no buffer, no early layer
    assert len(changed) > len(tuned) / 2


def test_the_second_stage_begins_with_the_best_of_the_first(prepared: Prepared, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 3.0, 1.0, 1.0])
    monkeypatch.setattr(train, "bleu", lambda *_: [0, 0, 0, next(scores)])
    made: list[dict[str, Any]] = []
    build_training = train.build_training
    monkeypatch.setattr(train, "build_training", lambda run, stage, start: made.append(start) or
                        build_training(run, stage, start))
    run(prepared, tmp_path)
    assert made[0] is None
    assert made[1]["training"]["epoch"] == 1
    assert load(tmp_path, prepared, "BEST_checkpoint_")["scores"]["bleu4"] == 5.0  # stage 2 was never better
    assert load(tmp_path, prepared)["training"]["best_bleu4"] == 5.0


def test_a_run_resumed_between_epochs_is_the_run_left_alone(prepared: Prepared, straight: Path, tmp_path: Path) -> None:
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1)
    run(prepared, tmp_path, "--checkpoint", tmp_path / f"checkpoint_{prepared.name}.pth.tar")
    assert_same_run(load(tmp_path, prepared), load(straight, prepared))
    assert_same_run(load(tmp_path, prepared, "BEST_checkpoint_"), load(straight, prepared, "BEST_checkpoint_"))


@pytest.mark.parametrize("steps", [3, 9, 14], ids=["stage 1", "second stage's start", "stage 2"])
def test_a_run_resumed_within_an_epoch_is_the_run_left_alone(prepared: Prepared, straight: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            run(prepared, tmp_path, "--checkpoint_minutes", 0)
    assert load(tmp_path, prepared)["training"]["step"] == steps % 4
    run(prepared, tmp_path, "--checkpoint", tmp_path / f"checkpoint_{prepared.name}.pth.tar")
    assert_same_run(load(tmp_path, prepared), load(straight, prepared))


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    train_step, done = train.train_step, [0]

    def step(*arguments: Any) -> torch.Tensor:
        done[0] += 1
        if done[0] > steps:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize(("device", "processes", "asked"), [
    ("cuda", 2, [10, 20, 23]), ("cuda", 1, []), ("cpu", 2, [*range(8, 24)])])
def test_several_gpus_ask_each_other_for_signals_at_every_tenth_step(monkeypatch: pytest.MonkeyPatch, device: str,
                                                                     processes: int, asked: list[int]) -> None:
    """And at the last, each rank at the same ones, here after a resume: then one that was sent a signal stops all."""
    monkeypatch.setattr("utils.SIGNALS", signals := [])
    steps: list[int] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: steps.append(progress.step))
    args, world = train.get_parser().parse_args([]), World(0, processes, torch.device(device))

    def watch(sent: int = 0) -> None:
        with Watch(args, world, progress, 23, lambda: saved.append(progress.step)) as watched:
            while progress.step < 23:
                signals.extend([signal.SIGTERM] * (progress.step + 1 == sent))
                watched.after_step(torch.ones(len(Losses._fields)))

    progress, saved = Progress(1, step=7), []
    watch()
    assert (steps, saved) == (asked, [23])
    progress, saved, steps[:] = Progress(1), [], []
    with pytest.raises(Stopped):
        watch(sent=13)
    assert saved == [20 if asked == [10, 20, 23] else 13]
    assert progress.sums == [saved[0]] * len(Losses._fields)
    assert steps[-2:] == saved * 2 * bool(asked), "once more, to wait for the first to have saved"


def test_the_order_of_captions_may_be_the_tutorials(prepared: Prepared, tmp_path: Path) -> None:
    """Without --whole_images each caption is drawn alone, and the same number is seen."""
    arguments = [each for each in flags(prepared, tmp_path, "--stage", 1, "--epochs", 1) if each != "--whole_images"]
    rows = train.main(train.get_parser().parse_args(arguments))
    assert rows[0]["train_loss"] > 0
    assert load(tmp_path, prepared)["training"]["epoch"] == 1


def test_within_an_epoch_other_batches_begin_it_again(prepared: Prepared, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who ran out of memory in the middle of an epoch can resume with smaller batches."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(prepared, tmp_path, "--checkpoint_minutes", 0, "--stage", 1, "--epochs", 1)
    there = tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    assert load(tmp_path, prepared)["training"]["step"] > 0
    capsys.readouterr()
    (row,) = run(prepared, tmp_path, "--checkpoint", there, "--stage", 1, "--epochs", 1, "--batch_size", 10)
    said = capsys.readouterr().out
    assert "its batches were others (--batch_size 20), so epoch 1 begins again" in said
    assert "in 8 batches" in said and "begins at epoch 1, batch 1" in said
    assert row["epoch"] == 1


def test_the_tuned_recipe_resumed_is_the_run_left_alone(prepared: Prepared, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that change with every step, pictures changed at random: all depend on the place in the run alone."""
    recipe = ["--decoder_lr", 0.01, 0.02, "--schedule", "cosine", "--augment", "--label_smoothing", 0.1]
    monkeypatch.setattr(train, "WARM_UP", 3)
    rates, changed, train_step, augment = [], [], train.train_step, train.augment
    monkeypatch.setattr(train, "augment", lambda images: changed.append(len(rates)) or augment(images))

    def step(run: train.Run, training: train.Training, *others: Any) -> torch.Tensor:
        rates.append([each.param_groups[0]["lr"] for each in training.optimizers.values()])
        return train_step(run, training, *others)

    monkeypatch.setattr(train, "train_step", step)
    run(prepared, tmp_path / "alone", *recipe)
    factors = [1 / 3, 2 / 3, *((1 + math.cos(math.pi * step / 8)) / 2 for step in range(2, 8))]  # 2 epochs of 4 batches
    assert changed == list(range(9, 17))  # in each step of stage 2
    peaks = [0.01] * 8 + [0.02] * 8
    assert [first for first, *_ in rates] == pytest.approx([a * b for a, b in zip(peaks, factors * 2, strict=True)])
    assert [second for _, *tuned in rates for second in tuned] == pytest.approx([1e-4 * factor for factor in factors])
    with monkeypatch.context() as patch:
        stop_after(patch, 14)
        with pytest.raises(KeyboardInterrupt):
            run(prepared, tmp_path / "stopped", "--checkpoint_minutes", 0, *recipe)
    run(prepared, tmp_path / "stopped", *recipe, "--checkpoint",
        tmp_path / "stopped" / f"checkpoint_{prepared.name}.pth.tar")
    assert_same_run(load(tmp_path / "stopped", prepared), load(tmp_path / "alone", prepared))


def test_float16_learns_what_float32_does_and_its_checkpoint_loads_anywhere(prepared: Prepared, straight: Path,
                                                                             tmp_path: Path) -> None:
    """In stage 1 alone: a CPU takes long for a convolution's gradients in float16."""
    rows = run(prepared, tmp_path, "--precision", "float16", "--stage", 1)
    expected = load(straight, prepared)["training"]["log"][:2]
    for name in ("train_loss", "val_loss"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], rel=0.01), name
    assert load(straight, prepared)["training"]["scaler"] == {}
    state, path = load(tmp_path, prepared), tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    assert state["training"]["scaler"]["scale"] == 2 ** 16 and state["training"]["scaler"]["_growth_tracker"] == 8
    assert {each.dtype for part in ("encoder", "decoder") for each in state[part].values()
            if each.is_floating_point()} == {torch.float32}
    picture = sorted(prepared.pictures.iterdir())[0]
    assert len(caption.caption_images(caption.load(path, device="cpu"), [picture])) == 1
    run(prepared, tmp_path, "--stage", 1, "--epochs", 3, "--checkpoint", path)  # in float32 again
    assert not same(load(tmp_path, prepared)["decoder"], state["decoder"])


def test_a_step_with_an_infinite_gradient_is_left_out_in_float16(prepared: Prepared, tmp_path: Path) -> None:
    """The loss is multiplied by less from then on, and the weights stay as they were."""
    setting = setting_of(prepared, tmp_path)._replace(precision="float16")
    training = train.build_training(setting, 1, None)
    training.scaler.load_state_dict({**training.scaler.state_dict(), "scale": 2.0 ** 127})
    before = copy.deepcopy(training.captioner.decoder.state_dict())
    batch = next(iter(DataLoader(Pictures(setting.train), 4)))
    assert train.train_step(setting, training, batch).isfinite().all()
    assert same(dict(training.captioner.decoder.state_dict()), dict(before))
    assert training.scaler.get_scale() == 2.0 ** 126


def test_a_recipe_is_a_file_of_flags(tmp_path: Path) -> None:
    (tmp_path / "recipe.txt").write_text("# why\n--schedule cosine --augment  # both\n\n--epochs 3 4\n")
    args = train.get_parser().parse_args([f"@{tmp_path / 'recipe.txt'}", "--epochs", "5"])
    assert (args.schedule, args.augment, args.epochs) == ("cosine", True, [5])


def test_a_recipe_for_both_stages_trains_one(prepared: Prepared, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """And says in one line which of its flags that stage does not use."""
    data = shutil.copytree(prepared.folder, tmp_path / "data")  # where the recipe keeps features
    recipe = Path(train.__file__).parent / "recipes" / "tuned.txt"
    args = train.get_parser().parse_args([f"@{recipe}", *flags(
        prepared, tmp_path / "out", "--data_folder", data, "--stage", 1, "--epochs", 1)])
    (row,) = train.main(args)
    assert row["stage"] == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "not use" in line]
    assert said == ["stage 1 alone does not use --augment, --encoder_lr"]


TRAIN_AND_LIST_THREADS = """
import contextlib, runpy, time
from pathlib import Path

def threads():
    for thread in Path("/proc/self/task").glob("*"):  # on Linux; elsewhere none is listed
        with contextlib.suppress(OSError):            # it has just ended
            yield (thread / "comm").read_text().strip()

runpy.run_module("train", run_name="__main__", alter_sys=True)
deadline = time.monotonic() + 5
while "gloo" in " ".join(threads()) and time.monotonic() < deadline:  # one that has ended is listed a little longer
    time.sleep(0.1)
print("threads at the end:", *threads())
"""


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 10), (3, 25)], ids=["two", "three, some with dummy items"])
def test_several_processes_give_the_losses_and_scores_of_one(prepared: Prepared, tmp_path: Path, processes: int,
                                                             batch_size: int) -> None:
    """One process with the batch of all, in float32, and no dropout, which is drawn by each process for itself."""
    options = ["--dropout", 0, "--epochs", 1, "--grad_clip", 1e-3]  # of sums: to Adam alone means would be the same
    alone = run(prepared, tmp_path / "one", *options, "--batch_size", processes * batch_size)
    script = tmp_path / "train_and_list_threads.py"
    script.write_text(TRAIN_AND_LIST_THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               script, *flags(prepared, tmp_path / "all", *options, "--batch_size", batch_size)]
    paths = {"PYTHONPATH": str(Path(train.__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env={**os.environ, **paths})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads at the end:") == processes
    threads = done.stdout.split("threads at the end:", 1)[1]
    assert "gloo" not in threads  # or Python's end would abort now and then, though all the work is done
    log = tmp_path / "all" / f"log_{prepared.name}.jsonl"
    for one, several in zip(alone, map(json.loads, log.read_text().splitlines()), strict=True):
        for name in ("train_loss", "val_loss", "val_top5", "bleu4", "bleu4_teacher_forced"):
            assert several[name] == pytest.approx(one[name], rel=1e-5), name


def test_two_processes_compute_the_gradients_of_one(prepared: Prepared, tmp_path: Path) -> None:
    """Of the encoder too, whose pretrained weights and BatchNorm's averages rank 0 alone has read."""
    torch.manual_seed(1)
    weights = torchvision.models.get_model(ENCODER).state_dict()
    weights["features.12.1.weight"].fill_(1e7)  # random layers leave almost nothing of a picture
    weights["features.0.1.running_mean"].fill_(0.5)
    torch.save(weights, tmp_path / "weights.pth")
    one_step(0, 1, prepared, tmp_path)
    torch.multiprocessing.spawn(one_step, (2, prepared, tmp_path), 2)
    expected, *others = (torch.load(tmp_path / name) for name in ("0 of 1", "0 of 2", "1 of 2"))
    assert sum(bool(each.any()) for each in expected) > 100
    for found in others:
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def one_step(rank: int, processes: int, prepared: Prepared, folder: Path) -> None:
    """One of some processes, with its share of four pictures; writes its sums and gradients to a file."""
    torch.set_num_threads(1)
    if processes > 1:
        store = torch.distributed.FileStore(str(folder / "store"), processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    setting = setting_of(prepared, folder, "--encoder_weights", folder / "weights.pth", "--dropout", 0)._replace(
        world=World(rank, processes, torch.device("cpu")))
    training = train.build_training(setting, 2, None)
    items = Pictures(setting.train)
    sampler = EpochSampler(len(items), 4 // processes, 0, rank, processes)
    sums = train.train_step(setting, training, next(iter(DataLoader(items, batch_sampler=sampler))))
    torch.save([sums, *(each.grad for each in train.learning_parameters(training))],
               folder / f"{rank} of {processes}")


def test_an_encoder_of_somebody_s_own_classifier(prepared: Prepared, tmp_path: Path) -> None:
    """Ten classes, in the form in which PyTorch's ImageNet example saves what it trains on several GPUs."""
    classifier = torchvision.models.get_model(ENCODER, num_classes=10)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    torch.save({"epoch": 3, "arch": ENCODER, "state_dict": nn.DataParallel(classifier).state_dict(),
                "best_acc1": np.float64(0.7), "optimizer": optimizer.state_dict()}, tmp_path / "mine.pth.tar")
    setting = setting_of(prepared, tmp_path, "--encoder_weights", tmp_path / "mine.pth.tar")
    encoder = train.build_training(setting, 1, None).captioner.encoder
    assert all(map(torch.equal, encoder.resnet.state_dict().values(), classifier.features.state_dict().values()))
    setting.args.encoder = "resnet18"
    with pytest.raises(InputError, match=r"--encoder resnet18 --encoder_weights .*mine.pth.tar: .*0 of the trunk's 1"):
        train.build_training(setting, 1, None)


def test_an_optimizer_s_state_that_does_not_fit_begins_anew(prepared: Prepared, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody else's SGD, another model's averages, or none; the weights do not need them."""
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1)
    path = tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    state = load(tmp_path, prepared)
    setting = setting_of(prepared, tmp_path)
    averages = state["training"]["optimizers"]["decoder"]
    state["training"]["optimizers"]["decoder"] = averages
    good = train.build_training(setting, 1, state).optimizers["decoder"].state_dict()["state"]
    assert good and "anew" not in capsys.readouterr().out
    parameter = [nn.Parameter(torch.zeros(3))]
    for other in (torch.optim.SGD(parameter, lr=0.1).state_dict(), {**averages, "state": {0: {
            **averages["state"][0], "exp_avg": torch.zeros(3)}}}, {**averages, "state": {0: {"momentum_buffer": None}}},
            {}, None):
        state["training"]["optimizers"]["decoder"] = other
        assert not train.build_training(setting, 1, state).optimizers["decoder"].state_dict()["state"]
        assert "of the decoder's Adam does not fit the weights, so it begins anew" in capsys.readouterr().out
    torch.save(state, path)
    (_, row) = run(prepared, tmp_path, "--stage", 1, "--checkpoint", path)
    assert row["epoch"] == 2


def setting_of(prepared: Prepared, folder: Path, *more: object) -> train.Run:
    """What train.py has before its first stage."""
    args = train.get_parser().parse_args(flags(prepared, folder, "--alpha_c", 0.7, "--grad_clip", 1e-3,
                                               "--label_smoothing", 0.2, *more))
    data = [CaptionDataset(prepared.folder, prepared.name, split) for split in ("TRAIN", "VAL")]
    world = World(0, 1, torch.device("cpu"))
    word_map = load_word_map(prepared.folder, prepared.name)
    return train.Run(args, output_files(args), world, "float32", print, word_map, *data, [])


def test_a_dummy_item_counts_for_nothing(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for which an epoch's last batch has no caption computes one, without effect on loss or gradients."""
    setting = setting_of(prepared, tmp_path)
    training = train.build_training(setting, 1, None)
    setting = setting._replace(world=World(1, 2, torch.device("cpu")))
    others = torch.arange(1.0, len(Losses._fields) + 1, dtype=torch.float64)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(others))
    batch = next(iter(DataLoader(Pictures(setting.train), 1)))
    assert train.train_step(setting, training, batch, has_share=False).tolist() == others.tolist()
    assert not any(each.grad.any() for each in training.captioner.decoder.parameters())
    assert not torch.equal(train.train_step(setting, training, batch), others)
    assert any(each.grad.any() for each in training.captioner.decoder.parameters())


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_is_the_plain_arithmetic(prepared: Prepared, tmp_path: Path, stage: int) -> None:
    """Dropout, both terms of the loss, each gradient cut off, Adam; in stage 1 nothing of it for the encoder."""
    setting = setting_of(prepared, tmp_path)
    training = train.build_training(setting, stage, None)
    learned_encoder, learned_decoder, *_ = training.captioner
    learned_decoder.train()
    with torch.no_grad():
        learned_encoder.resnet[-1][1].weight.fill_(1e7)  # random layers leave almost nothing of a picture
    encoder, decoder = copy.deepcopy(learned_encoder), copy.deepcopy(learned_decoder)
    batch = next(iter(DataLoader(Pictures(setting.train), 4)))
    torch.manual_seed(5)
    sums = train.train_step(setting, training, batch)

    torch.manual_seed(5)
    pictures, captions, lengths = batch
    features = encoder(normalize(pictures, setting.world.device)).repeat_interleave(5, 0)
    scores, targets, decode_lengths, alphas, _ = decoder.train()(features, captions.flatten(0, 1), lengths.view(-1, 1))
    real = torch.arange(scores.size(1)) < torch.tensor(decode_lengths).unsqueeze(1)
    log_probs, true = scores[real].log_softmax(dim=1), targets[:, 1:][:, :scores.size(1)][real]
    loss = -(0.8 * log_probs.gather(1, true.unsqueeze(1)) + 0.2 * log_probs.mean(dim=1, keepdim=True)).mean()
    loss = loss + 0.7 * ((1 - alphas.sum(dim=1)) ** 2).mean()
    loss.backward()
    learning = [(decoder, 0.01)] + ([(encoder, 1e-4)] if stage == 2 else [])
    for (model, lr), learned in zip(learning, (learned_decoder, learned_encoder), strict=False):
        gradients = [(each, own.grad) for each, own in zip(model.parameters(), learned.parameters(), strict=True)
                     if each.requires_grad]
        for parameter, gradient in gradients:
            parameter.grad.clamp_(-1e-3, 1e-3)
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)
        assert 0 < sum(int((gradient.abs() == 1e-3).sum()) for _, gradient in gradients) < sum(
            gradient.numel() for _, gradient in gradients), "some are cut off"
        torch.optim.Adam([parameter for parameter, _ in gradients], lr=lr).step()

    assert train.mean_loss(sums.tolist(), 0.7) == pytest.approx(loss.item(), rel=1e-5)
    for plain, learned in ((decoder, learned_decoder), (encoder, learned_encoder)):
        for (name, value), other in zip(plain.named_parameters(), learned.parameters(), strict=True):
            # Adam divides by the gradient's size: of next to nothing it makes a step of any direction.
            solid = slice(None) if value.grad is None else value.grad.abs() > 1e-5
            torch.testing.assert_close(other[solid], value[solid], rtol=1e-4, atol=1e-5, msg=name)
    tuned = [each for each in learned_encoder.parameters() if each.requires_grad]
    assert bool(tuned) == (stage == 2)  # in stage 1 no gradient is computed for the encoder
    assert all(each.grad is not None for each in tuned)


def test_compiled_models_compute_the_same(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As whole graphs, and few of them, whatever the captions' lengths. (Traced, but not made into machine code, which
    takes minutes and a compiler.)"""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    counters["stats"].clear()
    gradients, weights = [], []
    for compiled in (False, True):
        setting = setting_of(prepared, tmp_path)
        setting.args.compile, setting.args.dropout = compiled, 0.0
        training = train.build_training(setting, 2, None)
        for batch in islice(DataLoader(Pictures(setting.train), 3), 3):         # of different lengths
            train.train_step(setting, training, batch)
            gradients.append([each.grad.norm().item() for each in train.learning_parameters(training)])
        weights.append(training.captioner.decoder.state_dict().keys() | training.captioner.encoder.state_dict().keys())
    half = len(gradients) // 2
    for one, other in zip(gradients[:half], gradients[half:], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert weights[0] == weights[1]
    assert 0 < counters["stats"]["unique_graphs"] <= 8


def test_kept_features_train_as_the_pictures_do(prepared: Prepared, straight: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights after both stages, though in the first the encoder sees each picture once in all."""
    data = tmp_path / "data"
    shutil.copytree(prepared.folder, data)
    run(prepared, tmp_path / "kept", "--data_folder", data, "--cache_features")
    kept, plain = load(tmp_path / "kept", prepared), load(straight, prepared)
    for name in ("train_loss", "val_loss", "bleu4"):
        assert [row[name] for row in kept["training"]["log"]] == pytest.approx(
            [row[name] for row in plain["training"]["log"]], rel=1e-4), name
    assert [path.name.split("_")[0] for path in sorted(data.glob("*FEATURES*"))] == ["TRAIN", "VAL"]

    monkeypatch.setattr(train, "draw_gaze", lambda *_: None)  # which needs three pictures themselves
    encoded: list[int] = []
    grid = Encoder.grid
    monkeypatch.setattr(Encoder, "grid", lambda self, images: encoded.append(len(images)) or grid(self, images))
    run(prepared, tmp_path / "again", "--data_folder", data, "--cache_features", "--stage", 1)
    assert encoded == [1, 1]  # one of each split, for the shape
    run(prepared, tmp_path / "other", "--data_folder", data, "--cache_features", "--stage", 1, "--seed", 1)
    assert sum(encoded) == 2 + 1 + 16 + 1 + 6  # another encoder, and other files


def test_a_stage_ends_when_patience_is_spent_and_says_so(prepared: Prepared, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "PATIENCE", 3)
    monkeypatch.setattr(train, "DECAY_EVERY", 2)
    monkeypatch.setattr(train, "bleu", lambda *_: [0, 0, 0, 1.0])
    rows = run(prepared, tmp_path, "--stage", 1, "--epochs", 9)
    assert len(rows) == 4  # the first is better than nothing, three are not better
    assert [row["decoder_lr"] for row in rows] == pytest.approx([0.01, 0.01, 0.01, 0.008])
    assert "no better BLEU-4 for 3 epochs" in capsys.readouterr().out
    again = run(prepared, tmp_path, "--stage", 1, "--epochs", 9, "--checkpoint",
                tmp_path / f"checkpoint_{prepared.name}.pth.tar")
    assert len(again) == 4
    assert "no better BLEU-4 for 3 epochs" in capsys.readouterr().out


def test_pretrained_embeddings_set_the_size_and_stay_frozen(prepared: Prepared, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("red 1 2 3\ncircle 4 5 6\nzebra 7 8 9\n")
    run(prepared, tmp_path / "out", "--embeddings", vectors, "--freeze_embeddings", "--stage", 1, "--epochs", 1)
    state = load(tmp_path / "out", prepared)
    assert state["model"]["embed_dim"] == 3
    assert state["decoder"]["embedding.weight"][state["word_map"]["circle"]].tolist() == [4, 5, 6]
    assert f"2 of {len(state['word_map'])} words found" in capsys.readouterr().out


def test_scheduled_sampling_grows_to_its_probability(prepared: Prepared, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    train_step = train.train_step

    def step(run: train.Run, training: train.Training, batch: Any, sampling: float, has_share: bool) -> torch.Tensor:
        assert training.captioner.decoder.training  # again, after a validation
        seen.append(sampling)
        return train_step(run, training, batch, sampling, has_share)

    monkeypatch.setattr(train, "train_step", step)
    run(prepared, tmp_path, "--stage", 1, "--epochs", 3, "--scheduled_sampling", 0.5)
    assert sorted(set(seen)) == [0.0, 0.25, 0.5]


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(prepared: Prepared, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1)
    before = (tmp_path / f"checkpoint_{prepared.name}.pth.tar").read_bytes()
    caption_losses = train.caption_losses
    monkeypatch.setattr(train, "caption_losses", lambda *given: Losses(*(
        each * torch.nan for each in caption_losses(*given))))
    with pytest.raises(InputError, match="the loss is nan"):
        run(prepared, tmp_path, "--checkpoint", tmp_path / f"checkpoint_{prepared.name}.pth.tar")
    assert (tmp_path / f"checkpoint_{prepared.name}.pth.tar").read_bytes() == before


@pytest.mark.parametrize(("more", "message"), [
    (["--data_name", "nothing"], "no data set nothing"),
    (["--data_folder", "nowhere"], "create_input_files.py"),
    (["--stage", "2"], "--checkpoint"),
    (["--stage", "3"], "--checkpoint"),
    (["--batch_size", "1", "2", "3", "4"], "--batch_size"),
    (["--freeze_embeddings"], "--embeddings"),
    (["--freeze_embeddings", "--checkpoint", "auto"], "--embeddings"),
    (["--checkpoint", "nothing.pth.tar"], "no such checkpoint"),
    (["--encoder", "no_such_network"], "no_such_network"),
    (["--embeddings", "nothing.txt"], "nothing.txt"),
    (["--device", "nonsense"], "--device")])
def test_what_cannot_work_is_said_in_one_line(prepared: Prepared, tmp_path: Path, more: list[str],
                                              message: str) -> None:
    with pytest.raises((InputError, OSError), match=message):
        run(prepared, tmp_path, *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("more", "message"), [
    (["--epochs", "0"], "argument --epochs: 0: a whole number of 1 or more"),
    (["--dropout", "1"], "argument --dropout: 1: a number from 0 to below 1")])
def test_a_number_out_of_its_range_is_refused(prepared: Prepared, tmp_path: Path, command: Any, more: list[str],
                                              message: str) -> None:
    assert command(train, *flags(prepared, tmp_path, *more)) == (2, f"train.py: {message} (--help tells the flags)\n")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_overwritten_unasked(prepared: Prepared, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a run already"):
        run(prepared, straight)
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1)
    with pytest.raises(InputError, match="belongs to another run"):
        run(prepared, straight, "--checkpoint", tmp_path / f"checkpoint_{prepared.name}.pth.tar")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_one_run_is_at_work_in_a_folder(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits a while for what a killed run left, and is refused."""
    monkeypatch.setattr("training.resume.LOCK_SECONDS", 0.5)
    monkeypatch.setattr(train, "run_stages", lambda *_: [{"begun": True}])
    there = tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    first = lock_folder(there.with_name(f".{there.name}.run.tmp"))
    with pytest.raises(InputError, match=f"another run is at work on {there}"):
        run(prepared, tmp_path)
    threading.Timer(0.2, first.close).start()
    assert run(prepared, tmp_path) == [{"begun": True}]
    assert not list(tmp_path.iterdir())

    def fails(*_: Any) -> None:
        reader.append(os.fork())
        if not reader[0]:
            time.sleep(60)
            os._exit(0)
        raise ValueError

    reader: list[int] = []
    monkeypatch.setattr(train, "run_stages", fails)
    with pytest.raises(ValueError):
        run(prepared, tmp_path)
    monkeypatch.setattr(train, "run_stages", lambda *_: [{"begun": True}])
    assert run(prepared, tmp_path) == [{"begun": True}], "though a process that it forked lives"
    os.kill(reader[0], 9)
    os.waitpid(reader[0], 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
@pytest.mark.parametrize(("resumes", "message"), [(False, "holds a run already"), (True, "belongs to another run")])
def test_what_another_run_saved_meanwhile_is_not_overwritten(prepared: Prepared, straight: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch, resumes: bool,
                                                             message: str) -> None:
    """It had no checkpoint yet when this run began to wait for its lock; then it saved one, and ended."""
    there = tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    other = ExitStack()
    other.enter_context(claimed_output_folder(setting_of(prepared, tmp_path).args, World(0, 1, torch.device("cpu"))))

    def meanwhile(_: float) -> None:
        there.write_bytes(b"of the other")
        other.close()

    monkeypatch.setattr("training.resume.time", SimpleNamespace(monotonic=time.monotonic, sleep=meanwhile))
    with pytest.raises(InputError, match=f"{there} {message}"):
        run(prepared, tmp_path, *(["--checkpoint", straight / there.name] if resumes else []))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {there.name: b"of the other"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_what_another_run_saved_meanwhile_is_resumed_if_asked_for(prepared: Prepared, straight: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """--checkpoint auto looks for a checkpoint once the folder is its own: a requeued job may wait for its former."""
    world = World(0, 1, torch.device("cpu"))
    args = train.get_parser().parse_args(flags(prepared, tmp_path, "--checkpoint", "auto"))
    other = ExitStack()
    assert other.enter_context(claimed_output_folder(args, world)) is None
    there = tmp_path / f"checkpoint_{prepared.name}.pth.tar"

    def meanwhile(_: float) -> None:
        shutil.copy(straight / there.name, there)
        other.close()

    monkeypatch.setattr("training.resume.time", SimpleNamespace(monotonic=time.monotonic, sleep=meanwhile))
    with claimed_output_folder(args, world) as checkpoint:
        assert checkpoint == str(there)


def test_stage_2_finds_the_best_of_stage_1_and_then_its_own(prepared: Prepared, straight: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """With --checkpoint auto. Where stage 1 left nothing, one line says so."""
    auto = ["--checkpoint", "auto"]
    with pytest.raises(InputError, match=f"BEST_checkpoint_{prepared.name}.pth.tar is not there, and --stage 2 .*"):
        run(prepared, tmp_path / "out", "--stage", 2, *auto)
    assert not list(tmp_path.iterdir())
    run(prepared, tmp_path, "--stage", 1, *auto)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        run(prepared, tmp_path, "--stage", 2, "--checkpoint_minutes", 0, *auto)
    stopped = load(tmp_path, prepared)["training"]
    assert (stopped["stage"], stopped["step"]) == (2, 3)
    assert stopped["args"]["checkpoint"] == str(tmp_path / f"BEST_checkpoint_{prepared.name}.pth.tar")
    run(prepared, tmp_path, "--stage", 2, *auto)
    assert_same_run(load(tmp_path, prepared), load(straight, prepared))


def test_a_leftover_of_torchruns_restarts_resumes_nothing(prepared: Prepared, straight: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(straight, tmp_path / "copy")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with refused("holds a run already"):
        run(prepared, folder)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # and its WORLD_SIZE not
    args = train.get_parser().parse_args(flags(prepared, folder))
    assert "resume it with: " in train.resume_command(args) and "torchrun --n" not in train.resume_command(args)


def test_an_older_checkpoint_does_not_replace_a_newer_one(prepared: Prepared, tmp_path: Path) -> None:
    """But stage 2 may begin from an older one of stage 1, its best, and keeps the log of the others."""
    newest, older = tmp_path / f"checkpoint_{prepared.name}.pth.tar", tmp_path / "older.pth.tar"
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1)
    shutil.copy(newest, older)
    run(prepared, tmp_path, "--stage", 1, "--checkpoint", newest)
    before = newest.read_bytes()
    with pytest.raises(InputError, match=f"{newest} is further .stage 1, 2 epochs done. than {older}.* {newest}, or"):
        run(prepared, tmp_path, "--checkpoint", older)
    assert newest.read_bytes() == before
    rows = run(prepared, tmp_path, "--stage", 2, "--epochs", 2, 1, "--checkpoint", older)
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (2, 1)]
    with pytest.raises(InputError, match="is further"):
        run(prepared, tmp_path, "--stage", 2, "--checkpoint", older)


def test_a_checkpoint_without_its_best_one_has_its_own_score_to_beat(prepared: Prepared, straight: Path,
                                                                     tmp_path: Path) -> None:
    start = load(straight, prepared)
    (tmp_path / "lone").mkdir()
    alone = tmp_path / "lone" / f"checkpoint_{prepared.name}.pth.tar"
    torch.save(start, alone)
    args = train.get_parser().parse_args(flags(prepared, tmp_path, "--checkpoint", alone))
    for _ in range(2):  # as when the first was killed before it saved anything
        start["training"]["best_bleu4"] = 99.0
        progress, _ = check_resume(start, args, World(0, 1, torch.device("cpu")))
        assert progress.best_bleu4 == start["scores"]["bleu4"] < 99
        assert start["training"]["best_bleu4"] == 99.0, "it is left as it is"
    start["training"]["world_size"] = 2
    _, (said,) = check_resume(start, args, World(0, 1, torch.device("cpu")))
    assert "another number of processes than before (2)" in said
    assert (tmp_path / f"BEST_checkpoint_{prepared.name}.pth.tar").read_bytes() == alone.read_bytes()


UNTOLD: dict[str, tuple[Any, str]] = {
    "scores in a list": (lambda state: {"scores": [1.0]}, "scores"),
    "a score in words": (lambda state: {"scores": {"bleu4": "high"}}, "scores"),
    "a CIDEr in words": (lambda state: {"training": {**state["training"], "best_cider": "high"}}, "best_cider"),
    "no dict": (lambda state: {"training": [1]}, "stage, best_bleu4, log"),
    "a stage in words": (lambda state: {"training": {**state["training"], "stage": "1"}}, "stage"),
    "no sums": (lambda state: {"training": {**state["training"], "sums": 5}}, "sums"),
    "no flags": (lambda state: {"training": {**state["training"], "args": None}}, "args"),
    "a batch size alone": (lambda state: {"training": {
        **state["training"], "args": {**state["training"]["args"], "batch_size": 80}}}, "batch_size"),
    "a log of numbers": (lambda state: {"training": {**state["training"], "log": [1]}}, "row 1 of log"),
    "a log without losses": (lambda state: {"training": {**state["training"], "log": [{"stage": 1}]}}, "row 1 of log")}


@pytest.mark.parametrize("case", UNTOLD)
def test_a_checkpoint_that_does_not_tell_of_its_run_is_named(prepared: Prepared, straight: Path, tmp_path: Path,
                                                            command: Any, case: str) -> None:
    """And it captions all the same."""
    change, named = UNTOLD[case]
    state, path = load(straight, prepared), tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    torch.save({**state, **change(state)}, path)
    status, shown = command(train, *flags(prepared, tmp_path, "--checkpoint", "auto"))
    assert (status, shown.count("\n")) == (1, 1) and shown.startswith(f"train.py: {path}: what it tells of {named}")
    assert load_checkpoint(path)["word_map"] == state["word_map"]


def test_other_flags_on_a_resume_are_said(prepared: Prepared, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1)
    run(prepared, tmp_path, "--stage", 1, "--alpha_c", 0.5, "--checkpoint",
        tmp_path / f"checkpoint_{prepared.name}.pth.tar")
    assert "--alpha_c 0.5 (was 1.0)" in capsys.readouterr().out


def test_flags_are_the_tutorials_with_its_defaults() -> None:
    values = vars(train.get_parser().parse_args([]))
    expected: dict[str, Any] = {
        "data_name": "coco_5_cap_per_img_5_min_word_freq", "emb_dim": 512, "attention_dim": 512, "decoder_dim": 512,
        "dropout": 0.5, "encoder_lr": 1e-4, "decoder_lr": [4e-4], "grad_clip": 5.0, "alpha_c": 1.0,
        "print_freq": 100, "checkpoint": None, "encoder": "resnet101", "stage": "both", "output_folder": ".",
        "epochs": [20, 120], "batch_size": [80, 32], "checkpoint_minutes": 15}
    assert {name: values[name] for name in expected} == expected
    assert train.get_parser().parse_args(["--fine_tune_encoder"]).stage == "2"


def test_each_stage_has_its_own_rate_without_a_schedule_too(prepared: Prepared, tmp_path: Path) -> None:
    rows = run(prepared, tmp_path, "--decoder_lr", 0.01, 0.002, "--epochs", 1, 2)
    assert [row["decoder_lr"] for row in rows] == [0.01, 0.002, 0.002]
    (*_, last) = run(prepared, tmp_path, "--decoder_lr", 0.01, 0.002, "--epochs", 1, 3, "--checkpoint",
                     tmp_path / f"checkpoint_{prepared.name}.pth.tar")
    assert last["decoder_lr"] == 0.002


def test_the_best_checkpoint_of_another_run_is_neither_overwritten_nor_resumed(prepared: Prepared, straight: Path,
                                                                           tmp_path: Path) -> None:
    name = f"BEST_checkpoint_{prepared.name}.pth.tar"
    (tmp_path / name).write_bytes(b"of somebody else")
    with pytest.raises(InputError, match=f"{name} holds a run already"):
        run(prepared, tmp_path)
    with pytest.raises(InputError, match=f"{name} belongs to another run"):
        run(prepared, tmp_path, "--checkpoint", straight / f"checkpoint_{prepared.name}.pth.tar")
    assert (tmp_path / name).read_bytes() == b"of somebody else"
    shutil.copy(straight / name, tmp_path / name)  # the run's own, that an earlier start brought along
    run(prepared, tmp_path, "--checkpoint", straight / f"checkpoint_{prepared.name}.pth.tar")


def test_a_best_checkpoint_that_tells_no_score_is_not_overwritten(prepared: Prepared, straight: Path,
                                                                  tmp_path: Path) -> None:
    """The original tutorial's, or one stripped for publishing: any epoch would count as better."""
    published = tmp_path / f"BEST_checkpoint_{prepared.name}.pth.tar"
    torch.save(load(straight, prepared, "BEST_checkpoint_") | {"training": None}, published)
    before = published.read_bytes()
    with pytest.raises(InputError, match=f"{published} would be overwritten.*name another --output_folder"):
        run(prepared, tmp_path, "--stage", 2, "--checkpoint", published)
    assert published.read_bytes() == before
    (row,) = run(prepared, tmp_path / "tuned", "--stage", 2, "--epochs", 1, "--checkpoint", published)
    assert row["stage"] == 2


def test_another_number_of_epochs_is_said_where_rates_depend_on_it(prepared: Prepared, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    run(prepared, tmp_path, "--stage", 1, "--epochs", 1, "--schedule", "cosine")
    run(prepared, tmp_path, "--stage", 1, "--epochs", 2, "--schedule", "cosine", "--checkpoint", there)
    assert "resumed with other flags than before: --epochs [2] (was [1])" in capsys.readouterr().out


class GRUDecoder(DecoderWithAttention):
    """With a GRU instead of the LSTM: its state is h alone."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.decode_step = nn.GRUCell(self.decode_step.input_size, self.decode_step.hidden_size)
        del self.init_c

    def init_hidden_state(self, encoder_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.init_h(encoder_out.mean(dim=1)),)

    def step(self, words: torch.Tensor, annotations: Annotations,
             state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        [h] = state
        context, alpha = self.attention(annotations, h)
        context = torch.sigmoid(self.f_beta(h)) * context
        h = self.decode_step(torch.cat([self.embedding(words), context], dim=1), h)
        return self.dropout(h), alpha, (h,)


def test_a_decoder_of_ones_own_serves_every_script_by_its_name(prepared: Prepared, straight: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    """Trained in both stages, resumed bit for bit in each, evaluated and asked; refused where nobody registered it."""
    monkeypatch.setitem(DECODERS, "gru", GRUDecoder)
    monkeypatch.setattr("eval.shutil.which", lambda _: None)  # METEOR has nothing to do with it
    name = f"checkpoint_{prepared.name}.pth.tar"
    run(prepared, tmp_path / "alone", "--decoder", "gru", "--epochs", 1)
    options = ["--epochs", 1, "--checkpoint_minutes", 0]
    for steps, more in ((2, ["--decoder", "gru"]), (4, ["--checkpoint", tmp_path / "stopped" / name])):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, steps)
            run(prepared, tmp_path / "stopped", *options, *more)
        assert load(tmp_path / "stopped", prepared)["training"]["step"] == 2
    run(prepared, tmp_path / "stopped", *options, "--checkpoint", tmp_path / "stopped" / name)
    for prefix in ("checkpoint_", "BEST_checkpoint_"):
        assert_same_run(load(tmp_path / "stopped", prepared, prefix), load(tmp_path / "alone", prepared, prefix))
    state = load(tmp_path / "alone", prepared)
    assert state["model"]["decoder"] == "gru" and state["training"]["stage"] == 2
    assert state["decoder"]["decode_step.weight_hh"].shape == (3 * 16, 16)

    best, out = tmp_path / "alone" / f"BEST_{name}", tmp_path / "out"
    search = ["--beam_size", 3, "--length_penalty", 1, "--max_len", 8, "--device", "cpu"]
    evaluate = ["--checkpoint", best, "--data_folder", prepared.folder, "--data_name", prepared.name, "--out", out,
                *search]
    ask = ["--model", best, "--img", prepared.pictures / "shapes_test_*", "--json", out / "asked.json", *search]
    assert command(evaluation, *evaluate)[0] == 0
    assert command(caption, *ask) == (0, "")
    scored = [each["caption"] for each in json.loads((out / "captions_TEST_beam3.json").read_text())]
    assert scored == [each["captions"][0]["caption"] for each in json.loads((out / "asked.json").read_text())]
    assert len(scored) == 7 and all(scored)

    monkeypatch.delitem(DECODERS, "gru")
    resume = flags(prepared, tmp_path / "alone", "--checkpoint", tmp_path / "alone" / name)
    for script, arguments, path in ((train, resume, resume[-1]), (evaluation, evaluate, best), (caption, ask, best)):
        status, said = command(script, *arguments)
        assert status == 1 and said.count("\n") == 1 and str(path) in said
        assert "there is no decoder 'gru', only lstm" in said
    status, said = command(train, *flags(prepared, tmp_path / "new", "--decoder", "gru"))
    assert status == 2 and said.startswith("train.py: --decoder gru: ") and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(DECODERS, "gru", GRUDecoder)
    with pytest.raises(InputError, match="holds a model with --decoder lstm, and not gru"):
        run(prepared, straight, "--decoder", "gru", "--checkpoint", straight / name)
