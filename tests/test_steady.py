"""Memory stays where it is however long a run is, and the number of workers changes nothing."""
from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER, Prepared
from test_train import load, run, same, setting_of
from torch.utils.data import DataLoader

import train
from caption import Captioner, Search
from datasets import CaptionDataset, EpochSampler, Pictures, image_loader, load_word_map
from eval import generate_captions
from models import DecoderWithAttention, Encoder, Losses
from safety.signals import ignore_signals
from utils import World

CPU = torch.device("cpu")


def growth(work: Callable[[], Any], warm: int, times: int) -> float:
    """Megabytes that this process has grown by in so many rounds of work, after some to warm up."""
    for i in range(warm + times):
        if i == warm:
            gc.collect()
            before = resident()
        work()
    gc.collect()
    return resident() - before


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_of_training_is_flat(prepared: Prepared, tmp_path: Path) -> None:
    """Steps on features that are kept, so that many take little time."""
    setting = setting_of(prepared, tmp_path)
    training = train.build_training(setting, 1, None)
    train.keep_features(setting.train, training.captioner, 0, show=False)
    try:
        batch = next(iter(DataLoader(Pictures(setting.train), 4)))
        sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
        assert growth(lambda: sums.add_(train.train_step(setting, training, batch)), 50, 150) < 1
    finally:
        setting.train.features.path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_of_evaluation_is_flat(prepared: Prepared) -> None:
    """Validation and search over the test split again and again."""
    word_map = load_word_map(prepared.folder, prepared.name)
    dataset = CaptionDataset(prepared.folder, prepared.name, "TEST")
    torch.manual_seed(0)
    encoder = Encoder(4, ENCODER)
    decoder = DecoderWithAttention(8, 8, 16, len(word_map), encoder.encoder_dim)
    one, model = World(0, 1, CPU), Captioner(encoder, decoder, word_map)
    train.keep_features(dataset, model, 0, show=False)

    def work() -> None:
        train.validate(model, dataset, image_loader(dataset, 4, 0, one), one)
        generate_captions(model, dataset, Search(beam_size=2, max_len=8), one, 4)

    try:
        assert growth(work, 5, 20) < 1
    finally:
        dataset.features.path.unlink()


def test_the_same_seed_gives_the_same_run(prepared: Prepared, tmp_path: Path) -> None:
    """Bit for bit; and another seed another."""
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        run(prepared, tmp_path / name, "--stage", 1, "--epochs", 1, "--seed", seed)
    one, again, other = (load(tmp_path / name, prepared) for name in ("one", "again", "other"))
    for part in ("encoder", "decoder", "scores"):
        assert same(one[part], again[part]) and not same(one[part], other[part])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of every fork beside threads
@pytest.mark.parametrize(("start", "workers"), [("fork", 1), ("fork", 2), ("fork", 4), ("spawn", 1), ("spawn", 2),
                                                ("spawn", 4)])
def test_any_number_of_workers_gives_the_same_batches(prepared: Prepared, start: str, workers: int) -> None:
    dataset = CaptionDataset(prepared.folder, prepared.name, "TRAIN")
    sampler = EpochSampler(len(dataset), 7, seed=5)

    def batches(**options: Any) -> list[list[torch.Tensor]]:
        return list(DataLoader(dataset, batch_sampler=sampler, worker_init_fn=ignore_signals, **options))

    expected = batches(num_workers=0)
    assert len(expected) == 12 and not torch.equal(expected[0][1], expected[1][1])
    assert same(batches(num_workers=workers, multiprocessing_context=start), expected)
