"""A DataLoader that ends as politely as the script that it works for."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from safety.signals import ignore_signals, unbroken


class Loader(DataLoader):
    """Its workers leave signals to us. One that comes while they start has its effect afterwards, as PyTorch complains
    of an iterator that is destroyed before it is complete."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, worker_init_fn=ignore_signals, **settings)

    def __iter__(self) -> Iterator[Any]:
        return unbroken(super().__iter__)
