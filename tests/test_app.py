"""The page that captions: what its controls do, and in a browser what a reader sees; nothing leaves the machine."""
from __future__ import annotations

import base64
import re
import socket
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from conftest import ENCODER
from PIL import Image
from test_gallery import TAB, Browser, browser, decoded  # noqa: F401 (a fixture)
from torch import nn

import demo.app
from caption import Captioner, Search
from datasets import encode, read_image
from demo.app import DRAWN, SEARCHED, answer, page, search_of
from models import build
from safety.errors import UsageError

SAID = ["a dog runs in the <b>", "red cat sits"]
WORDS = {word: i for i, word in enumerate(["<pad>", *" ".join(SAID).split(), "<unk>", "<start>", "<end>"])}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of noise, which even an encoder with random weights tells apart."""
    paths = [tmp_path_factory.mktemp("pictures") / name for name in ("one.png", "other.png")]
    for i, path in enumerate(paths):
        noise = np.random.default_rng(i).integers(0, 256, (6, 8 + 4 * i, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40 * (2 + i), 60), Image.Resampling.NEAREST).save(path)
    return paths


def taught(pictures: list[Path], said: list[str]) -> Captioner:
    """A tiny model that looks at random, but narrowly, and learns in a second to say these sentences."""
    torch.manual_seed(0)
    encoder, decoder = build({"encoder": ENCODER, "encoded_image_size": 4, "attention_dim": 8, "embed_dim": 8,
                              "decoder_dim": 16, "vocab_size": len(WORDS), "dropout": 0.0})
    features = encode(encoder, decoder, torch.from_numpy(np.stack([read_image(path) for path in pictures])),
                      torch.device("cpu")).detach()
    with torch.no_grad():
        decoder.attention.encoder_att.weight.normal_().div_(features.std())     # of random weights it is 1e-8
        decoder.init_h.weight.normal_().div_(features.std() * 10)
        decoder.attention.full_att.weight.fill_(2)
    ids = [[WORDS[word] for word in ["<start>", *each.split(), "<end>"]] for each in said]
    captions = nn.utils.rnn.pad_sequence([torch.tensor(each) for each in ids], batch_first=True)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.03)
    for _ in range(60):
        scores, wanted, lengths, *_ = decoder(features, captions, torch.tensor([[len(each)] for each in ids]))
        loss = sum(nn.functional.cross_entropy(of[:n], right[1:n + 1])
                   for of, right, n in zip(scores, wanted, lengths, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Captioner(encoder.eval(), decoder.eval(), WORDS)


@pytest.fixture(scope="module")
def model(pictures: list[Path]) -> Captioner:
    return taught(pictures, SAID)


def words_of(html: str) -> list[str]:
    """The words of the best caption."""
    return [unescape(each) for each in re.findall(r">([^<]*)</button>", html.partition("</p>")[0])]


# ---- what the page says ----------------------------------------------------------------------------------------------

def test_a_picture_in_and_captions_out(model: Captioner, pictures: list[Path]) -> None:
    html = answer({"x": model}, str(pictures[0]), Search(n_best=5))
    assert " ".join(words_of(html)) in SAID
    assert html.count("<figure") == 1 and "<h2>" not in html and "one.png &middot; log-probability -" in html
    assert "<summary>4 more</summary>" in html and "<details open>" in html
    assert len(re.findall(r"<small>-\d+\.\d\d</small>", html)) == 4
    assert re.search(r'style="--sure: [01]\.\d\d" title="\d+% sure"', html)
    assert decoded(re.search(r'class="photo" src="([^"]*)"', html)[1]).size == (512, 384)
    assert "&lt;b&gt;</button>" in html and "<b>" not in html, "a word is no markup"


def test_several_models_stand_side_by_side(model: Captioner, pictures: list[Path]) -> None:
    html = answer({"one<i>": model, "other": taught(pictures, ["dog sits"] * 2)}, str(pictures[0]), Search())
    assert re.findall("<h2>(.*?)</h2>", html) == ["one&lt;i&gt;", "other"]
    first, second = (words_of(figure) for figure in html.split("<figure")[1:])
    assert " ".join(first) in SAID and second == ["dog", "sits"]


@pytest.mark.parametrize(("name", "content"), [
    ("text.jpg", b"no picture"), ("empty.png", b""), ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ("<img src=x>.png", b"\x89PNG\r\n\x1a\n")])
def test_what_is_no_picture_is_refused_in_one_line(name: str, content: bytes, model: Captioner, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    html = answer({"x": model}, str(tmp_path / name), Search())
    assert re.fullmatch(r'<p role="alert">[^<>\n]*: this picture cannot be read \([^<>\n]*\); replace it[^<>\n]*</p>',
                        html)
    assert str(tmp_path) not in html, "where Gradio put it is nothing that the user knows"


def test_without_a_picture_nothing_is_said(model: Captioner) -> None:
    assert answer({"x": model}, None, Search()) == ""


def test_a_picture_of_one_colour_is_said_to_be_one(model: Captioner, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / "black.png")
    assert "black.png &middot; all of one colour" in answer({"x": model}, str(tmp_path / "black.png"), Search())


def test_controls_are_settings_of_the_search() -> None:
    assert search_of(SEARCHED, 7, 0.5, 3, 1.5) == Search(beam_size=7, n_best=7, length_penalty=0.5)
    assert search_of(DRAWN, 7, 0.5, 3, 1.5) == Search(sample=3, temperature=1.5)
    for how in (SEARCHED, DRAWN):
        assert search_of(how, 1, 2, 20, 0.1).checked()
        assert search_of(how, 20.0, 0, 1.0, 2).checked(), "JSON knows no whole numbers"


# ---- the page itself -------------------------------------------------------------------------------------------------

def test_each_control_has_an_effect(model: Captioner, pictures: list[Path]) -> None:
    """Of all that Gradio calls on a change."""
    pytest.importorskip("gradio")
    blocks = page({"x": model})
    function, shown = (each.fn for each in blocks.fns.values())
    path = str(pictures[0])
    at_first = function(path, SEARCHED, 5, 0, 5, 1)
    assert at_first == answer({"x": model}, path, Search(n_best=5))
    assert function(path, SEARCHED, 2, 0, 5, 1).count("<li>") == 1
    assert len(words_of(function(path, SEARCHED, 5, 2, 5, 1))) > len(words_of(at_first))
    torch.manual_seed(0)
    said = [[" ".join(words_of(function(path, DRAWN, 5, 0, 1, each))) for _ in range(5)] for each in (0.1, 2)]
    assert set(said[0]) <= set(SAID) and len(set(said[1])) > 2, "each time anew, and odder the hotter"
    assert function(path, DRAWN, 5, 0, 3, 1).count("<li>") == 2
    assert [each["visible"] for how in (SEARCHED, DRAWN) for each in shown(how)] == [True, False, False, True]


def test_a_number_that_is_being_typed_is_no_error(model: Captioner) -> None:
    """The 0 of 0.5 is below the lowest temperature, and Gradio would say so."""
    gradio = pytest.importorskip("gradio")
    sliders = [each for each in page({"x": model}).blocks.values() if isinstance(each, gradio.Slider)]
    assert [[each.preprocess(value) for value in (-1, 1.5, 1000)] for each in sliders] == [
        [1, 1.5, 20], [0, 1.5, 2], [1, 1.5, 20], [0.1, 1.5, 2]]


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, command: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("demo.app.is_there", lambda name: name != "gradio")
    status, shown = command(demo.app, "--model", tmp_path / "none.pth.tar")
    assert status == 1 and shown.count("\n") == 1
    assert "pip install -r demo/app_requirements.txt" in shown
    assert "gradio" in (Path(demo.app.__file__).parent / "app_requirements.txt").read_text()


@pytest.fixture(scope="module")
def served(model: Captioner) -> Iterator[tuple[str, set[Any]]]:
    """The page's address, and all addresses that this process asked for."""
    pytest.importorskip("gradio")
    asked, connect, look_up = set(), socket.socket.connect, socket.getaddrinfo
    blocks = page({"x": model})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda self, to: (asked.add(to[0]), connect(self, to))[1])
        patch.setattr(socket, "getaddrinfo", lambda host, *more, **named: (asked.add(host), look_up(
            host, *more, **named))[1])
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("no_proxy", "")
            environment.setenv("http_proxy", "http://192.0.2.1:9")  # an address of nobody's
            address = demo.app.launch(blocks, None)
        yield address, asked
    blocks.close(verbose=False)


def test_only_this_machine_is_asked_and_answered(served: tuple[str, set[Any]]) -> None:
    address, asked = served
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    assert asked <= {"127.0.0.1", b"127.0.0.1"}
    with pytest.raises(UsageError, match=r"--port .*another"):
        demo.app.launch(page({}), int(address.rstrip("/").rpartition(":")[2]))


def wait_for(browser: Browser, script: str) -> None:  # noqa: F811
    for _ in range(200):
        if browser.run(script):
            return
        time.sleep(0.1)
    raise AssertionError(script)


def give(browser: Browser, path: Path) -> None:  # noqa: F811
    field = browser.post("/elements", using="css selector", value="input[type=file]")[0][Browser.ELEMENT]
    browser.post(f"/element/{field}/value", text=str(path))


def open_page(browser: Browser, address: str) -> None:  # noqa: F811
    browser.post("/url", url=address)
    wait_for(browser, "document.querySelector('input[type=file]')")


def words_shown(browser: Browser) -> list[str]:  # noqa: F811
    return browser.run("[...document.querySelectorAll('.caption button')].map(each => each.textContent)")


def test_a_picture_a_caption_a_word_and_another_picture(
        browser: Browser, served: tuple[str, set[Any]], model: Captioner, pictures: list[Path],  # noqa: F811
        tmp_path: Path) -> None:
    open_page(browser, served[0])
    give(browser, pictures[0])
    wait_for(browser, "document.querySelector('figure')")
    expected = answer({"x": model}, str(pictures[0]), Search(n_best=5))
    assert words_shown(browser) == words_of(expected)
    lights = np.asarray(decoded(re.findall(r'class="gaze" src="([^"]*)"', expected)[1]))
    before = browser.photo()
    word = browser.post("/elements", using="css selector", value=".caption button")[1]
    browser.act("pointer", {"type": "pointerMove", "origin": word, "x": 0, "y": 0, "duration": 0})
    ratio = browser.photo() / before
    assert np.abs(ratio - lights / 255).max() < 0.1 and ratio.max() > 0.9 and ratio.min() < 0.3
    browser.act("pointer", {"type": "pointerMove", "origin": "viewport", "x": 1, "y": 1, "duration": 0})
    assert np.abs(browser.photo() - before).max() < 2
    browser.run("document.querySelectorAll('.caption button')[0].focus()")
    browser.press(TAB)
    assert browser.run("document.activeElement == document.querySelectorAll('.caption button')[1]")
    assert browser.run("getComputedStyle(document.activeElement.nextElementSibling).opacity") == "1"

    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    tops = browser.run("['input[type=file]', '.photo', 'input[type=radio]'].map(each => "
                       "document.querySelector(each).getBoundingClientRect().top)")
    assert tops == sorted(tops), "on a phone the controls come last"
    browser.post("/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})

    photo = browser.run("document.querySelector('.photo').src")
    (tmp_path / "text.png").write_text("no picture")
    for path, shown in ((tmp_path / "text.png", "[role=alert]"), (pictures[1], "figure")):
        browser.run("document.querySelector('[aria-label=\"Remove Image\"], [aria-label=Clear]').click()")
        wait_for(browser, "!document.querySelector('figure, [role=alert]')")
        wait_for(browser, "document.querySelector('input[type=file]')")
        give(browser, path)
        wait_for(browser, f"document.querySelector('{shown}')")
    assert browser.run("document.querySelector('.photo').src") != photo
    assert browser.run("document.querySelector('.photo').alt") == "other.png"
    browser.run("document.querySelectorAll('input[type=radio]')[1].click()")
    wait_for(browser, "[...document.querySelectorAll('button')].some(each => each.textContent.includes('Draw again'))")

    fetched = browser.run("performance.getEntriesByType('resource').map(each => each.name)")
    assert len(fetched) > 10
    assert {each for each in fetched if not each.startswith((served[0], "data:"))} == set()
    outside = browser.run("[...document.querySelectorAll('[src], link[href]')].map(each => each.src || each.href)")
    assert {each for each in outside if not each.startswith((served[0], "data:"))} == set()
    assert served[1] <= {"127.0.0.1", b"127.0.0.1"}


def wait_for_caption(browser: Browser, model: Captioner, path: Path) -> None:  # noqa: F811
    expected = answer({"x": model}, str(path), Search(n_best=5))
    photo = re.search(r'class="photo" src="([^"]*)"', expected)[1]
    wait_for(browser, f"document.querySelector('.photo')?.src == '{photo}'")
    assert words_shown(browser) == words_of(expected)


def button(text: str) -> str:
    return (f"[...document.querySelectorAll('#page button')].find(each => each.offsetWidth && "
            f"(each.ariaLabel || each.textContent).includes('{text}'))")


def test_pictures_are_pasted(browser: Browser, served: tuple[str, set[Any]], model: Captioner,  # noqa: F811
                             pictures: list[Path]) -> None:
    """With Ctrl-V, whichever way of giving a picture is selected, and with the button; also where there is one."""
    browser.post("/goog/cdp/execute", cmd="Browser.grantPermissions", params={
        "origin": served[0].rstrip("/"), "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    open_page(browser, served[0])
    control, v = ({"value": key} for key in ("\ue009", "v"))
    for i, way in enumerate(("Upload file", "Capture from camera", "Paste from clipboard", "Ctrl-V")):
        content = base64.b64encode(pictures[i % 2].read_bytes()).decode()
        copied = browser.post("/execute/async", args=[content], script="""
            const [content, done] = arguments
            fetch('data:image/png;base64,' + content).then(each => each.blob()).then(each =>
                navigator.clipboard.write([new ClipboardItem({'image/png': each})])).then(() => done(''), done)""")
        assert copied == ""
        if way != "Ctrl-V":
            browser.run(f"{button(way)}.click()")
        if way != "Paste from clipboard":
            browser.act("key", *({"type": "keyDown", **key} for key in (control, v)),
                        *({"type": "keyUp", **key} for key in (v, control)))
        wait_for_caption(browser, model, pictures[i % 2])


def test_pictures_are_dropped_anywhere(browser: Browser, served: tuple[str, set[Any]], model: Captioner,  # noqa: F811
                                       pictures: list[Path], tmp_path: Path) -> None:
    """On another picture and beside the field, too; what is no picture is refused."""
    open_page(browser, served[0])
    (tmp_path / "notes.txt").write_text("no picture")

    def drop(path: Path, selector: str) -> None:
        x, y = browser.run(f"(box => [box.left + 9, box.top + 9])"
                           f"(document.querySelector('{selector}').getBoundingClientRect())")
        for kind in ("dragEnter", "dragOver", "drop"):
            browser.post("/goog/cdp/execute", cmd="Input.dispatchDragEvent", params={
                "type": kind, "x": x, "y": y, "data": {"items": [], "files": [str(path)], "dragOperationsMask": 1}})

    at_first = "getComputedStyle(document.querySelector('#page .block')).borderColor"
    colour = browser.run(at_first)
    for i, selector in enumerate(("#page button", "#page .block img", "h1")):
        drop(pictures[i % 2], selector)
        wait_for_caption(browser, model, pictures[i % 2])
    assert browser.run(at_first) == colour, "nothing is being dragged"
    drop(tmp_path / "notes.txt", "h1")
    wait_for(browser, "document.querySelector('.toast-body')?.innerText.includes('notes.txt')")


class WithCamera(Browser):
    """Its camera shows Chromium's test pattern, and nobody has to allow its use."""

    def post(self, path: str, **body: Any) -> Any:
        if path == "/session":
            body["capabilities"]["alwaysMatch"]["goog:chromeOptions"]["args"] += [
                "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        return super().post(path, **body)


def test_a_picture_is_shot(browser: Browser, served: tuple[str, set[Any]]) -> None:  # noqa: F811
    camera = WithCamera(urlsplit(browser.address).port)
    try:
        open_page(camera, served[0])
        for each in ("Capture from camera", "Webcam"):
            wait_for(camera, button(each))
            camera.run(f"{button(each)}.click()")
        wait_for(camera, "document.querySelector('video')?.videoWidth && " + button("capture photo"))
        seen = camera.run("""(canvas => {
            canvas.getContext('2d').drawImage(document.querySelector('video'), 0, 0, canvas.width, canvas.height)
            return canvas.toDataURL() })(document.createElement('canvas'))""")
        camera.run(f"{button('capture photo')}.click()")
        wait_for(camera, "document.querySelectorAll('.caption button').length")
        shot = camera.run("document.querySelector('.photo').src")
        colours = [np.asarray(decoded(each).convert("RGB")).mean((0, 1)) for each in (seen, shot)]
        assert np.abs(colours[0] - colours[1]).max() < 40 < colours[0].max()
    finally:
        camera.send("DELETE", "")


def test_the_keyboard_shows_where_it_is(browser: Browser, served: tuple[str, set[Any]],  # noqa: F811
                                        pictures: list[Path]) -> None:
    open_page(browser, served[0])
    give(browser, pictures[0])
    wait_for(browser, "document.querySelector('figure')")
    outlined = {}
    for _ in range(100):  # once round the page, which has fewer
        browser.press(TAB)
        tag, kind, name, seen = browser.run("""(each => [each.tagName, each.type, each.ariaLabel || each.textContent,
            getComputedStyle(each).outlineStyle != 'none' || getComputedStyle(each).boxShadow != 'none'])(
            document.activeElement)""")
        if tag == "BODY":
            break
        outlined[tag, kind, name] = seen
    assert tag == "BODY"
    assert {kind for _, kind, _ in outlined} >= {"submit", "button", "radio", "number", "range"}
    assert [each for each, seen in outlined.items() if not seen] == []


def test_two_models_are_side_by_side_on_a_laptop_and_one_below_the_other_on_a_phone(
        browser: Browser, model: Captioner, pictures: list[Path]) -> None:  # noqa: F811
    pytest.importorskip("gradio")
    blocks = page({"one": model, "other": model})
    try:
        open_page(browser, demo.app.launch(blocks, None))
        give(browser, pictures[0])
        wait_for(browser, "document.querySelectorAll('figure').length == 2")
        for width in (1200, 375):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 400}
            browser.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
            (one, other), widths = browser.run("""['top', 'width'].map(side => [...document.querySelectorAll('figure')]
                .map(each => each.getBoundingClientRect()[side]))""")
            assert (one == other) == (width == 1200) and min(widths) > 280
            assert browser.run("document.documentElement.scrollWidth") == width
    finally:
        browser.post("/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})
        blocks.close(verbose=False)
