"""`pip install -e .` gives one name, beside which anybody's `datasets` and `utils` live undisturbed."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_eval import Model

from datasets import load_word_map

REPOSITORY = Path(__file__).parent.parent
THEIRS = ("datasets", "utils", "models", "caption", "train", "safety")
NAMES = ["Caption", "Captioner", "Search", "beam_search", "caption_images", "load"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A project with modules of these names, and a site-packages that knows our package alone."""
    for name in THEIRS:
        (tmp_path / f"{name}.py").write_text("whose = 'theirs'\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "show_attend_tell").symlink_to(REPOSITORY / "show_attend_tell")
    return tmp_path


def run(folder: Path, code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder / "site")})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


IMPORTS = {
    "theirs first": f"import {', '.join(THEIRS)}\nimport show_attend_tell as ours\n",
    "ours first": f"import show_attend_tell as ours\nassert not {{*{THEIRS}}} & {{*sys.modules}}\n"
                  f"import {', '.join(THEIRS)}\n"}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_names_do_not_clash(imports: str, elsewhere: Path) -> None:
    """Neither in sys.modules nor in what the scripts import later on; and what is made can be pickled."""
    code = "import pickle, sys\n" + imports + f"""
print({{sys.modules[name].whose for name in {THEIRS}}})
from show_attend_tell import caption, train
print(train.datasets.read_image is caption.read_image, caption.read_image.__module__)
print(pickle.loads(pickle.dumps(ours.Search(3))) == ours.Search(3), *ours.__all__)
print([type(getattr(ours, name)).__name__ for name in ours.__all__])"""
    assert run(elsewhere, code).splitlines() == [
        "{'theirs'}", "True show_attend_tell.datasets", f"True {' '.join(NAMES)}",
        "['type', 'type', 'type', 'function', 'function', 'function']"]


def test_the_pages_line_captions_from_elsewhere(elsewhere: Path, prepared) -> None:
    page = (REPOSITORY / "docs" / "captions.md").read_text(encoding="utf-8")
    assert "`pip install -e .`" in page
    line = re.search("`(from show_attend_tell import [^`]*)`", page)[1]
    Model(load_word_map(prepared.folder, prepared.name)).save(elsewhere / "x.pth.tar")
    Image.open(prepared.pictures / "shapes_test_0003.png").save(elsewhere / "x.png")
    said = run(elsewhere, f"""import datasets, utils
{line}
[[best]] = caption_images(load("x.pth.tar", device="cpu"), "x.png", max_len=5)
print(*best.words)""")
    assert said.split()


def test_a_copy_without_the_scripts_says_so(elsewhere: Path) -> None:
    (elsewhere / "site" / "show_attend_tell").unlink()
    (elsewhere / "site" / "show_attend_tell").mkdir()
    source = (REPOSITORY / "show_attend_tell" / "__init__.py").read_text()
    (elsewhere / "site" / "show_attend_tell" / "__init__.py").write_text(source)
    done = subprocess.run([sys.executable, "-c", "import show_attend_tell"], cwd=elsewhere, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(elsewhere / "site")})
    assert "does not hold the scripts" in done.stderr.splitlines()[-1] and "pip install -e ." in done.stderr


def test_the_package_holds_all_places_and_is_all_that_is_installed() -> None:
    text = (REPOSITORY / "show_attend_tell" / "__init__.py").read_text()
    ours = set(re.findall('"([a-z_]+)"', text[text.index("OURS ="):text.index("__path__")]))
    scripts = {path.stem for path in REPOSITORY.glob("*.py")}
    assert ours == scripts | {"encoders", "safety", "preparing", "searching", "training", "drawing"}
    assert 'packages = ["show_attend_tell"]' in (REPOSITORY / "pyproject.toml").read_text()
