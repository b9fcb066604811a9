"""Pictures as a person would see them: decoded, upright, RGB."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from simclr.errors import UserError

_ORIENTATION = 0x0112


class Unreadable(UserError):
    """A picture that cannot be used; the message is the reason."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Use it around Pillow's reading calls, and around nothing else. For a damaged file Pillow raises nearly anything (struct.error,
    IndexError, zlib.error …), which becomes Unreadable here. An exception of our own code is a bug."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].partition(" <_io.")[0]  # without the stream's address in memory
        raise Unreadable(reason or type(error).__name__) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF rotation applied, transparency over white, 16 bits reduced to 8, grey, palette and CMYK converted.

    Returns the same object if nothing had to be done. Raises Unreadable if Pillow cannot decode it.
    """
    with reading():
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        return Image.fromarray(np.clip(values / (257 if values.max() > 255 else 1), 0, 255).astype(np.uint8)).convert("RGB")
    with reading():  # the palette or the transparency may be invalid
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
