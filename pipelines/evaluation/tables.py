"""`simclr evaluate --features`: kNN and probes on features that `simclr embed` wrote, without their encoder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.evaluation import protocols, quick
from pipelines.evaluation.inputs import held_back
from pipelines.runs.scores import HELD_BACK, TEST, WHOLE, Measured
from pipelines.terminal import Bar, say, show
from simclr.config import Config
from simclr.errors import UserError

if TYPE_CHECKING:
    import torch

    from simclr.data.feature_parts import FeatureParts
    from simclr.evaluation.features import Features


def run(
    places: Sequence[str], asked: tuple[protocols.Protocol, ...], device: torch.device, settings: protocols.Settings, out: Path | None
) -> list[dict[str, Any]]:
    """Show the score row of the features in `places` (training and test together, or one place each), or the result of each protocol
    asked for; return them. Without a test split a tenth of the training rows is held back."""
    from simclr.data.feature_parts import open_features
    from simclr.evaluation.features import Features
    from simclr.evaluation.representation import rankme

    parts = [open_features(place) for place in places]
    first = parts[0]
    for place, part in zip(places[1:], parts[1:], strict=True):
        if (part.about.encoder, part.about.preprocessing) != (first.about.encoder, first.about.preprocessing):
            raise UserError(
                f"{places[0]} has features of encoder {first.about.encoder[:12]} and {place} of {part.about.encoder[:12]}, or of another "
                "preprocessing; embed both with one encoder"
            )
    classes, train, test, split = _read(places, parts, settings.limit)
    images = f"{len(train.y):,} training and {len(test.y):,} test rows"
    say(f"features of encoder {first.about.encoder[:12]}, {first.d} numbers each ({first.about.dtype}), of {first.about.source}: {images}")
    _say_common_classes(classes, train, test)
    config = Config()
    if not asked:
        row = {"name": f"encoder {first.about.encoder[:12]}", "rankme": float(rankme(test.h[: quick.RANKED].to(device)))}
        k, temperature = settings.k or config.watch.k, settings.temperature or config.watch.temperature
        row |= quick.scored(train, test, k, temperature, device)
        show(quick.table([row]))
        protocols.say_unscored(first.about.method)
        return [row]
    if not classes:
        raise UserError(f"the features in {' and '.join(places)} have no labels, and every protocol needs them; leave out --protocol")
    out = out or Path("runs/evaluation") / f"features-{first.about.encoder[:12]}"
    out.mkdir(parents=True, exist_ok=True)
    train, test = (Features(f.h.to(device), f.y.to(device), f.ids.to(device)).labelled() for f in (train, test))
    if not len(train.y) or not len(test.y):
        raise UserError("none of the rows of a split has a label; raise --limit")
    measured = Measured(split=split, limit=f"at most {settings.limit:,} rows of a split" if settings.limit else WHOLE)
    rows = []
    for protocol in asked:
        began = time.monotonic()
        scores, told = protocols.FITTED[protocol](train, test, config, settings, len(classes))
        told = {"protocol": protocol, "encoder": first.about.encoder[:12], "train": len(train.y), "test": len(test.y), **told}
        rows.append(protocols.finish(scores, test.y, classes, settings, told, measured, out, began))
    protocols.say_unscored(first.about.method)
    return rows


def _read(places: Sequence[str], parts: Sequence[FeatureParts], limit: int | None) -> tuple[list[str], Features, Features, str]:
    """(class names, training rows, test rows, which rows these are). Labels are places in the sorted names of both."""
    tables = [part.table(["id", "split", "label"]) for part in parts]
    for place, table, alone in zip(places, tables, ("the training", "the test"), strict=False):
        found = Counter(table["split"])
        if not found:
            raise UserError(f"{place} has no features; embed some images first")
        if len(places) == 2 and len(found) > 1:
            told = " and ".join(f"{count:,} of {split}" for split, count in sorted(found.items()))
            raise UserError(f"{place} has {told}, and was given as {alone} split alone; give one place, which is cut by its splits")
    if len(places) == 1 and (unknown := set(tables[0]["split"]) - {"train", "test"}):
        raise UserError(f"{places[0]} has rows of the splits {', '.join(sorted(unknown))}; expected train and test, or two places")
    classes = sorted({label for table in tables for label in table["label"] if label is not None})
    with Bar("features", sum(map(len, parts))) as bar:
        if len(places) == 2:
            train, test = (_split(part, table, None, classes, limit, bar) for part, table in zip(parts, tables, strict=True))
            return classes, train, test, TEST
        splits = [split for split in ("train", "test") if split in tables[0]["split"]]
        if splits == ["test"]:
            raise UserError(f"{places[0]} has rows of the test split alone; give the training rows, too: --features TRAIN TEST")
        cut = [_split(parts[0], tables[0], split, classes, limit, bar) for split in splits]
    train, test = cut if len(cut) == 2 else held_back(cut[0])
    return classes, train, test, TEST if len(cut) == 2 else HELD_BACK


def _split(part: FeatureParts, table: dict[str, list[Any]], split: str | None, classes: list[str], limit: int | None, bar: Bar) -> Features:
    """The rows of a split, or all, at most `limit` of them; the table's features are never in memory twice."""
    import numpy as np
    import torch

    from simclr import keyed
    from simclr.evaluation.features import Features
    from simclr.evaluation.rows import matrix

    rows = np.array([i for i, name in enumerate(table["split"]) if split in (None, name)], np.int64)
    if limit is not None and limit < len(rows):
        rows = rows[np.sort(keyed.permutation(0, 0, len(rows))[:limit])]
    number = {name: at for at, name in enumerate(classes)}
    y = torch.tensor([-1 if table["label"][i] is None else number[table["label"][i]] for i in rows], dtype=torch.int64)
    h, done = matrix(len(rows), part.d), 0
    for first, block in part.blocks():
        until = int(np.searchsorted(rows, first + len(block)))
        h[done:until] = torch.from_numpy(block[rows[done:until] - first])
        done = until
        bar.advance(len(block) if split != "test" else 0)
    return Features(h, y, torch.tensor([table["id"][i] for i in rows], dtype=torch.int64))


def _say_common_classes(classes: list[str], train: Features, test: Features) -> None:
    """Say how many test rows are of classes that no training row has. Raises UserError if all are."""
    import torch

    y = test.y[test.y >= 0]
    strange = y[~torch.isin(y, train.y)]
    if not len(strange):
        return
    kinds = [classes[label] for label in strange.unique()]
    named = ", ".join(kinds[:3]) + (f" and {len(kinds) - 3:,} more" if len(kinds) > 3 else "")
    found = f"{len(strange):,} of {len(y):,} labelled test rows are of classes that no training row has ({named})"
    if len(strange) == len(y):
        raise UserError(f"{found}, so every score would be 0; embed training and test images whose classes have the same names")
    say(f"{found}: they are judged wrong")
