"""What a GPU would see, on a feigned one: nothing is left on the CPU by mistake, and no step waits for the GPU."""
from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prepared
from feigned_gpu import GPU, feigned_gpu
from test_train import flags, setting_of

import eval as evaluation
import train

EVERYTHING = ("--epochs", "1", "--cache_features", "--augment", "--scheduled_sampling", "0.5", "--label_smoothing",
              "0.1", "--precision", "bfloat16")


def scripts(prepared: Prepared, folder: Path, device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both stages of train.py, then eval.py with a gallery; the rows of both, without times."""
    log = train.main(train.get_parser().parse_args([*flags(prepared, folder), *EVERYTHING, "--device", device]))
    table = evaluation.main(evaluation.get_parser().parse_args(
        ["--data_folder", str(prepared.folder), "--data_name", prepared.name, "--device", device, "--beam_size", "1",
         "3", "--precision", "bfloat16", "--checkpoint", str(folder / f"BEST_checkpoint_{prepared.name}.pth.tar"),
         "--gallery", str(folder / "gallery.html")]))
    timed = {"seconds", "captions_per_second", "images/s"}
    return tuple([{name: row[name] for name in row.keys() - timed} for row in rows] for rows in (log, table))


@pytest.mark.filterwarnings("ignore:'pin_memory'")
def test_the_scripts_do_on_a_gpu_what_they_do_on_a_cpu(prepared: Prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.shutil.which", lambda _: None)  # METEOR has nothing to do with it
    own = Path(shutil.copytree(prepared.folder, tmp_path / "data"))  # where the features are kept
    prepared = prepared._replace(folder=own)
    with monkeypatch.context() as patch:  # without the shortcuts that only a CPU takes, and that round otherwise
        patch.setattr("models.speed_up_convolutions", lambda layers: layers.to(memory_format=torch.channels_last))
        patch.setattr("torchvision.transforms.v2.functional._geometry._do_native_uint8_resize_on_cpu", lambda _: False)
        expected = scripts(prepared, tmp_path / "cpu", "cpu")
    with feigned_gpu() as seen:
        assert scripts(prepared, tmp_path / "gpu", "cuda:0") == expected
    assert seen.operations["aten._fused_adam_.default"] == 4 + 4 * 2  # steps of stage 1, and of stage 2 twice
    # Training waits where it looks at the losses, and at no other place of a step.
    assert set(seen.waits) == {"choose_device", "build_training", "load_optimizers", "keep_features", "look_at_losses",
                               "save", "save_checkpoint", "main", "validate", "predicted_words", "beam_search",
                               "hypotheses_at"}
    assert seen.waits["look_at_losses"] == 2 * 2  # at the first step and at the last


@pytest.mark.parametrize("free", [10 ** 9, 10 ** 5], ids=["on the card", "on disk"])
def test_kept_features_are_looked_up_on_the_card_where_they_fit(prepared: Prepared, tmp_path, monkeypatch, free):
    own = Path(shutil.copytree(prepared.folder, tmp_path / "data"))
    setting = setting_of(prepared._replace(folder=own), tmp_path)
    training = train.build_training(setting, 1, None)
    train.keep_features(setting.train, training.captioner, 0, show=False)
    on_disk = torch.stack([setting.train.picture(i) for i in (3, 0, 3)])
    assert on_disk.dim() == 4 and setting.train.look_up(on_disk) is on_disk
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10 ** 9))
    with feigned_gpu() as seen:
        setting.train.features.copy_to(GPU)
        items = torch.stack([setting.train.picture(i) for i in (3, 0, 3)])
        assert (items.tolist() == [3, 0, 3]) == (free > 10 ** 6)
        before = seen.waits.total()
        features = setting.train.look_up(items)
        assert seen.waits.total() == before
        assert torch.equal(features.cpu(), on_disk) and (features.device == GPU) == (free > 10 ** 6)
        worker = pickle.loads(pickle.dumps(setting.train))
        assert torch.equal(worker.picture(3), items[0])


def test_the_feigned_gpu_is_strict():
    with feigned_gpu() as seen:
        ours, other = torch.ones(3).to(GPU), torch.ones(3)
        assert ours.device == GPU and (ours + 1).device == GPU and torch.zeros(2, device=GPU).device == GPU
        with pytest.raises(RuntimeError, match="some tensors are on cuda:0"):
            ours + other
        assert other.device.type == ours.cpu().device.type == "cpu"
        for wait in (lambda: ours.sum().item(), lambda: ours.cpu(), lambda: ours.tolist(), lambda: ours.nonzero(),
                     lambda: ours[ours > 0], lambda: bool((ours > 0).all()), lambda: other.to(GPU),
                     lambda: ours.copy_(other), lambda: ours[[0, 1]]):
            before = seen.waits.total()
            wait()
            assert seen.waits.total() == before + 1
        before = seen.waits.total()
        other.to(GPU, non_blocking=True)
        ours.copy_(other, non_blocking=True)
        ours.add_(2.0).masked_fill_(ours > 1, 0)
        assert seen.waits.total() == before
