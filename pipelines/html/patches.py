"""What a vision transformer does with patches: where its class token looks, and what MAE paints. Sections of a run's report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.html import charts
from pipelines.html.neighbours import class_name

PAINTED = ("masked", "painted", "original")
"""The pictures of a column of `charts.columns`, from top to bottom."""
# Seven colours of matplotlib's viridis in equal steps, from little to much: they differ in brightness for every eye, and on paper.
_VIRIDIS = np.array(
    [[68, 1, 84], [68, 58, 131], [49, 104, 142], [33, 145, 140], [53, 183, 121], [144, 215, 67], [253, 231, 37]], np.float64
)


# ── Attention ──────────────────────────────────────────────────────────────────────────────────────────────────────


def attention_notes(method: str, shares: NDArray[np.floating]) -> str:
    """What stands beside the maps of `shares` (n, heads, rows, columns), as HTML."""
    if not shares.size:
        return ""
    student = "the trained one (the student), which the run publishes; the paper shows its moving average (the teacher)"
    return (
        "<p>How much the class token attends to each patch of a test image in the last block: the mean over the heads, then each head. "
        f"The network is {student if method == 'dino' else 'the published encoder'}.</p>"
        '<p class="scale"><i></i>none to the most of each map by itself; one colour alone is even attention</p>'
        f"<p>The token gives {charts.percent(float(1 - shares.sum((2, 3)).mean()))} of its attention to itself, the rest to patches.</p>"
    )


def maps(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(n, heads, rows, columns) → (n, 1 + heads, rows, columns, 3): the mean over heads, then each head's. A map goes from 0 to its own
    largest share."""
    found = np.concatenate([shares.mean(1, keepdims=True), shares], 1, dtype=np.float64)
    found /= np.maximum(found.max((2, 3), keepdims=True), 1e-12)
    steps = np.linspace(0, 1, len(_VIRIDIS))
    return np.stack([np.interp(found, steps, channel) for channel in _VIRIDIS.T], -1).round().astype(np.uint8)


def enlarged(drawn: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Pictures (…, rows, columns, 3) → (…, height, width, 3), where a patch is a rectangle."""
    rows, columns = (np.arange(side) * there // side for side, there in ((height, drawn.shape[-3]), (width, drawn.shape[-2])))
    return drawn[..., rows, :, :][..., columns, :]


def attention_drawn(images: NDArray[np.uint8], shares: NDArray[np.floating], labels: NDArray[np.integer], classes: Sequence[str]) -> str:
    """The maps, as HTML: a row for each image (n, H, W, 3), of class `labels` (n,)."""
    if not shares.size:
        return ""
    rows = ""
    for i, (image, drawn) in enumerate(zip(images, maps(shares), strict=True)):
        own = charts.escape(class_name(classes, int(labels[i])) if classes else f"test image {i + 1}")
        shown = ""
        for j, picture in enumerate(drawn):
            name = f"head {j}" if j else "mean"
            shown += f"<li>{charts.picture(picture, f'Attention, {name}', 192)}<small>{name}</small></li>"
        rows += f"<li><figure>{charts.picture(image, f'Test image {i + 1}')}<figcaption>{own}</figcaption></figure><ol>{shown}</ol></li>"
    return f'<ol class="neighbours maps {charts.display(images)}>{rows}</ol>'


# ── MAE ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def painted_notes(normalised: bool, mask_ratio: object) -> str:
    """What stands beside MAE's pictures, as HTML."""
    hidden = f"{100 * mask_ratio:.3g} % of the patches" if isinstance(mask_ratio, float) else "some patches"
    text = (
        f"<p>From top to bottom: a test image of which {hidden} are hidden, by the mask that the run’s seed gives it in the first epoch; "
        "the same with the hidden patches as the decoder paints them; the image.</p>"
    )
    if normalised:
        text += (
            "<p>The network learns patches normalised by their own mean and deviation. To make pixels of them, the painted ones get mean "
            "and deviation of the original patch, so colour and contrast are given; shapes and edges are its own.</p>"
        )
    return text


UNPAINTED = (
    "<p>What it paints is not shown: the decoder is in the run’s checkpoints alone, and <code>simclr evaluate</code> needs one of them.</p>"
)
"""Of a run of MAE with pictures, but without these."""
