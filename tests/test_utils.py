"""What the scripts share: devices and embeddings are checked."""

import bz2
import gzip
import io
import lzma
import struct
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import utils
from safety.devices import bfloat16_on_cpu, cpu_advice
from safety.errors import InputError
from utils import World, choose_precision, load_embeddings, loader_workers, setup_world

WORDS = {"<pad>": 0, "a": 1, "red": 2, "of": 3, "<unk>": 4}


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
                                                      ("bfloat16", "bfloat16", "high"),
                                                      ("float16", "float16", "high")])
def test_a_cpu_computes_exactly_unless_told_otherwise(given, precision, matmul):
    assert setup_world("cpu", given) == (World(0, 1, torch.device("cpu")), precision)
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 == (precision != "float32")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta", "cuda:99", *["cuda"] * (not torch.cuda.is_available())])
def test_a_device_that_cannot_be_used_is_named(device):
    with pytest.raises(InputError, match=f"--device {device}: ") as error:
        setup_world(device, None)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("alone")
def test_processes_do_not_share_a_gpu(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
                        "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--device cuda:1: each process takes a GPU of its own; leave the flag out"):
        setup_world("cuda:1", None)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("why, given, remedy", [
    ("CUDA error: unknown error", "cpu", "leave the flag out"),
    ("CUDA error: unknown error", None, "use --device cpu, or fewer processes"),  # a flag that nobody gave
    ("CUDA error: out of memory", "cpu", "other programs fill its memory; end them, or name another GPU"),
    ("CUDA error: no kernel image is available for execution on the device", None, "an older CUDA"),
    ("The NVIDIA driver on your system is too old (found version 11040)", None, "install a newer NVIDIA driver")])
def test_a_device_that_fails_is_named_with_a_remedy(monkeypatch, why, given, remedy):
    def fail(*_, **__):
        raise RuntimeError(f"{why}\nCUDA kernel errors might be reported later\n")

    monkeypatch.setattr(torch, "zeros", fail)
    with refused("--device cpu: PyTorch cannot use it here", why, remedy):
        setup_world(given, None)


@pytest.mark.parametrize("capability, native, given, chosen", [
    ((8, 0), True, None, "bfloat16"), ((7, 5), False, None, "float16"), ((7, 0), False, None, "float16"),
    ((6, 1), False, None, "float32"), ((9, 0), True, "float16", "float16"), ((7, 5), False, "float32", "float32")])
def test_a_gpu_computes_in_the_best_precision_that_it_has(monkeypatch, capability, native, given, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert choose_precision(torch.device("cuda", 0), given) == chosen
    if not native:
        with refused("--precision bfloat16: Tesla T4 has no arithmetic for it", "use --precision float"):
            choose_precision(torch.device("cuda", 0), "bfloat16")


@pytest.mark.parametrize("native, precision, advice", [
    (True, "float32", "--precision bfloat16 would"), (True, "bfloat16", ""),
    (True, "float16", "float16 is for GPUs"),
    (False, "float32", ""), (False, "bfloat16", "leave out --precision bfloat16")])
def test_a_cpu_says_which_precision_is_faster(monkeypatch, native, precision, advice):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    said = bfloat16_on_cpu(precision) or ""
    assert advice in said and bool(advice) == bool(said)


def test_a_gpu_that_is_left_idle_is_told(monkeypatch):
    """An old driver leaves PyTorch without a GPU, and it says so in a warning that scrolls away."""
    def old_driver():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it")

    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    cpu = torch.device("cpu")
    [line] = cpu_advice(cpu, None, "float32")
    assert "too old (found version 11040)" in line and "install a newer NVIDIA driver" in line and "\n" not in line
    assert cpu_advice(cpu, "cpu", "float32") == []  # it was asked for
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cpu_advice(cpu, None, "float32") == []   # PyTorch was installed for the CPU


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("cores, processes, workers", [(16, 1, 4), (16, 8, 2), (2, 1, 2), (1, 1, 1), (4, 8, 1)])
def test_a_gpu_gets_up_to_four_workers_of_its_share_of_the_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(utils, "cores", lambda: cores)
    for name, value in (("RANK", 0), ("WORLD_SIZE", processes), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", processes),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 29500)):
        monkeypatch.setenv(name, str(value))
    assert loader_workers(None, torch.device("cuda", 0)) == workers
    assert loader_workers(None, torch.device("cpu")) == 0 and loader_workers(7, torch.device("cpu")) == 7


@pytest.mark.usefixtures("alone")
def test_a_precision_that_is_none_is_refused():
    with refused("--precision bf16: there are bfloat16, float16, float32"):
        setup_world("cpu", "bf16")


@pytest.mark.usefixtures("alone")
def test_a_device_that_nobody_tried_is_refused():
    with refused("--device mps: not tried yet", "leave the flag out"):
        setup_world("mps", None)


@pytest.mark.usefixtures("alone")
def test_without_a_device_the_best_one_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup_world(None, None)[0].device == torch.device("cpu")


def test_one_process_needs_no_others():
    alone = World(0, 1, torch.device("cpu"))
    tensor = torch.ones(2)
    assert utils.gather([1, 2], alone) == [[1, 2]] and utils.broadcast("x", alone) == "x"
    assert utils.sum_over(tensor, alone) is tensor and tensor.tolist() == [1, 1]


@given(items=st.lists(st.integers()), world_size=st.integers(1, 9))
def test_what_all_ranks_have_is_in_order_again(items, world_size):
    shares = [items[rank::world_size] for rank in range(world_size)]
    with mock.patch.object(utils, "gather", lambda own, world: shares):
        assert utils.gather_in_order(shares[0], World(0, world_size, torch.device("cpu"))) == items


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
    ("red 1 2 3\na 1 2\n", "line 2: 2 numbers where most lines have 3"),
    ("red 1 2 3\na 1 2 3 4\n", "line 2: 4 numbers where most lines have 3"),
    ("the 1 2 3\nof\n", "line 2: 0 numbers"), ("red 1 2 x\n", "line 1: .*'x'"), ("red 1 2\n\na 3 x\n", "line 3"),
    ("blue 1 2\n", "no word of the vocabulary"), ("", "no word"), ("red\na\n", "no word"), ("3 2\n", "no word")])
def test_a_file_of_other_than_embeddings_is_named_with_its_line(text, message, tmp_path):
    path = glove(tmp_path, text)
    with pytest.raises(InputError, match=message) as error:
        load_embeddings(path, WORDS)
    assert str(path) in str(error.value) and "GloVe" in str(error.value) and "\n" not in str(error.value)


# Each stands before, between or behind the lines of two words of ours.
ODD_LINES = {"a broken byte": b"bl\xfce 1 2 3\n", "another number of numbers": b"blue 1 2\n", "no numbers": b"blue\n",
             "words": b"# made by me\n", "a number that is none": b"blue 1 x nan\n", "nothing": b"\t \n",
             "a word of ours, and more": b"of mice and men 1 2 3\n", "no end": b"blue 1 2"}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("odd", ODD_LINES)
def test_lines_of_other_words_cannot_stop_it(odd, place, tmp_path):
    lines = [b"red 0.5 -1 2e-1\n", b"a 1 2 3\n"]
    lines.insert(place, ODD_LINES[odd] + b"\n")
    (tmp_path / "glove.txt").write_bytes(b"".join(lines))
    embeddings, found = load_embeddings(tmp_path / "glove.txt", WORDS)
    assert found == 2 and torch.equal(embeddings[[1, 2]], torch.tensor([[1, 2, 3], [0.5, -1, 0.2]]))


@pytest.mark.parametrize("text", ["\ufeffred 0.5 -1 2e-1\na 1 2 3\n", "red\t0.5\t-1\t2e-1\na\t1 2 3\n",
                                  "red 0.5 -1 2e-1\r\na 1 2 3\r\n", "red  0.5  -1 2e-1\n a 1 2 3\n",
                                  "red 0.5 -1 2e-1\na 1 2 3\nred 1 x\n"],
                         ids=["a byte order mark", "tabs", "Windows", "more spaces", "again, and broken"])
def test_other_forms_of_the_text(text, tmp_path):
    embeddings, found = load_embeddings(glove(tmp_path, text), WORDS)
    assert found == 2 and torch.equal(embeddings[[1, 2]], torch.tensor([[1, 2, 3], [0.5, -1, 0.2]]))


def test_a_word_in_another_spelling_is_the_same_word(tmp_path):
    """Accents apart from their letters, as macOS writes them."""
    embeddings, found = load_embeddings(glove(tmp_path, "cafe\u0301 1 2\nre\u00add 3 4\n"), {"caf\u00e9": 0, "red": 1})
    assert found == 2 and embeddings.tolist() == [[1, 2], [3, 4]]


def zipped(content: bytes) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("glove.txt", content)
    return file.getvalue()


@pytest.mark.parametrize("pack, words", [
    (zipped, ["zip archive", "unpack it"]), (gzip.compress, ["gzip", "unpack it"]),
    (bz2.compress, ["bzip2", "unpack it"]), (lzma.compress, ["xz", "unpack it"]),
    (lambda _: b"2 3\nred " + struct.pack("<3f", 1, 2, 3), ["binary", ".vec"]),
    (lambda _: struct.pack("<ii", 793712314, 12), ["binary", ".vec"]),
    (lambda content: content.decode().encode("utf-16"), ["UTF-16", "UTF-8"])],
    ids=["zip", "gzip", "bzip2", "xz", "word2vec's .bin", "fastText's .bin", "UTF-16"])
def test_a_container_is_named(pack, words, tmp_path):
    content = b"red 0.5 -1 2e-1\na 1 2 3\n"
    (tmp_path / "vectors").write_bytes(pack(content))
    with refused("vectors is ", *words):
        load_embeddings(tmp_path / "vectors", WORDS)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00red", None])
def test_a_file_without_text_is_named(content, tmp_path):
    path = tmp_path / "vectors.bin"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"vectors\.bin"):
        load_embeddings(path, WORDS)
