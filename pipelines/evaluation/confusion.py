"""The picture of a confusion table. Counts in, image out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_WRITTEN = 20  # up to so many classes, every cell shows its number
_NAMED = 110  # up to so many, every row and column shows its class
_PAPER, _INK, _QUIET = (255, 255, 255), (32, 33, 36), (120, 124, 130)
_RIGHT, _WRONG = np.array([31, 95, 168.0]), np.array([196, 62, 38.0])


def confusion_picture(table: NDArray[np.int64], names: Sequence[str], title: str) -> Image.Image:
    """One row per true class, one column per predicted class; a cell's shade is its share of the row, blue on the diagonal."""
    classes = len(table)
    cell = 44 if classes <= _WRITTEN else max(1200 // classes, 2)
    text = ImageFont.load_default(14 if classes <= _WRITTEN else max(min(cell - 1, 14), 7))
    heading = ImageFont.load_default(20)
    shown = [name if len(name) <= 22 else name[:21] + "…" for name in names] if classes <= _NAMED else []
    wide = int(max((text.getlength(name) for name in shown), default=0)) + 16
    left, top, side = wide + 24, 84 + wide, cell * classes
    image = Image.new("RGB", (max(left + side + 24, int(heading.getlength(title)) + 48), top + side + 24), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((24, 16), title, _INK, heading)
    draw.text((24, 46), "rows: true class · columns: predicted · % of the row", _QUIET, ImageFont.load_default(14))
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    for i in range(classes):
        for j in range(classes):
            share = float(shares[i, j])
            hue = _RIGHT if i == j else _WRONG
            # The square root makes one error in a hundred visible; a linear shade would leave it white.
            colour = tuple(int(v) for v in 255 + (hue - 255) * np.sqrt(share))
            at = (left + j * cell, top + i * cell)
            draw.rectangle((*at, at[0] + cell - 1 - (cell > 6), at[1] + cell - 1 - (cell > 6)), colour)
            if classes <= _WRITTEN and table[i, j]:
                number = f"{100 * share:.0f}" if share >= 0.005 else "<1"
                middle = (at[0] + cell / 2 - 1, at[1] + cell / 2 - 1)
                draw.text(middle, number, _PAPER if share > 0.3 else _INK, text, anchor="mm")
    for i, name in enumerate(shown):
        draw.text((left - 8, top + i * cell + cell / 2), name, _INK, text, anchor="rm")
        column = Image.new("RGB", (wide, cell), _PAPER)
        ImageDraw.Draw(column).text((4, cell / 2), name, _INK, text, anchor="lm")
        image.paste(column.rotate(90, expand=True), (left + i * cell, top - wide - 4))
    return image
