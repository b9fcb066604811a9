"""The report's pictures as PNG files, for pages that show pictures and no HTML: MLflow's artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.html import patches
from pipelines.html.page import ReportData
from simclr import files

_GAP_PX, _LEAST_PX, _MOST_PX = 4, 64, 192


def write_sheets(data: ReportData, folder: Path) -> list[Path]:
    """Write views.png (a column an image: original, view 0, view 1), neighbours.png (a row a test image, its neighbours behind it, the
    nearest first), attention.png (the same with the maps of `patches.maps`) and painted.png (a column a test image: masked, painted,
    original) into `folder`, where the report has such pictures. Returns the files."""
    found = {"views": data.gallery.transpose(1, 0, 2, 3, 4), "painted": data.painted.transpose(1, 0, 2, 3, 4)}
    if data.attention.size:
        drawn = patches.enlarged(patches.maps(data.attention), *data.neighbours.queries.shape[1:3])
        found["attention"] = np.concatenate([data.neighbours.queries[:, None], drawn], 1)
    if len(data.neighbours.queries):
        found["neighbours"] = np.concatenate([data.neighbours.queries[:, None], data.neighbours.images], 1)
    written = []
    for name, rows in found.items():
        if rows.size:
            folder.mkdir(exist_ok=True)
            with files.whole(folder / f"{name}.png") as scratch:
                _sheet(rows).save(scratch, "PNG")
            written.append(folder / f"{name}.png")
    return written


def _sheet(rows: NDArray[np.uint8]) -> Image.Image:
    """One picture of (rows, columns, H, W, 3) pictures. Small ones are enlarged, with their pixels visible, large ones are reduced."""
    down, across, height, width = rows.shape[:4]
    scale = max(1, _LEAST_PX // max(height, width)) * min(1.0, _MOST_PX / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    kind = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    sheet = Image.new("RGB", (across * (w + _GAP_PX) - _GAP_PX, down * (h + _GAP_PX) - _GAP_PX), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(Image.fromarray(np.ascontiguousarray(image)).resize((w, h), kind), (x * (w + _GAP_PX), y * (h + _GAP_PX)))
    return sheet
