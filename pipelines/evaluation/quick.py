"""The quick table: weighted kNN and a linear probe of frozen features, beside raw pixels and the untrained encoder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.inputs import device_of, held_back, require_common_classes, resolve
from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run
from pipelines.terminal import Bar, say
from simclr import files
from simclr.config import Config
from simclr.data.manifest import read_manifest
from simclr.errors import UserError

if TYPE_CHECKING:
    import torch

    from simclr.evaluation.features import Features
    from simclr.views.preprocessing import Preprocessing


_RANKED = 2048  # features for RankMe's singular values


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the quick table."""

    k: int | None = None
    """Neighbours that vote; None = the config's watch.k."""
    baselines: bool = True
    """Also raw pixels and the untrained encoder."""
    limit: int | None = None
    """Images of each split, at most; None = all."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(encoder_or_run: Path, data_at: Path | None, settings: Settings) -> list[dict[str, Any]]:
    """The score rows of the encoder (or run) in a directory, weakest method first: name, rankme, and, if there are labels,
    knn_top1, probe_top1, …. In a run directory they are also written, with the report's pictures."""
    directory, config, data = resolve(encoder_or_run, data_at)
    manifest = read_manifest(data)
    require_common_classes(data, manifest)
    import simclr
    from simclr.evaluation.features import pixels
    from simclr.methods.simclr import build_model

    device = device_of(settings.device)
    published = simclr.load_encoder(directory)
    encoders: dict[str, Any] = {}
    if settings.baselines:
        if manifest.classes:
            encoders["raw pixels"] = _Pixels() if manifest.kind == "jpeg" else pixels
        encoders["untrained encoder"] = build_model(config).encoder.eval().to(device)
    encoders["trained encoder"] = published.encoder.to(device)
    images = sum(min(settings.limit or manifest.examples(s), manifest.examples(s)) for s in manifest.splits) * len(encoders)
    rows: list[dict[str, Any]] = []
    kept = None
    began = time.monotonic()
    with Bar("evaluate", images) as bar:
        for name, encoder in encoders.items():
            train = _features(encoder, data, "train", published.preprocessing, settings.limit, device, bar)
            if "test" in manifest.splits:
                test = _features(encoder, data, "test", published.preprocessing, settings.limit, device, bar)
            else:
                train, test = held_back(train)
            rows.append({"name": name, **_scores(train, test, config, settings.k)})
            bar.update(bar.done, f"{name}: {_score_text(rows[-1])}")
            kept = (train, test)
    assert kept is not None
    k, voters = settings.k or config.watch.k, len(kept[0].labelled().y)
    if 0 < voters < k:
        say(f"kNN: all {voters:,} labelled training images vote, since k is {k:,}; a smaller --k tells more")
        k = voters
    if (encoder_or_run / "run.json").is_file():
        from pipelines.html.pictures import write_pictures

        write_pictures(encoder_or_run / "pictures.npz", config, data, *kept, query_split=sorted(manifest.splits)[0])
        shown = sync.shown(data_at or load_run(encoder_or_run).origin)
        text = {"scores": rows, "data": shown, "k": k, "time": time.time()}
        files.write_text(encoder_or_run / "evaluation.json", json.dumps(text, indent=1) + "\n")
        load_run(encoder_or_run).took("evaluate", time.monotonic() - began)
    return rows


def _features(encoder: Any, data: Path, split: str, seen: Preprocessing, limit: int | None, device: torch.device, bar: Bar) -> Features:
    from simclr.data.loader import in_order
    from simclr.evaluation.features import embed

    return embed(encoder, in_order(data, split, seen, 256, limit), seen, device, progress=bar.advance)


def _scores(train: Features, test: Features, config: Config, k: int | None) -> dict[str, float]:
    from simclr.evaluation.knn import knn
    from simclr.evaluation.linear import linear_probe
    from simclr.evaluation.representation import rankme

    health = {"rankme": float(rankme(test.h[:_RANKED]))}
    train, test = train.labelled(), test.labelled()
    if not len(train.y) or not len(test.y):
        return health
    votes = knn(train.h, train.y, test.h, test.y, k or config.watch.k, config.watch.temperature)
    probe = linear_probe(train.h, train.y, test.h, test.y)
    scores = {f"knn_{name}": value for name, value in votes.items()}
    return scores | {f"probe_{name}": value for name, value in probe.items()} | health


def score(run: Run, data: Path, device: torch.device, shares: tuple[float, ...] = ()) -> dict[str, float]:
    """The scores of a finished run's encoder, over at most watch.bank training and watch.queries test images; also written to the
    run for `simclr publish`. For a trial of a sweep: without baselines and pictures.

    Each of `shares` adds a probe that is fitted to that share of each class's training images: probe_top1_at_0.01, ….
    """
    require_common_classes(data, read_manifest(data))
    import simclr
    from simclr.evaluation.linear import linear_probe

    published, watch = simclr.load_encoder(run.encoder), run.config.watch
    encoder, seen = published.encoder.to(device), published.preprocessing
    with Bar("evaluate", None) as bar:
        train = _features(encoder, data, "train", seen, watch.bank, device, bar)
        if "test" in read_manifest(data).splits:
            test = _features(encoder, data, "test", seen, watch.queries, device, bar)
        else:
            train, test = held_back(train)
    row = _scores(train, test, run.config, None)
    train, test = train.labelled(), test.labelled()
    for share in shares if len(train.y) and len(test.y) else ():
        some = _share(train, share)
        row[f"probe_top1_at_{share:g}"] = linear_probe(some.h, some.y, test.h, test.y)["top1"]
    k = min(watch.k, len(train.y) or watch.k)
    text = {"scores": [{"name": "trained encoder", **row}], "data": run.origin, "k": k, "time": time.time()}
    files.write_text(run.path / "evaluation.json", json.dumps(text, indent=1) + "\n")
    return row


def _share(train: Features, share: float) -> Features:
    """A share of each class's images, at least one; every run takes the same ones."""
    import torch

    from simclr import keyed

    order = torch.from_numpy(keyed.permutation(0, 2, len(train.y))).to(train.y.device)
    chosen = [found[: max(round(share * len(found)), 1)] for c in train.y.unique() for found in [order[train.y[order] == c]]]
    return train[torch.cat(chosen).sort().values]


class _Pixels:
    """Photographs as rows of 32 × 32 pixels: rows of 150,528 numbers would need a larger machine than training."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        return F.interpolate(x, (32, 32), mode="area").flatten(1)


def scores_of(run: Path) -> list[dict[str, Any]]:
    """The rows of `evaluate` for a run. Raises UserError if it was not evaluated yet."""
    found = load_run(run).evaluation()
    if found is None:
        raise UserError(f"{run} was not evaluated yet; `simclr evaluate {run}` does it")
    rows: list[dict[str, Any]] = found["scores"]
    return rows


def _score_text(row: dict[str, Any]) -> str:
    return f"kNN {100 * row['knn_top1']:.1f} %" if "knn_top1" in row else f"RankMe {row['rankme']:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: kNN and probe in per cent, or the effective rank without labels."""
    if "knn_top1" not in rows[-1]:
        return "\n".join([f"{'no labels':<20} {'RankMe':>6}", *(f"{row['name']:<20} {row['rankme']:>6.1f}" for row in rows)])
    lines = [f"{'top-1, %':<20} {'kNN':>6} {'probe':>6}"]
    lines += [f"{row['name']:<20} {100 * row['knn_top1']:>6.1f} {100 * row['probe_top1']:>6.1f}" for row in rows]
    return "\n".join(lines)
