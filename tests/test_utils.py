"""What the scripts share: files appear whole, devices and embeddings are checked, failures are one line."""

import argparse
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import utils
from training.curves import draw_curves
from utils import InputError, Processes, UsageError, load_embeddings, run_script, setup_processes, whole_file

WORDS = {"<pad>": 0, "a": 1, "red": 2, "of": 3, "<unk>": 4}


# ---- whole_file ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, content", [("w", "Größe\n"), ("wb", b"\x00\xff")])
def test_a_file_appears_when_it_is_whole(mode, content, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    with whole_file(str(path), mode) as file:
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
        with whole_file(link) as file:
            file.write(content)
        assert link.is_symlink() and target.read_text() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_device_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with whole_file(tmp_path / "pipe") as file:
        file.write("text")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with whole_file(tmp_path / "link") as file:
        file.write("more")
    assert os.read(reader, 9) == b"textmore" and (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    os.close(reader)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_file_that_fails_leaves_the_old_one(failure, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), whole_file(path) as file:
        file.write("new")
        raise failure
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    with whole_file(path) as file:
        file.write("x")
    assert synced == [False] and path.read_text() == "x"


# ---- devices and processes -------------------------------------------------------------------------------------------

@pytest.fixture
def alone(monkeypatch):
    """Without what torchrun sets, and with PyTorch's settings put back afterwards."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("given, precision, matmul", [(None, "float32", "highest"), ("float32", "float32", "highest"),
                                                      ("bfloat16", "bfloat16", "high")])
def test_a_cpu_computes_exactly_unless_told_otherwise(given, precision, matmul):
    assert setup_processes("cpu", given) == (Processes(0, 1, torch.device("cpu")), precision)
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 == (precision == "bfloat16")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta", "cuda:99", *["cuda"] * (not torch.cuda.is_available())])
def test_a_device_that_cannot_be_used_is_named(device):
    with pytest.raises(InputError, match=f"--device {device}: ") as error:
        setup_processes(device, None)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("alone")
def test_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device cuda:1: each process takes a GPU of its own; leave the flag out"):
        setup_processes("cuda:1", None)


@pytest.mark.usefixtures("alone")
def test_only_the_first_line_of_pytorchs_reason_is_shown(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later\n")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(InputError, match=r"^--device cpu: .*\(CUDA error: out of memory\); leave the flag out$"):
        setup_processes("cpu", None)
    with pytest.raises(InputError, match=r"^--device cpu: .*\); take --device cpu, or fewer processes$"):
        setup_processes(None, None)  # a flag that nobody gave cannot be left out


@pytest.mark.usefixtures("alone")
def test_without_a_device_the_best_one_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup_processes(None, None)[0].device == torch.device("cpu")


def test_one_process_needs_no_others():
    alone = Processes(0, 1, torch.device("cpu"))
    tensor = torch.ones(2)
    assert utils.gather([1, 2], alone) == [[1, 2]] and utils.broadcast("x", alone) == "x"
    assert utils.broadcast_tensors([tensor], alone) is None and tensor.tolist() == [1, 1]


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast(precision, dtype):
    with utils.autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_learning_rate_of_every_group_shrinks():
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.Adam([{"params": weights[:1], "lr": 1e-3}, {"params": weights[1:], "lr": 1e-4}])
    utils.adjust_learning_rate(optimizer, 0.8)
    utils.adjust_learning_rate(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.64e-3, 0.64e-4])


# ---- embeddings ------------------------------------------------------------------------------------------------------

def glove(folder: Path, text: str) -> Path:
    path = folder / "glove.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("before, after", [
    ("", ""), ("400000 3\n", ""), ("", "\n\n"), ("", " \n"), ("the 0 0 0\n", "zürich 9 9 9"),
    ("", ". . . 1 2 3\nof name@domain.com 4 5 6\n")], ids=["GloVe", "word2vec", "empty lines", "spaces", "other words",
                                                         "words with spaces"])
def test_embeddings_of_known_words(before, after, tmp_path):
    torch.manual_seed(0)
    path = glove(tmp_path, f"{before}red 0.5 -1 2e-1\na 1 2 3 \n{after}")
    embeddings, found = load_embeddings(path, WORDS)
    assert found == 2 and embeddings.shape == (5, 3) and embeddings.dtype == torch.float32
    assert torch.equal(embeddings[[1, 2]], torch.tensor([[1, 2, 3], [0.5, -1, 0.2]]))


def test_words_without_embedding_get_random_ones(tmp_path):
    """Uniform up to the square root of 3 / size, whose variance is 1 / size."""
    words = {f"word{i}": i for i in range(2000)}
    embeddings, found = load_embeddings(glove(tmp_path, f"word7 {'9 ' * 12}"), words)
    others = torch.cat([embeddings[:7], embeddings[8:]])
    assert found == 1 and embeddings[7].tolist() == [9] * 12
    assert 0.49 < others.max() <= 0.5 and -0.5 <= others.min() < -0.49
    assert others.var() == pytest.approx(1 / 12, rel=0.02) and others.unique().numel() > 20_000


@pytest.mark.parametrize("text, message", [
    ("red 1 2 3\na 1 2\n", "line 2: 2 numbers where the lines before have 3"),
    ("red 1 2 3\na 1 2 3 4\n", "line 2: 4 numbers where the lines before have 3"),
    ("the 1 2 3\nof\n", "line 2: 0 numbers"), ("red 1 2 x\n", "line 1: .*'x'"), ("red 1 2\n\na 3 x\n", "line 3"),
    ("blue 1 2\n", "no word of the vocabulary"), ("", "no word"), ("red\na\n", "no word"), ("3 2\n", "no word")])
def test_a_file_of_other_than_embeddings_is_named_with_its_line(text, message, tmp_path):
    path = glove(tmp_path, text)
    with pytest.raises(InputError, match=message) as error:
        load_embeddings(path, WORDS)
    assert str(path) in str(error.value) and "GloVe" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00red", None])
def test_a_file_without_text_is_named(content, tmp_path):
    path = tmp_path / "vectors.bin"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"vectors\.bin"):
        load_embeddings(path, WORDS)


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
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (InputError("--encoder_weights x: not a state dict (RuntimeError: can't allocate memory)"), False)])
def test_memory_that_is_too_small_is_told(failure, told):
    line = utils.in_one_line(failure, argparse.Namespace(batch_size=[8, 3]))
    assert ("too small for --batch_size 8 3; try --batch_size 4 1" in line) == told and (told or line == str(failure))
    assert ("too small; end other programs" in utils.in_one_line(failure, argparse.Namespace())) == told


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
