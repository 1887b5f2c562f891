"""Files appear whole, and a failure is one line."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safety.errors import InputError, UsageError, in_one_line, run_script
from safety.files import atomic_write, open_locked
from training.curves import draw_curves

# ---- atomic_write ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, content", [("w", "Größe\n"), ("wb", b"\x00\xff")])
def test_a_file_appears_when_it_is_whole(mode, content, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with atomic_write(str(path), mode) as file:
        file.write(content)
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == (content.encode() if mode == "w" else content)
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link", tmp_path / "disk" / "target"
    link.symlink_to(target)
    for content in ("new", "newer"):
        with atomic_write(link) as file:
            file.write(content)
        assert link.is_symlink() and target.read_text() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_write(tmp_path / "pipe") as file:
        file.write("text")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with atomic_write(tmp_path / "link") as file:
        file.write("more")
    assert os.read(reader, 9) == b"textmore" and (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    os.close(reader)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_file_that_fails_leaves_the_old_one(failure, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), atomic_write(path) as file:
        file.write("new")
        raise failure
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    with atomic_write(path) as file:
        file.write("x")
    assert synced == [False] and path.read_text() == "x"


def test_a_file_that_is_deleted_before_it_is_locked_is_opened_again(tmp_path, monkeypatch):
    """As `remove_stale` of another process may do."""
    path, opened = tmp_path / "file", []

    def late(file):
        opened.append(file)
        if len(opened) == 1:
            path.unlink()

    monkeypatch.setattr("safety.files.lock", late)
    with open_locked(path, "w") as file:
        file.write("text")
    assert len(opened) == 2 and opened[0].closed and path.read_text() == "text"


# ---- run_script ------------------------------------------------------------------------------------------------------

def test_nobody_need_listen(monkeypatch):
    """Python has no standard output where it is closed, as `>&-` does."""
    monkeypatch.setattr("sys.argv", ["x.py"])
    monkeypatch.setattr("sys.stdout", None)
    said = []
    run_script(lambda args: said.append(print("something")), argparse.ArgumentParser())
    assert said == [None]


@pytest.mark.parametrize("failure, status, shown", [
    (InputError("--img x: no picture there"), 1, "train.py: --img x: no picture there\n"),
    (FileNotFoundError(2, "No such file or directory", "x.txt"), 1,
     "train.py: [Errno 2] No such file or directory: 'x.txt'\n"),
    (ImportError("pip install it"), 1, "train.py: pip install it\n"),
    (KeyboardInterrupt(), 130, "\ntrain.py: stopped\n")])
def test_expected_failures_are_one_line(failure, status, shown, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])

    def main(args: argparse.Namespace) -> None:
        raise failure

    with pytest.raises(SystemExit) as stop:
        run_script(main, argparse.ArgumentParser())
    if isinstance(stop.value.code, str):  # what Python prints, and then ends with 1
        assert (1, stop.value.code + "\n") == (status, shown)
    else:
        assert (stop.value.code, capsys.readouterr().err) == (status, shown)


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_one_line_that_says_where(debug, monkeypatch, capsys):
    """And its traceback, if that was asked for; main() knows nothing of it."""
    monkeypatch.setattr("sys.argv", ["train.py", *["--debug"] * debug])
    with pytest.raises(SystemExit) as stop:
        run_script(lambda args: vars(args) or draw_curves([{}], Path()), argparse.ArgumentParser())
    assert "\n" not in stop.value.code and "--debug" in stop.value.code and "report it" in stop.value.code
    assert "KeyError" in stop.value.code and re.search(r"curves\.py:\d+\)", stop.value.code)
    assert ("Traceback" in capsys.readouterr().err) == debug


@pytest.mark.parametrize("failure, told", [
    (MemoryError(), True), (OSError(12, "Cannot allocate memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
    (RuntimeError("CUDA error: out of memory"), True), (RuntimeError("Failed to CUDA calloc async 24 bytes"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (InputError("--encoder_weights x: not a state dict (RuntimeError: can't allocate memory)"), False)])
def test_memory_that_is_too_small_is_told(failure, told):
    line = in_one_line(failure, argparse.Namespace(batch_size=[8, 3]))
    assert ("out of memory with --batch_size 8 3; try --batch_size 4 1" in line) == told
    assert told or line == str(failure)
    assert ("out of memory; end other programs" in in_one_line(failure, argparse.Namespace())) == told


@pytest.mark.parametrize("text, remedy", [
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
     "shared memory. Please try to raise your shared memory limit.", "start a container with --shm-size=8g"),
    ("Cannot find a working triton installation. Either the package is not installed", "--compile cannot work here"),
    ("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')", "--compile cannot work here")])
def test_what_a_machine_lacks_is_told_with_its_remedy(text, remedy):
    line = in_one_line(RuntimeError(text), argparse.Namespace())
    assert remedy in line and "report it" not in line and "\n" not in line


def test_a_wrong_flag_is_one_line_and_status_2(monkeypatch, capsys):
    """Whether argparse finds it or main(); also if it would clear the screen."""
    def main(args: argparse.Namespace) -> None:
        raise UsageError("--n 7\x1b[2J\x9b: below 7")

    for arguments, shown in ((["--m"], "unrecognized arguments: --m"), (["--n", "x"], "--n: invalid int"),
                             (["--n", "7"], "--n 7\\u001b[2J\\u009b: below 7")):
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        parser = argparse.ArgumentParser()
        parser.add_argument("--n", type=int)
        with pytest.raises(SystemExit) as stop:
            run_script(main, parser)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("train.py: ") and shown in error and error.count("\n") == 1


def test_a_script_that_succeeds_ends_quietly(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--n", "3"])
    parser, seen = argparse.ArgumentParser(), []
    parser.add_argument("--n", type=int)
    run_script(lambda args: seen.append(args.n), parser)
    assert seen == [3] and capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="the worker is forked with the data set that fails")
def test_a_script_ends_though_it_failed_in_a_worker(tmp_path: Path) -> None:
    """The error's frames hold the DataLoader, whose workers take no SIGTERM: Python would wait for them for ever."""
    (tmp_path / "script.py").write_text("""
import argparse, multiprocessing
from torch.utils.data import DataLoader
from safety.errors import InputError, run_script
from safety.signals import ignore_signals

class Gone:
    def __len__(self): return 9
    def __getitem__(self, i): raise InputError(f"item {i} is gone; bring it back")

def main(args):
    for _ in DataLoader(Gone(), num_workers=2, worker_init_fn=ignore_signals):
        pass

multiprocessing.set_start_method("fork")
run_script(main, argparse.ArgumentParser())
""")
    repository = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(repository)})
    assert (done.returncode, done.stderr) == (1, "script.py: item 0 is gone; bring it back\n")
