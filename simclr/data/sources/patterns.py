"""The built-in dataset: ten kinds of pattern, rendered, so that the whole job runs on any machine without a download.

Contrastive learning keeps whatever identifies an image. In two saturated colours (`coloured=True`) the colour pair identifies it and
survives the jitter, so the network learns the colours: the loss falls and kNN stays near chance, the colour-histogram shortcut of
arXiv:2002.05709, Fig. 6. Near-grey patterns with a light tint leave the shape to be learnt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from simclr import keyed
from simclr.data.sources.reading import Split, Understood
from simclr.data.sources.source import Item, Part, Source
from simclr.errors import UserError

CLASSES = ("bricks", "checks", "crosses", "diamonds", "dots", "grid", "rings", "stripes", "waves", "zigzag")
Field = NDArray[np.floating]
_FORMS = (
    "{ink} {kind} on {ground}",
    "a picture of {width} {kind}, {ink} on a {ground} ground",
    "{width} {kind} in {ink} grey",
    "{ink} and {width}: {kind}",
)
DRAWS = 16
_PIXELS = 1 << 19  # rendered at a time: 512 images of 32 px, small enough to stay near the cache
_LARGEST_PX = 511  # beyond this an image's noise would need more draws than a key of `keyed` has


def render(ids: NDArray[np.int64], seed: int, size_px: int = 32, coloured: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, size, size, 3) and labels (n,) of sample `ids`: class id % 10, everything else keyed by (seed, id).

    Position, phase, scale, angle, polarity, brightness, contrast, tint and noise vary. A period is a fifth to nearly half
    of the side, whatever the side is. Raises UserError for a size outside 1 … 511 px.
    """
    if not 1 <= size_px <= _LARGEST_PX:
        raise UserError(f"patterns of {size_px} px were asked for; expected 1 to {_LARGEST_PX} px, the built-in recipe uses 32")
    ids = np.asarray(ids, np.int64)
    labels = ids % len(CLASSES)
    images = np.empty((len(ids), size_px, size_px, 3), np.uint8)
    block = max(_PIXELS // size_px**2, 1)
    for begin in range(0, len(ids), block):
        rows = slice(begin, begin + block)
        images[rows] = _render(ids[rows], labels[rows], seed, size_px, coloured)
    return images, labels


def _render(ids: NDArray[np.int64], labels: NDArray[np.int64], seed: int, size_px: int, coloured: bool) -> NDArray[np.uint8]:
    draws = keyed.uniform(seed, "patterns", 0, ids, 0, DRAWS + size_px * size_px).astype(np.float32)
    return painted(draws[:, :DRAWS], draws[:, DRAWS:], labels, size_px, coloured)


def painted(drawn: Field, noise: Field, labels: NDArray[np.int64], size_px: int, coloured: bool) -> NDArray[np.uint8]:
    """Images (n, size, size, 3) of the classes `labels` (n,) by uniform numbers: `drawn` (n, 16), which are angle, period, two of
    position, polarity, contrast, level, strength of the noise and three of colour, and `noise` (n, size²)."""
    u, noise = drawn[:, :, None, None], noise.reshape(-1, size_px, size_px) - 0.5

    # Pixel centres in periods of the pattern, turned by up to 40°; diamonds are taller than wide, so checks stay checks.
    angle = np.deg2rad(80) * (u[:, 0] - 0.5)
    period = 0.22 + 0.25 * u[:, 1]
    at = ((np.arange(size_px, dtype=np.float32) + 0.5) / size_px - 0.5)[None]
    x, y = at[:, None, :], at[:, :, None]
    a = (np.cos(angle) * x + np.sin(angle) * y) / period
    b = (np.cos(angle) * y - np.sin(angle) * x) / period
    shift_a, shift_b = u[:, 2], u[:, 3]

    shape = np.empty((len(labels), size_px, size_px), np.float32)
    for label, name in enumerate(CLASSES):
        chosen = labels == label
        # Rings have a centre, which lies in the middle half of the image; the others have only a phase, and repeat within two periods.
        reach = 0.5 / period[chosen] if name == "rings" else 2.0
        field = _SHAPES[name](a[chosen] + reach * (shift_a[chosen] - 0.5), b[chosen] + reach * (shift_b[chosen] - 0.5))
        # Edges are one pixel wide: a distance in periods times the pixels of a period.
        shape[chosen] = np.clip(0.5 + field * (period[chosen] * size_px), 0, 1) if name != "waves" else field
    polarity = np.where(u[:, 4] < 0.5, -1.0, 1.0)
    contrast = 0.2 + 0.35 * u[:, 5]
    level = 0.5 + 0.3 * (u[:, 6] - 0.5)
    grey = level + polarity * contrast * (shape - 0.5) + (0.05 + 0.2 * u[:, 7]) * noise

    if coloured:  # a pair of saturated colours per image: hue anywhere, the second at least 90° away
        first, second = _hue(u[:, 8, 0, 0]), _hue(u[:, 8, 0, 0] + 0.25 + 0.5 * u[:, 9, 0, 0])
        share = np.where(polarity > 0, shape, 1 - shape)[..., None]
        bright = 0.6 + 0.4 * u[:, 6] + (0.05 + 0.2 * u[:, 7]) * noise
        mixed = bright[..., None] * (first[:, None, None] * share + second[:, None, None] * (1 - share))
    else:
        mixed = grey[..., None] * (1 + 0.12 * (u[:, 8:11, 0, 0][:, None, None] - 0.5))
    image: NDArray[np.uint8] = np.rint(255 * np.clip(mixed, 0, 1)).astype(np.uint8)
    return image


def captions(ids: NDArray[np.int64], seed: int) -> list[str]:
    """A caption of each sample of `render`: its class, whether it is bright on dark or dark on bright, and how wide its period is, in a
    form of words that is keyed by (seed, id)."""
    ids = np.asarray(ids, np.int64)
    draws = keyed.uniform(seed, "patterns", 0, ids, 0, DRAWS).astype(np.float32)
    forms = keyed.uniform(seed, "captions", 0, ids, 0, 1)[:, 0]
    said = []
    for label, u, form in zip(ids % len(CLASSES), draws, forms, strict=True):
        ink, ground = ("dark", "bright") if u[4] < 0.5 else ("bright", "dark")
        width = "narrow" if u[1] < 0.5 else "wide"
        said.append(_FORMS[int(form * len(_FORMS))].format(kind=CLASSES[label], ink=ink, ground=ground, width=width))
    return said


def _hue(turn: Field) -> Field:
    """Fully saturated RGB (n, 3) of hues in turns."""
    k = np.mod(np.array([0.0, 2 / 3, 1 / 3], np.float32) + turn[:, None], 1.0)
    rgb: Field = np.clip(np.abs(6 * k - 3) - 1, 0, 1)
    return rgb


def _cell(t: Field) -> Field:
    """Distance from the middle of the unit cell, in [−0.5, 0.5)."""
    return t - np.floor(t) - 0.5


def _triangle(t: Field) -> Field:
    """Triangle wave of period 1 in [−0.5, 0.5]."""
    return 2 * np.abs(_cell(t)) - 0.5


def _bricks(a: Field, b: Field) -> Field:
    row = 1.3 * b
    joint = 0.65 * a + 0.5 * np.mod(np.floor(row), 2)
    return np.minimum((0.5 - np.abs(_cell(joint))) / 0.65, (0.5 - np.abs(_cell(row))) / 1.3) - 0.1


def _checks(a: Field, b: Field) -> Field:
    left, up = 0.25 - np.abs(_cell(a)), 0.25 - np.abs(_cell(b))
    return np.sign(left * up) * np.minimum(np.abs(left), np.abs(up))


def _crosses(a: Field, b: Field) -> Field:
    x, y = np.abs(_cell(a)), np.abs(_cell(b))
    return np.maximum(np.minimum(0.1 - x, 0.38 - y), np.minimum(0.1 - y, 0.38 - x))


def _diamonds(a: Field, b: Field) -> Field:
    return (0.42 - np.abs(_cell(a)) - 0.75 * np.abs(_cell(0.75 * b))) / 1.25


def _dots(a: Field, b: Field) -> Field:
    return 0.3 - np.hypot(_cell(a), _cell(b))


def _grid(a: Field, b: Field) -> Field:
    return np.maximum(0.09 - np.abs(_cell(a)), 0.09 - np.abs(_cell(b)))


def _rings(a: Field, b: Field) -> Field:
    distance: Field = np.hypot(a, b)
    return 0.25 - np.abs(_cell(distance))


def _stripes(a: Field, b: Field) -> Field:
    return 0.25 - np.abs(_cell(a))


def _waves(a: Field, b: Field) -> Field:
    """Smooth swell with bent crests: the only class without edges."""
    swell: Field = np.sin(2 * np.pi * (a + 0.3 * np.sin(np.pi * b)))
    return 0.5 + 0.5 * swell


def _zigzag(a: Field, b: Field) -> Field:
    return (0.22 - np.abs(_cell(a + 1.2 * _triangle(0.7 * b)))) / 1.5


_SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "bricks": _bricks,
    "checks": _checks,
    "crosses": _crosses,
    "diamonds": _diamonds,
    "dots": _dots,
    "grid": _grid,
    "rings": _rings,
    "stripes": _stripes,
    "waves": _waves,
    "zigzag": _zigzag,
}


_RENDER_BLOCK = 512


def options_of(name: str, options: str, usual: dict[str, int]) -> dict[str, int]:
    """The numbers that `options` state, as train=4000,coloured, else those of `usual`. Raises UserError for an unknown one."""
    values = dict(usual)
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in values or not (value.isdigit() or (key in ("coloured", "captions") and not value)):
            raise UserError(f"{name} has no option {option!r}; expected {', '.join(f'{k}=NUMBER' for k in values)}")
        values[key] = int(value or 1)
    if values["size"] < 8:
        raise UserError(f"{name} of {values['size']} px show nothing; use size=32, at least 8")
    return values


def patterns_source(spec: str, options: str) -> Source:
    values = options_of("patterns", options, {"train": 4_000, "test": 1_000, "size": 32, "seed": 0, "coloured": 0, "captions": 0})
    counts = {"train": values["train"], "test": values["test"]}
    if values["train"] < 2:
        raise UserError(f"patterns:train={values['train']} leaves nothing to contrast; use at least 2")

    first = {"train": 0, "test": counts["train"]}  # the test images are other samples than the training images
    parts = [
        Part(split, tuple(f"{split}/{sample}" for sample in range(first[split] + begin, first[split] + min(begin + _RENDER_BLOCK, count))))
        for split, count in counts.items()
        for begin in range(0, count, _RENDER_BLOCK)
    ]

    def read(part: Part) -> Iterator[Item]:
        ids = np.array([int(name.rpartition("/")[2]) for name in part.names])
        images, labels = render(ids, values["seed"], values["size"], bool(values["coloured"]))
        said = captions(ids, values["seed"]) if values["captions"] else [""] * len(ids)
        for name, image, label, caption in zip(part.names, images, labels, said, strict=True):
            yield Item(part.name, CLASSES[label], name, image, caption)

    stated = ",".join(f"{k}={v}" for k, v in values.items() if k != "captions" or v)
    understood = Understood(
        splits={split: Split(_classes(first[split], count), ()) for split, count in counts.items() if count},
        how_split="rendered as such",
        how_labelled="rendered as such",
        notes=(),
        counted=True,
    )
    return Source(
        spec=f"patterns:{stated}",
        parts=parts,
        read=read,
        total=sum(counts.values()),
        understood=understood.to_dict(),
        captioned=bool(values["captions"]),
    )


def _classes(first: int, count: int) -> Counter[str | None]:
    """Class → images among `count` samples from `first` on."""
    step = len(CLASSES)
    images = {label: len(range(first + (which - first) % step, first + count, step)) for which, label in enumerate(CLASSES)}
    return Counter({label: n for label, n in images.items() if n})
