"""A page in your browser: show it a picture, read what the model says, and point at a word to see where it looked.

    pip install -r requirements.txt -r demo/app_requirements.txt
    python demo/app.py                                      # the model that caption.py takes
    python demo/app.py --model one.pth.tar other.pth.tar    # what each of them says, side by side

It is served to this machine alone and fetches nothing from elsewhere; pictures shown to it are deleted when it ends.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # where the scripts are; was this folder, whose demo.py would hide the folder demo

from caption import Captioner, Search, caption_read, load, try_to_read  # noqa: E402
from drawing import is_there  # noqa: E402
from drawing.page import html_figure, page_style  # noqa: E402
from drawing.panels import SCALE, fit  # noqa: E402
from safety.errors import InputError, UsageError, run_script  # noqa: E402
from safety.flags import integer  # noqa: E402
from safety.pictures import is_one_colour  # noqa: E402
from utils import add_device_flags  # noqa: E402

if TYPE_CHECKING:
    import gradio as gr

ADDRESS = "127.0.0.1"  # which no other machine can reach
TITLE = "Show, Attend and Tell"
HINT = ("Drop a picture, paste one (Ctrl-V) or take one. Then point at a word of the caption, tap on it, or move to it "
        f"with the Tab key. {SCALE} The deeper a word's colour, the less sure of it the model was.")
BESIDE = " Each model captions by itself; `caption.py --model`, given the same files, finds one caption together."
SEARCHED, DRAWN = "searched for", "drawn at random"

# The figures' own style, for a part of the page: Gradio nests it in a rule for that part, which is & there.
STYLE = page_style().replace(":root", "&").replace("body", "&") + """
& { padding: 0; max-width: none; background: none; }
section { margin: 0; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
h2 { margin: 0 0 .6rem; font-size: .9rem; }
button { background: rgb(from var(--accent) r g b / calc(.5 * (1 - var(--sure)))); }
"""
# Beside the picture, with the controls below it, the result; on a narrow screen the result before the controls.
LAYOUT = """
#page { display: grid; gap: 1.5rem 2rem; grid-template: "picture result" auto "controls result" 1fr / 20rem 1fr; }
#page > :nth-child(1) { grid-area: picture; } #page > :nth-child(2) { grid-area: result; }
#page > :nth-child(3) { grid-area: controls; } #page .html-container { padding: 0; }
#page :is([type=radio], [type=range]):focus-visible { outline: 2px solid; outline-offset: 2px; }
@media (max-width: 50rem) { #page { grid-template: "picture" "result" "controls" / minmax(0, 1fr); } }
"""
# Files that are pasted, or dropped anywhere, are given to the field for chosen ones: Gradio knows no Ctrl-V, and loses
# a picture that is dropped on another. The field is there only while "Upload file" is selected.
SCRIPT = """<script>
for (const kind of ["dragover", "drop", "paste"]) addEventListener(kind, event => {
  const files = (event.dataTransfer ?? event.clipboardData).files
  if (kind == "dragover" || files.length) event.preventDefault()
  if (!files.length) return
  event.stopPropagation()
  document.querySelector("[aria-label='Upload file']").click()
  setTimeout(() => {
    const field = document.querySelector("input[type=file]")
    field.files = files
    for (const kind of ["dragleave", "change"]) field.dispatchEvent(new Event(kind, {bubbles: true}))
  })
}, true)
</script>"""


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "-m", nargs="+", metavar="FILE", default=[None],
                        help="checkpoints, whose captions stand side by side (default: as caption.py's)")
    parser.add_argument("--port", type=integer(1, 65535), metavar="N", help="(default: the first free from 7860 on)")
    add_device_flags(parser.add_argument)
    return parser


def answer(captioners: Mapping[str, Captioner], path: str | None, search: Search) -> str:
    """What each model says of a picture, as HTML; of a file that is no picture, in one line why not."""
    if path is None:
        return ""
    pixels, name = try_to_read(path), Path(path).name
    if isinstance(pixels, InputError):
        return f'<p role="alert">{escape(str(pixels).replace(path, name))}</p>'  # the user knows nothing of its folder
    note = "all of one colour: what is said of it means nothing" if is_one_colour(pixels) else ""
    picture = fit(path, 512)  # once for all models, as large files take long
    figures = {of: html_figure(picture, name, *caption_read(captioner, [pixels], search), note)
               for of, captioner in captioners.items()}
    if len(figures) > 1:
        figures = {of: f"<div><h2>{escape(of)}</h2>{figure}</div>" for of, figure in figures.items()}
    # The other captions are open: a change of a control would close them.
    return f"<section>{''.join(figures.values())}</section>".replace("<details>", "<details open>")


def search_of(how: str, beam_size: int, length_penalty: float, sample: int, temperature: float) -> Search:
    """The page's controls as a search, of which all captions are shown."""
    if how == DRAWN:
        return Search(sample=int(sample), temperature=temperature)
    return Search(beam_size=int(beam_size), n_best=int(beam_size), length_penalty=length_penalty)


def page(captioners: Mapping[str, Captioner]) -> gr.Blocks:
    """The page, whose captions are found anew after each change of the picture or of a control."""
    import gradio as gr  # not at the top: without it, the command says in one line what to install
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(86400, 86400)) as blocks:
        gr.Markdown(f"# {TITLE}\n{HINT}{BESIDE * (len(captioners) > 1)}")
        with gr.Row(elem_id="page"):
            with gr.Column():
                picture = gr.Image(type="filepath", label="Picture", height="16rem", buttons=[])
                picture.preprocess = lambda file: file and file.path  # not Gradio's own reader, and its errors
            with gr.Column():
                result = gr.HTML(css_template=STYLE, apply_default_css=False)
            with gr.Column():
                how = gr.Radio([SEARCHED, DRAWN], value=SEARCHED, label="Captions are")
                with gr.Group() as searched:
                    beam_size = gr.Slider(1, 20, 5, step=1, label="Beam size (1: greedy)")
                    penalty = gr.Slider(0, 2, 0, step=0.1, label="Length penalty")
                with gr.Group(visible=False) as drawn:
                    number = gr.Slider(1, 20, 5, step=1, label="Number")
                    temperature = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature")
                    again = gr.Button("Draw again")
        for each in (beam_size, penalty, number, temperature):  # half a number is out of range, and no error
            each.preprocess = lambda value, of=each: min(max(value, of.minimum), of.maximum)
        controls = [how, beam_size, penalty, number, temperature]
        gr.on([*(each.change for each in (picture, *controls)), again.click],
              lambda path, *settings: answer(captioners, path, search_of(*settings)), [picture, *controls], result,
              trigger_mode="always_last", api_visibility="private")
        how.change(lambda value: [gr.update(visible=value == SEARCHED), gr.update(visible=value == DRAWN)],
                   how, [searched, drawn], api_visibility="private")
    return blocks


def launch(blocks: gr.Blocks, port: int | None) -> str:
    """Serves the page from a thread; returns its address."""
    import gradio as gr
    os.environ["no_proxy"] = ADDRESS  # Gradio looks whether it is there, and would ask a proxy
    try:
        blocks.launch(server_name=ADDRESS, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                      ssr_mode=False, footer_links=[], css=LAYOUT, head=SCRIPT,
                      theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]))
    except OSError as error:
        raise UsageError(f"--port {port}: cannot be had, as another program may have it; name another, or leave it "
                         "out") from error
    return blocks.local_url


def main(args: argparse.Namespace) -> None:
    if not is_there("gradio"):
        raise InputError("the page needs Gradio, which is not installed: pip install -r demo/app_requirements.txt")
    captioners = {str(each or "the model"): load(each, device=args.device, precision=args.precision)
                  for each in args.model}
    blocks = page(captioners)
    print(f"open {launch(blocks, args.port)} in a browser; Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(3600)  # and not an Event's wait, which no signal ends on Windows
    finally:
        blocks.close(verbose=False)


if __name__ == "__main__":
    run_script(main, get_parser())
