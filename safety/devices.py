"""What to say where a device cannot be used, or would be slower than it need be."""
from __future__ import annotations

import platform
import shutil
import warnings

import torch

OLDER_WHEELS = "https://pytorch.org/get-started/previous-versions"
NEWER_DRIVER = f"install a newer NVIDIA driver, or a PyTorch that is built with an older CUDA ({OLDER_WHEELS})"


def unusable_device(why: str, asked_for: str | None) -> str:
    """Why PyTorch cannot use a device, and what to do about it, from the error that it raised."""
    why = why.splitlines()[0]
    if "no kernel image" in why or "not compatible with the current PyTorch" in why:
        return (f"({why}): this PyTorch is built with CUDA {torch.version.cuda}, which does not serve the card; for an "
                f"old card install one that is built with an older CUDA ({OLDER_WHEELS}), or use --device cpu")
    if "out of memory" in why:
        return f"({why}): other programs fill its memory; end them, or name another GPU, as --device cuda:1"
    if "driver" in why:
        return f"({why}); {NEWER_DRIVER}, or use --device cpu"
    return f"({why}); " + ("leave the flag out" if asked_for else "use --device cpu, or fewer processes")


def cpu_advice(device: torch.device, asked_for: str | None, precision: str) -> list[str]:
    """Lines to say where a run on the CPU could be faster: as there is a GPU, or by another precision.

    Args:
        device: where it runs; of a GPU there is nothing to say.
        asked_for: the device that the user named, if any.
    """
    if device.type != "cpu":
        return []
    return [line for line in (None if asked_for else idle_gpu(), bfloat16_on_cpu(precision)) if line]


def idle_gpu() -> str | None:
    """Where a GPU is there, and PyTorch was installed to use it, why it does not."""
    if torch.cuda.is_available() or not torch.version.cuda or not shutil.which("nvidia-smi"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        return f"PyTorch finds no GPU that it can use ({why}), so this runs on the CPU; {NEWER_DRIVER}"
    return None


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16, AVX512-BF16 or AMX; of others than x86 PyTorch does not tell."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bfloat16_on_cpu(precision: str) -> str | None:
    """Whether bfloat16 is faster on this CPU, where that was not chosen, or slower, where it was."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return None
    if precision == "float16":
        return "float16 is for GPUs: on this CPU fine-tuning takes many times as long as in float32"
    native = cpu_has_bfloat16()
    if precision == "bfloat16" and not native:
        return ("this CPU has no instructions for bfloat16, which takes it three times as long as float32; leave out "
                "--precision bfloat16")
    if precision == "float32" and native:
        return "this CPU has instructions for bfloat16: --precision bfloat16 would be up to three times as fast"
    return None
