"""What a GPU would see, on a feigned one: nothing is left on the CPU by mistake, and no step waits for the GPU."""
from __future__ import annotations

import copy
import pickle
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Prepared
from feigned_gpu import GPU, feigned_gpu
from test_train import flags, setting_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import eval as evaluation
import train
from caption import Captioner, Search, beam_search
from datasets import CaptionDataset, image_loader, load_word_map
from models import ATTENTIONS, Caption, build, caption_losses, teacher_forced
from searching.ensemble import Ensemble
from training.features import encode_batch
from training.progress import mean_loss
from utils import World, autocast

EVERYTHING = ("--epochs", "1", "1", "1", "--cache_features", "--augment", "--scheduled_sampling", "0.5",
              "--label_smoothing", "0.1", "--precision", "bfloat16")


def scripts(prepared: Prepared, folder: Path, device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All stages of train.py, then eval.py with a gallery; the rows of both, without times."""
    arguments = [*flags(prepared, folder), *EVERYTHING, "--device", device]
    train.main(train.get_parser().parse_args(arguments))
    log = train.main(train.get_parser().parse_args([*arguments, "--stage", "3", "--checkpoint", "auto"]))
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
    assert seen.operations["aten._fused_adam_.default"] == 4 + 4 * 2 + 1  # of stage 1, of stage 2 twice, of stage 3
    # Training waits where it looks at the losses, and at no other place of a step, but where captions are drawn.
    assert set(seen.waits) == {"choose_device", "build_training", "load_optimizers", "keep_features", "look_at_losses",
                               "save", "save_checkpoint", "load_models", "validate", "predicted_words", "beam_search",
                               "to_captions", "copy_to", "frequencies", "draw_captions"}
    assert seen.waits["look_at_losses"] == 2 * 2 + 1  # at the first step and at the last


@pytest.mark.parametrize("free", [10 ** 9, 10 ** 5], ids=["on the card", "on disk"])
def test_kept_features_are_looked_up_on_the_card_where_they_fit(prepared: Prepared, tmp_path, monkeypatch, free):
    own = Path(shutil.copytree(prepared.folder, tmp_path / "data"))
    setting = setting_of(prepared._replace(folder=own), tmp_path)
    training = train.build_training(setting, 1, None)
    train.keep_features(setting.train, training.captioner, 0, show=False)
    on_disk = torch.stack([setting.train.picture(i) for i in (3, 0, 3)])
    assert on_disk.dim() == 4 and setting.train.look_up(on_disk) is on_disk
    with feigned_gpu() as seen:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10 ** 9))
        setting.train.features.copy_to(GPU)
        items = torch.stack([setting.train.picture(i) for i in (3, 0, 3)])
        assert (items.tolist() == [3, 0, 3]) == (free > 10 ** 6)
        before = seen.waits.total()
        features = setting.train.look_up(items)
        assert seen.waits.total() == before
        assert torch.equal(features.cpu(), on_disk) and (features.device == GPU) == (free > 10 ** 6)
        worker = pickle.loads(pickle.dumps(setting.train))
        assert torch.equal(worker.picture(3), items[0])


class Forward(NamedTuple):
    """What a model computes on its way forward."""

    features: Tensor            # of 4 pictures, on the CPU
    losses: list[float]         # of a step of training, and of a validation
    found: list[Caption]        # the best of each of the 4 pictures
    decisions: tuple[Any, ...]  # numbers of words, and captions: the same if no more than the last bits differ


def forward(model: Captioner, prepared: Prepared, device: torch.device, waits: Counter[str]) -> Forward:
    encoder, decoder = (copy.deepcopy(each).to(device) for each in model[:2])
    model = model._replace(encoder=encoder, decoder=decoder)
    train_set, val_set = (CaptionDataset(prepared.folder, prepared.name, split) for split in ("TRAIN", "VAL"))
    world = World(0, 1, device)
    images = torch.from_numpy(np.array(train_set.images[:4]))
    captions, lengths = torch.from_numpy(train_set.captions[:20]).long(), torch.from_numpy(train_set.caplens[:20])
    features = encode_batch(model, images)

    torch.manual_seed(0)
    before = waits.copy()
    with autocast(device, model.precision):
        losses = train.TeacherForcing(encoder, decoder.train())(
            images, captions, lengths, sampling=0.5, label_smoothing=0.1)
    assert waits == before, "a step of training waits"
    validation, _, generated = train.validate(model, val_set, image_loader(val_set, 4, 0, world), world)

    def counted(*arguments: Any) -> Any:
        at_step.append(waits.total())
        return step(*arguments)

    at_step: list[int] = []
    step, decoder.step = decoder.step, counted
    with autocast(device, model.precision):
        found = [best for best, *_ in beam_search(decoder, features, model.word_map, Search(beam_size=3, max_len=12))]
    assert max(after - before for before, after in pairwise(at_step)) <= 1, "a step of the search waits twice"
    both_losses = [mean_loss([each.item() for each in losses], 1.0), mean_loss(validation, 1.0)]
    return Forward(features.cpu(), both_losses, found,
                   (validation.top5, generated, [each.words for each in found]))


@pytest.fixture(scope="module")
def model(prepared: Prepared) -> Captioner:
    """Random weights, large enough that captions differ, and some end soon."""
    word_map = load_word_map(prepared.folder, prepared.name)
    torch.manual_seed(0)
    encoder, decoder = build({"encoder": "resnet18", "encoded_image_size": 14, "attention_dim": 16, "embed_dim": 16,
                              "decoder_dim": 16, "vocab_size": len(word_map)})
    with torch.no_grad():
        for each in decoder.parameters():
            each.mul_(4)
        decoder.fc.bias[word_map["<end>"]] = 1
    return Captioner(encoder, decoder.eval(), word_map)


@pytest.fixture(scope="module")
def on_the_cpu(model: Captioner, prepared: Prepared) -> Forward:
    return forward(model, prepared, torch.device("cpu"), Counter())


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("precision, error", [("float32", 1e-6), ("bfloat16", 0.02), ("float16", 0.005)])
def test_the_way_forward_by_cudas_own_rules(precision, error, model, prepared, on_the_cpu):
    """It computes what the CPU does in float32, but for rounding."""
    with feigned_gpu(cuda_rules=True) as seen:
        result = forward(model._replace(precision=precision), prepared, GPU, seen.waits)
    assert result.features.dtype == getattr(torch, precision)  # autocast was not off
    torch.testing.assert_close(result.features.float(), on_the_cpu.features, rtol=error, atol=10 * error)
    assert result.losses == pytest.approx(on_the_cpu.losses, rel=error)
    for best, features in zip(result.found, on_the_cpu.features.clone(), strict=True):
        decoded = teacher_forced(model.decoder, features.unsqueeze(0), torch.tensor([best.sequence]),
                                 torch.tensor([[len(best.sequence)]]))
        assert best.log_prob == pytest.approx(-caption_losses(decoded).cross_entropy.item(), rel=error)
    if precision == "float32":
        assert result.decisions == on_the_cpu.decisions


@pytest.mark.parametrize("search", [Search(3, max_len=9, no_repeat=2), Search(sample=3, seed=1, max_len=9)])
def test_an_ensemble_finds_and_draws_on_a_gpu_what_it_does_on_a_cpu(search: Search, model: Captioner) -> None:
    """From bytes, by both encoders; nothing that is drawn is waited for."""
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    other = copy.deepcopy(model.decoder)
    with torch.no_grad():
        other.fc.weight.neg_()
    ensemble = Ensemble([model.encoder, model.encoder], [model.decoder, other]).eval()
    expected = beam_search(ensemble, images, model.word_map, search)
    with feigned_gpu() as seen:
        found = beam_search(copy.deepcopy(ensemble).to(GPU), images.to(GPU), model.word_map, search)
    assert [[each.words for each in captions] for captions in found] == [
        [each.words for each in captions] for captions in expected]
    assert "draw" not in seen.waits
    torch.manual_seed(0)
    with feigned_gpu():
        drawn = beam_search(copy.deepcopy(ensemble).to(GPU), images.to(GPU), model.word_map, Search(sample=2))
    assert len(drawn) == 3


@pytest.mark.parametrize("cuda_rules", [False, True])
def test_the_feigned_gpu_is_strict(cuda_rules):
    with feigned_gpu(cuda_rules) as seen:
        ours, other = torch.ones(3).to(GPU), torch.ones(3)
        assert ours.device == GPU and (ours + 1).device == GPU and torch.zeros(2, device=GPU).device == GPU
        with pytest.raises(RuntimeError, match="some tensors are on cuda:0"):
            ours + other
        with pytest.raises(RuntimeError, match="the generator is on the CPU"):
            torch.rand(3, generator=torch.Generator(), device=GPU)
        with pytest.raises(RuntimeError, match="the lengths are on cuda:0"):
            pack_padded_sequence(torch.ones(2, 3).to(GPU), torch.tensor([3, 2]).to(GPU), batch_first=True)
        assert other.device.type == ours.cpu().device.type == "cpu"
        for wait in (lambda: ours.sum().item(), lambda: ours.cpu(), lambda: ours.tolist(), lambda: ours.nonzero(),
                     lambda: ours[ours > 0], lambda: bool((ours > 0).all()), lambda: other.to(GPU),
                     lambda: ours.copy_(other), lambda: ours[[0, 1]], lambda: torch.tensor([1.0, 2.0], device=GPU)):
            before = seen.waits.total()
            wait()
            assert seen.waits.total() == before + 1
        before = seen.waits.total()
        other.to(GPU, non_blocking=True)
        ours.copy_(other, non_blocking=True)
        ours.add_(2.0).masked_fill_(ours > 1, 0)
        assert seen.waits.total() == before


def product(device: torch.device) -> Tensor:
    return torch.ones(2, 3, device=device) @ torch.ones(3, 3, device=device)


@pytest.mark.parametrize("precision, refused, message", [
    ("float16", lambda device: torch.zeros_like(product(device)).index_add(
        0, torch.arange(2, device=device), product(device).softmax(dim=1)), "self .Half. and source .Float."),
    ("bfloat16", lambda device: product(device).index_put_(
        (torch.arange(1, device=device),), product(device)[:1].exp()), "Index put requires"),
    ("float16", lambda device: F.binary_cross_entropy(
        product(device).sigmoid(), torch.ones(2, 3, device=device)), "unsafe to autocast"),
    ("float32", lambda device: nn.LSTMCell(3, 3).half().to(device)(
        product(device).half(), (product(device).half(), product(device))), "gates in torch.float16"),
], ids=["softmax into 16 bits", "exp into 16 bits", "binary_cross_entropy", "a cell in float32"])
def test_what_only_cuda_refuses(precision, refused, message):
    """A CPU takes it, and so does a feigned GPU with a CPU's rules."""
    with autocast(torch.device("cpu"), precision):
        refused(torch.device("cpu"))
    with feigned_gpu(), autocast(GPU, precision):
        refused(GPU)
    with (feigned_gpu(cuda_rules=True), autocast(GPU, precision), pytest.raises(RuntimeError, match=message)):
        refused(GPU)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("attention", ["hard", "mean"])
def test_the_other_kinds_of_attention_wait_for_nothing(model: Captioner, attention: str, precision: str) -> None:
    """In a step of training, by CUDA's own rules."""
    with feigned_gpu(cuda_rules=True) as seen:
        decoder = copy.deepcopy(model.decoder)
        old = decoder.attention
        decoder.attention = ATTENTIONS[attention](*(each.in_features for each in (old.encoder_att, old.decoder_att)),
                                                  old.full_att.in_features)
        decoder = decoder.to(GPU).train()
        features = torch.randn(2, 4, 4, old.encoder_att.in_features).to(GPU)
        captions, lengths = torch.randint(1, 5, (4, 7)).to(GPU), torch.tensor([[7], [5], [3], [6]])
        before = seen.waits.copy()
        with autocast(GPU, precision):
            decoded = teacher_forced(decoder, features, captions, lengths)
            losses = caption_losses(decoded, 0.1, getattr(decoder.attention, "baseline", None))
            loss = losses.mean(losses, 1.0)
        assert seen.waits == before
        assert loss.isfinite() and decoded.alphas.sum(dim=2).max().item() == pytest.approx(1, abs=1e-3)
