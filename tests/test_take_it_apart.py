"""What docs/take_it_apart.md shows a reader to add works as it stands there."""
from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import ENCODER, Prepared
from test_train import flags, run

import caption
import eval as evaluation
import models
import train

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs" / "take_it_apart.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """The first block of code under a heading."""
    return re.search(rf"## {heading}\n.*?```{language}\n(.*?)```", TEXT, re.DOTALL)[1]


def patched(script: str, heading: str) -> str:
    """A script's text with the changes that stand under a heading: hunks that are separated by an empty line."""
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    for hunk in re.split(r"^ ?\n", block(heading, "diff"), flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, hunk
        text = text.replace(before, after)
    return text


@pytest.fixture
def registered() -> Iterator[None]:
    """The decoders and the encoder of that page, for one test."""
    with mock.patch.dict(models.DECODERS), mock.patch.dict(models.ENCODERS):
        for heading in ("A GRU instead of the LSTM", "A Transformer decoder", "An encoder"):
            exec(block(heading, "python"), {"__name__": "my_decoders"})
        yield


def test_the_gru_is_used_from_the_command_line(prepared: Prepared, tmp_path: Path) -> None:
    """In a copy of the scripts, none of which changes; with two processes, which need every weight to learn."""
    (tmp_path / "my_decoders.py").write_text(block("A GRU instead of the LSTM", "python"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         tmp_path / "my_decoders.py", REPOSITORY / "train.py",
         *flags(prepared, tmp_path / "out", "--decoder", "gru", "--epochs", 1, "--batch_size", 10)],
        capture_output=True, text=True, timeout=200, env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    path = tmp_path / "out" / f"checkpoint_{prepared.name}.pth.tar"
    assert torch.load(path, weights_only=True)["model"]["decoder"] == "gru"
    with pytest.raises(OSError, match="there is no decoder 'gru', only lstm"):  # its class is not known here
        caption.load(path)


@pytest.mark.parametrize(("decoder", "encoder"), [("gru", "patches"), ("transformer", ENCODER)])
def test_other_parts_are_trained_evaluated_and_caption(prepared: Prepared, tmp_path: Path, registered: None,
                                                       decoder: str, encoder: str) -> None:
    """Both stages, the first from kept features (which for the Transformer are pooled ones), and a resume."""
    data = shutil.copytree(prepared.folder, tmp_path / "data")
    more = ["--decoder", decoder, "--encoder", encoder, "--dropout", 0, "--epochs", 1]
    kept = run(prepared, tmp_path / "kept", *more, "--data_folder", data, "--cache_features")
    (plain,) = run(prepared, tmp_path / "plain", *more, "--stage", 1)
    assert kept[0]["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)
    assert kept[1]["train_loss"] < kept[0]["train_loss"]
    path = tmp_path / "kept" / f"checkpoint_{prepared.name}.pth.tar"
    assert run(prepared, tmp_path / "kept", *more, "--checkpoint", path) == kept  # nothing is left to do
    rows = evaluation.main(evaluation.get_parser().parse_args(
        ["--data_folder", str(prepared.folder), "--data_name", prepared.name, "--checkpoint", str(path),
         "--beam_size", "2", "--json", str(tmp_path / "rows.json")]))
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    model = caption.load(path)
    [[best]] = caption.caption_images(model, sorted(prepared.pictures.iterdir())[:1])
    assert best.alphas.shape == (len(best.words), 4, 4)


def test_a_term_of_the_loss_and_tensorboard(prepared: Prepared, tmp_path: Path) -> None:
    """Both patches in one run of a copy: the loss has the term, and the writer is given each step and epoch."""
    for path in REPOSITORY.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, tmp_path)
        elif path.name in {"encoders", "safety", "searching", "training", "drawing", "preparing"}:
            shutil.copytree(path, tmp_path / path.name)
    (tmp_path / "models.py").write_text(patched("models.py", "A term of the loss"), encoding="utf-8")
    (tmp_path / "train.py").write_text(patched("train.py", "TensorBoard"), encoding="utf-8")
    (tmp_path / "stub.py").write_text(
        "import runpy, sys, types\n"
        "class SummaryWriter:\n"
        "    def add_scalar(self, *given): print('STEP', *given)\n"
        "    def add_scalars(self, *given): print('EPOCH', *given)\n"
        "sys.modules['torch.utils.tensorboard'] = types.SimpleNamespace(SummaryWriter=SummaryWriter)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    arguments = flags(prepared, tmp_path / "out", "--stage", 1, "--epochs", 1, "--dropout", 0)
    done = subprocess.run([sys.executable, "stub.py", "train.py", *arguments], cwd=tmp_path, capture_output=True,
                          text=True, timeout=200, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("STEP loss/stage 1 ") == 4
    assert done.stdout.count("EPOCH epoch {'train_loss': ") == 1
    plain = run(prepared, tmp_path / "plain", "--stage", 1, "--epochs", 1, "--dropout", 0)
    (row,) = map(json.loads, (tmp_path / "out" / f"log_{prepared.name}.jsonl").read_text().splitlines())
    # Of weights that are nearly equal over 16 pixels the entropy is nearly the logarithm of 16.
    assert row["val_loss"] - plain[0]["val_loss"] == pytest.approx(0.1 * torch.tensor(16.0).log().item(), rel=0.02)


def test_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)  # METEOR has nothing to do with it
    module: Any = types.ModuleType("patched")
    exec(patched("eval.py", "A metric"), module.__dict__)
    references = [[["a", "b", "c", "d"]], [["a", "b", "c", "e"]], [["f", "g"]]]
    scores = module.score(references, [["a", "b"], ["a", "b"], ["f", "g"]])
    assert scores["distinct"] == pytest.approx(200 / 3)
    row = {"beam": 1, "seconds": 1.0, "images/s": 1.0, "unfinished": 0.0, **scores}
    assert "| distinct |" in module.markdown([row])


def test_the_wrapper_runs_a_script_as_its_own_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                      registered: None) -> None:
    """What `python my_decoders.py SCRIPT FLAGS` does in the end."""
    (tmp_path / "script.py").write_text("import sys\nsys.modules['seen'] = (__name__, list(sys.argv))\n")
    (tmp_path / "my_decoders.py").write_text(block("A GRU instead of the LSTM", "python"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["my_decoders.py", str(tmp_path / "script.py"), "--flag"])
    runpy.run_path(str(tmp_path / "my_decoders.py"), run_name="__main__")
    assert sys.modules.pop("seen") == ("__main__", [str(tmp_path / "script.py"), "--flag"])


def test_features_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(block("Features of your own", "python"), {})
    assert capsys.readouterr().out == "a cat sleeps\n"


def test_the_flag_is_there() -> None:
    assert train.get_parser().parse_args([]).decoder == "lstm"
