"""`simclr views`: a picture of the views that the network sees of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from pipelines.html.curves import words
from pipelines.runs import sync
from pipelines.terminal import show
from simclr import files
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.family import method_name

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP, _TITLE = 6, 22  # pixels between images, and for the columns' titles
_LEAST_PX = 96  # smaller images are drawn larger, by a whole factor


@dataclass(frozen=True)
class Args:
    """Draw images beside the two views that a recipe makes of them; every field of the recipe is a flag.

    `simclr views RECIPE --data DIR`, or `simclr views DIR`: then cifar10_resnet18 for small images of one size,
    imagenet_resnet50 for photographs.
    """

    data: Path
    """Directory of prepared shards."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.Suppress] = ""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file with the config, in place of a recipe: YAML as `simclr recipes NAME` writes it, or a run's run.json. Flags change it."""
    out: Path | None = None
    """Picture to write. Default: runs/views-RECIPE.png."""
    images: int = 24
    """Images to show: the first of the first epoch."""


def recipe_for(data: Path) -> str:
    """The recipe whose views suit the shards in `data`."""
    return "cifar10_resnet18" if read_manifest(data).kind == "raw" else "imagenet_resnet50"


def main(args: Args) -> None:
    if args.images < 1:
        raise UserError(f"--images is {args.images}; expected at least 1")
    out = args.out or Path("runs") / f"views-{args.recipe}.png"
    files.require_file(out)
    data = sync.shards(args.data)
    examples = read_manifest(data).examples("train")
    from pipelines.html.pictures import gallery

    # One batch of the images to show; nothing is trained.
    config = args.config.of_batch(min(max(args.images, 2), examples))
    _made(out)
    rows = gallery(config, data, args.images)
    out.parent.mkdir(parents=True, exist_ok=True)
    titles = words(method_name(config), config.flat()).views
    sheet(rows, titles).save(_made(out))
    what = "two views" if titles == ("view 0", "view 1") else "crop and what the encoder sees of it"
    show(f"{out}: {len(rows)} images, each with its {what} at {config.views.size_px} px")


def _made(path: Path) -> Path:
    from PIL import Image

    Image.init()
    if path.suffix.lower() not in Image.EXTENSION:
        raise UserError(f"{path} has no ending of a picture; use {path.name}.png")
    return path


def sheet(rows: NDArray[np.uint8], titles: tuple[str, str] = ("view 0", "view 1")) -> Image:
    """(n, 3, H, W, 3) uint8: original and two views of n images, as blocks of three columns under their titles."""
    from PIL import Image as pictures
    from PIL import ImageDraw, ImageFont

    n, _, height, width, _ = rows.shape
    scale = max(-(-_LEAST_PX // height), 1)
    tall, wide = height * scale, width * scale
    blocks = max(round((n * tall / (3 * wide) * 4 / 3) ** 0.5), 1)  # about as 4 : 3
    deep = -(-n // blocks)
    blocks = -(-n // deep)
    block = 3 * (wide + _GAP) + 2 * _GAP
    picture = pictures.new("RGB", (blocks * block - _GAP, _TITLE + deep * (tall + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for number, row in enumerate(rows):
        left, top = number // deep * block + _GAP, _TITLE + number % deep * (tall + _GAP)
        for column, (image, title) in enumerate(zip(row, ("original", *titles), strict=True)):
            at = left + column * (wide + _GAP)
            picture.paste(pictures.fromarray(image).resize((wide, tall), pictures.Resampling.NEAREST), (at, top))
            if number % deep == 0:
                draw.text((at, 4), title, "black", font)
    return picture
