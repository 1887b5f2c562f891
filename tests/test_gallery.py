"""Pictures of the gaze show where the model looked; the page is whole, runs nothing, and does what a reader expects."""
from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from caption import visualize_att
from drawing.page import html_figure, write_page
from drawing.panels import SCALE, draw_sheet, fit, panel, write_gif
from models import Caption

DRIVER = shutil.which("chromedriver") if shutil.which("chromium") or shutil.which("google-chrome") else None


def gaze(text: str, *places: tuple[int, int], n: int = 4, log_prob: float = -7.314, finished: bool = True,
         probabilities: tuple[float, ...] = ()) -> Caption:
    """A caption whose words look at these pixels (row, column) of an n x n map; those without one at the first. The
    model was sure of those without a probability."""
    words = text.split(" ")
    alphas = np.full((len(words) + 2, n, n), 0.2 / (n * n - 1), np.float32)
    for i in range(len(words)):
        alphas[1 + i][places[i] if i < len(places) else (0, 0)] = 0.8
    sure = [math.log(probabilities[i] if i < len(probabilities) else 1.0) for i in range(len(words) + finished)]
    sequence = list(range(len(words) + 1 + finished))
    return Caption(words, log_prob, finished, alphas[1:-1], sequence, sure, alphas[:len(sequence)])


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 200, 200))


def brightness(picture: Image.Image, n: int = 4) -> np.ndarray:
    """(n, n), of each cell's middle: what lies between the cells is smooth."""
    pixels = np.asarray(picture.convert("L")).astype(float)
    middles = [[(2 * i + 1) * side // (2 * n) for i in range(n)] for side in pixels.shape]
    return pixels[np.ix_(*middles)]


# ---- drawing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "fitted"), [((300, 200), (120, 80)), ((20, 30), (80, 120)), ((900, 2), (120, 1))])
def test_pictures_keep_their_shape(size: tuple[int, int], fitted: tuple[int, int], tmp_path: Path) -> None:
    grey(*size).save(tmp_path / "x.png")
    assert fit(tmp_path / "x.png", 120).size == fit(grey(*size), 120).size == fitted


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (500, 100)])
def test_panels_of_the_figure_keep_the_pictures_shape(size: tuple[int, int], tmp_path: Path) -> None:
    """And the weights cover all of it."""
    grey(*size).save(tmp_path / "x.png")
    figure = visualize_att(tmp_path / "x.png", [0, 1], np.ones((2, 4, 4)), {0: "<start>", 1: "a"})
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(size[0] / size[1], rel=0.02)
        assert box.width > 200 or box.height > 200
    assert len({tuple(image.get_extent()) for axes in figure.axes for image in axes.images}) == 1


@pytest.mark.parametrize("smooth", [True, False])
def test_a_panel_is_lit_where_the_model_looks(smooth: bool) -> None:
    alpha = gaze("a", (3, 1)).alphas[0]
    drawn = panel(grey(240, 160), ["a"], 0, alpha, smooth).crop((0, 0, 240, 160))
    cells = brightness(drawn)
    assert np.unravel_index(cells.argmax(), (4, 4)) == (3, 1)
    assert cells[3, 1] == pytest.approx(200, abs=3)
    assert cells[0, 3] < 0.25 * 200
    assert (len(set(np.asarray(drawn).ravel())) == 2) != smooth
    uniform = panel(grey(240, 160), ["a"], 0, np.full((4, 4), 1 / 16)).crop((0, 0, 240, 160))
    assert np.ptp(np.asarray(uniform)) == 0, "a gaze that is everywhere darkens nothing"


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_figure_and_panel_have_one_scale(smooth: bool, spread: float) -> None:
    """Of the same gaze the .png is as sharp as the .gif: both begin at 0, not at the lowest weight."""
    alpha = 1 - spread * (np.indices((4, 4)).sum(0) / 6) ** 0.5
    figure = visualize_att(grey(240, 240), [0, 1], [alpha, alpha / alpha.sum()], {0: "<start>", 1: "a"}, smooth)
    shade = figure.axes[1].images[1]
    assert np.ptp(shade.get_array()) == 0 and shade.cmap(shade.norm(0.0))[:3] == (0, 0, 0), "black, more or less opaque"
    in_figure = 200 * (1 - np.asarray(shade.get_alpha()))
    in_panel = np.asarray(panel(grey(240, 240), ["a"], 0, alpha, smooth).convert("L"))[:240, :240]
    middles = [(2 * i + 1) * 240 // 8 for i in range(4)], [(2 * i + 1) * len(in_figure) // 8 for i in range(4)]
    one, other = (each[np.ix_(at, at)].astype(float) for each, at in zip((in_panel, in_figure), middles, strict=True))
    assert np.abs(one - other).max() < (20 if smooth else 2)  # a Gaussian, as in the original, and a bicubic filter
    assert (np.ptp(in_figure) < 1) == (spread == 0), "an even gaze is even"
    if spread == 0.1:
        assert np.ptp(in_figure) < 20


def test_the_scale_is_said_with_each_picture(tmp_path: Path) -> None:
    figure = visualize_att(grey(90, 60), [0, 1], np.ones((2, 4, 4)), {0: "<start>", 1: "a"})
    assert figure.get_supxlabel() == SCALE
    write_page(tmp_path / "page.html", "x", {"": []})
    assert SCALE in Page(tmp_path / "page.html").text["p"][0]
    with open(tmp_path / "x.gif", "wb") as file:
        write_gif(file, grey(300, 150), gaze("a"))
    bare = panel(fit(grey(300, 150), 400), ["a"])
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 3
        for i in range(3):
            gif.seek(i)
            below = np.asarray(gif.convert("L"))[bare.height:]
            assert below.max() == 255 and 500 < (below < 220).sum() < below.size / 4, "pale letters"


def test_a_gif_goes_through_the_words(tmp_path: Path) -> None:
    caption = gaze("a dog runs", (0, 0), (2, 3), (3, 0))
    with open(tmp_path / "x.gif", "wb") as file:
        write_gif(file, grey(300, 150), caption)
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.n_frames, gif.info["loop"], gif.width) == (5, 0, 400)
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append((gif.info["duration"], gif.convert("RGB")))
    assert [duration for duration, _ in frames] == [1000, 700, 700, 700, 2000]
    looks = [brightness(frame.crop((0, 0, 400, 200))) for _, frame in frames]
    assert [np.unravel_index(look.argmax(), (4, 4)) for look in looks[1:4]] == [(0, 0), (2, 3), (3, 0)]
    assert min(look.min() for look in (looks[0], looks[4])) > 190, "first and last the picture as it is"
    written = [np.asarray(frame.crop((0, 200, 400, frame.height))).astype(int) for _, frame in frames]
    black = [int((text.max(2) < 60).sum()) for text in written]
    red = [int((text[..., 0] > text[..., 2] + 80).sum()) for text in written]
    assert black[0] == black[1] == 0 < black[2] < black[3] < black[4], "what was said is black"
    assert red[0] == red[4] == 0 < min(red[1:4])


def test_the_word_of_now_keeps_its_colour_among_a_gifs_256(tmp_path: Path) -> None:
    """Text alone has so few pixels that the picture's own colours took its place."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 160, (300, 400, 3), dtype=np.uint8))
    with open(tmp_path / "x.gif", "wb") as file:
        write_gif(file, noise, gaze("a dog runs", (0, 0), (2, 3), (3, 0)))
    with Image.open(tmp_path / "x.gif") as gif:
        for i in (1, 2, 3):
            gif.seek(i)
            text = np.asarray(gif.convert("RGB").crop((0, 300, 400, gif.height))).astype(int)
            assert (np.abs(text - (180, 68, 28)).max(-1) < 40).sum() > 100


@pytest.mark.parametrize("word", ["line\nbreak", "\ud800", "W" * 300, "naïve", ""])
@pytest.mark.parametrize("size", [(400, 2), (2, 400)])
def test_any_word_and_shape_can_be_drawn(word: str, size: tuple[int, int], tmp_path: Path) -> None:
    with open(tmp_path / "x.gif", "wb") as file:
        write_gif(file, grey(*size), gaze(f"a {word}"))
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 4


def test_words_wrap_and_none_is_lost() -> None:
    low, high = (panel(grey(200, 100), ["word"] * n, n) for n in (2, 40))
    assert high.width == low.width == 200
    ink = [int((np.asarray(each.convert("L")) < 100).sum()) for each in (low, high)]
    assert ink[1] == pytest.approx(20 * ink[0], rel=0.1)


def test_a_caption_without_words_can_be_drawn(tmp_path: Path) -> None:
    silent = Caption([], -1.0, True, np.zeros((0, 4, 4), np.float32), [0, 1], [-1.0], np.ones((2, 4, 4), np.float32))
    with open(tmp_path / "x.gif", "wb") as file:
        write_gif(file, grey(30, 20), silent)
    assert "<button" not in html_figure(grey(30, 20), "x", [silent])


def test_a_sheet_has_a_row_for_each_picture() -> None:
    sheet = draw_sheet([grey(256, 256)] * 2, [gaze("a dog", (0, 0), (3, 3)), gaze("a " * 29 + "a", (1, 2))], "epoch 1")
    width, height = panel(fit(grey(9, 9), 128), ["epoch 1"]).size
    assert sheet.size == (16 * width, 2 * height)

    def look(row: int, column: int) -> tuple[int, ...]:
        cell = sheet.crop((column * width, row * height, column * width + 128, row * height + 128))
        return tuple(int(i) for i in np.unravel_index(brightness(cell).argmax(), (4, 4)))

    assert [look(0, 1), look(0, 2), look(1, 1)] == [(0, 0), (3, 3), (1, 2)]


# ---- the page, as a file ---------------------------------------------------------------------------------------------

class Page(HTMLParser):
    """All elements with their attributes, and the text within each kind of element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self.open:
            self.text[self.open[-1]][-1] += text

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and kind in (None, found.get("class"))]


def decoded(uri: str | None) -> Image.Image:
    kind, _, content = str(uri).partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert kind == f"data:image/{str(picture.format).lower()}"
    return picture


def test_a_page_has_everything_in_it(tmp_path: Path) -> None:
    """Photographs of moderate size, words as buttons, each before its weights; other captions with their scores."""
    captions = [gaze("a dog runs", (0, 0), (2, 3), (3, 0), probabilities=(1.0, 0.426, 0.004)),
                gaze("dogs", (1, 1), log_prob=-9.5, finished=False, probabilities=(0.75,))]
    figures = [html_figure(grey(900, 600), "x.jpg", captions),
               html_figure(grey(100, 400), "y.jpg", captions[:1], "CIDEr 1.23", ["people wrote", "of it"])]
    write_page(tmp_path / "deep" / "page.html", "A title", {"": figures[:1], "Second": figures[1:]})
    page = Page(tmp_path / "deep" / "page.html")
    assert [decoded(each["src"]).size for each in page.all("img", "photo")] == [(512, 341), (128, 512)]
    assert [each["style"] for each in page.all("figure")] == ["--ratio: 512 / 341", "--ratio: 128 / 512"]
    assert page.text["button"] == ["a", "dog", "runs", "dogs", "a", "dog", "runs"]
    following = [after for (tag, _), after in zip(page.elements, page.elements[1:], strict=False) if tag == "button"]
    looks = [np.asarray(decoded(found["src"])) for _, found in following if found["class"] == "gaze"]
    assert {look.shape for look in looks} == {(4, 4)}
    assert [tuple(np.argwhere(look == 255)[0]) for look in looks[:4]] == [(0, 0), (2, 3), (3, 0), (1, 1)]
    assert {int(look.min()) for look in looks} == {int(255 * (0.2 + 0.8 * 0.2 / 15 / 0.8))}
    assert [each["aria-label"] for each in page.all("button")][:4] == [
        "a: looked at the top left, 100% sure", "dog: looked at the middle right, 43% sure",
        "runs: looked at the bottom left, 0% sure", "dogs: looked at the middle centre, 75% sure"]
    assert [each["title"] for each in page.all("button")][:4] == ["100% sure", "43% sure", "0% sure", "75% sure"]
    assert [each["style"] for each in page.all("button")][:4] == [
        f"--sure: {probability}" for probability in ("1.00", "0.43", "0.00", "0.75")]
    assert (page.text["h1"], page.text["h2"], page.text["title"]) == (["A title"], ["Second"], ["A title"])
    assert page.text["small"] == ["-9.50", "x.jpg · log-probability -7.31", "y.jpg · CIDEr 1.23"]
    assert page.text["summary"] == ["1 more"]
    assert page.text["li"][1:] == ["people wrote", "of it"]
    assert page.text["li"][0].endswith("… "), "a caption without an end is marked"
    assert (tmp_path / "deep" / "page.html").stat().st_size < 60_000


def assert_inert(path: Path) -> None:
    """No script, and nothing that a browser would fetch."""
    page = Page(path)
    assert {tag for tag, _ in page.elements} <= set(
        "html head meta title style body header h1 h2 p main section figure img figcaption button small ul ol li "
        "details summary".split())
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert all(str(each["src"]).startswith("data:image/") for each in page.all("img"))
    assert not names & {"href", "srcset", "action", "data", "poster", "background"}
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in page.text["style"][0]
    assert "@import" not in page.text["style"][0]


HOSTILE = ["<script>document.title='run'</script>", '"><img/src=x/onerror=document.title="run">', "</style>", "&lt;",
           "$title", "'onmouseover=alert(1)", "<!--", "\ud800", "${x}"]


def hostile_page(path: Path) -> None:
    """Words, file names, titles and references that would rather be markup."""
    figures = [html_figure(grey(30, 20), name, [gaze(" ".join(HOSTILE)), gaze(" ".join(HOSTILE))], name, HOSTILE)
               for name in HOSTILE]
    write_page(path, " ".join(HOSTILE), dict.fromkeys(HOSTILE, figures))


def test_words_and_names_are_no_markup(tmp_path: Path) -> None:
    hostile_page(tmp_path / "page.html")
    assert_inert(tmp_path / "page.html")
    page, readable = Page(tmp_path / "page.html"), [each.replace("\ud800", "?") for each in HOSTILE]
    assert page.text["button"] == readable * 2 * len(HOSTILE) ** 2
    assert page.text["h2"] == readable
    assert page.text["h1"] == page.text["title"] == [" ".join(readable)]
    assert [each["alt"] for each in page.all("img", "photo")] == readable * len(HOSTILE)


def test_pixels_may_be_shown_as_they_are(tmp_path: Path) -> None:
    for smooth, rendering in ((True, "auto"), (False, "pixelated")):
        write_page(tmp_path / "page.html", "x", {"": []}, smooth)
        assert f"image-rendering: {rendering};" in Page(tmp_path / "page.html").text["style"][0]


# ---- the page, in a browser ------------------------------------------------------------------------------------------

class Browser:
    """Headless Chromium, driven by the W3C's WebDriver protocol, which is JSON over HTTP."""

    ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,900",
                     "--force-prefers-reduced-motion"]
        wanted = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post("/session", capabilities={"alwaysMatch": wanted})
        self.address += f"/session/{session['sessionId']}"

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode() if body is not None else None,
                                         {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def post(self, path: str, **body: Any) -> Any:
        return self.send("POST", path, body)

    def run(self, script: str) -> Any:
        return self.post("/execute/sync", script=f"return {script}", args=[])

    def photo(self, i: int = 0) -> np.ndarray:
        """How bright the i-th photograph is, (4, 4), as it is seen."""
        self.run(f"document.querySelectorAll('.photo')[{i}].scrollIntoView()")
        element = self.post("/elements", using="css selector", value=".photo")[i][self.ELEMENT]
        picture = Image.open(io.BytesIO(base64.b64decode(self.send("GET", f"/element/{element}/screenshot"))))
        return brightness(picture)

    def act(self, kind: str, *actions: dict[str, Any]) -> None:
        self.post("/actions", actions=[{"type": kind, "id": kind, "actions": list(actions)}])

    def point_at(self, i: int) -> None:
        """Moves the mouse to the i-th button."""
        button = self.post("/elements", using="css selector", value="button")[i]
        self.act("pointer", {"type": "pointerMove", "origin": button, "x": 0, "y": 0, "duration": 0})

    def press(self, key: str) -> None:
        self.act("key", {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key})


TAB, ENTER = "\ue004", "\ue007"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if DRIVER is None:
        pytest.skip("needs Chromium and its driver (Debian: apt install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env={**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("browser"))})
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        opened = Browser(port)
        yield opened
        opened.send("DELETE", "")
    finally:
        driver.kill()
        driver.wait()


def brightest(cells: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(cells.argmax(), cells.shape))


def test_pointing_at_a_word_lights_the_picture(browser: Browser, tmp_path: Path) -> None:
    captions = [gaze("a dog runs", (0, 0), (2, 3), (3, 0)), gaze("dogs", (1, 1))]
    figures = [html_figure(grey(300, 200), f"{i}.jpg", captions) for i in range(3)]
    write_page(tmp_path / "page.html", "x", {"": figures})
    browser.post("/url", url=(tmp_path / "page.html").as_uri())
    assert browser.send("POST", "/se/log", {"type": "browser"}) == [], "the console says nothing"
    assert browser.run("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
    assert np.ptp(browser.photo()) < 3
    for i, look in enumerate([(0, 0), (2, 3), (3, 0)]):
        browser.point_at(i)
        cells = browser.photo()
        assert brightest(cells) == look
        assert cells.max() == pytest.approx(200, abs=10), "the photograph shows through"
        assert np.median(cells) < 60
    assert np.ptp(browser.photo(1)) < 3, "the other pictures stay as they are"

    browser.run("document.activeElement.blur()")
    browser.act("pointer", {"type": "pointerMove", "origin": "viewport", "x": 1, "y": 1, "duration": 0})
    assert np.ptp(browser.photo()) < 3
    browser.press(TAB)
    browser.press(TAB)
    assert browser.run("document.activeElement.textContent") == "dog"
    assert brightest(browser.photo()) == (2, 3)
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.point_at(2)
    assert brightest(browser.photo()) == (3, 0), "pointing at a word goes before the one that has the focus"
    browser.press(TAB)
    browser.press(TAB)
    browser.press(ENTER)
    assert browser.run("document.querySelector('details').open")
    browser.act("pointer", {"type": "pointerMove", "origin": "viewport", "x": 1, "y": 1, "duration": 0})
    browser.press(TAB)
    assert brightest(browser.photo()) == (1, 1), "words of the other captions too"


def test_words_are_underlined_the_more_the_less_sure_the_model_was(browser: Browser, tmp_path: Path) -> None:
    """From 80 % on not at all."""
    probabilities = (1.0, 0.8, 0.6, 0.2, 0.0)
    caption = gaze("a dog runs so fast", probabilities=(*probabilities[:-1], 1e-9))
    write_page(tmp_path / "page.html", "x", {"": [html_figure(grey(300, 200), "x.jpg", [caption])]})
    browser.post("/url", url=(tmp_path / "page.html").as_uri())
    styles = browser.run("""[...document.querySelectorAll('button')].map(each => {
        const style = getComputedStyle(each)
        return [style.textDecorationLine, style.textDecorationColor] })""")
    assert [line for line, _ in styles] == ["underline"] * 5
    found = [re.search(r"/ ([0-9.]+)\)", color) for _, color in styles]
    opacities = [float(each[1]) if each else 1.0 for each in found]  # of what is opaque it is not written
    assert opacities == pytest.approx([max(0.0, 1 - 1.25 * each) for each in probabilities], abs=0.01)


def test_a_page_fits_a_phone_and_the_dark(browser: Browser, tmp_path: Path) -> None:
    figures = [html_figure(grey(*size), "x" * 90, [gaze("a " * 30 + "W" * 80)]) for size in ((300, 200), (40, 900))]
    write_page(tmp_path / "page.html", "x", {"": figures, "one": figures[:1]})
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.post("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=scheme)
    browser.post("/url", url=(tmp_path / "page.html").as_uri())
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 21, 19)"
    box = "document.querySelectorAll('.photo')[1].getBoundingClientRect()"
    assert browser.run(f"{box}.height <= innerHeight && {box}.height > 20 * {box}.width")
    boxes = browser.run("""[...document.querySelectorAll('figure')].map(figure =>
        [...figure.querySelectorAll('.photo, .gaze')].map(image => {
            const box = image.getBoundingClientRect()
            return [box.x, box.y, box.width, box.height] }))""")
    for of_figure in boxes:
        assert np.allclose(of_figure, of_figure[0], atol=0.5), "weights lie on their photograph"
    browser.post("/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})
    browser.post("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": []})


@pytest.mark.parametrize("size", [(300, 400), (300, 533), (400, 300), (300, 300)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_sentence_is_in_sight_of_its_photograph(size: tuple[int, int], count: int, browser: Browser,
                                                  tmp_path: Path) -> None:
    """Both whole, on a small laptop, without scrolling; a portrait has it at its side where there is room."""
    figures = [html_figure(grey(*size), "x.jpg", [gaze("a man in a red coat is looking through a camera")])] * count
    write_page(tmp_path / "page.html", "x", {"": figures})
    screen = {"width": 1280, "height": 720, "deviceScaleFactor": 1, "mobile": False}
    browser.post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=screen)
    browser.post("/url", url=(tmp_path / "page.html").as_uri())
    photo, sentence = (browser.run(f"(box => [box.left, box.top, box.right, box.bottom])"
                                   f"(document.querySelector('{each}').getBoundingClientRect())")
                       for each in (".photo", ".caption"))
    assert max(photo[3], sentence[3]) <= 720 and photo[3] - photo[1] > 200
    beside = sentence[0] >= photo[2] and sentence[1] < photo[3]
    assert beside == (count == 1 and size != (400, 300))
    assert beside or sentence[1] >= photo[3]
    browser.post("/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})


def test_a_hostile_page_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    hostile_page(tmp_path / "page.html")
    browser.post("/url", url=(tmp_path / "page.html").as_uri())
    assert browser.send("GET", "/title").startswith("<script>document.title='run'</script>")
    assert browser.run("document.scripts.length") == 0
