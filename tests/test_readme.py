"""What the README shows and names exists, and its commands run: those on data as they stand there, on drawn shapes."""
from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import caption
import create_input_files
import demo.demo
import eval as evaluation
import img.draw
import img.record
import train
from demo.shapes import draw_data_set
from tests.conftest import ENCODER

REPOSITORY = Path(train.__file__).parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PARSERS = {"create_input_files.py": create_input_files, "train.py": train, "eval.py": evaluation, "caption.py": caption,
           "demo/demo.py": demo.demo, "img/draw.py": img.draw, "img/record.py": img.record}
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines()]
PICTURES = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", README)  # description and path
# What makes a command of the README small enough for a test.
SMALL = {"train.py": ["--encoder", ENCODER, "--encoder_weights", "none", "--encoded_image_size", "4", "--emb_dim", "8",
                      "--attention_dim", "8", "--decoder_dim", "8", "--epochs", "1",
                      "--batch_size", "20", "--whole_images"],
         "create_input_files.py": ["--workers", "1"], "eval.py": ["--max_len", "5"], "caption.py": ["--max_len", "5"]}


def run(command: str) -> object:
    _, script, *flags = shlex.split(command)
    module = PARSERS[script]
    return module.main(module.get_parser().parse_args([*flags, *SMALL[script], *(
        [] if script == "create_input_files.py" else ["--device", "cpu"])]))


@pytest.mark.parametrize("command", [each for each in COMMANDS if ".py" in each])
def test_every_command_has_flags_that_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # where recipes/ is
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert PARSERS[words[at]].get_parser().parse_args(words[at + 1:])


def test_every_other_command_is_known() -> None:
    others = [each for each in COMMANDS if ".py" not in each]
    assert {each.split(" -r")[0] for each in others} == {
        "make demo", "make test", "source .venv/bin/activate", "python3 -m venv .venv && source .venv/bin/activate",
        "pip install", "python -m pytest"}
    lists = [path for each in others for path in re.findall(r"-r (\S+)", each)]
    assert len(lists) == 3
    assert [path for path in lists if not (REPOSITORY / path).is_file()] == []


def test_the_commands_on_photographs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in a folder that holds what the README says: COCO's JSON and pictures, and some of one's own."""
    captions = draw_data_set(tmp_path / "shapes", train=4, val=2, test=2)
    (tmp_path / "shapes" / "images").rename(tmp_path / "train2014")
    data = json.loads(captions.read_text(encoding="utf-8"))
    for image in data["images"]:
        image["filepath"] = "train2014"
    (tmp_path / "dataset_coco.json").write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "holiday").mkdir()
    for name in ("photo.jpg", "holiday/1.jpg", "holiday/2.jpg"):
        Image.open(tmp_path / "train2014" / "shapes_test_0000.png").save(tmp_path / name)
    output = tmp_path / "demo" / "output"  # the model of the demo is here the one that is trained below
    output.mkdir(parents=True)
    model = tmp_path / "BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar"
    (output / f"BEST_checkpoint_{demo.demo.NAME}.pth.tar").symlink_to(model)
    shutil.copytree(tmp_path / "train2014", output / "shapes" / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # METEOR's Java would take most of the time

    on_data = ("python create_input_files.py --dataset coco", "python eval.py", "python caption.py")
    ran = [each for each in COMMANDS if each.startswith(on_data) or each == "python train.py"]
    assert [each.split()[1] for each in ran[:4]] == ["create_input_files.py", "train.py", "eval.py", "caption.py"]
    for command in dict.fromkeys(ran):
        assert run(command)
    written = re.findall(r"--(?:out|gallery) (\S+)", " ".join(ran))
    assert len(set(written)) == 5
    assert [path for path in written if not Path(path).stat().st_size] == []


def test_the_table_of_ones_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = re.search(r"```\n(image,caption\n.*?)```", README, re.DOTALL)[1]
    names = {line.split(",")[0] for line in table.splitlines()[1:]} | {"cats/1.jpg", "cats/2.jpg"}
    monkeypatch.chdir(tmp_path)
    Path("cats").mkdir()
    for i, name in enumerate(sorted(names)):
        Image.effect_noise((64, 64), 60 + i).save(name)
    Path("captions.csv").write_text(table + "cats/1.jpg,A cat\ncats/2.jpg,Two cats\n", encoding="utf-8")
    prepare, learn = (each for each in COMMANDS if "mine" in each)
    assert learn == f"python train.py --data_name {run(prepare)}"


def test_every_file_that_is_linked_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_link_within_leads_to_a_heading() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    headings = re.findall(r"^(#+) (.+)$", prose, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for _, heading in headings]  # as GitHub does
    assert len(set(anchors)) == len(anchors)
    links = set(re.findall(r"\]\(#([^)]+)\)", prose))
    assert links - set(anchors) == set()
    chapters = {anchor for anchor, (level, _) in zip(anchors, headings, strict=True) if level == "##"}
    assert chapters - links == set(), "a chapter that the table of contents lacks"


def test_what_is_folded_opens() -> None:
    assert README.count("<details><summary><b>") == README.count("</b></summary>\n\n") == README.count("\n</details>\n")
    assert README.count("<details>") > 20


def test_the_drawings_are_the_scripts(tmp_path: Path) -> None:
    img.draw.main(img.draw.get_parser().parse_args(["--out", str(tmp_path), "--dpi", "25"]))
    drawn = {f"img/{path.name}" for path in tmp_path.iterdir()}
    assert drawn == {path for _, path in PICTURES}
    for path in drawn:
        with Image.open(tmp_path / Path(path).name) as new, Image.open(REPOSITORY / path) as shown:
            assert len(new.convert("RGB").getcolors(1 << 24)) > 20, f"{path} is empty"
            assert new.width / new.height == pytest.approx(shown.width / shown.height, rel=0.03), f"{path}: draw anew"
        assert (REPOSITORY / path).stat().st_size < 200_000
    assert all(len(description) > 20 for description, _ in PICTURES)


def test_the_recorded_tree_ends_in_the_recorded_caption() -> None:
    record = json.loads(img.draw.RECORD.read_text(encoding="utf-8"))
    ends = [(log_prob, t, i) for t, level in enumerate(record["tree"])
            for i, (_, _, log_prob, fate) in enumerate(level) if fate == "ended"]
    _, last, place = max(ends)
    words = []
    for t in range(last, -1, -1):
        place, word, *_ = record["tree"][t][place]
        words.append(word)
    assert words[::-1] == record["words"]
    assert [len(each) for each in record["alphas"]] == [8] * len(record["words"])


def test_the_first_screen_shows_both_commands() -> None:
    first = README.splitlines()[:40]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)
    targets = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert "\ndemo:" in targets
    assert "\ntest:" in targets


def test_flags_named_in_the_text_exist() -> None:
    known = {option for module in PARSERS.values() for action in module.get_parser()._actions
             for option in action.option_strings}
    named = set(re.findall(r"`(--\w+)", README))
    assert named - known == set()
