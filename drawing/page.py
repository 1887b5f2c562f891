"""A page of captioned pictures that needs no other file: point at a word, and see where the model looked."""
from __future__ import annotations

import base64
import io
import math
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import AnyPicture
from drawing.panels import SCALE, fit, light
from models import Caption
from safety.files import atomic_write

PAGES = {".html", ".htm"}
TEMPLATE, STYLE = (Path(__file__).with_name(name) for name in ("page.html", "page.css"))  # an editor knows such files


def html_figure(image: AnyPicture, name: str, captions: Sequence[Caption], note: str = "",
                references: Sequence[str] = ()) -> str:
    """A picture of the page, its best caption, the others on demand, and what people wrote."""
    picture, (best, *others) = fit(image, 512), captions
    more = written = ""
    if others:
        rows = "".join(f"<li>{html_words(each)} <small>{each.log_prob:.2f}</small></li>" for each in others)
        more = f'<details><summary>{len(others)} more</summary><ol start="2">{rows}</ol></details>'
    if references:
        rows = "".join(f"<li>{escape(each)}</li>" for each in references)
        written = f'<ul class="people" aria-label="people wrote">{rows}</ul>'
    note = escape(note or f"log-probability {best.log_prob:.2f}")
    return f"""<figure style="--ratio: {picture.width} / {picture.height}" aria-label="{escape(' '.join(best.words))}">
<img class="photo" src="{data_uri(picture, "JPEG")}" alt="{escape(name)}">
<figcaption><p class="caption">{html_words(best)}</p>{more}{written}<small>{escape(name)} &middot; {note}</small>
</figcaption></figure>"""


def html_words(caption: Caption) -> str:
    """Words as buttons, each followed by the picture of its weights, which the page's style shows and hides. A word
    that the model was unsure of is underlined."""
    words = [f'<button type="button" style="--sure: {math.exp(log_prob):.2f}" title="{math.exp(log_prob):.0%} sure" '
             f'aria-label="{escape(word)}: {whereabouts(alpha)}, {math.exp(log_prob):.0%} sure">{escape(word)}</button>'
             f'<img class="gaze" src="{data_uri(light(alpha), "PNG")}" alt="">'
             for word, alpha, log_prob in zip(caption.words, caption.alphas, caption.word_log_probs, strict=False)]
    return " ".join(words) + ("" if caption.finished else " &hellip;")


def whereabouts(alpha: np.ndarray) -> str:
    """Where the highest weight is, in words."""
    highest = np.unravel_index(alpha.argmax(), alpha.shape)
    row, column = ((6 * i + 3) // (2 * n) for i, n in zip(highest, alpha.shape, strict=True))  # by a pixel's middle
    return f"looked at the {('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"


def data_uri(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def page_style(smooth: bool = True) -> str:
    """What makes a page of such figures, in CSS; `:root` and `body` are the page itself."""
    return string.Template(STYLE.read_text(encoding="utf-8")).substitute(rendering="auto" if smooth else "pixelated")


def write_page(path: str | Path, title: str, sections: Mapping[str, Sequence[str]], smooth: bool = True) -> None:
    """One page that needs no other file: sections, by heading ("" for none), of what `html_figure` returns."""
    body = [line for heading, figures in sections.items()
            for line in (f"<h2>{escape(heading)}</h2>" if heading else "", "<section>", *figures, "</section>")]
    page = string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), body="\n".join(body), scale=escape(SCALE), style=page_style(smooth))
    with atomic_write(path, "wb") as file:
        file.write(page.encode("utf-8", "replace"))  # a file's name may hold what is no letter
