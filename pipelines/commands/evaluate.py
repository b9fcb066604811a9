"""`simclr evaluate`: encoder + data → the quick table, the papers' protocols (`protocols`), or the transfer suite (`transfer`)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipelines.commands.report import refresh
from pipelines.evaluation import protocols, quick
from pipelines.evaluation.inputs import default_out, device_of, opened, resolve
from pipelines.parts.run import Where
from pipelines.runs import sync
from pipelines.runs.directory import load_run
from pipelines.terminal import say, show
from pipelines.tracking import evaluated, trust
from pipelines.tracking import uri as mlflow_uri
from pipelines.tracking.outbox import SCORES, log_scores
from simclr import files
from simclr.cores import cores
from simclr.data.s3.uri import address
from simclr.errors import UserError


@dataclass(frozen=True)
class Args:
    """Weighted kNN and a linear probe on frozen features of the training split, scored on the test split.

    Without a test split, a tenth of the training images is held back for it. Images without a label are left out. Data without any
    label gets the effective rank of its features (RankMe). A run's scores are kept in it and go to its MLflow run as evaluate/knn_top1, ….
    Those of --limit are kept beside the others, and do not.

    --protocol asks for the papers' protocols instead: top-1 with its 95 % bootstrap interval, top-5, every class, and the
    confusion table as a picture. --features takes features from disk instead of an encoder. --suite transfer runs the twelve datasets
    of the paper's Table 8.
    """

    encoder: Annotated[Path | None, tyro.conf.Positional] = None
    """Run directory, or a published encoder's directory; s3://bucket/prefix of one; or NAME@alias, NAME/version of the registry."""
    features: tuple[str, ...] = ()
    """TRAIN or TRAIN TEST instead of an encoder: features that `simclr embed` wrote (a folder of parts, one .parquet, s3://bucket/prefix).
    One place is cut by its column `split`; of two, each is a split as a whole."""
    data: Path | None = None
    """Directory or s3://bucket/prefix of prepared shards; or pictures: a folder or an archive on disk, whose features are then taken as
    `simclr embed` takes them, without baselines. Default: the data of the run."""
    k: int | None = None
    """Neighbours that vote. Default: the config's watch.k."""
    baselines: bool = True
    """Also score raw pixels and the untrained encoder, for comparison."""
    limit: int | None = None
    """Images of each split, at most; every run takes the same ones. Default: all."""
    device: str = "auto"
    """auto, cpu or cuda."""
    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)
    protocol: tuple[protocols.Protocol, ...] = ()
    """knn: weighted votes. probe: the quick table's. lbfgs: the transfer protocol's 45 penalties, chosen on a fifth of every class,
    then fitted again (arXiv:2002.05709, App. B.8). sgd: linear evaluation on random crops and flips (App. B.6). zero-shot: by the names of
    the classes, for an encoder of image–text pairs (arXiv:2103.00020, Sec. 3.1). Default: the quick table."""
    prompts: tuple[str, ...] = ()
    """zero-shot: what is made of a class's name, in the place of {}; of several the features' mean. Default: the config's prompt."""
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
    """Suite: the folder of torchvision's datasets, in its own layout, with birdsnap/train and birdsnap/test beside them."""
    only: tuple[str, ...] = ()
    """Suite: the datasets, as in `--only cifar10,dtd`. Default: all that are there."""
    fine_tune: bool = False
    """Suite: also fine-tune the whole network on each dataset. The paper's 56 pairs of learning rate and weight decay, 20,000 steps of
    256 images each, take days on a GPU; --rates, --decays and --tuning-steps make it less."""
    tuning_steps: int = 20_000
    """Suite, --fine-tune: optimizer steps of each training."""
    rates: tuple[float, ...] = ()
    """Suite, --fine-tune: learning rates to try. Default: 7 from 1e-4 to 0.1, evenly in their logarithm."""
    decays: tuple[float, ...] = ()
    """Suite, --fine-tune: weight decays to try, each divided by the learning rate. Default: 0 and 7 from 1e-6 to 1e-3."""
    download: bool = False
    """Suite: let torchvision download absent datasets."""
    threads: int | None = None
    """Threads that read and decode images. Default: all cores."""
    out: Path | None = None
    """Directory for JSON and pictures of --protocol and --suite. Default: evaluation/ in a run or encoder directory on disk, else
    runs/evaluation/NAME."""
    tracking_uri: str | None = None
    """MLflow address, for an encoder of the registry, and for a run's scores, which go to its MLflow run. Default: $MLFLOW_TRACKING_URI,
    else the database under runs/."""


def main(args: Args) -> None:
    if args.suite and args.protocol:
        raise UserError("--suite transfer has a protocol of its own; leave out --protocol, or evaluate twice")
    if args.prompts and "zero-shot" not in args.protocol:
        raise UserError("--prompts are for --protocol zero-shot; add that, or leave them out")
    if args.tuning_steps < 1 or min(args.rates, default=1.0) <= 0 or min(args.decays, default=0.0) < 0:
        raise UserError("expected --tuning-steps of at least 1, --rates above 0 and --decays of 0 or more")
    if not args.suite and (args.root or args.only or args.download or args.fine_tune):
        raise UserError("--root, --only, --fine-tune and --download belong to --suite transfer; add that, or leave them out")
    if not args.where.here and (args.suite or args.protocol or args.features):
        raise UserError("--address and --workers are the quick table's; leave them out with --suite, --protocol and --features")
    if args.features:
        _features(args)
        return
    if args.data is not None and not args.suite and _is_no_shards(args.data):
        _pictures(args, args.data)
        return
    if not args.suite and not args.protocol:
        show(quick.table(evaluate(args)))
        return
    _check(args)
    encoder = _encoder(args)
    out, name = args.out or default_out(encoder), sync.shown(encoder)
    files.require_folder(out)
    with opened(encoder, args.tracking_uri) as directory:
        if args.suite:
            _suite(args, directory, out, name)
        else:
            _protocols(args, directory, out, name)
        if set(args.protocol) != {"zero-shot"}:
            protocols.say_unscored(_pretrained(directory), name if (directory / "run.json").is_file() else "ENCODER")
        if not args.suite and args.limit is None:
            _logged(args, directory)


def _pretrained(directory: Path) -> str:
    """The method of the run or published encoder in `directory`."""
    from simclr.encoder.directory import read_text

    published = directory / "encoder" if (directory / "run.json").is_file() else directory
    return str(read_text(published).get("method", ""))


def _logged(args: Args, directory: Path) -> None:
    """Send what was found of a run to MLflow, if that knows the run: at an address that the user names, or in a database of the user's.
    MLflow never holds an evaluation up, and its failure is no error of it."""
    if not (directory / "run.json").is_file() or not (run := load_run(directory)).tracking_run:
        return
    refresh(run)
    if not evaluated.whole(run):
        return
    asked = args.encoder or directory
    named = args.tracking_uri or mlflow_uri.same_server(mlflow_uri.tracking_address(None), run.tracking_uri)
    if not named and mlflow_uri.database_file(run.tracking_uri) is None:
        run.noted(unlogged=run.unlogged or SCORES)
        say(f"the scores are not sent to {run.tracking_uri}, which run.json alone names: give it with --tracking-uri, or publish the run")
        return
    try:
        uri = trust.address_for(run, args.tracking_uri, asked)
    except UserError as error:
        run.noted(unlogged=run.unlogged or SCORES)
        say(f"the scores are not sent to MLflow: {error}")
        return
    log_scores(run, uri)


def _encoder(args: Args) -> Path:
    if args.encoder is None:
        raise UserError("what is to be evaluated? give a run, an encoder's directory or NAME@alias, or --features TRAIN [TEST]")
    return args.encoder


def _features(args: Args) -> None:
    from pipelines.evaluation import tables

    if args.encoder is not None:
        raise UserError(f"--features are an encoder's already; leave out {args.encoder}, or give it after the command alone, without them")
    _require_an_encoder(args)
    if args.suite or args.data or "sgd" in args.protocol:
        raise UserError("--features have no pictures, which --suite, --data and --protocol sgd read; leave those out")
    if len(args.features) > 2:
        raise UserError(f"--features has {len(args.features)} places; expected TRAIN, or TRAIN TEST")
    _check(args)
    settings = _protocol_settings(args)
    if args.out is not None:
        files.require_folder(args.out)
    tables.run(args.features, tuple(dict.fromkeys(args.protocol)), device_of(args.device), settings, args.out)


def _require_an_encoder(args: Args) -> None:
    """Raise UserError for the protocol that has to read shards by the encoder itself."""
    if "zero-shot" in args.protocol:
        raise UserError("--protocol zero-shot reads shards by an encoder with a text tower; give these, or leave it out")


def _is_no_shards(data: Path) -> bool:
    """Whether there are files of another kind at `data`. What an interrupted `prepare` has left counts as shards."""
    if address(data) is not None or not data.exists():
        return False
    return data.is_file() or not ((data / "manifest.json").exists() or any(data.glob("*.beton")) or any(data.glob(".writing-*")))


def _pictures(args: Args, data: Path) -> None:
    """Score pictures that nobody has prepared: what `simclr embed` and then --features would give."""
    from pipelines.commands import embed
    from pipelines.evaluation import tables

    _require_an_encoder(args)
    if "sgd" in args.protocol:
        raise UserError(
            f"{data} are no shards, which --protocol sgd draws crops from; run `simclr prepare --source {data} --out DIR` first"
        )
    _check(args)
    encoder, device, settings = _encoder(args), device_of(args.device), _protocol_settings(args)
    say(f"{data} is no directory of shards: its pictures are read as `simclr embed` reads them, and there are no baselines")
    with tempfile.TemporaryDirectory(prefix="simclr-") as scratch, opened(encoder, args.tracking_uri) as directory:
        published = directory / "encoder" if (directory / "run.json").is_file() else directory
        there = Path(scratch) / "features"
        on: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
        embed.run_embed(embed.Args(published, (str(data),), out=there, where=args.where, device=on))
        tables.run([str(there)], tuple(dict.fromkeys(args.protocol)), device, settings, args.out or default_out(encoder))


def _suite(args: Args, directory: Path, out: Path, name: str) -> None:
    from pipelines.evaluation import suite

    if args.root is None:
        raise UserError("where are the datasets? give --root DIR, the folder that torchvision's datasets lie in")
    if args.data is not None:
        raise UserError("--data is for shards; --suite transfer reads torchvision's folders under --root, so leave it out")
    settings = suite.Settings(
        root=args.root,
        only=args.only,
        fine_tune=args.fine_tune,
        tuning_steps=args.tuning_steps,
        rates=args.rates,
        decays=args.decays,
        download=args.download,
        threads=_threads(args),
        resamples=args.resamples,
        limit=args.limit,
        device=args.device,
    )
    suite.run(directory, settings, out, name)


def _protocols(args: Args, directory: Path, out: Path, name: str) -> None:
    published, config, data = resolve(directory, args.data)
    import simclr

    device = device_of(args.device)
    settings = replace(_protocol_settings(args), prompts=args.prompts, published=published)
    encoder = simclr.load_encoder(published)
    own = load_run(directory).origin if (directory / "run.json").is_file() else data
    shown = sync.shown(args.data or own)
    protocols.run(tuple(dict.fromkeys(args.protocol)), encoder, data, config, device, settings, out, name, shown)


def _protocol_settings(args: Args) -> protocols.Settings:
    return protocols.Settings(
        k=args.k,
        temperature=args.temperature,
        epochs=args.epochs,
        batch_size=args.batch_size,
        resamples=args.resamples,
        limit=args.limit,
        threads=_threads(args),
    )


def evaluate(args: Args) -> list[dict[str, Any]]:
    """The rows of the quick table (`quick.run`). In a run directory they are also written, with the report's pictures."""
    _check(args)
    settings = quick.Settings(
        k=args.k, baselines=args.baselines, limit=args.limit, device=args.device, threads=_threads(args), where=args.where
    )
    encoder = _encoder(args)
    with opened(encoder, args.tracking_uri) as directory:
        rows = quick.run(directory, args.data, settings, encoder if address(encoder) is not None else None)
        if args.limit is None:
            _logged(args, directory)
        return rows


def _threads(args: Args) -> int:
    return args.threads or cores()


def _check(args: Args) -> None:
    least = {"k": 1, "limit": 2, "epochs": 0.0, "temperature": 0.0, "batch_size": 2, "resamples": 100, "threads": 1}
    for name, value in ((name, getattr(args, name)) for name in least):
        strictly = isinstance(least[name], float)
        if value is not None and (value < least[name] or (strictly and value == least[name])):
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected {'more than' if strictly else 'at least'} {least[name]:g}")
    if args.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {args.device!r}; expected auto, cpu or cuda")
