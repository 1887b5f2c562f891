"""Whatever ends a run, nothing good is lost, nothing half-written stands, and the next run resumes from what is there.

Processes are killed for real. They are forked from a server that has imported everything, so that each starts at once.
"""
from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prepared
from PIL import Image
from test_train import assert_same_run, flags, load, same
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import caption
import create_input_files
import datasets
import eval
import train
from models import Losses
from safety.errors import run_script
from safety.files import atomic_write, remove_stale
from training import features

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and forks are POSIX's")
HERE = Path(__file__).parent
SCRIPTS = {"train": train, "create_input_files": create_input_files, "eval": eval, "caption": caption}


# ---- processes to kill -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """Forks processes that need not import anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_faults"])
        yield context


def script(name: str, arguments: list[str], output: str, *faults: tuple[Any, ...]) -> None:
    """What such a process does: a script from its command line, with its output in a file, and maybe faults."""
    multiprocessing.set_start_method("fork", force=True)  # for the DataLoader workers
    torch.set_num_threads(1)
    features.FEATURES_AT_ONCE = 4
    os.environ["PATH"] = ""  # without Java, whose score takes long
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # if nohup runs the suite, it is ignored
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = sys.orig_argv = [f"{name}.py", *arguments]
    for fault in faults:
        inject(*fault)
    module = SCRIPTS[name]
    run_script(module.main, module.get_parser(), *([train.resume_command] if name == "train" else []))


def inject(where: str, n: int, *numbers: int) -> None:
    """Sends this process signals when it comes to a place for the n-th time: a function, as `module.name`.

    In torch.save a file is half-written then, in os.fsync written, and in Path.replace about to get its name.
    """
    module, name = where.rsplit(".", 1)
    owner = Path if module == "Path" else sys.modules[module]
    wrapped, calls = getattr(owner, name), [0]

    def function(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == n:
            if where == "torch.save":
                args[1].write(b"half of it")
                args[1].flush()
            for number in numbers or (signal.SIGKILL,):
                os.kill(os.getpid(), number)
        return wrapped(*args, **kwargs)

    setattr(owner, name, function)


def start(server: Any, name: str, arguments: list[object], output: Path, *faults: tuple[Any, ...]) -> Any:
    process = server.Process(target=script, args=(name, [str(each) for each in arguments], str(output), *faults))
    process.start()
    return process


def finish(process: Any) -> int:
    process.join(200)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def assert_whole(folder: Path) -> None:
    """Each file that has its real name can be read to its end."""
    for path in folder.glob("[!.]*"):
        if path.name.endswith(".pth.tar"):
            assert set(torch.load(path, weights_only=True)) >= {"encoder", "decoder", "training"}
        elif path.suffix == ".jsonl":
            assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".bin":
            assert path.stat().st_size == (16 if "TRAIN" in path.name else 6) * 8 * 8 * 576 * 4


def leftovers(*folders: Path) -> list[str]:
    return [path.name for folder in folders for path in folder.glob(".*")]


# ---- killed ----------------------------------------------------------------------------------------------------------

KILLS: list[tuple[str, int] | None] = [  # None: at a random moment, at the latest in its second step
    ("datasets.load_word_map", 1), ("os.fsync", 2), ("training.features._write_features", 2), ("Path.replace", 1), None,
    None, ("train.train_step", 2), ("torch.save", 1), ("os.fsync", 1), ("Path.replace", 1), None, None, None,
    ("train.validate", 1), ("train.bleu", 1), ("train.draw_curves", 1), ("torch.save", 1), ("Path.replace", 2),
    ("train.save_checkpoint", 2), None, None, ("train.run_stage", 2), ("train.read_checkpoint", 1), None, None,
    ("torch.save", 3), None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, prepared: Prepared) -> list[Path]:
    """Copies of the data, with the same times."""
    parent = tmp_path_factory.mktemp("copies")
    for name in ("alone", "killed"):
        shutil.copytree(prepared.folder, parent / name / "data")
    return [parent / "alone", parent / "killed"]


def kept_flags(prepared: Prepared, folder: Path, *more: object) -> list[str]:
    return flags(prepared, folder / "out", "--data_folder", folder / "data", "--cache_features", *more)


@pytest.fixture(scope="module")
def alone(server: Any, folders: list[Path], prepared: Prepared) -> Path:
    """A run of both stages that nothing interrupts."""
    output = folders[0] / "output"
    assert finish(start(server, "train", kept_flags(prepared, folders[0]), output)) == 0, output.read_text()
    return folders[0] / "out"


def resume_flags(folder: Path, prepared: Prepared) -> list[str]:
    """The flag to resume from what is there."""
    checkpoint = folder / f"checkpoint_{prepared.name}.pth.tar"
    return ["--checkpoint", str(checkpoint)] if checkpoint.exists() else []


def log(folder: Path, prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"log_{prepared.name}.jsonl").read_text().splitlines()]


def assert_same_files(one: Path, other: Path, prepared: Prepared) -> None:
    """Both checkpoints bit for bit, the log but for its seconds, and no other file."""
    for prefix in ("checkpoint_", "BEST_checkpoint_"):
        assert_same_run(load(one, prepared, prefix), load(other, prepared, prefix))
    assert same(log(one, prepared), log(other, prepared))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())


def test_a_run_killed_at_any_time_is_the_run_left_alone(server: Any, folders: list[Path], alone: Path,
                                                        prepared: Prepared) -> None:
    """Killed 27 times, in every phase and at random moments; what it leaves is equal bit for bit."""
    folder, moments, longest = folders[1], random.Random(1), 0.0
    arguments = kept_flags(prepared, folder, "--checkpoint_minutes", 0)
    for fault in KILLS:
        began = time.monotonic()
        process = start(server, "train", [*arguments, *resume_flags(folder / "out", prepared)], folder / "output",
                        fault or ("train.train_step", 2))
        if fault is None:
            time.sleep(moments.uniform(0, longest))
            process.kill()
        assert finish(process) == -signal.SIGKILL, (fault, (folder / "output").read_text())
        longest = max(longest, time.monotonic() - began)
        assert_whole(folder / "out")
        assert_whole(folder / "data")
    last = start(server, "train", [*arguments, *resume_flags(folder / "out", prepared)], folder / "output")
    assert finish(last) == 0, (folder / "output").read_text()
    assert_same_files(folder / "out", alone, prepared)
    assert leftovers(folder / "data", folder / "out") == []


def test_a_run_in_float16_that_is_killed_is_the_run_left_alone(server: Any, prepared: Prepared,
                                                               tmp_path: Path) -> None:
    """With batches of like length: what scales its loss, and the order of its captions, are where they were."""
    both = []
    shutil.copytree(prepared.folder, tmp_path / "data")
    for name, faults in (("alone", []), ("killed", [("train.train_step", 3), ("train.train_step", 4)])):
        arguments = kept_flags(prepared, tmp_path, "--output_folder", tmp_path / name, "--precision", "float16",
                               "--bucket", "--checkpoint_minutes", 0, "--stage", 1)
        for fault in (*faults, None):
            process = start(server, "train", [*arguments, *resume_flags(tmp_path / name, prepared)],
                            tmp_path / f"{name}.txt", *[fault] * bool(fault))
            assert finish(process) == (-signal.SIGKILL if fault else 0), (tmp_path / f"{name}.txt").read_text()
        both.append(tmp_path / name)
    assert_same_files(*both, prepared)


PREPARING = [("create_input_files.write_json", 3), ("create_input_files.write_images", 2), None, None,
             ("preparing.pixels.check_pixels", 3), ("Path.replace", 1), ("Path.replace", 3), ("Path.replace", 5)]


def test_killed_while_input_files_are_made(server: Any, prepared: Prepared, tmp_path: Path) -> None:
    """The same command again makes the files that a run left alone makes; each that has its name is whole."""
    arguments = ["--dataset", "shapes", "--karpathy_json_path", prepared.json_path, "--image_folder", prepared.pictures,
                 "--min_word_freq", 0, "--output_folder", tmp_path / "data", "--workers", 2]
    moments = random.Random(2)
    for fault in PREPARING:
        process = start(server, "create_input_files", arguments, tmp_path / "output", *([fault] if fault else []))
        if fault is None:
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
        assert finish(process) == -signal.SIGKILL, (fault, (tmp_path / "output").read_text())
        for path in (tmp_path / "data").glob("[!.]*"):
            assert path.read_bytes() == (prepared.folder / path.name).read_bytes()
    time.sleep(10)  # workers notice within five seconds that their process was killed, and keep its lock until then
    assert finish(start(server, "create_input_files", arguments, tmp_path / "output")) == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert made == {path.name: path.read_bytes() for path in prepared.folder.iterdir() if "FEATURES" not in path.name}


def test_an_overwriting_that_is_killed_leaves_the_old_files(server: Any, prepared: Prepared, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared.folder, data)
    arguments = ["--dataset", "shapes", "--karpathy_json_path", prepared.json_path, "--image_folder", prepared.pictures,
                 "--min_word_freq", 0, "--output_folder", data, "--workers", 1, "--max_len", 9, "--overwrite"]
    for fault in (("preparing.pixels.check_pixels", 1), ("Path.replace", 1)):
        assert finish(start(server, "create_input_files", arguments, tmp_path / "output", fault)) == -signal.SIGKILL
        for path in prepared.folder.iterdir():
            assert (data / path.name).read_bytes() == path.read_bytes()


def test_only_the_leftovers_of_dead_processes_are_swept(server: Any, tmp_path: Path) -> None:
    """What a living process is writing stays, whatever number is in its name."""
    path = tmp_path / "file.json"
    for name in (".file.json.1.tmp", ".file.json.999999.tmp", ".other.json.999999.tmp", "file.json.1.tmp"):
        (tmp_path / name).write_text("left")
    with atomic_write(path) as file:
        file.write("mine")
        remove_stale(path)
        assert sorted(leftovers(tmp_path)) == [f".file.json.{os.getpid()}.tmp", ".other.json.999999.tmp"]
    assert path.read_text() == "mine" and (tmp_path / "file.json.1.tmp").exists()


# ---- asked to stop ---------------------------------------------------------------------------------------------------

def last_line(output: Path) -> str:
    text = output.read_text()
    assert "Traceback" not in text
    return text.splitlines()[-1]


@pytest.mark.parametrize(("where", "n", "number", "step"), [
    ("train.train_step", 6, signal.SIGTERM, 2), ("train.train_step", 2, signal.SIGUSR1, 2),
    ("train.validate", 1, signal.SIGINT, 4),
    ("train.draw_curves", 2, signal.SIGTERM, 4), ("train.run_stage", 2, signal.SIGINT, 0)])
def test_a_stopped_run_saves_and_says_how_to_resume(server: Any, folders: list[Path], alone: Path, prepared: Prepared,
                                                   tmp_path: Path, where: str, n: int, number: int, step: int) -> None:
    """At the end of a step that is under way; elsewhere at once, as all has been saved."""
    arguments = flags(prepared, tmp_path / "out", "--data_folder", folders[0] / "data", "--cache_features")
    assert finish(start(server, "train", arguments, tmp_path / "output", (where, n, number))) == 128 + number
    assert load(tmp_path / "out", prepared)["training"]["step"] == step
    assert leftovers(tmp_path / "out") == []
    advice, command = last_line(tmp_path / "output").split("resume it with: ")
    assert "stopped" in advice and str(tmp_path / "out") in advice
    assert shlex.split(command) == ["train.py", *arguments, *resume_flags(tmp_path / "out", prepared)]
    if where in ("train.train_step", "train.run_stage"):
        assert finish(start(server, "train", shlex.split(command)[1:], tmp_path / "output")) == 0
        assert_same_files(tmp_path / "out", alone, prepared)


def test_one_command_begins_resumes_and_ends_a_run(server: Any, folders: list[Path], alone: Path, prepared: Prepared,
                                                   tmp_path: Path) -> None:
    """--checkpoint auto, for who starts it again without looking: stopped, killed, and started after its end."""
    arguments = flags(prepared, tmp_path / "out", "--data_folder", folders[0] / "data", "--cache_features",
                      "--checkpoint_minutes", 0, "--checkpoint", "auto")
    for fault, status in ((("train.train_step", 1, signal.SIGKILL), -signal.SIGKILL),  # before there is a checkpoint
                          (("train.train_step", 3, signal.SIGTERM), 143), (("train.validate", 1), -signal.SIGKILL),
                          (("train.run_stage", 2, signal.SIGINT), 130), (("train.train_step", 2), -signal.SIGKILL)):
        assert finish(start(server, "train", arguments, tmp_path / "output", fault)) == status
        if status > 0:
            command = last_line(tmp_path / "output").split("resume it with: ")[1]
            assert shlex.split(command) == ["train.py", *arguments], "the same"
    for _ in range(2):
        assert finish(start(server, "train", arguments, tmp_path / "output")) == 0
        assert "stage 2 is over, all its epochs are done" in last_line(tmp_path / "output")
        assert_same_files(tmp_path / "out", alone, prepared)


@pytest.mark.parametrize("where", ["datasets.load_word_map", "train.build_training", "training.features.encode"])
def test_stopped_before_there_is_anything_to_save(server: Any, prepared: Prepared, tmp_path: Path, where: str) -> None:
    shutil.copytree(prepared.folder, tmp_path / "data")
    output = tmp_path / "output"
    assert finish(start(server, "train", kept_flags(prepared, tmp_path), output, (where, 1, signal.SIGTERM))) == 143
    assert last_line(output) == "train.py: stopped before the first checkpoint; the same command starts again"
    assert not (tmp_path / "out").exists()


def test_stage_2_stopped_before_its_first_checkpoint_begins_from_the_best_again(
        server: Any, prepared: Prepared, tmp_path: Path) -> None:
    """The last checkpoint of stage 1 stands in the folder, but it is not what the flags begin from."""
    arguments, output = flags(prepared, tmp_path / "out"), tmp_path / "output"
    assert finish(start(server, "train", [*arguments, "--stage", "1"], output)) == 0
    best = tmp_path / "out" / f"BEST_checkpoint_{prepared.name}.pth.tar"
    arguments = [*arguments, "--stage", "2", "--checkpoint", str(best)]
    assert finish(start(server, "train", arguments, output, ("train.build_training", 1, signal.SIGTERM))) == 143
    assert last_line(output) == "train.py: stopped before the first checkpoint; the same command starts again"


def test_a_second_signal_ends_at_once(server: Any, folders: list[Path], alone: Path, prepared: Prepared,
                                      tmp_path: Path) -> None:
    arguments = flags(prepared, tmp_path / "out", "--data_folder", folders[0] / "data", "--cache_features")
    both = ("train.train_step", 2, signal.SIGINT, signal.SIGTERM)
    assert finish(start(server, "train", arguments, tmp_path / "output", both)) == 143
    assert not list((tmp_path / "out").glob("[!.]*"))  # but for its lock, which the next run takes over


@pytest.mark.parametrize(("name", "where", "number"), [
    ("eval", "eval.bleu", signal.SIGINT), ("eval", "os.fsync", signal.SIGTERM), ("caption", "os.fsync", signal.SIGINT),
    ("create_input_files", "preparing.pixels.check_pixels", signal.SIGTERM),
    ("caption", "caption.encode", signal.SIGHUP)])
def test_the_other_scripts_stop_with_one_line(server: Any, alone: Path, prepared: Prepared, tmp_path: Path, name: str,
                                              where: str, number: int) -> None:
    model, out = alone / f"BEST_checkpoint_{prepared.name}.pth.tar", tmp_path / "out"
    arguments = {
        "eval": ["--checkpoint", model, "--data_folder", prepared.folder, "--data_name", prepared.name, "--beam_size",
                 1, "--out", out, "--device", "cpu", "--workers", 1],
        "caption": ["--img", prepared.pictures, "--model", model, "--json", out / "all.json", "--device", "cpu"],
        "create_input_files": ["--dataset", "shapes", "--karpathy_json_path", prepared.json_path, "--image_folder",
                               prepared.pictures, "--output_folder", out, "--workers", 2]}[name]
    assert finish(start(server, name, arguments, tmp_path / "output", (where, 1, number))) == 128 + number
    assert last_line(tmp_path / "output") == f"{name}.py: stopped"
    assert not out.exists() or list(out.iterdir()) == []


def test_ctrl_c_reaches_a_whole_process_group(prepared: Prepared, tmp_path: Path) -> None:
    """In a terminal the workers get it too. All end, and only the main process says something."""
    command = [sys.executable, train.__file__, *flags(prepared, tmp_path / "out", "--epochs", 500, "--workers", 2)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        while not resume_flags(tmp_path / "out", prepared):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    said = [line for line in errors.splitlines() if line.strip() and not re.search(r"\d+/\d+ \[", line)]  # no bars
    more = resume_flags(tmp_path / "out", prepared)
    assert said == [f"train.py: stopped; the run is in {more[1]}, resume it with: {shlex.join([*command, *more])}"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_terminal_that_goes_away(prepared: Prepared, tmp_path: Path) -> None:
    """All that is printed from then on fails; the run still ends as it should, its lock removed."""
    command = [sys.executable, train.__file__, *flags(prepared, tmp_path / "out", "--epochs", 500, "--workers", 1)]
    controller, terminal = os.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
                          preexec_fn=own_terminal) as process:
        os.close(terminal)
        while not resume_flags(tmp_path / "out", prepared):
            assert process.poll() is None
            if select.select([controller], [], [], 0.05)[0]:
                os.read(controller, 10_000)  # or the terminal is full
        os.close(controller)
        assert process.wait(60) == 128 + signal.SIGHUP
    assert_whole(tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


# ---- torchrun --------------------------------------------------------------------------------------------------------

def node(folder: Path, nodes: int, port: int, arguments: list[str], restarts: int, fault: tuple[Any, ...]) -> None:
    """A machine of a torchrun: its own agent starts its processes, and starts them again, in this working folder."""
    os.chdir(folder)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as RELIABILITY.md tells those who want restarts
    config = LaunchConfig(nodes, nodes, 2 // nodes, run_id="test", rdzv_backend="c10d", max_restarts=restarts,
                          rdzv_endpoint=f"localhost:{port}", monitor_interval=0.1, start_method="forkserver")
    elastic_launch(config, one_of_several)(arguments, fault)


def one_of_several(arguments: list[str], fault: tuple[Any, ...]) -> None:
    """train.py in one of two processes. The fault comes to the second, once."""
    fresh = os.environ["RANK"] == "1" and not Path("fault").exists()
    if fresh:
        Path("fault").touch()
    script("train", arguments, f"output{os.environ['RANK']}", *([fault] if fresh and fault else []))


def torchrun(server: Any, folders: list[Path], arguments: list[str], *fault: Any, restarts: int = 0) -> list[int]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = []
    for folder in folders:
        folder.mkdir()
        nodes.append(server.Process(target=node, args=(folder, len(folders), port, arguments, restarts, fault)))
        nodes[-1].start()
    return [finish(each) for each in nodes]


@pytest.fixture(scope="module")
def two(server: Any, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("two") / "node"
    assert torchrun(server, [folder], flags(prepared, Path("out"), "--epochs", 1)) == [0]
    return folder / "out"


@pytest.mark.parametrize(("nodes", "more"), [(1, []), (2, ["--checkpoint", "auto"])])
def test_torchrun_starts_a_killed_process_again_from_the_last_checkpoint(server: Any, two: Path, prepared: Prepared,
                                                                         tmp_path: Path, nodes: int,
                                                                         more: list[str]) -> None:
    """The second node's folder holds no checkpoint: the first process's counts."""
    folders = [tmp_path / str(i) for i in range(nodes)]
    arguments = flags(prepared, Path("out"), "--epochs", 1, "--checkpoint_minutes", 0, *more)
    assert torchrun(server, folders, arguments, "train.train_step", 2, restarts=3) == [0] * nodes
    [out] = [folder / "out" for folder in folders if (folder / "out").exists()]
    [output] = [folder / "output0" for folder in folders if (folder / "output0").exists()]
    assert "begins at epoch 1, batch 2;" in output.read_text()
    assert_same_files(out, two, prepared)


def test_restarts_do_not_resume_a_run_of_before(server: Any, alone: Path, prepared: Prepared,
                                                tmp_path: Path) -> None:
    """The first start refuses the folder. The second is a restart, and must not take it for its own."""
    shutil.copytree(alone, tmp_path / "out")
    before = load(alone, prepared)
    assert torchrun(server, [tmp_path / "node"], flags(prepared, tmp_path / "out"), restarts=1) == [1]
    assert (tmp_path / "node" / "output0").read_text().count("holds a run already") == 2
    assert_same_run(load(tmp_path / "out", prepared), before)


def test_all_processes_stop_at_the_same_step(server: Any, two: Path, prepared: Prepared, tmp_path: Path) -> None:
    """One of two gets a signal: both end with the step, the first has saved, and says how to resume."""
    arguments = flags(prepared, Path("out"), "--epochs", 1)
    assert torchrun(server, [tmp_path / "one"], arguments, "train.train_step", 1, signal.SIGTERM) == [1]
    out = tmp_path / "one" / "out"
    assert load(out, prepared)["training"]["step"] == 1
    more = ["--checkpoint", f"out/checkpoint_{prepared.name}.pth.tar"]
    command = last_line(tmp_path / "one" / "output0").split("resume it with: ")[1]
    assert shlex.split(command) == ["torchrun", "--nproc_per_node=2", "train.py", *arguments, *more]
    assert "stopped" not in (tmp_path / "one" / "output1").read_text()
    shutil.copytree(out, tmp_path / "out")
    arguments = flags(prepared, tmp_path / "out", "--epochs", 1, "--checkpoint", tmp_path / more[1])
    assert torchrun(server, [tmp_path / "other"], arguments) == [0]
    assert_same_files(tmp_path / "out", two, prepared)


# ---- what fails ------------------------------------------------------------------------------------------------------

def said_by(monkeypatch: pytest.MonkeyPatch, arguments: list[str], name: str = "train") -> str:
    """The one line with which a script fails."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(SCRIPTS[name].main, SCRIPTS[name].get_parser())
    assert isinstance(ended.value.code, str), "which Python prints, to end with status 1"
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.fixture(scope="module")
def one_epoch(server: Any, folders: list[Path], prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("begun")
    arguments = flags(prepared, folder / "out", "--data_folder", folders[0] / "data", "--cache_features")
    stop = ("train.train_epoch", 2, signal.SIGTERM)
    assert finish(start(server, "train", arguments, folder / "output", stop)) == 143
    return folder / "out"


@pytest.fixture
def begun(one_epoch: Path, folders: list[Path], prepared: Prepared, tmp_path: Path) -> list[str]:
    """The flags that resume that run, in tmp_path/out."""
    shutil.copytree(one_epoch, tmp_path / "out")
    arguments = flags(prepared, tmp_path / "out", "--data_folder", folders[0] / "data", "--cache_features")
    return [*arguments, *resume_flags(tmp_path / "out", prepared)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_keeps_the_checkpoint(server: Any, begun: list[str], prepared: Prepared, tmp_path: Path) -> None:
    before = contents(tmp_path / "out")
    said = fill_disk(server, 100_000, "train", begun, tmp_path / "said")
    assert said == (f"train.py: {begun[-1]} could not be written (File too large); what stood there before is as it "
                    "was")
    assert contents(tmp_path / "out") == before


def fill_disk(server: Any, limit: int, name: str, arguments: list[str], output: Path) -> str:
    """Runs a script whose files may not grow beyond so many bytes, and returns the one line with which it fails."""
    process = server.Process(target=with_limit, args=(limit, name, arguments, str(output)))
    process.start()
    assert finish(process) == 1
    said = last_line(output)
    assert "could not be written (File too large)" in said
    return said


def with_limit(limit: int, *what: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script(*what)


def test_a_full_disk_leaves_no_input_files(server: Any, prepared: Prepared, tmp_path: Path) -> None:
    arguments = ["--dataset", "shapes", "--karpathy_json_path", str(prepared.json_path), "--image_folder",
                 str(prepared.pictures), "--output_folder", str(tmp_path / "data")]
    fill_disk(server, 9000, "create_input_files", arguments, tmp_path / "said")
    assert list((tmp_path / "data").iterdir()) == []


def test_features_are_continued_after_a_full_disk(server: Any, prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(prepared.folder, tmp_path / "data")
    arguments = kept_flags(prepared, tmp_path)
    fill_disk(server, 1_500_000, "train", arguments, tmp_path / "said")
    [partial] = (tmp_path / "data").glob(".*.part")
    assert 1_000_000 < partial.stat().st_size <= 1_500_000
    assert finish(start(server, "train", arguments, tmp_path / "said", ("train.train_step", 1))) == -signal.SIGKILL
    assert_whole(tmp_path / "data")
    assert leftovers(tmp_path / "data") == []


def test_a_folder_that_cannot_be_written_is_named_at_once(prepared: Prepared, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    said = said_by(monkeypatch, flags(prepared, tmp_path / "file" / "out"))
    assert f"{tmp_path / 'file' / 'out'}: nothing can be written there (Not a directory)" in said

    def read_only(**options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    said = said_by(monkeypatch, flags(prepared, tmp_path / "out"))
    assert said == (f"train.py: {tmp_path / 'out'}: nothing can be written there (Read-only file "
                    "system); name another folder")


def test_a_folder_that_became_read_only(begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, there = contents(tmp_path / "out"), open

    def opened(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "out/." in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return there(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", opened)
    assert f"{begun[-1]} could not be written (Read-only file system)" in said_by(monkeypatch, begun)
    monkeypatch.undo()
    assert contents(tmp_path / "out") == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["IMAGES", "FEATURES"])
def test_a_data_file_that_vanished_is_named(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            kind: str) -> None:
    """Before a worker has opened it; one that has goes on reading it, as its worker lives as long as the stage."""
    shutil.copytree(prepared.folder, tmp_path / "data")
    arguments = flags(prepared, tmp_path / "out", "--data_folder", tmp_path / "data", "--workers", "1", "--stage", "1",
                      *(["--cache_features"] if kind == "FEATURES" else []))
    train.main(train.get_parser().parse_args([*arguments, "--epochs", "1"]))
    train_epoch = train.train_epoch
    [gone] = (tmp_path / "data").glob(f"TRAIN_{kind}*")

    def vanish(*arguments: Any) -> dict[str, Any]:
        gone.unlink()
        return train_epoch(*arguments)

    monkeypatch.setattr(train, "train_epoch", vanish)
    said = said_by(monkeypatch, [*arguments, *resume_flags(tmp_path / "out", prepared)])
    assert said.startswith(f"train.py: {gone} cannot be read any more (") and "from the last checkpoint" in said
    assert load(tmp_path / "out", prepared)["training"]["epoch"] == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_reading_process_that_died(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, picture = os.getpid(), datasets.CaptionDataset.picture

    def die(self: datasets.CaptionDataset, i: int) -> torch.Tensor:
        if os.getpid() != first:
            os.kill(os.getpid(), signal.SIGKILL)
        return picture(self, i)

    monkeypatch.setattr(datasets.CaptionDataset, "picture", die)
    said = said_by(monkeypatch, flags(prepared, tmp_path / "out", "--workers", 1))
    assert said.startswith("train.py: a worker that reads pictures died (DataLoader worker (pid")
    assert "fewer --workers" in said


def test_a_loss_that_is_no_number_is_named_with_its_batch(begun: list[str], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """The first such batch, though one looks at the loss at the end only."""
    before, caption_losses, calls = contents(tmp_path / "out"), train.caption_losses, []

    def third(*given: Any) -> Losses:
        calls.append(0)
        losses = caption_losses(*given)
        return losses._replace(doubly_stochastic=losses.doubly_stochastic * (torch.nan if len(calls) == 3 else 1))

    monkeypatch.setattr(train, "caption_losses", third)
    said = said_by(monkeypatch, [*begun, "--print_freq", "100"])
    assert "stage 1, epoch 2, batch 3: the loss is nan (of words " in said and ", of attention nan)" in said
    assert "of words nan" not in said and len(calls) == 4
    assert contents(tmp_path / "out") == before


def test_weights_that_are_no_numbers_are_not_saved(begun: list[str], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last step of an epoch no loss tells."""
    before, train_step, calls = contents(tmp_path / "out"), train.train_step, []

    def fourth(run: train.Run, training: train.Training, *rest: Any) -> torch.Tensor:
        sums = train_step(run, training, *rest)
        calls.append(0)
        if len(calls) == 4:
            training.captioner.decoder.fc.bias.data[0] = torch.inf
        return sums

    monkeypatch.setattr(train, "train_step", fourth)
    assert "stage 1, epoch 2, batch 4: some weights are NaN or infinite" in said_by(monkeypatch, begun)
    assert contents(tmp_path / "out") == before


def test_out_of_memory_names_the_batch_size_to_try(begun: list[str], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(tmp_path / "out")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nAnd more lines")

    monkeypatch.setattr(train, "train_step", full)
    assert said_by(monkeypatch, begun) == ("train.py: out of memory with --batch_size 20; try "
                                           "--batch_size 10")
    assert said_by(monkeypatch, [*begun, "--batch_size", "20", "1"]).endswith("try --batch_size 10 1")
    assert "out of memory; end other programs" in said_by(monkeypatch, [*begun, "--batch_size", "1"])
    assert said_by(monkeypatch, [*begun, "--stage", "3"]).endswith("--batch_size 20 20 80; try --batch_size 10 10 40")
    assert contents(tmp_path / "out") == before


def test_features_that_no_run_needs_any_more_are_told(prepared: Prepared, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(prepared.folder, tmp_path / "data")
    stale = tmp_path / "data" / f"TRAIN_FEATURES_{prepared.name}_0123456789abcdef.bin"
    stale.write_bytes(bytes(12345))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", raise_interrupt)
        train.main(train.get_parser().parse_args(kept_flags(prepared, tmp_path)))
    assert f"take 12,345 bytes; delete what no run needs: {stale}\n" in capsys.readouterr().out
    assert stale.exists()


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
