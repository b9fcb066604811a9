"""Test images beside the training images nearest to them: a section of a run's report, and the names of their files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.html import charts
from pipelines.html.charts import escape


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Test images and the training images nearest to each by cosine of their features, nearest first. Label −1 = unlabelled."""

    queries: NDArray[np.uint8]
    """(m, H, W, 3)."""
    query_labels: NDArray[np.integer]
    """(m,)."""
    images: NDArray[np.uint8]
    """(m, k, H, W, 3)."""
    labels: NDArray[np.integer]
    """(m, k)."""
    similarity: NDArray[np.floating]
    """(m, k) cosines."""
    query_names: NDArray[np.str_] | None = None
    """(m,) their files' names; "" where that is not known."""
    names: NDArray[np.str_] | None = None
    """(m, k)."""

    def __post_init__(self) -> None:
        m, k = self.similarity.shape
        assert self.queries.shape[0] == m and self.images.shape[:2] == (m, k)
        assert self.query_labels.shape == (m,) and self.labels.shape == (m, k)


def notes(found: Neighbours, classes: Sequence[str]) -> str:
    """What stands beside the pictures, as HTML."""
    known = _known(found, classes)
    text = (
        "<p>Left: an image of the test split. Right: the training images whose features are nearest to its own, nearest first. "
        "The number is the cosine of the two, 1 for the same direction.</p>"
    )
    if known.any():
        same = (found.labels == found.query_labels[:, None])[known]
        text += (
            '<p><b class="tick">✓</b> and a solid frame: the same class. <b class="cross">✗</b> and a dashed frame: another, which is '
            f"named. Here {int(same.sum())} of {same.size} are of the same class.</p>"
        )
    return text


def drawn(found: Neighbours, classes: Sequence[str]) -> str:
    """The pictures, as HTML: a row for each test image."""
    known, rows = _known(found, classes), ""
    for i, query in enumerate(found.queries):
        own = class_name(classes, int(found.query_labels[i])) if classes else f"test image {i + 1}"
        called = "" if found.query_names is None else str(found.query_names[i])
        shown = ""
        for j, image in enumerate(found.images[i]):
            cosine = f"{found.similarity[i, j]:.2f}".replace("-", "−").replace("nan", "–")
            alt, sort, mark, name = f"Neighbour {j + 1}", "", "", ""
            if known[i, j]:
                other, right = class_name(classes, int(found.labels[i, j])), found.labels[i, j] == found.query_labels[i]
                alt += f": {other}, {'the same' if right else 'another'} class"
                sort, mark = ("right", '<b class="tick">✓</b>') if right else ("wrong", '<b class="cross">✗</b>')
                name = "" if right else f"<em>{escape(other)}</em>"
            alt += "" if found.names is None or not found.names[i, j] else f", {found.names[i, j]}"
            framed = f'<span class="frame" title="{escape(alt)}">{charts.picture(image, alt, 192)}{mark}</span>'
            shown += f'<li class="{sort}">{framed}<small>{cosine}</small>{name}</li>'
        picture = charts.picture(query, f"Query: {own}{f', {called}' if called else ''}")
        caption = escape(own) + (f"<small>{breakable(called)}</small>" if called else "")
        rows += f"<li><figure>{picture}<figcaption>{caption}</figcaption></figure><ol>{shown}</ol></li>"
    return f'<ol class="neighbours {charts.display(found.queries)}>{rows}</ol>' if rows else ""


def breakable(name: str) -> str:
    """A name as HTML that may break into lines behind the signs that divide it."""
    return re.sub(r"(?<=[/_-])(?=[^/_-])", "<wbr>", escape(name))


def class_name(classes: Sequence[str], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else "unlabelled"


def _known(found: Neighbours, classes: Sequence[str]) -> NDArray[np.bool_]:
    """(m, k) whether both labels of a pair are known."""
    return (found.query_labels[:, None] >= 0) & (found.labels >= 0) & bool(classes)
