"""Where the model looks in a few validation pictures, which train.py draws after each epoch."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from caption import Captioner, caption_images
from datasets import CaptionDataset
from drawing.panels import draw_sheet
from safety.files import atomic_write


def shown_pictures(dataset: CaptionDataset) -> list[int]:
    """Three pictures of a split, the same after every epoch."""
    return sorted({0, dataset.n_images // 3, 2 * dataset.n_images // 3})


def draw_gaze(model: Captioner, dataset: CaptionDataset, path: str | Path, title: str) -> None:
    """Draws the gaze over the last epoch's, so that one can watch it sharpen."""
    pictures: Sequence[Image.Image] = [Image.fromarray(dataset.images[i].transpose(1, 2, 0))
                                       for i in shown_pictures(dataset)]
    found = caption_images(model, pictures, beam_size=1)
    with atomic_write(path, "wb") as file:
        draw_sheet(pictures, [best for best, *_ in found], title).save(file, "PNG")
