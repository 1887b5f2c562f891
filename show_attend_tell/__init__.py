"""The scripts from anywhere, after `pip install -e .` in their folder:

    from show_attend_tell import caption_images, load

Elsewhere `datasets`, `utils` and `models` may be somebody else's. So each script is a module of this package here,
show_attend_tell.caption for instance, and what it imports by a short name it gets from the package.
"""
from __future__ import annotations

import builtins
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

HOME = Path(__file__).resolve().parent.parent
OURS = {"models", "datasets", "create_input_files", "caption", "eval", "train", "utils", "encoders", "safety",
        "preparing", "searching", "training", "drawing"}
__path__ = [str(HOME)]  # where Python looks for modules of this package


def import_ours(name: str, its_globals: Any = None, its_locals: Any = None, names: Sequence[str] = (),
                level: int = 0) -> ModuleType:
    """What an `import` in the scripts calls instead of Python's own."""
    first = name.partition(".")[0]
    if level or first not in OURS:
        return builtins.__import__(name, its_globals, its_locals, names, level)
    module = builtins.__import__(f"{__name__}.{name}", its_globals, its_locals, names)
    return module if names else getattr(module, first)


class ScriptLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        module.__builtins__ = {**vars(builtins), "__import__": import_ours}
        super().exec_module(module)


class ScriptFinder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name.startswith(f"{__name__}.") else None
        if spec and spec.origin:
            spec.loader = ScriptLoader(name, spec.origin)
        return spec


if not (HOME / "caption.py").is_file():
    raise ImportError(f"{HOME} does not hold the scripts; install them where they are: `pip install -e .`")
sys.meta_path.insert(0, ScriptFinder())

from .caption import Caption, Captioner, Search, beam_search, caption_images, load  # noqa: E402

__all__ = ["Caption", "Captioner", "Search", "beam_search", "caption_images", "load"]
