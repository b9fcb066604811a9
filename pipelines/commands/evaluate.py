"""`simclr evaluate`: encoder + data → the quick table, the papers' protocols (`protocols`), or the transfer suite (`transfer`)."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pipelines.evaluation import protocols
from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run
from pipelines.terminal import Bar
from simclr import files
from simclr.config import Config
from simclr.data.manifest import read_manifest

if TYPE_CHECKING:
    import torch

    from simclr.evaluation.features import Features

_RANKED = 2048  # features whose singular values are taken


@dataclass(frozen=True)
class Args:
    """Weighted kNN and a linear probe on frozen features of the training split, scored on the test split.

    Without a test split a tenth of the training images is held back for it. Images without a label count for nothing; where
    there are no labels at all, the effective rank of the features (RankMe) is what can be said.

    --protocol asks for the papers' protocols instead: top-1 with its 95 % bootstrap interval, top-5, every class, and the
    confusion table as a picture. --suite transfer runs the twelve datasets of the paper's Table 8.
    """

    encoder: Annotated[Path, tyro.conf.Positional]
    """Run directory, or a published encoder's directory; s3://bucket/prefix of one; or NAME@alias, NAME/version of the registry."""
    data: Path | None = None
    """Directory or s3://bucket/prefix of prepared shards. Default: the data of the run."""
    k: int | None = None
    """Neighbours that vote. Default: the config's watch.k."""
    baselines: bool = True
    """Also score raw pixels and the untrained encoder: what a score is to be compared with."""
    limit: int | None = None
    """Images of each split, at most; which ones is the same in every run. Default: all."""
    device: str = "auto"
    """auto, cpu or cuda."""
    protocol: tuple[protocols.Protocol, ...] = ()
    """knn: weighted votes. probe: the quick table's. lbfgs: the transfer protocol's 45 penalties, chosen on a fifth of every class,
    then fitted again (arXiv:2002.05709, App. B.8). sgd: linear evaluation on random crops and flips (App. B.6). Default: the
    quick table."""
    temperature: float | None = None
    """knn: a neighbour's vote weighs exp(cosine / temperature). Default: the config's watch.temperature."""
    epochs: float = 90.0
    """sgd: passes over the training split."""
    batch_size: int | None = None
    """sgd: N; the peak learning rate is 0.1 N / 256. Default: the largest power of two, 4096 at most, that leaves 90 steps per
    epoch, as the official README has it for CIFAR-10 and ImageNet."""
    resamples: int = 1000
    """Bootstrap resamples of the test images behind an interval."""
    suite: Literal["transfer"] | None = None
    """transfer: the twelve datasets under --root, each split and scored by its own rule."""
    root: Path | None = None
    """Suite: the folder that torchvision's datasets lie in, as its classes lay them out; birdsnap/train and birdsnap/test beside."""
    only: tuple[str, ...] = ()
    """Suite: which datasets, as in `--only cifar10,dtd`. Default: all that are there."""
    fine_tune: bool = False
    """Suite: also fine-tune the whole network on each dataset: the paper's 56 pairs of learning rate and weight decay, 20,000 steps
    of 256 images each, are days of a GPU; --rates, --decays and --tuning-steps make it less."""
    tuning_steps: int = 20_000
    """Suite, --fine-tune: optimizer steps of each training."""
    rates: tuple[float, ...] = ()
    """Suite, --fine-tune: learning rates to try. Default: 7 from 1e-4 to 0.1, evenly in their logarithm."""
    decays: tuple[float, ...] = ()
    """Suite, --fine-tune: weight decays to try, each divided by the learning rate. Default: 0 and 7 from 1e-6 to 1e-3."""
    download: bool = False
    """Suite: have torchvision fetch what is absent."""
    threads: int = 1
    """Threads that read and decode images."""
    out: Path | None = None
    """Directory for JSON and pictures of --protocol and --suite. Default: evaluation/ in a run or encoder directory on disk, else
    runs/evaluation/NAME."""
    tracking_uri: str | None = None
    """MLflow address, for an encoder of the registry. Default: $MLFLOW_TRACKING_URI, else the database under runs/."""


def main(args: Args) -> None:
    if args.suite and args.protocol:
        raise ValueError("--suite transfer has a protocol of its own; leave out --protocol, or evaluate twice")
    if args.tuning_steps < 1 or min(args.rates, default=1.0) <= 0 or min(args.decays, default=0.0) < 0:
        raise ValueError("expected --tuning-steps of at least 1, --rates above 0 and --decays of 0 or more")
    if not args.suite and (args.root or args.only or args.download or args.fine_tune):
        raise ValueError("--root, --only, --fine-tune and --download belong to --suite transfer; add that, or leave them out")
    if not args.suite and not args.protocol:
        print(table(evaluate(args)))
        return
    _check(args)
    out = args.out or default_out(args.encoder)
    with opened(args.encoder, args.tracking_uri) as encoder:
        if args.suite:
            from pipelines.evaluation import suite

            suite.run(replace(args, encoder=encoder), out, sync.shown(args.encoder))
        else:
            _protocols(replace(args, encoder=encoder), out, sync.shown(args.encoder))


def _protocols(args: Args, out: Path, name: str) -> None:
    directory, config, data = resolve(args.encoder, args.data)
    import simclr

    device = device_of(args.device)
    settings = protocols.Settings(
        k=args.k,
        temperature=args.temperature,
        epochs=args.epochs,
        batch_size=args.batch_size,
        resamples=args.resamples,
        limit=args.limit,
        threads=args.threads,
    )
    encoder = simclr.load_encoder(directory).encoder.to(device)
    protocols.run(tuple(dict.fromkeys(args.protocol)), encoder, data, config, device, settings, out, name)


def default_out(encoder: Path) -> Path:
    """Where results go without --out: into a directory on disk; of S3 and the registry there is only a copy, which goes away."""
    if encoder.is_dir():
        return encoder / "evaluation"
    return Path("runs/evaluation") / re.sub(r"[^\w.-]+", "-", sync.shown(encoder).removeprefix("s3://"))


@contextlib.contextmanager
def opened(encoder: Path, tracking_uri: str | None) -> Iterator[Path]:
    """The directory of the encoder that a command was given: as `storage.directory`, or pulled from the registry until the end."""
    named = str(encoder)
    if encoder.exists() or not re.fullmatch(r"[^@/:]+(@[^@/:]+|/\d+)", named):
        with sync.directory(encoder) as directory:
            yield directory
        return
    from pipelines.tracking import client
    from pipelines.tracking import uri as mlflow_uri

    uri = mlflow_uri.tracking_address(tracking_uri)
    mlflow_uri.check(uri)
    with tempfile.TemporaryDirectory() as scratch:
        with Bar("download", None, "MiB", "MiB/s") as bar:
            client.pull(uri, named, Path(scratch) / "encoder", sync.mebibytes(bar))
        yield Path(scratch) / "encoder"


def device_of(name: str) -> torch.device:
    """auto is the GPU where torch sees one, which then computes in float32 as such. Raises ValueError where `name` asks for one that is
    not there."""
    import torch

    from simclr.precision import set_backends

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU here; leave it out to use the CPU")
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
    set_backends("float32", device)
    return device


def _check(args: Args) -> None:
    least = {"k": 1, "limit": 2, "epochs": 0.0, "temperature": 0.0, "batch_size": 2, "resamples": 100, "threads": 1}
    for field, value in ((name, getattr(args, name)) for name in least):
        strictly = isinstance(least[field], float)
        if value is not None and (value < least[field] or (strictly and value == least[field])):
            raise ValueError(f"--{field.replace('_', '-')} is {value}; expected {'more than' if strictly else 'at least'} {least[field]:g}")
    if args.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {args.device!r}; expected auto, cpu or cuda")


def evaluate(args: Args) -> list[dict[str, Any]]:
    """The score rows, weakest method first: name, rankme, and where there are labels knn_top1, probe_top1, ….

    In a run directory they are also written, with what the report shows of them.
    """
    _check(args)
    with opened(args.encoder, args.tracking_uri) as encoder:
        return _evaluate(replace(args, encoder=encoder))


def _evaluate(args: Args) -> list[dict[str, Any]]:
    directory, config, data = resolve(args.encoder, args.data)
    manifest = read_manifest(data)
    import simclr
    from simclr.evaluation.features import pixels
    from simclr.methods.simclr import build_model

    device = device_of(args.device)
    trained = simclr.load_encoder(directory).encoder
    encoders: dict[str, Any] = {}
    if args.baselines:
        if manifest.classes:
            encoders["raw pixels"] = _Pixels() if manifest.kind == "jpeg" else pixels
        encoders["untrained encoder"] = build_model(config).encoder.eval().to(device)
    encoders["trained encoder"] = trained.to(device)
    images = sum(min(args.limit or manifest.examples(s), manifest.examples(s)) for s in manifest.splits) * len(encoders)
    rows: list[dict[str, Any]] = []
    kept = None
    began = time.monotonic()
    with Bar("evaluate", images) as bar:
        for name, encoder in encoders.items():
            train = _features(encoder, data, "train", config, args.limit, device, bar)
            if "test" in manifest.splits:
                test = _features(encoder, data, "test", config, args.limit, device, bar)
            else:
                train, test = held_back(train)
            rows.append({"name": name, **_scores(train, test, config, args.k)})
            bar.update(bar.done, f"{name}: {_score_text(rows[-1])}")
            kept = (train, test)
    assert kept is not None
    if (args.encoder / "run.json").is_file():
        from pipelines.html.pictures import write_pictures

        write_pictures(args.encoder / "pictures.npz", config, data, *kept, query_split=sorted(manifest.splits)[0])
        shown = sync.shown(args.data or load_run(args.encoder).origin)
        text = {"scores": rows, "data": shown, "k": args.k or config.watch.k, "time": time.time()}
        files.write_text(args.encoder / "evaluation.json", json.dumps(text, indent=1) + "\n")
        load_run(args.encoder).took("evaluate", time.monotonic() - began)
    return rows


def resolve(encoder: Path, data: Path | None) -> tuple[Path, Config, Path]:
    """(published encoder directory, its config, data directory) of a run or an encoder directory."""
    if (encoder / "run.json").is_file():
        run = load_run(encoder)
        if not run.encoder.is_dir():
            raise ValueError(f"{encoder} has no encoder yet; finish it with the command that began it: {run.command}")
        return run.encoder, run.config, sync.shards(data or run.origin)
    if not (encoder / "config.json").is_file():
        raise ValueError(f"{encoder} is neither a run nor a published encoder; give a run directory, or `simclr pull` one")
    if data is None:
        raise ValueError("which data? give --data DIR (a run directory knows its own, a published encoder does not)")
    text = json.loads((encoder / "config.json").read_text())
    from simclr.encoder.directory import config_of

    return encoder, config_of(text), sync.shards(data)


def _features(encoder: Any, data: Path, split: str, config: Config, limit: int | None, device: torch.device, bar: Bar) -> Features:
    from simclr.data.loader import in_order
    from simclr.evaluation.features import embed

    batches = in_order(data, split, config.views.size_px, 256, limit, resize=config.views.resize)
    return embed(encoder, batches, config.views, device, progress=bar.advance)


def held_back(train: Features) -> tuple[Features, Features]:
    """(the rest, a tenth): which images is the same for every encoder."""
    import torch

    from simclr import keyed

    order = torch.from_numpy(keyed.permutation(0, 1, len(train.ids))).to(train.h.device)
    tenth = max(len(order) // 10, 1)
    return train[order[tenth:].sort().values], train[order[:tenth].sort().values]


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
    run for `simclr publish`. What a trial of a sweep needs: no baselines, no pictures.

    For each of `shares` there is a probe more, fitted to that share of each class's training images: probe_top1_at_0.01, ….
    """
    import simclr
    from simclr.evaluation.linear import linear_probe

    encoder, watch = simclr.load_encoder(run.encoder).encoder.to(device), run.config.watch
    with Bar("evaluate", None) as bar:
        train = _features(encoder, data, "train", run.config, watch.bank, device, bar)
        if "test" in read_manifest(data).splits:
            test = _features(encoder, data, "test", run.config, watch.queries, device, bar)
        else:
            train, test = held_back(train)
    row = _scores(train, test, run.config, None)
    train, test = train.labelled(), test.labelled()
    for share in shares if len(train.y) and len(test.y) else ():
        some = _share(train, share)
        row[f"probe_top1_at_{share:g}"] = linear_probe(some.h, some.y, test.h, test.y)["top1"]
    text = {"scores": [{"name": "trained encoder", **row}], "data": run.origin, "k": watch.k, "time": time.time()}
    files.write_text(run.path / "evaluation.json", json.dumps(text, indent=1) + "\n")
    return row


def _share(train: Features, share: float) -> Features:
    """A share of each class's images, at least one; which ones is the same in every run."""
    import torch

    from simclr import keyed

    order = torch.from_numpy(keyed.permutation(0, 2, len(train.y))).to(train.y.device)
    chosen = [found[: max(round(share * len(found)), 1)] for c in train.y.unique() for found in [order[train.y[order] == c]]]
    return train[torch.cat(chosen).sort().values]


class _Pixels:
    """Photographs as rows of 32 × 32 pixels: 150,528 numbers each would ask for a larger machine than training does."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional as F

        return F.interpolate(x, (32, 32), mode="area").flatten(1)


def scores_of(run: Path) -> list[dict[str, Any]]:
    """The rows that `evaluate` found for a run. Raises ValueError where it was not evaluated yet."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"{run} was not evaluated yet; `simclr evaluate {run}` does it")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["scores"]
    return rows


def _score_text(row: dict[str, Any]) -> str:
    return f"kNN {100 * row['knn_top1']:.1f} %" if "knn_top1" in row else f"RankMe {row['rankme']:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text: kNN and probe in per cent, or the effective rank where there are no labels."""
    if "knn_top1" not in rows[-1]:
        return "\n".join([f"{'no labels':<20} {'RankMe':>6}", *(f"{row['name']:<20} {row['rankme']:>6.1f}" for row in rows)])
    lines = [f"{'top-1, %':<20} {'kNN':>6} {'probe':>6}"]
    lines += [f"{row['name']:<20} {100 * row['knn_top1']:>6.1f} {100 * row['probe_top1']:>6.1f}" for row in rows]
    return "\n".join(lines)
