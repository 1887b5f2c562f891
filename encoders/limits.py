"""How large a model may become that a stranger's file describes."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


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
