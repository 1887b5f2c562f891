"""A model from a checkpoint, maybe a stranger's: it fits, is as large as the file says, or one line tells why."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from encoders.by_name import UnknownEncoder
from encoders.trunk import Pixels
from models import Encoder, build


def restore(checkpoint: dict[str, Any], path: Any = "checkpoint") -> tuple[Encoder, nn.Module]:
    """Encoder and decoder with a checkpoint's weights, in eval mode.

    Raises:
        OSError: it is of a model that is not there, or its weights do not fit; `path` is named.
    """
    try:
        try:
            with torch.device("meta"):  # shapes alone: first weights, replaced at once, would take a second to draw
                models = rebuilt(checkpoint)
        except RuntimeError:  # RegNet computes with its first weights
            with limited(checkpoint):
                models = rebuilt(checkpoint)
        fill(models, checkpoint)
        if any(each.is_meta for model in models for each in model.buffers()):  # timm's Swin computes its masks,
            with limited(checkpoint):                                          # which are no weights
                models = rebuilt(checkpoint)
            fill(models, checkpoint)
    except ImportError:
        raise
    except UnknownEncoder as error:
        raise OSError(f"{path}: {error}") from error
    except Exception as error:  # what a file describes can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{path}: its weights and the model that it names do not fit ({reason}); get the file again, or "
                      "name another") from error
    encoder, decoder = models
    return encoder.to(torch.float32, memory_format=torch.channels_last), decoder.to(torch.float32).eval()


def rebuilt(checkpoint: dict[str, Any]) -> tuple[Encoder, nn.Module]:
    """What a checkpoint describes, without its weights."""
    pixels = Pixels.of(checkpoint["preprocessing"]) if checkpoint.get("preprocessing") else None
    encoder, decoder = build(checkpoint["model"], None, pixels and pixels.image_size)
    encoder.pixels = pixels or encoder.pixels
    return encoder, decoder


def fill(models: tuple[Encoder, nn.Module], checkpoint: dict[str, Any]) -> None:
    """Gives both their weights."""
    for module, name in zip(models, ("encoder", "decoder"), strict=True):
        own = {key: each.clone() for key, each in checkpoint[name].items()}  # or the file would stay mapped
        module.load_state_dict(own, assign=True)


@contextmanager
def limited(checkpoint: dict[str, Any]) -> Iterator[None]:
    """Within it a model that is far larger than a checkpoint's weights cannot be built: a small file that describes a
    large model must not take its memory. A classifier's head, and layers that are cut off, may be built beside them.

    Raises:
        ValueError: it is larger by 10^8 numbers and ten times.
    """
    held = sum(each.numel() for name in ("encoder", "decoder") for each in checkpoint[name].values())
    left, own = [10 * held + 10 ** 8], threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        left[0] -= parameter.numel() if threading.get_ident() == own else 0
        if left[0] < 0:
            raise ValueError(f"it describes a larger model than its {held} weights are of")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
