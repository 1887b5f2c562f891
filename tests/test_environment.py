"""What surrounds a command is input like its flags: encodings, what torchrun leaves behind, file systems, signals, and
names on the command line."""
from __future__ import annotations

import argparse
import errno
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import Prepared, refused
from test_eval import Model
from test_train import flags
from torch.utils.data import DataLoader

import caption
import create_input_files
import eval as evaluation
import train
from datasets import CaptionDataset, load_word_map
from safety.checkpoints import load_checkpoint
from safety.errors import UsageError, run_script
from safety.files import atomic_write
from safety.hdf5 import open_array, open_hdf5
from safety.loader import Loader
from safety.pictures import find_pictures
from safety.processes import Place, place_among_processes
from safety.signals import POLITE, SIGNALS, Stopped, handle_signals, raise_stopped
from training.features import Features
from training.resume import resume_command
from utils import setup_world

HERE = Path(__file__).parent


@pytest.fixture
def model(prepared: Prepared, tmp_path: Path) -> Path:
    return Model(load_word_map(prepared.folder, prepared.name)).save(tmp_path / "model.pth.tar")


def on_data(prepared: Prepared, *more: object) -> list[object]:
    return ["--data_folder", prepared.folder, "--data_name", prepared.name, "--device", "cpu", *more]


# ---- what is printed -------------------------------------------------------------------------------------------------

@pytest.fixture
def greek(prepared: Prepared, tmp_path: Path) -> Prepared:
    """The same data, in which a word has letters that few encodings have: the first that training shows."""
    shutil.copytree(prepared.folder, tmp_path / "data")
    [references] = (tmp_path / "data").glob("VAL_REFERENCES*")
    first = json.dumps(json.loads(references.read_text())[0][0][0])
    for path in (tmp_path / "data").glob("*.json"):
        path.write_text(path.read_text().replace(first, '"ένα"'), encoding="utf-8")
    return prepared._replace(folder=tmp_path / "data")


def streams(monkeypatch: pytest.MonkeyPatch, encoding: str) -> io.BytesIO:
    """Gives this process streams of that encoding, and returns what is written to standard output."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding, line_buffering=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding, line_buffering=True))
    return out


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_an_encoding_without_a_word_does_not_end_a_run(greek: Prepared, tmp_path: Path, command: Any, encoding: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    out = streams(monkeypatch, encoding)
    arguments = flags(greek, tmp_path / "out", "--stage", 1, "--epochs", 1)
    assert command(train, *arguments)[0] == 0
    said = out.getvalue().decode(encoding)
    assert ("(people: ένα" if encoding == "utf-8" else r"(people: \u03ad\u03bd\u03b1") in said
    assert "stage 1 is over" in said


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_printed_json_is_json_in_every_encoding(prepared: Prepared, model: Path, tmp_path: Path, command: Any,
                                                encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tmp_path / "Größe Γάτα 🐈.png"
    shutil.copy(prepared.pictures / "shapes_test_0000.png", name)
    out = streams(monkeypatch, encoding)
    arguments = ["--img", name, "--model", model, "--max_len", 3, "--device", "cpu"]
    assert command(caption, *arguments, "--json")[0] == 0
    assert json.loads(out.getvalue().decode(encoding))[0]["image"] == str(name)
    assert command(caption, *arguments)[0] == 0
    assert out.getvalue().decode(encoding).splitlines()[-1].startswith(str(tmp_path))


class ClosesAt(io.StringIO):
    """Standard output that fails where something is printed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def write(self, text: str) -> int:
        if self.text in text:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize(("script", "at", "written"), [
    ("train", "picture 0", ["checkpoint_{}.pth.tar", "BEST_checkpoint_{}.pth.tar", "log_{}.jsonl", "gaze_{}.png"]),
    ("eval", "BLEU-4", ["scores.json", "scores_TEST.md", "scores_TEST.json", "captions_TEST_beam1.json", "page.html"]),
    ("caption", "shapes_test_0000.png: ", ["scores.json", "page.html"]),
    ("create_input_files", "TRAIN: ", ["WORDMAP_{}.json"])])
def test_results_are_in_their_files_before_they_are_printed(
        prepared: Prepared, model: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch, script: str,
        at: str, written: list[str]) -> None:
    """Seen where nobody listens any more, as of `| head`."""
    out = tmp_path / "out"
    module, arguments = {
        "train": (train, flags(prepared, out, "--stage", 1, "--epochs", 1)),
        "eval": (evaluation, on_data(prepared, "--checkpoint", model, "--beam_size", 1, "--max_len", 3, "--json",
                                     out / "scores.json", "--out", out, "--gallery", out / "page.html")),
        "caption": (caption, ["--img", prepared.pictures, "--model", model, "--max_len", 3, "--device", "cpu",
                              "--json", out / "scores.json", "--out", out / "page.html"]),
        "create_input_files": (create_input_files, [
            "--dataset", "shapes", "--karpathy_json_path", prepared.json_path, "--image_folder", prepared.pictures,
            "--min_word_freq", 0, "--output_folder", out, "--workers", 1])}[script]
    out.mkdir()
    monkeypatch.setattr(shutil, "which", lambda _: None)  # METEOR has nothing to do with it
    monkeypatch.setattr(sys, "stdout", ClosesAt(at))
    status, shown = command(module, *arguments)
    assert status == 1 and shown.endswith(f"{script}.py: [Errno 32] Broken pipe\n")
    assert [name for name in written if not (out / name.format(prepared.name)).is_file()] == []
    if script == "train":
        assert load_checkpoint(out / f"checkpoint_{prepared.name}.pth.tar")["training"]["epoch"] == 1


def test_a_step_is_saved_before_its_loss_is_shown(prepared: Prepared, tmp_path: Path, command: Any,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", ClosesAt("loss="))
    status, _ = command(train, *flags(prepared, tmp_path / "out", "--checkpoint_minutes", 0))
    assert status == 1
    assert load_checkpoint(tmp_path / "out" / f"checkpoint_{prepared.name}.pth.tar")["training"]["step"] == 1


def test_captions_are_seen_whatever_becomes_of_files(prepared: Prepared, model: Path, tmp_path: Path, command: Any,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    out = streams(monkeypatch, "utf-8")
    status, shown = command(caption, "--img", prepared.pictures, "--model", model, "--max_len", 3, "--device", "cpu",
                            "--json", tmp_path / "file" / "x.json")
    assert status == 1 and "x.json could not be written" in shown
    assert len(out.getvalue().splitlines()) == 29


def test_nobody_need_listen_to_errors(prepared: Prepared, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `2>&-`."""
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "argv", ["caption.py", "--img", str(prepared.pictures), "--model", str(model), "--max_len",
                                      "3", "--device", "cpu"])
    caption.run_script(caption.main, caption.get_parser())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs Linux's terminals")
@pytest.mark.parametrize("script", ["train", "caption"])
@pytest.mark.parametrize("place", ["a full disk", "a terminal that went away"])
def test_what_cannot_be_printed_ends_nothing(prepared: Prepared, model: Path, tmp_path: Path, command: Any, place: str,
                                             script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All work is done and in its files; afterwards a full disk is named, while of a terminal nobody is left."""
    if place == "a full disk":
        file: Any = "/dev/full"
    else:
        terminal, file = os.openpty()
        os.close(terminal)
    out = tmp_path / "out"
    module, arguments, written = {
        "train": (train, flags(prepared, out, "--stage", 1, "--epochs", 2), f"log_{prepared.name}.jsonl"),
        "caption": (caption, ["--img", prepared.pictures, "--model", model, "--max_len", 3, "--device", "cpu",
                              "--json", out / "captions.json", "--batch_size", 8], "captions.json")}[script]
    with open(file, "w", buffering=1) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        status, shown = command(module, *arguments)
        print("and no more complaints")
    if place == "a full disk":
        assert status == 1 and shown.endswith(
            f"{script}.py: what was printed could not be written (No space left on device); all else is done\n")
    else:
        assert status == 0
    assert (out / written).read_text().count('"epoch": ' if script == "train" else '"image"') == (
        2 if script == "train" else 29)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_full_disk_for_errors_ends_nothing(prepared: Prepared, model: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["caption.py", "--img", str(prepared.pictures), "--model", str(model), "--max_len",
                                      "3", "--device", "cpu", "--batch_size", "8"])
    with open("/dev/full", "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        caption.run_script(lambda args: [print("lost", file=sys.stderr), caption.main(args)], caption.get_parser())
    assert capsys.readouterr().out.count(".png: ") == len(list(prepared.pictures.iterdir()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full disk")
def test_a_host_has_its_output_back_after_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was printed is lost, as if it had been written; no descriptor stays open."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    written = []
    with open("/dev/full", "w", buffering=1) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        before = sorted(each.name for each in Path("/proc/self/fd").iterdir())
        for _ in range(2):
            with pytest.raises(SystemExit, match="all else is done"):
                run_script(lambda _: written.extend([sys.stdout.write("lost\n"), sys.stdout.write("too\n")]),
                           argparse.ArgumentParser())
            assert Path(f"/proc/self/fd/{stdout.fileno()}").readlink() == Path("/dev/full")
        assert sorted(each.name for each in Path("/proc/self/fd").iterdir()) == before
    assert written == [5, 4] * 2


@pytest.mark.parametrize("named", ["module://json", "module://no_such.window", None])
def test_a_notebooks_backend_is_not_waited_for(named: str) -> None:
    """To look whether it is there takes no matplotlib, for which a caption need not wait."""
    code = "import drawing, os, sys; print('matplotlib' in sys.modules, os.environ.get('MPLBACKEND'))"
    others = {name: each for name, each in os.environ.items() if name != "MPLBACKEND"}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, text=True, capture_output=True,
                          env={**others, "MPLBACKEND": named} if named else others)
    assert done.stdout == f"False {'agg' if named and 'no_such' in named else named}\n", done.stderr


@pytest.mark.parametrize("module", ["training.curves", "img.draw"])
def test_whoever_draws_needs_no_notebook(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=HERE.parent, text=True, capture_output=True,
                          env={**os.environ, "MPLBACKEND": "no_such_window"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("named", "taken"), [
    pytest.param("module://matplotlib_inline.backend_inline", "agg", marks=pytest.mark.skipif(
        importlib.util.find_spec("matplotlib_inline") is not None, reason="it is installed here")),
    ("no_such_window", "agg"), ("svg", "svg")])
def test_a_notebooks_backend_is_not_needed(named: str, taken: str) -> None:
    """Left in the environment, it would end whatever imports matplotlib; one that is there stays."""
    code = ("import drawing.fonts, os, sys; from matplotlib.figure import Figure; Figure().savefig(sys.argv[1]); "
            "import matplotlib; print(os.environ['MPLBACKEND'], matplotlib.rcParams['backend'])")
    done = subprocess.run([sys.executable, "-c", code, os.devnull], cwd=HERE.parent, text=True,
                          env={**os.environ, "MPLBACKEND": named}, capture_output=True)
    assert done.stdout == f"{taken} {taken}\n", done.stderr


# ---- what torchrun leaves behind -------------------------------------------------------------------------------------

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LEFT = {  # what is in the environment, and what is said of it
    "a rank": ({"RANK": "1"}, "RANK=1: a whole number from 0 to 0"),
    "an empty rank": ({"RANK": ""}, "RANK=: a whole number from 0 to 0"),
    "no number": ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two: a whole number of 1 or more"),
    "a negative one": ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK=-1: a whole number from 0 to 0"),
    "nobody": ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: a whole number of 1 or more"),
    "a size": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but no RANK"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, but no MASTER_ADDR"),
    "no port": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but no MASTER_PORT"),
    "no such port": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
                     "MASTER_PORT=http: a whole number from 1 to 65535"),
    "too many": ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
                 "RANK=2: a whole number from 0 to 1"),
    "a local rank": ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1: a whole number from 0 to 0"),
    "a local size": ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8: a whole number from 1 to 1")}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("left", "said"), LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("script", ["train", "eval"])
def test_what_torchrun_left_is_refused_like_a_flag(prepared: Prepared, tmp_path: Path, command: Any, script: str,
                                                   left: dict[str, str], said: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded; and what the line advises helps."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    module, arguments = {"train": (train, flags(prepared, tmp_path / "out", "--data_folder", "none")),
                         "eval": (evaluation, on_data(prepared, "--data_folder", "none"))}[script]
    status, shown = command(module, *arguments)
    assert (status, shown.count("\n")) == (2, 1) and shown.startswith(f"{script}.py: ") and said in shown
    assert list(tmp_path.iterdir()) == []
    for name in re.search(r"unset ([A-Z_ ]+) \(", shown)[1].split():
        monkeypatch.delenv(name)
    status, shown = command(module, *arguments)
    assert status == 1 and "no data set" in shown


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("left", [each for each, _ in LEFT.values()], ids=LEFT)
def test_captions_need_no_torchrun(prepared: Prepared, model: Path, command: Any, left: dict[str, str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    picture = prepared.pictures / "shapes_test_0000.png"
    assert command(caption, "--img", picture, "--model", model, "--max_len", 1, "--device", "cpu") == (0, "")


@pytest.mark.usefixtures("alone")
def test_what_torchrun_sets_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_among_processes() == Place(0, 1, 0, 1)
    for name, value in zip(VARIABLES, ("3", "4", "1", "2", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert place_among_processes() == Place(3, 4, 1, 2)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UsageError, match="no MASTER_ADDR"):
        place_among_processes()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("torchrun", [False, True])
def test_who_is_waited_for_is_said_before(torchrun: bool, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """All variables may be left, and then the others do not exist."""
    for name, value in zip(VARIABLES, ("0", "3", "0", "3", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    said = []

    def wait(*_: Any, **__: Any) -> None:
        said.append(capsys.readouterr().err)
        assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == (not torchrun)  # PyTorch waits without Python
        raise torch.distributed.DistNetworkError("no answer")

    monkeypatch.setattr(torch.distributed, "init_process_group", wait)
    with refused("2 other processes at localhost:29500 could not be found (DistNetworkError: no answer); torchrun"):
        setup_world("cpu", None)
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    assert said == ["" if torchrun else "waiting for 2 other processes at localhost:29500, because of WORLD_SIZE=3 in "
                    "the environment; torchrun sets it; without torchrun: unset RANK WORLD_SIZE LOCAL_RANK "
                    "LOCAL_WORLD_SIZE\n"]


@pytest.mark.usefixtures("alone")
def test_what_is_left_of_torchrun_is_not_taken_for_it(prepared: Prepared, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """In the command that resumes a run."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py"])
    args = train.get_parser().parse_args(flags(prepared, tmp_path))
    (tmp_path / f"checkpoint_{prepared.name}.pth.tar").touch()
    assert "resume it with: python train.py --checkpoint " in resume_command(args)


@pytest.mark.parametrize(("failure", "status", "said"), [
    ("raise InputError('no, and why')", 1, "x.py: no, and why\n"),
    ("raise UsageError('no such flag')", 2, "x.py: no such flag (--help tells the flags)\n"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, "\nx.py: stopped\n")], ids=["error", "flag", "signal"])
def test_one_of_several_processes_that_fails_ends_at_once(failure: str, status: int, said: str) -> None:
    """Without Python's own end, which now and then aborts where threads of a process group are left."""
    code = f"""if True:
        import argparse, atexit, os, signal, sys, torch
        from safety.errors import InputError, UsageError, run_script

        def main(args):
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            print("printed before")
            {failure}

        atexit.register(print, "Python's own end")
        sys.argv = ["x.py"]
        run_script(main, argparse.ArgumentParser())
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, text=True, capture_output=True)
    assert (done.stdout, done.returncode) == ("printed before\n", status)
    assert done.stderr == said


# ---- file systems ----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="feigned with Linux's LD_PRELOAD")
def test_a_file_system_without_maps_and_locks_is_enough(prepared: Prepared, tmp_path: Path) -> None:
    """From pictures to captions, with kept features and a worker, under a folder where maps and locks fail."""
    shim, there = tmp_path / "shim.so", tmp_path / "network"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", shim, HERE / "fixtures" / "no_maps_no_locks.c", "-ldl"],
                   check=True)
    (there / "out").mkdir(parents=True)
    data = prepared._replace(folder=there / "data")
    prepare = ["--dataset", "shapes", "--karpathy_json_path", prepared.json_path, "--image_folder", prepared.pictures,
               "--min_word_freq", 0, "--output_folder", data.folder, "--workers", 1]
    learn = flags(data, there / "out", "--stage", 1, "--epochs", 1, "--cache_features", "--workers", 1)
    model = there / "out" / f"BEST_checkpoint_{prepared.name}.pth.tar"
    say = ["--img", prepared.pictures, "--model", model, "--device", "cpu", "--max_len", 3, "--out", there / "x.html"]
    commands = [("create_input_files", prepare), ("train", learn), ("caption", say)]
    done = subprocess.run([sys.executable, "-c", f"""
import importlib, mmap
with open({str(there / "probe")!r}, "w+b") as probe:
    probe.truncate(1)
    try:
        mmap.mmap(probe.fileno(), 1)
    except OSError as error:
        print(error)
for name, arguments in {[(name, [str(each) for each in arguments]) for name, arguments in commands]}:
    script = importlib.import_module(name)
    script.main(script.get_parser().parse_args(arguments))
"""], env={**os.environ, "FEIGNED": str(there), "LD_PRELOAD": str(shim)}, cwd=HERE.parent, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[Errno 19]") and "stage 1 is over" in done.stdout
    assert (there / "x.html").is_file()
    for path in data.folder.glob("*.json"):
        assert path.read_bytes() == (prepared.folder / path.name).read_bytes()
    for split in ("TRAIN", "VAL", "TEST"):
        ours, theirs = (CaptionDataset(folder, data.name, split).images[:] for folder in (data.folder, prepared.folder))
        assert np.array_equal(ours, theirs)
    assert len(list(data.folder.glob("*FEATURES*.bin"))) == 2


def without_maps(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def test_pictures_and_features_are_the_same_without_maps(prepared: Prepared, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepared.folder / f"TEST_IMAGES_{prepared.name}.hdf5"
    kept = torch.arange(5 * 24, dtype=torch.float32).view(5, 2, 3, 4)
    (tmp_path / "features.bin").write_bytes(kept.numpy().tobytes())
    mapped = np.array(open_array(path, "images"))
    monkeypatch.setattr(np, "memmap", without_maps)
    read = open_array(path, "images")
    assert len(read) == len(mapped) and np.array_equal(read[3], mapped[3]) and np.array_equal(read[:], mapped)
    features = Features(tmp_path / "features.bin", 5, (2, 3, 4), torch.float32)
    assert all(torch.equal(features[i], kept[i]) for i in (3, 0, 4))
    monkeypatch.undo()
    features = Features(tmp_path / "features.bin", 5, (2, 3, 4), torch.float32)
    assert all(torch.equal(features[i], kept[i]) for i in (3, 0, 4))


def test_hdf5_does_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where another program holds the lock."""
    opened, said = h5py.File, []

    def without_locks(path: Path, mode: str, locking: bool = True) -> h5py.File:
        if locking:
            raise OSError(said[-1], f"unable to lock file, errno = {said[-1]}")
        return opened(path, mode, locking=False)

    monkeypatch.setattr(h5py, "File", without_locks)
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        said.append(number)
        with open_hdf5(tmp_path / "x.hdf5", "w") as file:
            file["x"] = 1
    said.append(errno.EAGAIN)
    with pytest.raises(BlockingIOError):
        open_hdf5(tmp_path / "x.hdf5")


@pytest.mark.parametrize(("number", "written"), [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_disk_that_cannot_tell_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int,
                                             written: bool) -> None:
    """Some file systems lack fsync; one that fails has lost something."""
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write("x")
    except Exception as error:
        assert not written and "could not be written (Input/output error)" in str(error)
    assert (tmp_path / "file").exists() == written


def test_only_bytes_that_were_read_are_called_damaged(prepared: Prepared, model: Path, tmp_path: Path, command: Any,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk's fault, or a missing permission, is no reason to make files again."""
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "the file")

    prepare = ["--dataset", "shapes", "--karpathy_json_path", prepared.json_path, "--image_folder", prepared.pictures,
               "--min_word_freq", 0, "--output_folder", prepared.folder, "--workers", 1]
    line = "[Errno 5] Input/output error: 'the file'\n"
    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", fail)
        assert command(train, *flags(prepared, tmp_path / "out")) == (1, f"train.py: {line}")
        assert command(create_input_files, *prepare) == (1, f"create_input_files.py: {line}")
    monkeypatch.setattr("safety.checkpoints._unpickle", fail)
    assert command(caption, "--img", prepared.pictures, "--model", model) == (1, f"caption.py: {line}")


@pytest.mark.parametrize("kind", ["gone", "cut"])
def test_kept_features_that_cannot_be_read_are_made_again_as_advised(prepared: Prepared, tmp_path: Path, command: Any,
                                                                    monkeypatch: pytest.MonkeyPatch,
                                                                    kind: str) -> None:
    shutil.copytree(prepared.folder, tmp_path / "data")
    arguments = flags(prepared, tmp_path / "out", "--data_folder", tmp_path / "data", "--stage", 1, "--cache_features")
    train_epoch, calls = train.train_epoch, []

    def before(*given: Any) -> dict[str, Any]:
        calls.append(given)
        [path] = (tmp_path / "data").glob("TRAIN_FEATURES*")
        if len(calls) == 2:  # in the second epoch
            given[0].train.features._read = None
            path.unlink() if kind == "gone" else os.truncate(path, 1000)
        return train_epoch(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", before)
        status, shown = command(train, *arguments)
    assert status == 1 and shown.count("\n") == 1 and "resume from the last checkpoint" in shown
    if "delete it" in shown:
        Path(shown.removeprefix("train.py: ").split(" is damaged")[0]).unlink()
    assert command(train, *arguments, "--checkpoint", tmp_path / "out" / f"checkpoint_{prepared.name}.pth.tar")[0] == 0


# ---- signals ---------------------------------------------------------------------------------------------------------

def nothing(*_: Any) -> None:
    pass


@pytest.fixture
def quiet() -> Any:
    """No signal is ignored or ends the suite."""
    before = {number: signal.signal(number, nothing) for number in POLITE}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("quiet")
@pytest.mark.skipif(os.name != "posix", reason="Windows has but two signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_every_polite_signal_stops_a_script(name: str, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    monkeypatch.setattr(sys, "argv", ["caption.py", "--img", "x"])
    with pytest.raises(SystemExit) as stop:
        caption.run_script(lambda _: os.kill(os.getpid(), number), caption.get_parser())
    assert stop.value.code == 128 + number and capsys.readouterr().err.endswith("caption.py: stopped\n")
    assert signal.getsignal(number) is nothing


@pytest.mark.usefixtures("quiet")
@pytest.mark.skipif(os.name != "posix", reason="Windows has but two signals")
def test_only_ctrl_c_and_sigterm_hurry() -> None:
    """A second one raises, so that a notebook lives on; a terminal's end comes twice, and hurries nobody."""
    came: list[int] = []
    with handle_signals(came.append):
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert came == [signal.SIGHUP]
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.args == (signal.SIGINT,) and len(SIGNALS) == 5


@pytest.mark.usefixtures("quiet")
def test_workers_all_start_before_a_signal_has_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once where it stops, as in a validation; where it waits for the end of a step, it goes on waiting."""
    started, start = [], DataLoader._get_iterator

    def slowly(loader: DataLoader) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        started.append(start(loader))
        return started[-1]

    monkeypatch.setattr(DataLoader, "_get_iterator", slowly)
    with pytest.raises(Stopped), handle_signals(raise_stopped):
        iter(Loader([1, 2]))
    assert len(started) == 1
    with handle_signals(nothing):
        assert len(list(Loader([1, 2]))) == 2 and SIGNALS == [signal.SIGINT]
    with pytest.raises(Stopped):  # where nobody handles signals
        iter(Loader([1, 2]))
    assert len(started) == 3


@pytest.mark.usefixtures("quiet")
def test_a_run_that_was_stopped_does_not_stop_the_next() -> None:
    """As in a notebook, where nobody begins a new process."""
    for _ in range(2):
        with handle_signals(nothing), handle_signals(nothing):
            assert SIGNALS == []
            os.kill(os.getpid(), signal.SIGINT)
        assert SIGNALS == [signal.SIGINT]


@pytest.mark.usefixtures("quiet")
@pytest.mark.skipif(os.name != "posix", reason="Windows has but two signals")
def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handle_signals(nothing):
        os.kill(os.getpid(), signal.SIGHUP)
    assert SIGNALS == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---- names on the command line ---------------------------------------------------------------------------------------

@pytest.fixture
def here(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("-mountain.jpg", "-mountain", "-b", "photo.jpg"):
        shutil.copy(prepared.pictures / "shapes_test_0000.png", name)
    return tmp_path / "here"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("before", [["--img"], ["--img", "photo.jpg"], ["--img", "photo.jpg", "--out"]])
@pytest.mark.parametrize("name", ["-mountain.jpg", "-mountain", "-new.png", "-*.jpg"])
def test_a_name_that_begins_with_a_dash_needs_a_folder(command: Any, before: list[str], name: str) -> None:
    status, shown = command(caption, *before, name)
    assert (status, shown.count("\n")) == (2, 1) and f"needs ./ before it: ./{name} (" in shown


@pytest.mark.usefixtures("here")
def test_with_its_folder_it_is_a_name(command: Any, model: Path) -> None:
    rest = ["--model", model, "--max_len", 1, "--device", "cpu", "--json", "./-results.json"]
    for flag in (["--img", "./-mountain.jpg"], ["--img=-mountain.jpg"], ["-i", "./-*.jpg"], ["-i=-mountain.jpg"]):
        assert command(caption, *flag, *rest, "-b", 3) == (0, "")
        [found] = json.loads(Path("-results.json").read_text())
        assert Path(found["image"]) == Path("-mountain.jpg")
    for flag in ("-iphoto.jpg", "-ip*.jpg"):
        assert command(caption, flag, *rest, "-b3") == (0, "")
        assert [each["image"] for each in json.loads(Path("-results.json").read_text())] == ["photo.jpg"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_this_folder(name: str) -> None:
    """As of a variable of the shell that is not set."""
    with refused("--img: an empty name", ". for this folder's"):
        find_pictures([name])
    assert len(find_pictures(["."])) == 2


@pytest.mark.parametrize(("script", "arguments", "name"), [
    (caption, ["--img", "https://example.com/photo.jpg"], "https://example.com/photo.jpg"),
    (caption, ["--img=s3://bucket/photo.jpg"], "s3://bucket/photo.jpg"),
    (caption, ["--img", "photo.jpg", "--model", "http://example.com/x.pth.tar"], "http://example.com/x.pth.tar"),
    (train, ["--embeddings", "https://example.com/glove.txt"], "https://example.com/glove.txt"),
    (evaluation, ["--out", "gs://bucket/scores"], "gs://bucket/scores"),
    (create_input_files, ["--image_folder", "file:///home/x"], "file:///home/x")])
def test_addresses_are_not_fetched(command: Any, here: Path, script: Any, arguments: list[str], name: str) -> None:
    status, shown = command(script, *arguments)
    assert (status, shown.count("\n")) == (2, 1) and f": {name}: addresses are not fetched; save" in shown
    assert not [each for each in here.iterdir() if each.is_dir()]


@pytest.mark.usefixtures("here")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pictures_do_not_come_through_a_pipe() -> None:
    os.mkfifo("pipe.jpg")
    for name in ("pipe.jpg", "/dev/null", "-"):
        with refused(f"--img {name}: a pipe", "save it, and name the file"):
            find_pictures([name])
