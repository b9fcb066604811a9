"""Folders of pictures as people have them, made small, and what is understood of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simclr.data.sources.folder import folder_tree, walk
from simclr.data.sources.layout import understand
from simclr.data.sources.reading import Reading
from simclr.data.sources.source import Source

WNIDS = ("n03", "n01", "n02")


def made(root: Path, pictures: list[str], texts: dict[str, str | bytes] | None = None) -> Path:
    for name in pictures:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    for name, text in (texts or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def read(root: Path, **how: Any) -> tuple[dict[str, dict[str | None, int]], str, Source]:
    """({split: {class: pictures}} of the items, all that is said, the source)."""
    source, understood = understand(folder_tree(root, walk(root)), Reading(**how))
    found: dict[str, dict[str | None, int]] = {}
    for item in source.items():
        of = found.setdefault(item.split, {})
        of[item.label] = of.get(item.label, 0) + 1
    assert found == {name: {k: v for k, v in split.classes.items() if v} for name, split in understood.splits.items()}
    assert source.total == sum(sum(of.values()) for of in found.values())
    return found, "\n".join((understood.how_split, understood.how_labelled, *understood.notes)), source


def tiny_imagenet(root: Path) -> Path:
    annotations = "".join(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t32\t44\t62\n" for i in range(6))
    boxes = {f"train/{c}/{c}_boxes.txt": f"{c}_0.JPEG\t0\t0\t63\t63\n" for c in WNIDS}
    return made(
        root,
        [f"train/{c}/images/{c}_{i}.JPEG" for c in WNIDS for i in range(4)]
        + [f"val/images/val_{i}.JPEG" for i in range(6)]
        + [f"test/images/test_{i}.JPEG" for i in range(5)],
        {"val/val_annotations.txt": annotations, "wnids.txt": "\n".join(WNIDS), "words.txt": "n01\tcat\nn02\tdog\nn09\tfox\n", **boxes},
    )
