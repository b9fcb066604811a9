"""`simclr pretrain`: shards → a pretrained encoder, on Ray Train workers; the same command again goes on where it stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from pipelines.evaluation import inputs
from pipelines.runs import sync
from pipelines.runs.config_file import given_to
from pipelines.runs.directory import Run, open_run
from pipelines.terminal import show
from pipelines.tracking import tensorboard
from pipelines.train import driver, plan, subset, warm_start
from pipelines.train.resources import Resources
from simclr import sense
from simclr.config import Config
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError
from simclr.family import MoCo, MoCoV3, method_name
from simclr.papers import named
from simclr.recipes import changed_from

if TYPE_CHECKING:
    from simclr.encoder.weights import Weights
    from simclr.methods.method import Method


@dataclass(frozen=True)
class Args:
    """Pretrain an encoder by a recipe; every field of the recipe is a flag. `simclr pretrain --extend RUN` needs neither recipe nor --data:
    it has those of RUN."""

    data: Path
    """Directory or s3://bucket/prefix of prepared shards (`simclr prepare`); each node fetches those of S3 once."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.Suppress] = ""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file with the config, in place of a recipe: YAML as `simclr recipes NAME` writes it, or a run's run.json. Flags change it."""
    dry_run: bool = False
    """Say what the run would do, need and leave: steps, images and memory of a worker, time, disk, checkpoints. Nothing is started or
    written."""
    run: Path | None = None
    """Run directory or s3://bucket/prefix, for checkpoints too; a run there goes on, on any machine.
    Default: runs/RECIPE-DIGEST, the same for the same config and data."""
    subset: Path | None = None
    """A list of the only images to train on, one a line, by file name or sample id: what `simclr curate` writes. They need no labels. The
    run keeps it as subset.txt. Default: all images; with --extend those of the run."""
    start: Path | None = None
    """Weights to begin with: a run, a published encoder, s3://bucket/prefix of either, NAME@alias in the registry, or a .safetensors or
    .pth file of a ResNet by torchvision's names or of a vision transformer by timm's. Optimizer and schedule begin anew. Default: initial
    weights drawn by the seed."""
    extend: Path | None = None
    """A complete run, on disk or at s3://bucket/prefix, to train on from in a new run, by its config: a new warm-up and cosine from its
    weights (--train.epochs N long), not what more epochs from the beginning would have given. Of SimCLR's siblings averages, queues and
    heads go on too, from the newest checkpoint. Default of --seed: the run's + 1."""
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    tracking_uri: str | None = None
    """MLflow address. Default: $MLFLOW_TRACKING_URI, else a database under runs/, without a server."""
    tensorboard: tuple[Path, ...] | None = None
    """Write TensorBoard's scalars, too (the extra tensorboard): into DIR/RUN of --tensorboard DIR, or into the run's own
    folder tensorboard of --tensorboard alone."""

    @staticmethod
    def usual(config: Config) -> dict[str, str]:
        """The flags that most people want, of a recipe with this `config`, each with what it is."""
        encoder = config.encoder
        network = {"--encoder.timm": "the network"} if encoder.timm else {"--encoder.vit": "size of the vision transformer"}
        own = {
            "--loss.temperature": "tau of NT-Xent",
            "--temperature": "tau of InfoNCE" if isinstance(config, MoCo | MoCoV3) else "tau of the softmax that learns",
            "--prototypes": "K, vectors to which images are assigned",
            "--queue": "K, keys of earlier batches" if isinstance(config, MoCo) else "projections of earlier batches, 0 = none",
            "--mask-ratio": "share of the patches that the encoder does not see",
            "--ema": "share of itself that the moving average keeps at a step",
        }
        return {
            "RECIPE": "a named config (`simclr recipes`), or --config FILE",
            "--data": "directory or s3://bucket/prefix of prepared shards",
            "--run": "run directory; default runs/RECIPE-DIGEST",
            "--workers": "processes, one GPU each where there are GPUs",
            "--train.epochs": "passes over the training images",
            "--train.batch-size": "N, images per step over all workers",
            **(network if encoder.timm or encoder.vit else {"--encoder.depth": "layers of the ResNet"}),
            "--optim.base-lr": "learning rate per 256 images",
            **{flag: said for flag, said in own.items() if flag.removeprefix("--") in config.flat()},
            "--tracking-uri": "MLflow address; default $MLFLOW_TRACKING_URI, else a database under runs/",
        }

    @classmethod
    def defaults(cls, words: list[str]) -> Args | None:
        """The recipe, config and data of the run behind --extend in a command's `words`; None without that flag."""
        given = given_to("--extend", words)
        if given is None:
            return None
        if not words[0].startswith("-"):
            raise UserError(f"--extend has the recipe of its run; leave out {words[0]!r}, or use --start {given} for another recipe")
        run = warm_start.parent(Path(given))
        config, flags = warm_start.extension(run), {word.partition("=")[0] for word in words}
        if "--train.epochs" in flags and "--train.steps" not in flags:  # else the run's number of steps would count
            config = replace(config, train=replace(config.train, steps=None))
        kept = run.path / subset.FILE if run.subset else None
        return cls(data=Path(run.origin), config=config, recipe=run.recipe, subset=kept)


def main(args: Args) -> None:
    if args.dry_run:
        for line in dry(args):
            show(line)
        return
    run = pretrain(args)
    show(sync.shown(args.run or run.path))


def dry(args: Args) -> Iterator[str]:
    """What the run would do, need and leave, in lines, after the checks that need no Ray, no MLflow and no lease. Starts and writes
    nothing, but for a manifest of S3 in this machine's cache.

    Raises UserError as the command itself does.
    """
    config, workers = args.config, args.resources.workers
    data, manifest = sync.manifest(args.data, look=config.train.shard_groups == 1)
    only = subset.read(args.subset, data, args.data, manifest, config) if args.subset is not None else None
    examples = len(only.ids) if only is not None else manifest.examples("train", config.train.shard_groups)
    driver.require_shares(config, examples, args.resources)
    at = s3_uri.address(args.data)
    yield plan.line("config", changed_from(args.recipe, config))
    yield plan.line("method", named(method_name(config)).title)
    if args.run is not None and s3_uri.address(args.run) is not None:
        run_at = Path()
        yield plan.line("run", f"{sync.shown(args.run)}, at which a dry run does not look")
        under_way = False
    else:
        weights, start = _start(args)
        config = warm_start.fitted(config, weights)
        described = only.described if only is not None else None
        run = open_run(args.run, args.recipe, config, data, str(at or ""), start=start, subset=described)
        run_at, under_way = run.path, run.under_way
        yield plan.line("run", f"{run.path}, {'which goes on from its newest checkpoint' if under_way else 'a new one'}")
        if weights and not under_way:
            from simclr.encoder.weights import require_fit

            require_fit(config.encoder, weights, run.start["from"], config.views.size_px)
            yield plan.line("begins with", run.began_with)
    for note in sense.notes(config, manifest, examples, args.resources.counts(config), under_way):
        yield plan.line("note", note)
    yield from plan.steps(config, examples, workers)
    classes = len(manifest.classes)
    room = plan.room_here(args.resources.device, workers) if args.resources.address is None and args.resources.device != "tpu" else None
    yield from plan.memory(config, workers, classes, room, "cpu" if args.resources.device == "cpu" else "")
    if room is None:
        yield plan.line("", "the cluster's machines are not asked; `simclr cluster check FILE --dry-run --recipe …` compares with a file's")
    yield plan.duration(config, examples, workers, room.device if room is not None else "", args.run.parent if args.run else Path("runs"))
    yield from plan.storage(config, manifest, at is not None, run_at, _checkpoint(config, classes))
    yield "nothing was started or written"


def _checkpoint(config: Config, classes: int) -> int:
    """Bytes of a checkpoint: network, moving averages and queue, and the optimizer's state of what is trained."""
    from simclr.methods.choice import shapes

    method = shapes(config, classes)
    held: int = sum(t.numel() for part in (method.network, method.state) for t in part.state_dict().values())
    trained = sum(p.numel() for group in method.groups for p in group.params)
    return 4 * (held + (2 if config.optim.name == "adamw" else 1) * trained)


def pretrain(args: Args) -> Run:
    """Check everything, train, and leave a run directory with its encoder. Returns the run.

    Raises UserError, before any worker starts, for errors that the user can mend.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as lock:
        return driver.train(_job(args, lock), began)


def _job(args: Args, lock: contextlib.ExitStack) -> driver.Job:
    """The job, with its run directory begun; `lock` then holds `Run.alone`, or the lease of a run in S3."""
    config = args.config
    groups = config.train.shard_groups
    data, manifest = sync.manifest(args.data, look=groups == 1)  # with groups not all shards may lie here
    classes = manifest.classes
    only = subset.read(args.subset, data, args.data, manifest, config) if args.subset is not None else None
    examples = len(only.ids) if only is not None else manifest.examples("train", groups)
    driver.require_shares(config, examples, args.resources)
    weights, start = _start(args)
    config = warm_start.fitted(config, weights)
    described = only.described if only is not None else None
    run, home, uri = driver.home_of(
        args.run, args.recipe, config, data, args.data, args.tracking_uri, start=start, subset=described, alone=lock
    )
    scalars = tensorboard.scalars(args.tensorboard, run, home.at)
    run = driver.checked(run, manifest, examples, args.resources)
    lock.enter_context(run.alone())
    if only is not None:
        subset.write(run, only)
    if weights and not run.under_way:
        run = warm_start.begin(run, weights, classes)

    return driver.Job(
        run=run,
        home=home,
        asked=args.run or run.path,
        total=config.total_steps(examples),
        uri=uri,
        resources=args.resources,
        scalars=scalars,
        publish=lambda run, method: publish_newest(run, classes, method),
        given={} if only is None else {"ids": only.ids},
    )


def _start(args: Args) -> tuple[Weights | None, dict[str, Any] | None]:
    """(the weights that the command gives to begin with, the run's `start`); None and None where it gives none."""
    if args.start and args.extend:
        raise UserError("--start and --extend both say what to begin with; leave out one of them")
    place = args.extend or args.start
    if place is None:
        return None, None
    weights = weights_at(place, args.tracking_uri, args.config, place is args.extend)
    return weights, warm_start.described(place, weights, place is args.extend)


def weights_at(place: Path, tracking_uri: str | None, config: Config | None = None, extends: bool = False) -> Weights:
    """The weights of a file of tensors for a run of `config`, or as `warm_start.weights_in` of a run, which that one may extend, or of a
    published encoder, which may lie in S3 or in the registry."""
    from simclr.encoder.weights import of_file

    if place.is_file():
        return of_file(place, config)
    with inputs.opened(place, tracking_uri) as directory:
        return warm_start.weights_in(directory, place, extends)


def publish_newest(run: Run, classes: Sequence[str], method: Method | None = None) -> None:
    """Write the newest checkpoint's encoder, head and linear classifier to run/encoder."""
    from simclr.encoder.directory import write_encoder

    step, parts = driver.newest_tensors(run, method)
    published: dict[str, object] = {"recipe": run.recipe, "step": step, "data": run.data.name}
    if run.subset:
        published["subset"] = run.subset | {"from": Path(run.subset["from"]).name}
    if run.start:
        published["start"] = run.start | {"from": Path(run.start["from"]).name}  # the whole path concerns no user of the encoder
    write_encoder(
        parts["encoder"],
        run.config,
        run.encoder,
        published,
        head=parts.get("head"),
        towers=parts.get("towers"),
        classifier=parts.get("classifier"),
        classes=list(classes),
    )
