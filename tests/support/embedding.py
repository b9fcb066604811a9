"""What `simclr embed` reads, without an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.parts.plan import plan, reader
from simclr.data.encode import decoded
from simclr.data.options import Options
from simclr.data.raster import file_bytes
from simclr.data.sources.portions import Portion
from simclr.data.sources.reading import Reading


def pictures(path: Path, options: Options | None = None) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and pixels of each picture. Raises UserError where the source is none, Unreadable where a picture is none."""
    options = options or Options()
    planned = plan([str(path)], Reading(), options)
    rule = options.rule(planned.ranges)
    for part in planned.parts:
        for item in reader(planned.sources[part["source"]], Reading(), path.parent)(Portion.from_dict(part["portion"])):
            if isinstance(item.data, np.ndarray):
                yield item.name, item.data
            else:
                yield item.name, decoded(file_bytes(item.data, rule), rule).pixels
