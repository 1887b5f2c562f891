"""What Windows and macOS lack is taken away here, on Linux: the scripts need none of it."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Prepared
from test_train import flags

import train
from demo.shapes import draw_data_set

# Taken away in the workers too, which import this file anew as they are spawned.
ELSEWHERE = """
import multiprocessing, os, signal, sys
from pathlib import Path

multiprocessing.set_start_method("spawn", force=True)
for name in ("fcntl", "grp", "pwd", "resource", "termios", "triton"):
    sys.modules[name] = None    # importing it fails
for name in ("fork", "killpg", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)


def closed_alone(change):
    def changed(path, *others, **options):
        opened = {os.path.realpath(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")}
        mapped = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps")}
        for each in (path, *others):
            if os.path.realpath(each) in opened | mapped and not os.path.isdir(each):  # no folder is opened there
                raise PermissionError(13, "Windows neither renames nor removes an open file", str(each))
        return change(path, *others, **options)
    return changed


for name in ("rename", "replace", "unlink"):
    setattr(Path, name, closed_alone(getattr(Path, name)))

if __name__ == "__main__":
    import json
    from safety.errors import run_script
    for script, *arguments in json.loads(sys.argv[1]):
        module, sys.argv = __import__(script), [script, *map(str, arguments)]
        run_script(module.main, module.get_parser())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it tells which files are open, on Linux")
def test_the_scripts_run_without_what_other_systems_lack(tmp_path: Path) -> None:
    """Without fcntl, fork, Triton and half of the signals, with spawned workers, and where an open file stays."""
    captions = draw_data_set(tmp_path / "shapes", train=4, val=2, test=0)
    shapes = Prepared(tmp_path / "data", "shapes_5_cap_per_img_0_min_word_freq", tmp_path / "shapes/images", captions)
    best = tmp_path / "out" / f"BEST_checkpoint_{shapes.name}.pth.tar"
    search = ["--beam_size", 2, "--max_len", 5, "--device", "cpu"]
    commands = [
        ["create_input_files", "--dataset", "shapes", "--karpathy_json_path", captions, "--image_folder",
         shapes.pictures, "--min_word_freq", 0, "--output_folder", shapes.folder, "--workers", 1],
        ["train", *flags(shapes, tmp_path / "out", "--epochs", 1, "--workers", 1, "--cache_features")],
        ["eval", "--checkpoint", best, "--data_folder", shapes.folder, "--data_name", shapes.name, "--split", "VAL",
         "--out", tmp_path / "scores", *search],
        ["caption", "--model", best, "--img", shapes.pictures, "--out", tmp_path / "page.html", *search]]
    program = tmp_path / "elsewhere.py"
    program.write_text(ELSEWHERE, encoding="utf-8")
    done = subprocess.run([sys.executable, program, json.dumps(commands, default=str)], capture_output=True, text=True,
                          timeout=500, env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "PATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "page.html").stat().st_size and list((tmp_path / "scores").iterdir())
    assert len(list(shapes.folder.glob("*FEATURES*.bin"))) == 2
