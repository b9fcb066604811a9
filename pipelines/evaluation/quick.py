"""The quick table: weighted kNN and a linear probe of frozen features, beside raw pixels and the untrained encoder."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.evaluation import spread
from pipelines.evaluation.inputs import device_of, held_back, require_common_classes, resolve
from pipelines.parts.run import Where
from pipelines.runs import scores, sync
from pipelines.runs.directory import Run, load_run
from pipelines.terminal import Bar, say
from simclr import files
from simclr.config import Config
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.s3.uri import address
from simclr.errors import UserError
from simclr.family import MAE, method_name
from simclr.papers import unscored

if TYPE_CHECKING:
    import torch

    from simclr.evaluation.features import Features
    from simclr.methods import mae
    from simclr.views.preprocessing import Preprocessing


RANKED = 2048  # features for RankMe's singular values


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
    threads: int = 1
    """Threads that read and decode images."""
    where: Where = field(default_factory=Where)
    """Which processes embed the images; kNN and probes are this one's."""


def run(encoder_or_run: Path, data_at: Path | None, settings: Settings, home: Path | None = None) -> list[dict[str, Any]]:
    """The score rows of the encoder (or run) in a directory, weakest method first: name, rankme, and, if there are labels,
    knn_top1, probe_top1, …. In a run directory they are also written, with the report's pictures. `home`: its address, if the directory is
    a copy, where other processes leave their features."""
    directory, config, data = resolve(encoder_or_run, data_at)
    if (encoder_or_run / "run.json").is_file():
        files.require_writable(encoder_or_run / "evaluation.json")
    manifest = read_manifest(data)
    require_common_classes(data, manifest)
    import simclr

    device = device_of(settings.device) if settings.where.here else device_of("auto")
    published = simclr.load_encoder(directory)
    encoders = spread.encoders_of(published, config, manifest, settings.baselines, device)
    images = sum(_count(manifest, split, settings.limit) for split in manifest.splits)
    rows: list[dict[str, Any]] = []
    kept = None
    began = time.monotonic()
    with Bar("evaluate", images) as bar:
        if settings.where.here:
            embedded = _features(
                encoders, data, manifest, published.preprocessing, settings.limit, settings.limit, device, bar, settings.threads
            )
        else:
            asked = {"limit": settings.limit, "baselines": settings.baselines, "device": settings.device}
            origin = data_at or load_run(encoder_or_run).origin
            there = str(origin) if address(origin) is not None else str(data.absolute())
            counts: dict[str, int] = {
                split: _count(manifest, split, settings.limit) for split in ("train", "test") if split in manifest.splits
            }
            at = sync.shown(home or encoder_or_run)
            found = spread.features(directory, at, there, manifest, counts, asked, settings.where, bar.advance)
            embedded = _paired(encoders, list(found.values()))
        for name in encoders:
            train, test = kept = embedded.pop(name)
            rows.append({"name": name, **_scores(train, test, config, settings.k, device)})
            bar.update(bar.done, f"{name}: {_score_text(rows[-1])}")
    assert kept is not None
    k, voters = settings.k or config.watch.k, len(kept[0].labelled().y)
    if 0 < voters < k:
        say(f"kNN: all {voters:,} labelled training images vote, since k is {k:,}; a smaller --k tells more")
        k = voters
    evaluated = load_run(encoder_or_run) if (encoder_or_run / "run.json").is_file() else None
    limit = scores.limited_to(manifest, settings.limit, settings.limit)
    shown = sync.shown(data_at or (evaluated.origin if evaluated else data))
    measured = _measured(data, manifest, shown, limit, rows[-1], kept, k, config, directory)
    say(f"scored on {measured.told('knn_top1' if 'knn_top1' in rows[-1] else 'rankme')}")
    if "knn_top1" in rows[-1] and (aside := unscored(method_name(config), sync.shown(home or encoder_or_run) if evaluated else "ENCODER")):
        say(aside)
    if evaluated is not None:
        from pipelines.html.pictures import write_pictures

        _say_kept(evaluated, measured)
        if measured.whole or evaluated.evaluation() is None:
            write_pictures(
                encoder_or_run / "pictures.npz",
                config,
                data,
                *kept,
                query_split=sorted(manifest.splits)[0],
                device=device,
                published=published,
                painter=_painter(evaluated, home),
                at=shown,
            )
        scores.write(evaluated, rows, measured, k=k)
        evaluated.took("evaluate", time.monotonic() - began)
    return rows


def _painter(run: Run, home: Path | None) -> mae.Network | None:
    """Encoder and decoder of a run of MAE, from its newest checkpoint, since it publishes no decoder; None without a checkpoint, which is
    said, and for other runs. `home`: as in `run`."""
    if not isinstance(run.config, MAE):
        return None
    from simclr import checkpoint
    from simclr.methods import mae

    if home is not None:
        sync.Home(home).fetch_newest()
    newest = checkpoint.latest(run.checkpoints, say)
    if newest is None:
        shown = sync.shown(home or run.path)
        say(f"the page will not show what the network paints: that takes a checkpoint, which has the decoder, and {shown} has none left")
        return None
    return mae.network_in(checkpoint.read(newest), run.config)


def _measured(
    data: Path,
    manifest: Manifest,
    shown: str,
    limit: str,
    row: dict[str, Any],
    embedded: tuple[Features, Features],
    k: int,
    config: Config,
    encoder: Path,
) -> scores.Measured:
    """What the scores in `row`, of (training, test) features, were measured on and how: k neighbours voted. The published `encoder` says of
    which step it is."""
    from simclr.encoder.directory import read_text

    found = {name: float(value) for name, value in row.items() if name != "name" and scores.higher_is_better(name)}
    _, test = embedded
    labelled = int((test.y >= 0).sum())
    images = {name: min(RANKED, len(test.y)) if name == "rankme" else labelled for name in found}
    step = read_text(encoder).get("published", {}).get("step")
    return scores.Measured.of(
        data,
        manifest,
        shown,
        split=scores.judged(manifest),
        limit=limit,
        step=step if isinstance(step, int) else None,
        images=images,
        protocols={name: _protocol(name, k, config.watch.temperature) for name in found},
        intervals=scores.intervals_of(found, images),
    )


def _protocol(score: str, k: int, temperature: float) -> str:
    if score == "rankme":
        return f"RankMe of at most {RANKED:,} images"
    if score.startswith("knn"):
        return f"weighted kNN, k {k}, temperature {temperature:g}, cosine"
    _, at, share = score.partition("_at_")
    return "linear probe, L-BFGS, weight decay chosen among six" + (f", fitted to {share} of each class" if at else "")


def _say_kept(run: Run, measured: scores.Measured) -> None:
    """Say so where a whole evaluation stays beside a limited one, or one of other data goes."""
    before = run.evaluation()
    if before is None:
        return
    if not measured.whole:
        limited = run.evaluation_file(limited=True)
        say(f"{run.evaluation_file()} keeps the scores of all images; these, of {measured.limit}, are in {limited.name}")
        return
    there = scores.measured_in(before, run.evaluation_file())
    if there.shards_sha256 and there.shards_sha256 != measured.shards_sha256:
        say(f"{run.evaluation_file()} had scores on {there.data} (sha256 {there.shards_sha256[:12]}…); these, on other data, replace them")


def _count(manifest: Manifest, split: str, limit: int | None) -> int:
    return min(limit or manifest.examples(split), manifest.examples(split))


def _features(
    encoders: Mapping[str, Any],
    data: Path,
    manifest: Manifest,
    seen: Preprocessing,
    most_train: int | None,
    most_test: int | None,
    device: torch.device,
    bar: Bar,
    threads: int,
) -> dict[str, tuple[Features, Features]]:
    """(training, test) features under each encoder. An image is decoded once for all of them."""
    from simclr.data.loader import in_order
    from simclr.evaluation.features import embed_each

    found = []
    for split, limit in (("train", most_train), ("test", most_test)):
        if split in manifest.splits:
            batches = in_order(data, split, seen, spread.BATCH, limit, threads)
            found.append(embed_each(list(encoders.values()), batches, _count(manifest, split, limit), seen, device, bar.advance))
    return _paired(encoders, found)


def _paired(names: Iterable[str], found: list[list[Features]]) -> dict[str, tuple[Features, Features]]:
    """Name → (training, test) of the features of one or two splits under each encoder."""
    if len(found) == 1:
        return {name: held_back(train) for name, train in zip(names, found[0], strict=True)}
    return dict(zip(names, zip(*found, strict=True), strict=True))


def _scores(train: Features, test: Features, config: Config, k: int | None, device: torch.device) -> dict[str, float]:
    from simclr.evaluation.representation import rankme

    health = {"rankme": float(rankme(test.h[:RANKED].to(device)))}
    return scored(train, test, k or config.watch.k, config.watch.temperature, device) | health


def scored(train: Features, test: Features, k: int, temperature: float, device: torch.device) -> dict[str, float]:
    """knn_top1, probe_top1, … of the labelled rows; nothing where a split has none."""
    import torch

    from simclr.evaluation.knn import knn
    from simclr.evaluation.linear import linear_probe
    from simclr.evaluation.rows import placed

    at, among = (torch.nonzero(part.y >= 0)[:, 0] for part in (train, test))
    if not len(at) or not len(among):
        return {}
    # Whole splits without an index, which would copy each block.
    bank, queries = (
        placed(part.h, device) if len(chosen) == len(part.y) else placed(part.h, device).chosen(chosen)
        for part, chosen in ((train, at), (test, among))
    )
    votes = knn(bank, train.y[at], queries, test.y[among], k, temperature)
    probe = linear_probe(bank, train.y[at], queries, test.y[among])
    return {f"knn_{name}": value for name, value in votes.items()} | {f"probe_{name}": value for name, value in probe.items()}


def score(run: Run, data: Path, device: torch.device, shares: tuple[float, ...] = ()) -> dict[str, float]:
    """The scores of a finished run's encoder, over at most watch.bank training and watch.queries test images; also written to the
    run for `simclr publish`. For a trial of a sweep: without baselines and pictures.

    Each of `shares` adds a probe that is fitted to that share of each class's training images: probe_top1_at_0.01, ….
    """
    manifest = read_manifest(data)
    require_common_classes(data, manifest)
    import simclr
    from simclr.evaluation.linear import linear_probe
    from simclr.evaluation.rows import placed

    published, watch = simclr.load_encoder(run.encoder), run.config.watch
    encoder, seen = published.encoder.to(device), published.preprocessing
    encoders = {"trained encoder": encoder}
    with Bar("evaluate", None) as bar:
        (train, test), *_ = _features(encoders, data, manifest, seen, watch.bank, watch.queries, device, bar, 1).values()
    row, embedded = _scores(train, test, run.config, None, device), (train, test)
    train, test = train.labelled(), test.labelled()
    for share in shares if len(train.y) and len(test.y) else ():
        some = _share(train, share)
        row[f"probe_top1_at_{share:g}"] = linear_probe(placed(some.h, device), some.y, test.h, test.y)["top1"]
    k = min(watch.k, len(train.y) or watch.k)
    limit = scores.limited_to(manifest, watch.bank, watch.queries)
    measured = _measured(data, manifest, run.origin, limit, row, embedded, k, run.config, run.encoder)
    scores.write(run, [{"name": "trained encoder", **row}], measured, k=k)
    return row


def _share(train: Features, share: float) -> Features:
    """A share of each class's images, at least one; every run takes the same ones."""
    import torch

    from simclr import keyed

    order = torch.from_numpy(keyed.permutation(0, 2, len(train.y))).to(train.y.device)
    chosen = [found[: max(round(share * len(found)), 1)] for c in train.y.unique() for found in [order[train.y[order] == c]]]
    return train[torch.cat(chosen).sort().values]


def scores_of(run: Path) -> tuple[list[dict[str, Any]], scores.Measured]:
    """The rows of `evaluate` for a run, and what they were measured on: of all images or, if it was evaluated on some alone, of those.
    Raises UserError if it was not evaluated yet."""
    found = scores.newest(load_run(run))
    if found is None:
        raise UserError(f"{run} was not evaluated yet; `simclr evaluate {run}` does it")
    text, measured = found
    rows: list[dict[str, Any]] = text["scores"]
    return rows, measured


def _score_text(row: dict[str, Any]) -> str:
    return f"kNN {100 * row['knn_top1']:.1f} %" if "knn_top1" in row else f"RankMe {row['rankme']:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: kNN and probe in per cent, or the effective rank without labels."""
    if "knn_top1" not in rows[-1]:
        return "\n".join([f"{'no labels':<20} {'RankMe':>6}", *(f"{row['name']:<20} {row['rankme']:>6.1f}" for row in rows)])
    lines = [f"{'top-1, %':<20} {'kNN':>6} {'probe':>6}"]
    lines += [f"{row['name']:<20} {100 * row['knn_top1']:>6.1f} {100 * row['probe_top1']:>6.1f}" for row in rows]
    return "\n".join(lines)
