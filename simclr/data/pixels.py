"""Pictures as a person would see them: decoded, upright, RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112


def upright_rgb(image: Image.Image) -> Image.Image:
    """EXIF rotation applied, transparency over white, 16 bits reduced to 8, grey, palette and CMYK converted.

    Returns the same object where nothing had to be done.
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        return Image.fromarray(np.clip(values / (257 if values.max() > 255 else 1), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
