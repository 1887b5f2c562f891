"""What the pages show and name exists, what they quote is the code, and their commands run: those on data as they stand
there, on drawn shapes."""
from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import demo.demo
import img.draw
import models
import train
from demo.shapes import draw_data_set
from tests.conftest import ENCODER

REPOSITORY = Path(train.__file__).parent
PAGES = {str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
         for folder in (".", "docs", "img", "benchmarks", "exercises", "pretrained")
         for path in sorted((REPOSITORY / folder).glob("*.md"))}
README = PAGES["README.md"]
SCRIPTS = ("create_input_files.py", "train.py", "eval.py", "caption.py", "demo/demo.py", "demo/app.py",
           "img/draw.py", "img/record.py", "notebooks/build.py", "training/publish.py", "benchmarks/run.py",
           "benchmarks/gpu.py")
OURS = [name for name in PAGES if not name.startswith(("exercises", "pretrained"))]  # those have tests of their own


def commands_of(text: str) -> list[str]:
    """The lines of its blocks for a shell, without comments; the variables of a loop have a value."""
    lines = [line.split(" #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
             for line in block.splitlines()]
    values = dict(re.findall(r'^(\w+)="?([^"\n]+)"?$', "\n".join(lines), re.MULTILINE)) | {"seed": "1"}
    for name, value in values.items():
        lines = [line.replace(f"${name}", value) for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


COMMANDS = list(dict.fromkeys(command for page in OURS for command in commands_of(PAGES[page])))
PICTURES = [(page, *found) for page in PAGES for found in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", PAGES[page])]
# What makes a command of the pages small enough for a test.
SMALL = {"train.py": ["--encoder", ENCODER, "--encoder_weights", "none", "--encoded_image_size", "4", "--emb_dim", "8",
                      "--attention_dim", "8", "--decoder_dim", "8", "--epochs", "1",
                      "--batch_size", "20", "--whole_images"],
         "create_input_files.py": ["--workers", "1"], "eval.py": ["--max_len", "5"], "caption.py": ["--max_len", "5"]}


def names_a_script(command: str) -> bool:
    return re.search(r"\w\.py( |$)", command) is not None


def module_of(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def run(command: str) -> object:
    _, script, *flags = shlex.split(command)
    module = module_of(script)
    return module.main(module.get_parser().parse_args([*flags, *SMALL[script], *(
        [] if script == "create_input_files.py" else ["--device", "cpu"])]))


# ---- commands --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [each for each in COMMANDS if names_a_script(each)])
def test_every_command_has_flags_that_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # where recipes/ is
    words = shlex.split(command)
    at = max(i for i, word in enumerate(words) if word in SCRIPTS)
    assert module_of(words[at]).get_parser().parse_args(words[at + 1:])


def test_every_other_command_is_known() -> None:
    others = [each for each in COMMANDS if not names_a_script(each) and not re.match(r"for |done|\w+=", each)]
    assert {re.sub(r"^(pip install|python -m pytest) .*", r"\1", each) for each in others} == {
        "make demo", "make test", "make lint", "source .venv/bin/activate", "pip install", "python -m pytest",
        "python3 -m venv .venv && source .venv/bin/activate"}
    lists = [path for each in others for path in re.findall(r"-r (\S+)", each)]
    assert len(lists) == 5
    assert [path for path in lists if not (REPOSITORY / path).is_file()] == []


def test_the_commands_on_photographs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the README's order, in a folder that holds what it says: COCO's JSON and pictures, and some of one's own. Then
    all that other pages do with the model."""
    captions = draw_data_set(tmp_path / "shapes", train=4, val=2, test=2)
    (tmp_path / "shapes" / "images").rename(tmp_path / "train2014")
    data = json.loads(captions.read_text(encoding="utf-8"))
    for image in data["images"]:
        image["filepath"] = "train2014"
    (tmp_path / "dataset_coco.json").write_text(json.dumps(data), encoding="utf-8")
    table = "".join(f"train2014/{each['filename']},{' '.join(each['sentences'][0]['tokens'])}\n"
                    for each in data["images"])
    (tmp_path / "captions.csv").write_text(f"image,caption\n{table}", encoding="utf-8")
    (tmp_path / "holiday").mkdir()
    for name in ("photo.jpg", "holiday/1.jpg", "holiday/2.jpg"):
        Image.open(tmp_path / "train2014" / "shapes_test_0000.png").save(tmp_path / name)
    # The models of the demo and of other runs are here the one that is trained below.
    model = tmp_path / "BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar"
    for place in ("demo/output", "runs/1", "runs/2"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / model.name).symlink_to(model)
    (tmp_path / "demo" / "output" / f"BEST_checkpoint_{demo.demo.NAME}.pth.tar").symlink_to(model)
    shutil.copytree(tmp_path / "train2014", tmp_path / "demo" / "output" / "shapes" / "images")
    for folder in ("recipes", "img"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # METEOR's Java would take most of the time

    first = commands_of(README[README.index("## Photographs"):README.index("## Your own pictures")])
    assert [each.split()[1] for each in first] == ["create_input_files.py", "train.py", "eval.py", "caption.py"]
    then = [each for each in COMMANDS if "holidays" in each or (
        each.startswith(("python eval.py", "python caption.py")) and "flickr8k" not in each)]
    for command in dict.fromkeys([*first, *then]):
        if "2631_given" in command or "--word_map WORDMAP" in command:
            words = shutil.copy(next((tmp_path / "data").glob("WORDMAP_coco*")), tmp_path)
            command = command.replace("2631", str(len(json.loads(Path(words).read_text()))))  # this model's
        assert run(command.replace("pretrained/flickr8k.pth.tar", model.name))
    written = set(re.findall(r"--(?:out|gallery) (\S+)", " ".join([*first, *then])))
    assert len(written) == 5
    assert [path for path in written if not Path(path).stat().st_size] == []


def test_the_table_of_ones_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {re.search(r"```\n(image,caption\n.*?)```", PAGES[page], re.DOTALL)[1]
              for page in ("README.md", "docs/data.md")}
    (table,) = tables
    names = {line.split(",")[0] for line in table.splitlines()[1:]} | {"cats/1.jpg", "cats/2.jpg"}
    monkeypatch.chdir(tmp_path)
    Path("cats").mkdir()
    for i, name in enumerate(sorted(names)):
        Image.effect_noise((64, 64), 60 + i).save(name)
    Path("captions.csv").write_text(table + "cats/1.jpg,A cat\ncats/2.jpg,Two cats\n", encoding="utf-8")
    prepare, learn = (each for each in COMMANDS if "mine" in each)
    assert learn == f"python train.py --data_name {run(prepare)}"


def test_flags_named_in_the_text_exist() -> None:
    known = {option for script in SCRIPTS for action in module_of(script).get_parser()._actions
             for option in action.option_strings}
    known |= {"--debug", "--standalone", "--max_restarts", "--nproc_per_node"}  # every script's, and torchrun's
    named = {(page, flag) for page in OURS for flag in re.findall(r"`(--\w+)", PAGES[page])}
    assert len(named) > 80
    assert {(page, flag) for page, flag in named if flag not in known} == set()


# ---- links and names -------------------------------------------------------------------------------------------------

def prose(text: str) -> str:
    """Without blocks of code and what is between backticks."""
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub makes them; each must be there once."""
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    made = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    assert len(set(made)) == len(made), f"{page}: two headings of the same name"
    return set(made)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    """To a file that is there, and to a heading that it has."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])) if "://" not in link]
    lost = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        if not target.exists() or (anchor and anchor not in anchors(str(target.resolve().relative_to(REPOSITORY)))):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", OURS)
def test_every_file_that_is_named_exists(page: str) -> None:
    named = re.findall(r"`(?:python )?((?:\w+/)+\w+\.(?:py|txt|sh|ipynb))\b", PAGES[page])
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert [page for page in OURS if page not in linked and page != "README.md"] == []


@pytest.mark.parametrize("page", [page for page in OURS if PAGES[page].count("\n## ") > 3 and page.startswith("docs")])
def test_a_long_page_begins_with_its_chapters(page: str) -> None:
    chapters = re.findall(r"^## (.+)$", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE),
                          re.MULTILINE)
    top = PAGES[page][:PAGES[page].index("\n## ")]
    made = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in chapters}
    assert made - set(re.findall(r"\]\(#([^)]+)\)", top)) == set()


def test_what_is_folded_opens() -> None:
    text = PAGES["docs/questions.md"]
    assert text.count("<details><summary><b>") == text.count("</b></summary>\n\n") == text.count("\n</details>\n")
    assert text.count("<details>") > 20


# ---- what is quoted --------------------------------------------------------------------------------------------------

def test_the_readmes_code_is_that_of_models() -> None:
    """Line by line, as it stands there, and in its order; `...` stands for lines that are left out."""
    source = Path(models.__file__).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        for part in re.split(r"^ *\.\.\.\n", block, flags=re.MULTILINE):
            assert source.count(part) == 1, part
    loop = [source.index(part) for part in re.split(r"^ *\.\.\.\n", blocks[2], flags=re.MULTILINE)]
    assert loop == sorted(loop)


@pytest.mark.parametrize("page", ["README.md", "docs/model.md"])
def test_each_equation_is_where_the_pages_say(page: str) -> None:
    """The code that a row names says the equation's number itself."""
    rows = re.findall(r"^\|[^|\n]*(?:equation|section)[^\n]*\|$", PAGES[page], re.MULTILINE)
    assert len(rows) >= 7
    for row in rows:
        cells = row.strip("|").split("|")
        sources = ""
        for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?|[a-z]+_\w+)`", cells[-1]):
            found = models
            for part in name.split("."):
                found = getattr(found, part)
            sources += inspect.getsource(found)
        numbers = re.findall(r"\d+", " ".join(re.findall(r"equations? \d+(?: (?:and|to) \d+)?", cells[0])))
        assert sources, row
        for number in numbers:
            assert re.search(rf"equations? (\d+ (and|to) )?{number}\b", sources), (number, row)


def test_the_readmes_figures_are_those_of_results() -> None:
    table = README[README.index("## Results"):README.index("## Where to go")]
    rows = [re.findall(r"\d+\.\d+(?: ± [\d.]+)?", row.replace("**", "")) for row in table.splitlines()
            if row.startswith("| ") and re.search(r"\d\.\d", row)]
    assert list(map(len, rows)) == [3, 3, 3, 2, 2]
    (box,) = re.findall(r"the model in the box: ([\d.]+), ([\d.]+), ([\d.]+) at beam 5", " ".join(table.split()))
    results = [row.replace("**", "") for row in PAGES["RESULTS.md"].splitlines() if row.startswith("|")]
    sources = ("here", "here", "here", "the paper, soft", "the paper, hard", "the model in the box")
    for figures, of in zip((*rows, box), sources, strict=True):
        assert any(all(f" {each} " in row for each in figures) for row in results if of == "here" or of in row), figures


def test_stored_captions_are_of_the_whole_split_and_their_logs_there() -> None:
    """What RESULTS.md says anyone can score again."""
    stored = sorted((REPOSITORY / "docs" / "results").glob("*_beam5.json"))
    assert len(stored) >= 8
    for path in stored:
        captions = json.loads(path.read_text(encoding="utf-8"))
        assert len({each["image_id"] for each in captions}) == len(captions) == 1000
        log = path.with_name(f"{path.name.removesuffix('_beam5.json')}.jsonl")
        assert path.name.startswith("ensemble") or all(
            {"stage", "epoch", "cider"} <= json.loads(line).keys() for line in log.read_text().splitlines())


def test_the_epochs_are_those_recorded() -> None:
    log = json.loads(img.draw.PHOTOS.read_text(encoding="utf-8"))["log"]
    text = PAGES["docs/trials.md"]
    part = text[text.index("### By epoch"):text.index("## The plain recipe")]
    rows = [[cell.strip() for cell in row.strip("|").split("|")]
            for row in re.findall(r"^\| [12], \d.*$", part, re.MULTILINE)]
    assert [row[0].split(", the")[0] for row in rows] == [f"{each['stage']}, {each['epoch']}" for each in log]
    for row, each in zip(rows, log, strict=True):
        for column, name, step in ((1, "train_loss", 1e-3), (2, "val_loss", 1e-3), (6, "bleu4", 0.1),
                                   (7, "bleu4_teacher_forced", 0.1)):
            assert float(row[column]) == pytest.approx(each[name], abs=0.51 * step), row
    last = log[-1]
    assert f"val loss {last['val_loss']:.3f} (" in PAGES["docs/training.md"]
    assert f"BLEU-4 {last['bleu4']:.2f} generated" in PAGES["docs/training.md"]


def test_the_trees_caption_is_the_recorded_one() -> None:
    record = json.loads(img.draw.RECORD.read_text(encoding="utf-8"))
    ends = [(log_prob, t, i) for t, level in enumerate(record["tree"])
            for i, (_, _, log_prob, fate) in enumerate(level) if fate == "ended"]
    best, last, place = max(ends)
    words = []
    for t in range(last, -1, -1):
        place, word, *_ = record["tree"][t][place]
        words.append(word)
    assert words.pop(0) == "<end>"
    assert [len(each) for each in record["alphas"]] == [8] * len(record["words"])
    said = f"*{' '.join(words[::-1])}* with \u2212{-best:.2f}"
    assert said in PAGES["docs/captions.md"].replace("\n", " ")


# ---- how it reads ----------------------------------------------------------------------------------------------------

def test_the_readme_takes_ten_minutes() -> None:
    assert 1500 < len(README.split()) < 2300


def test_the_first_screen_shows_all_three_commands() -> None:
    first = README.splitlines()[:30]
    for command in ("python caption.py --img", "make demo", "make test"):
        assert any(line.startswith(command) for line in first)
    targets = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert "\ndemo:" in targets
    assert "\ntest:" in targets


@pytest.mark.parametrize("page", ["RESULTS.md", "docs/trials.md"])
def test_a_cell_of_a_table_is_no_essay(page: str) -> None:
    cells = [cell for row in PAGES[page].splitlines() if row.startswith("|") for cell in row.split("|")]
    assert max(map(len, cells)) <= 240


def test_each_input_ends_in_its_shape() -> None:
    text = PAGES["docs/data.md"]
    for heading in ("Images", "Captions", "Lengths", "References"):
        part = re.search(rf"### {heading}\n(.*?)\n##", text, re.DOTALL)[1]
        assert len(re.findall(r"\*\*[^*]+\.\*\*", part)) == 1, heading


def test_every_photograph_shown_has_its_licence_and_its_caption() -> None:
    folder = REPOSITORY / "img" / "photographs"
    shown = sorted(path.name for path in folder.glob("*.jpg"))
    licences = re.findall(r"^\| (\S+\.jpg) \| .+ \| .*(?:CC|MIT).* \| .+ \|$", folder.with_suffix(".md").read_text(
        encoding="utf-8"), re.MULTILINE)
    said = json.loads((REPOSITORY / "img" / "photos.json").read_text(encoding="utf-8"))["photos"]
    assert shown == licences == list(said)
    assert [len(each["words"]) for each in said.values()] == [len(each["alphas"]) for each in said.values()]


def test_the_drawings_are_the_scripts(tmp_path: Path) -> None:
    img.draw.main(img.draw.get_parser().parse_args(["--out", str(tmp_path), "--dpi", "25"]))
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {(REPOSITORY / page).parent / path for page, _, path in PICTURES if page in OURS}
    assert {path.resolve() for path in shown} == {REPOSITORY / "img" / name for name in drawn}
    for name in drawn:
        with Image.open(tmp_path / name) as new, Image.open(REPOSITORY / "img" / name) as old:
            assert len(new.convert("RGB").getcolors(1 << 24)) > 20, f"{name} is empty"
            assert new.width / new.height == pytest.approx(old.width / old.height, rel=0.03), f"{name}: draw anew"
        assert (REPOSITORY / "img" / name).stat().st_size < 200_000
    assert all(len(description) > 20 for _, description, _ in PICTURES)
