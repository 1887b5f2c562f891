"""The recipes of docs/cookbook.md run, one after another, as they stand there."""
from __future__ import annotations

import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_eval import Model

from caption import caption_images
from datasets import load_word_map

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs" / "cookbook.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def kitchen(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder with the files that the recipes name; what the recipes leave behind."""
    monkeypatch.chdir(tmp_path)
    Model(load_word_map(prepared.folder, prepared.name)).save(Path(re.search('load\\("([^"]*)"', RECIPES[0])[1]))
    (tmp_path / "holiday").mkdir()
    for i, name in enumerate(("photo.jpg", "holiday/1.jpg")):
        Image.open(prepared.pictures / f"shapes_test_000{3 + i}.png").save(name)
    (tmp_path / "holiday" / "2.jpg").write_bytes(b"no picture")
    return {"__name__": "cookbook"}


def answer(address: str, data: bytes) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, data, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_recipes_run(kitchen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(RECIPES) == 8
    for recipe in RECIPES:
        assert len(recipe.splitlines()) < 20
        exec(recipe.replace('"127.0.0.1", 8000', '"127.0.0.1", 0'), kitchen)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert sum(line.startswith("0.5 ") for line in lines) == 5 <= sum(line.startswith("1.0 ") for line in lines)
    assert "2.jpg cannot be read" in said
    assert 0 < kitchen["sure"] <= 1
    server = kitchen["server"]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        [[best]] = caption_images(kitchen["model"], "photo.jpg")
        assert answer(address, Path("photo.jpg").read_bytes()) == (200, " ".join(best.words))
        assert answer(address, b"no picture")[0] == 400
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_to_serve_needs_what_is_listed_there() -> None:
    """Captions come with none of the other packages of requirements.txt."""
    commands = re.search(r"```bash\n(pip .*?)```", TEXT, re.DOTALL)[1]
    listed = {word for word in commands.split() if word.isalnum()}
    every = set(re.findall(r"^([\w-]+)", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE))
    others = {"scikit-image": "skimage"}
    missing = {others.get(name, name) for name in every if name.lower() not in listed
               and not name.startswith("efficientnet")}
    assert {"nltk", "matplotlib", "skimage", "pycocoevalcap"} <= missing
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from caption import caption_images, load"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
