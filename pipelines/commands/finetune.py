"""`simclr finetune`: a pretrained encoder + some labels → a classifier, on Ray Train workers."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from pipelines.runs import config_file, sync
from pipelines.runs.directory import Run
from pipelines.terminal import say, show
from pipelines.tracking import tensorboard
from pipelines.train import classifiers, driver
from pipelines.train.resources import Resources
from simclr.config import Config, Optim, SimCLR, Watch, head_of
from simclr.errors import UserError
from simclr.family import method_name
from simclr.papers import named
from simclr.stages import FineTune

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FEW = 0.05


@dataclass(frozen=True)
class Args:
    """Train a pretrained network and a classifier on labels (SimCLR v2's second stage), and score it on the test split, or without one on
    labelled images that it has not seen.

    The defaults are v2's for 1 % of the labels of ImageNet (see `simclr.stages`). v1's: --tap 0 --batch-size 4096
    --optim.name sgd --optim.nesterov --optim.scaling linear --optim.base-lr 0.05.
    """

    SETTINGS: ClassVar = (
        *(
            "labels",
            "tap",
            "class_weights",
            "linear",
            "from_scratch",
            "encoder",
            "epochs",
            "batch_size",
            "views",
            "optim",
            "seed",
            "label_seed",
        ),
        *("test_every_epochs", "precision", "compile"),
    )
    """What a file of --config may have."""

    start: Annotated[Path, tyro.conf.Positional]
    """Run directory or published encoder, on disk or at s3://bucket/prefix, or NAME@alias in the registry."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file with settings: YAML as `simclr recipes finetune` writes it, or the run.json of a fine-tuning, with its list of labels. Flags
    change it."""
    data: Path | None = None
    """Directory or s3://bucket/prefix of prepared shards. Default: the data of the run."""
    labels: float = 1.0
    """Share of each class whose labels are seen, at least one image of each: 0.01, 0.1, 1. labels.txt in the run lists them."""
    label_file: Path | None = None
    """Images whose labels are seen, in place of --labels: a text of file names or sample ids, one a line."""
    hold_back: float = 0.1
    """For data without a test split, whose classifier is scored on labelled images that it has not seen: where --labels or --label-file
    leave fewer than this share of them, this share of each class is held back. 0 = train on all, without a score."""
    tap: int | None = None
    """Layer of the projection head that the classifier reads. Default, as v2: 1 of a head of three layers, but 0 (the encoder's h) if
    all labels are seen, for v1's head, and for an encoder of another method than SimCLR, which has no head."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts in the loss by the inverse of its share of the labelled images, so that rare classes count alike."""
    linear: bool = False
    """Train only the classifier; the network stays fixed."""
    from_scratch: bool = False
    """The same network, from random weights: the supervised baseline."""
    encoder: classifiers.Shape = field(default_factory=classifiers.Shape)
    epochs: float | None = None
    """Passes over the labelled images. Default: 60 if less than 5 % of the labels are seen, else 30."""
    batch_size: int | None = None
    """Images per step over all workers. Default: 1024, or as many as there are."""
    views: classifiers.Crops = field(default_factory=classifiers.Crops)
    optim: Optim = field(default_factory=lambda: FineTune().optim)
    seed: int = 0
    """Seed of the choice of labels, of order and crops, and of new weights."""
    label_seed: int | None = None
    """Seed of the choice of labels alone. Default: --seed."""
    test_every_epochs: float = 0.0
    """Epochs between two scorings on the test split; 0 = only at the end."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """tf32 = float32 whose products take factors of 10 bits on a GPU; bfloat16 = autocast with float32 weights and loss."""
    compile: bool = False
    """Compile the network with torch.compile, which takes about a minute before the first step."""
    run: Path | None = None
    """Run directory or s3://bucket/prefix; a run there goes on. Default: runs/finetune-RECIPE-DIGEST."""
    resources: Annotated[Resources, tyro.conf.arg(name="")] = field(default_factory=Resources)
    tracking_uri: str | None = None
    """MLflow address. Default: $MLFLOW_TRACKING_URI, else a database under runs/, without a server."""
    tensorboard: tuple[Path, ...] | None = None
    """Write TensorBoard's scalars, too (the extra tensorboard): into DIR/RUN of --tensorboard DIR, or into the run's own
    folder tensorboard of --tensorboard alone."""

    @classmethod
    def defaults(cls, words: list[str]) -> Args | None:
        """The settings of the file behind --config in a command's `words`; None without that flag."""
        given = config_file.given_to("--config", words)
        if given is None:
            return None
        path, empty = config_file.at(Path(given)), cls(start=tyro.MISSING)
        if path.suffix != ".json":
            return config_file.changed(empty, config_file.entries(path), path, cls.SETTINGS)
        config = config_file.read(path, "finetune").config
        assert isinstance(config, FineTune)
        new = not config.encoder_sha256
        return replace(
            empty,
            **classifiers.settings_of(config, path.parent),
            tap=config.tap,
            class_weights=config.class_weights,
            linear=config.linear,
            from_scratch=new,
            encoder=classifiers.Shape.like(config.encoder) if new else classifiers.Shape.free(config.encoder),
        )


def main(args: Args) -> None:
    run = finetune(args)
    show(classifiers.told(run, sync.shown(args.run or run.path)))


def finetune(args: Args) -> Run:
    """Check everything, train, and leave a run directory with its classifier. Returns the run.

    Raises UserError, before any worker starts, for errors that the user can mend.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as lock:
        return driver.train(_job(args, lock), began)


def _job(args: Args, lock: contextlib.ExitStack) -> driver.Job:
    """The job, with its run directory begun; `lock` then holds `Run.alone`, or the lease of a run in S3."""
    with classifiers.published(args.start, args.tracking_uri) as (directory, known):
        at = args.data or known
        if at is None:
            raise UserError("which data? give --data DIR (a run directory knows its own, a published encoder does not)")
        data, manifest = sync.manifest(at)
        classes = classifiers.require_classes(manifest, data)
        from simclr.data import labels
        from simclr.encoder.directory import config_of, read_text
        from simclr.methods.classifier import first_state

        seed = args.seed if args.label_seed is None else args.label_seed
        seen = classifiers.choose_labels(data, at, manifest, args.labels, args.label_file, seed)
        held, about_held = None, ""
        if "test" not in manifest.splits:
            seen, held, about_held = classifiers.hold_back(seen, args.hold_back, seed, Watch().queries)
            say(about_held)
        ids = seen.ids
        if args.class_weights == "balanced":
            say(_weights(seen.y, classes))
        base = config_of(read_text(directory))
        config = _config(args, base, directory, len(ids), len(ids) / manifest.examples("train"), labels.digest(ids))
        driver.require_shares(config, len(ids), args.resources)
        state = None if args.from_scratch else first_state(config, directory, len(classes))
        name = f"finetune-{classifiers.recipe_of(directory)}"
        run, home, uri = driver.home_of(args.run, name, config, data, at, args.tracking_uri, "finetune", alone=lock)
        scalars = tensorboard.scalars(args.tensorboard, run, home.at)
        run = driver.checked(run, manifest, len(ids), args.resources)
        if about_crops := args.views.inherited(base.views):
            say(about_crops)
        run = replace(run, notes=(*run.notes, *filter(None, (about_crops, about_held))))
        lock.enter_context(run.alone())
        run.save()
        classifiers.write_labels(run, seen)
        if state is not None:
            driver.begin_with(run, state)

        about: dict[str, object] = {"labels": len(ids), "from_scratch": args.from_scratch}
        about |= {} if args.from_scratch else classifiers.pretrained(directory) | classifiers.pooled(directory, config)
    return driver.Job(
        run=run,
        home=home,
        asked=args.run or run.path,
        total=config.total_steps(len(ids)),
        uri=uri,
        resources=args.resources,
        scalars=scalars,
        publish=lambda run, method: classifiers.publish(run, classes, config.tap, about, method),
        given={"ids": ids} | ({"held": held} if held is not None and len(held) else {}),
    )


def _weights(y: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """The lightest and the heaviest class, in a sentence; `y` are the labels that are seen."""
    from simclr.data.labels import balanced

    weights = balanced(y, len(classes))
    seen = sorted(set(y.tolist()), key=lambda c: weights[c])
    return "class weights from " + " to ".join(f"{weights[c]:.3g} ({classes[c]}, {(y == c).sum():,} images)" for c in (seen[0], seen[-1]))


def _config(args: Args, base: Config, directory: Path, images: int, share: float, labels_sha256: str) -> FineTune:
    """The config of fine-tuning the encoder in `directory`, which a run of `base` made."""
    if args.encoder.other_weights and not args.from_scratch:
        raise UserError("--encoder.… asks for another network than the given one, which has weights; add --from-scratch, or leave it out")
    if args.tap and not isinstance(base, SimCLR):
        called = named(method_name(base)).title
        raise UserError(
            f"--tap {args.tap} reads a layer of SimCLR's projection head, which an encoder of {called} has not; leave --tap out"
        )
    epochs = args.epochs if args.epochs is not None else 60.0 if share < _FEW else 30.0
    batch_size = classifiers.batch_for(args.batch_size, 1024, images, args.resources.workers)
    tap = args.tap if args.tap is not None else int(isinstance(base, SimCLR) and base.head.layers >= 3 and share < 1)
    return FineTune(
        seed=args.seed,
        encoder=args.encoder.of(base.encoder),
        head=head_of(base),
        views=args.views.of(base.views),
        optim=args.optim,
        train=classifiers.stage_train(batch_size, epochs, args.precision, args.compile),
        watch=Watch(every_epochs=args.test_every_epochs),
        tap=tap,
        linear=args.linear,
        class_weights=args.class_weights,
        encoder_sha256="" if args.from_scratch else classifiers.digest(directory),
        labels_sha256=labels_sha256,
    )
