"""The baseline's side of each work: tutorial.py, fed and timed. The functions are named as those of ours.py."""
from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from benchmarks import tutorial
from benchmarks.setting import BEAM_SIZE, CAPTIONS_PER_IMAGE, NAME, Setting, now, peak_bytes, rate, to_float64


def load_models(setting: Setting, stage: int, decoder_weights: str = "decoder", **arguments: Any
                ) -> tuple[tutorial.TutorialEncoder, tutorial.TutorialDecoder, list[torch.optim.Optimizer]]:
    """Encoder, decoder and optimizers of a stage, with the weights that ours has too."""
    torch.set_float32_matmul_precision("highest")  # no TF32 in matrix products, which is also PyTorch's default
    weights = torch.load(setting.weights_path, weights_only=True)
    encoder = tutorial.TutorialEncoder(setting.encoder)
    decoder = tutorial.TutorialDecoder(**setting.decoder_arguments(weights["encoder_dim"]), **arguments)
    encoder.load_state_dict(weights["encoder"])
    decoder.load_state_dict(weights[decoder_weights])
    encoder.fine_tune(stage == 2)
    encoder, decoder = encoder.to(setting.device), decoder.to(setting.device)
    optimizers = [tutorial.make_optimizer(decoder, 4e-4)]
    return encoder, decoder, optimizers + ([tutorial.make_optimizer(encoder, 1e-4)] if stage == 2 else [])


def steps(setting: Setting, stage: int) -> Iterator[int]:
    """Training without end; each step says how many captions it took."""
    encoder, decoder, optimizers = load_models(setting, stage)
    dataset = tutorial.TutorialDataset(setting.data, NAME, "TRAIN")
    device = torch.device(setting.device)
    while True:
        for batch in tutorial.loader(dataset, setting.batch_size[stage - 1], device):
            tutorial.train_step(encoder, decoder, optimizers, *(each.to(device) for each in batch))
            yield len(batch[0])


def training(setting: Setting, stage: int) -> float:
    """Captions a second."""
    return rate(steps(setting, stage), setting.warm_up, setting.steps, setting.device)


def training_proof(setting: Setting, stage: int, dtype: str = "float32",
                   features_kept: bool = False) -> dict[str, float]:
    """Loss, and the norm of each gradient, of a step on the first pictures' captions without dropout.

    Args:
        features_kept: nothing to the baseline, which computes the same whatever ours keeps.
    """
    torch.backends.cudnn.allow_tf32 = False
    encoder, decoder, optimizers = load_models(setting, stage, dropout=0.0)
    if dtype == "float64":
        encoder.double().resnet.register_forward_pre_hook(to_float64)
        decoder.double()
    dataset = tutorial.TutorialDataset(setting.data, NAME, "TRAIN")
    batch = zip(*(dataset[i] for i in range(CAPTIONS_PER_IMAGE * setting.proof_pictures)), strict=True)
    batch = [torch.stack(each).to(setting.device) for each in batch]
    loss, _ = tutorial.train_step(encoder, decoder, optimizers, *batch)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default for convolutions, in which the baseline is timed
    gradients = {f"{model}.{name}": each.grad.norm().item() for model, module in
                 (("encoder", encoder), ("decoder", decoder))
                 for name, each in module.named_parameters() if each.grad is not None}
    return {"loss": loss, **gradients}


def searched_dataset(setting: Setting, pictures: int) -> Subset:
    """The captions of the first pictures of the test split."""
    return Subset(tutorial.TutorialDataset(setting.data, NAME, "TEST"), range(CAPTIONS_PER_IMAGE * pictures))


def evaluation_proof(setting: Setting) -> list[list[int]]:
    """The captions of the first pictures, from <start> on, each picture once."""
    torch.backends.cudnn.allow_tf32 = False
    encoder, decoder, _ = load_models(setting, 2, "speaker")
    dataset = searched_dataset(setting, setting.proof_pictures)
    batches = [[each.unsqueeze(0) for each in dataset[i]] for i in range(0, len(dataset), CAPTIONS_PER_IMAGE)]
    found = tutorial.evaluate(encoder, decoder, batches, setting.word_map(), torch.device(setting.device), BEAM_SIZE)
    torch.backends.cudnn.allow_tf32 = True
    return found


def evaluation(setting: Setting) -> float:
    """Pictures of a split a second; each is searched once for each of its captions."""
    encoder, decoder, _ = load_models(setting, 2, "speaker")  # as stage 2 leaves them: autograd records them all
    device, word_map = torch.device(setting.device), setting.word_map()

    def run(pictures: int) -> float:
        batches = tutorial.loader(searched_dataset(setting, pictures), 1, device)
        began = now(setting.device)
        tutorial.evaluate(encoder, decoder, batches, word_map, device, BEAM_SIZE)
        return now(setting.device) - began

    run(1)
    return setting.searched / run(setting.searched)


def prepare(setting: Setting, folder: Path) -> None:
    tutorial.prepare(setting.json_path, setting.pictures_folder, folder, NAME, CAPTIONS_PER_IMAGE)


def preparation(setting: Setting, folder: Path) -> float:
    """Pictures a second."""
    began = time.perf_counter()
    prepare(setting, folder)
    return setting.pictures / (time.perf_counter() - began)


def memory(setting: Setting, stage: int) -> int:
    """Bytes at the peak of two training steps: the second has Adam's averages too. For a process of its own."""
    encoder, decoder, optimizers = load_models(setting, stage)
    dataset = tutorial.TutorialDataset(setting.data, NAME, "TRAIN")
    loader = tutorial.loader(dataset, setting.batch_size[stage - 1], torch.device(setting.device))
    batch = [each.to(setting.device) for each in next(iter(loader))]
    return peak_bytes(lambda: [tutorial.train_step(encoder, decoder, optimizers, *batch) for _ in range(2)],
                      setting.device)


def save_checkpoint(setting: Setting) -> Path:
    """A pickle of whole modules and optimizers, as after a step of stage 2."""
    encoder, decoder, optimizers = load_models(setting._replace(device="cpu"), 2, "speaker")
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)  # Adam gets its averages, and the weights stay
        optimizer.step()
        optimizer.zero_grad()
    path = setting.folder / "baseline_checkpoint.pth.tar"
    torch.save({"epoch": 0, "epochs_since_improvement": 0, "bleu-4": 0.0, "encoder": encoder, "decoder": decoder,
                "decoder_optimizer": optimizers[0], "encoder_optimizer": optimizers[1]}, path)
    return path


def cold_caption(setting: Setting, checkpoint: Path, picture: Path) -> tuple[float, str]:
    """Seconds from the command to the caption, and the caption."""
    command = [sys.executable, tutorial.__file__, "--caption", picture, checkpoint, "--device", setting.device,
               "--word_map", setting.data / f"WORDMAP_{NAME}.json", "--beam_size", str(BEAM_SIZE)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout.strip()
