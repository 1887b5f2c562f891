"""What several tests share: a tiny data set of drawn shapes, prepared once, and a tiny trained run on it."""
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import create_input_files
from demo.shapes import draw_data_set
from models import ATTENTIONS, DecoderWithAttention
from safety.errors import InputError, run_script

torch.set_num_threads(1)  # at these sizes threads only wait for each other

ENCODER = "mobilenet_v3_small"  # the smallest of torchvision's, with random weights: fast on a CPU


class Prepared(NamedTuple):
    folder: Path      # what create_input_files.py wrote
    name: str         # --data_name
    pictures: Path    # the folder of picture files
    json_path: Path   # Karpathy's layout


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Iterator[Prepared]:
    """A small data set, which all tests share and none changes."""
    folder = tmp_path_factory.mktemp("prepared")
    json_path = draw_data_set(folder / "shapes", train=16, val=6, test=7)
    pictures = folder / "shapes" / "images"
    name = create_input_files.create_input_files("shapes", json_path, pictures, 5, 0, folder / "data", 50, workers=2)

    def written() -> set[tuple[str, int]]:
        return {(str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}

    before = written()
    yield Prepared(folder / "data", name, pictures, json_path)
    assert written() ^ before == set()  # of files that come and go, such as a lock, only the folder's time is left


def exact_decoder(kind: str, **sizes: int) -> DecoderWithAttention:
    """A tiny decoder with large random weights in double precision, for gradients to be compared."""
    torch.manual_seed(0)
    decoder = DecoderWithAttention(**sizes, dropout=0.0)
    decoder.attention = ATTENTIONS[kind](*(sizes[name] for name in ("encoder_dim", "decoder_dim", "attention_dim")))
    decoder.double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The error is one line, and each part is in it."""
    with pytest.raises(InputError) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.fixture(autouse=True)
def _whatever_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scripts say of bfloat16 depends on the machine."""
    monkeypatch.setattr("safety.devices.bfloat16_on_cpu", lambda _: None)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script as its command would; returns the exit status and what stood on standard error."""
    def run(script: ModuleType, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        status: int | str | None = 0
        try:
            run_script(script.main, script.get_parser())
        except SystemExit as stop:
            status = stop.code
        shown = capsys.readouterr().err
        if isinstance(status, str):  # what Python prints, and then ends with 1
            status, shown = 1, f"{shown}{status}\n"
        return status, re.sub(r"[^\r\n]*\r", "", shown)  # without bars that were drawn and wiped away

    return run
