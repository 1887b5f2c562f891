"""A coverage-guided search for files that load_checkpoint or load_weights neither reads nor refuses, or that make them
do anything else.

    pip install atheris                                    # not in requirements.txt: the suite does not need it
    python tests/fuzz_checkpoints.py -max_total_time=300   # libFuzzer's flags; a find is written to crash-...

What it finds belongs into test_hostile.py as a case.
"""
import codecs
import io
import pickle
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import atheris
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from test_checkpoints import WORDS, tiny_old, write_old  # noqa: E402

from safety import checkpoints, old_checkpoints  # noqa: E402
from safety.errors import InputError  # noqa: E402

for place in (checkpoints, old_checkpoints, old_checkpoints.OldUnpickler, pickle._Unpickler,
              torch._weights_only_unpickler.Unpickler, zipfile.ZipFile):
    for function in list(vars(place).values()):
        if isinstance(function, types.FunctionType):
            atheris.instrument_func(function)  # its branches guide the search

FOLDER = Path(tempfile.mkdtemp())
FILE = FOLDER / "x.pth.tar"
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "os.putenv",
             "subprocess", "socket", "ctypes.dlopen", "shutil", "exec", "compile")
watching = False


class Reached(BaseException):
    """No `except Exception` stops it."""


def watch(event: str, arguments: tuple) -> None:
    """Python tells of whatever reaches out; while a checkpoint is read, only the checkpoint may be opened."""
    if watching and (event.startswith(FORBIDDEN) or (event == "open" and str(arguments[0]) != str(FILE))):
        raise Reached(f"{event} {arguments}")


def in_a_zip(pickled: bytes) -> bytes:
    """A pickle with the checksum that lets it be read: of ours, if it takes PyTorch's own reader, else of the old."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, each in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"),
                           *((f"data/{i}", bytes(64)) for i in range(4))):
            archive.writestr(f"a/{name}", each)
    return content.getvalue()


def one(data: bytes) -> None:
    global watching
    FILE.write_bytes(in_a_zip(data[1:]) if data[:1] == b"z" else data[1:])
    watching = True
    try:
        for load in (lambda path: checkpoints.load_checkpoint(path, WORDS), checkpoints.load_weights):
            try:
                load(FILE)
            except (InputError, ImportError) as error:  # the package safetensors is not there
                assert str(FILE) in str(error) and "\n" not in str(error)
    finally:
        watching = False


def write_seeds(folder: Path) -> None:
    """The smallest checkpoints of each kind, whole and as the pickle alone."""
    state = {"format": 1, "encoder": {"a": torch.zeros(2)}, "decoder": {"b": torch.ones(2, 2)}, "word_map": WORDS,
             "model": {"vocab_size": len(WORDS)}}
    torch.save(state, folder / "ours")
    for container in ("zip", "stream"):
        write_old(folder / container, container, *tiny_old({}, {}))
    for path in list(folder.iterdir()):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
                (folder / f"{path.name}_pickle").write_bytes(b"z" + archive.read(name))
        path.write_bytes(b"f" + path.read_bytes())


if __name__ == "__main__":
    (seeds := FOLDER / "seeds").mkdir()
    write_seeds(seeds)
    for name in ("raw-unicode-escape", "latin-1", "ascii", "utf-8", "cp437"):  # or Python would open and run them
        codecs.lookup(name)
    repr(torch.zeros(1))
    sys.addaudithook(watch)
    atheris.Setup([*sys.argv, "-max_len=9000", "-rss_limit_mb=3000", "-timeout=20", str(seeds)], one)
    atheris.Fuzz()
