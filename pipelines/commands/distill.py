"""`simclr distill`: a fine-tuned classifier + images without labels → a student, on Ray Train workers."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from pipelines.runs import config_file, sync
from pipelines.runs.directory import Run
from pipelines.terminal import say, show
from pipelines.tracking import tensorboard
from pipelines.train import classifiers, driver
from pipelines.train.resources import Resources
from simclr.config import Config, Optim, Watch, head_of
from simclr.errors import UserError
from simclr.stages import Distill


@dataclass(frozen=True)
class Args:
    """Train a student on a teacher's probabilities over the whole training split (SimCLR v2's third stage), and score it.

    Without --encoder.… the student is the teacher's twin (self-distillation). The defaults are v2's for ImageNet.
    """

    SETTINGS: ClassVar = (
        *("encoder", "temperature", "alpha", "labels", "label_seed", "epochs", "batch_size", "views", "optim", "seed"),
        *("test_every_epochs", "precision", "compile"),
    )
    """What a file of --config may have."""

    teacher: Annotated[Path, tyro.conf.Positional]
    """A run of `simclr finetune` (or of this command), or a published directory with a classifier, on disk or at s3://bucket/prefix,
    or NAME@alias in the registry."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file with settings: YAML as `simclr recipes distill` writes it, or the run.json of a distillation. Flags change it."""
    data: Path | None = None
    """Directory or s3://bucket/prefix of prepared shards. Default: the data of the run."""
    encoder: classifiers.Shape = field(default_factory=classifiers.Shape)
    temperature: float | None = None
    """tau of both networks' probabilities. Default, as v2: 0.1 for a student like the teacher, 1 for another."""
    alpha: float = 1.0
    """Weight of the teacher's probabilities against the true labels (Eq. 3); 1 = no label is seen (Eq. 2)."""
    labels: float = 1.0
    """With --alpha below 1, the share of each class whose labels are seen."""
    label_file: Path | None = None
    """Images whose labels are seen, in place of --labels: labels.txt of the teacher's run."""
    label_seed: int | None = None
    """Seed of the choice of labels. Default: --seed."""
    epochs: float = 400.0
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per step over all workers. Default: 4096, or as many as there are."""
    views: classifiers.Crops = field(default_factory=classifiers.Crops)
    optim: Optim = field(default_factory=lambda: Distill().optim)
    seed: int = 0
    """Seed of the student's weights, of order and crops."""
    test_every_epochs: float = 0.0
    """Epochs between two scorings on the test split; 0 = only at the end."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """tf32 = float32 whose products take factors of 10 bits on a GPU; bfloat16 = autocast with float32 weights and loss."""
    compile: bool = False
    """Compile the student with torch.compile, which takes about a minute before the first step."""
    run: Path | None = None
    """Run directory or s3://bucket/prefix; a run there goes on. Default: runs/distill-RECIPE-DIGEST."""
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
        path, empty = config_file.at(Path(given)), cls(teacher=tyro.MISSING)
        if path.suffix != ".json":
            return config_file.changed(empty, config_file.entries(path), path, cls.SETTINGS)
        config = config_file.read(path, "distill").config
        assert isinstance(config, Distill)
        student = classifiers.Shape.like(config.encoder)
        return replace(
            empty, **classifiers.settings_of(config, path.parent), encoder=student, temperature=config.temperature, alpha=config.alpha
        )


def main(args: Args) -> None:
    run = distill(args)
    show(classifiers.told(run, sync.shown(args.run or run.path)))


def distill(args: Args) -> Run:
    """Check everything, train, and leave a run directory with the student. Returns the run.

    Raises UserError, before any worker starts, for errors that the user can mend.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as lock:
        return driver.train(_job(args, lock), began)


def _job(args: Args, lock: contextlib.ExitStack) -> driver.Job:
    """The job, with its run directory begun; `lock` then holds `Run.alone`, or the lease of a run in S3."""
    with classifiers.published(args.teacher, args.tracking_uri) as (directory, known):
        at = args.data or known
        if at is None:
            raise UserError("which data? give --data DIR (a run directory knows its own, a published encoder does not)")
        data, manifest = sync.manifest(at)
        examples = manifest.examples("train")
        from simclr.data import labels
        from simclr.encoder.directory import config_of, read_text
        from simclr.methods.distill import require_teacher

        classes = require_teacher(directory, manifest.classes)
        seed = args.seed if args.label_seed is None else args.label_seed
        seen = None if args.alpha == 1 else classifiers.choose_labels(data, at, manifest, args.labels, args.label_file, seed)
        ids = seen.ids if seen is not None else None
        base = config_of(read_text(directory))
        config = _config(args, base, directory, examples, labels.digest(ids) if ids is not None else "")
        driver.require_shares(config, examples, args.resources)
        name = f"distill-{classifiers.recipe_of(directory).removeprefix('finetune-')}"
        run, home, uri = driver.home_of(args.run, name, config, data, at, args.tracking_uri, "distill", alone=lock)
        scalars = tensorboard.scalars(args.tensorboard, run, home.at)
        run = driver.checked(run, manifest, examples, args.resources)
        if about_crops := args.views.inherited(base.views):
            say(about_crops)
            run = replace(run, notes=(*run.notes, about_crops))
        lock.enter_context(run.alone())
        run.save()
        if seen is not None:
            classifiers.write_labels(run, seen)
        if not (run.path / "teacher" / "config.json").is_file():  # copied into the run, so that every worker finds it there
            shutil.rmtree(run.path / "teacher", ignore_errors=True)
            shutil.copytree(directory, run.path / ".teacher", dirs_exist_ok=True)
            (run.path / ".teacher").rename(run.path / "teacher")
        about: dict[str, object] = {"temperature": config.temperature, "alpha": config.alpha, "labels": 0 if ids is None else len(ids)}
        about |= {f"teacher_{name}": method for name, method in classifiers.pretrained(directory).items()}
    return driver.Job(
        run=run,
        home=home,
        asked=args.run or run.path,
        total=config.total_steps(examples),
        uri=uri,
        resources=args.resources,
        scalars=scalars,
        publish=lambda run, method: classifiers.publish(run, classes, 0, about, method),
        given={"labelled": ids},
    )


def _config(args: Args, base: Config, directory: Path, images: int, labels_sha256: str) -> Distill:
    """The config of distilling the teacher in `directory`, which a run of `base` made."""
    student = args.encoder.of(base.encoder)
    alike = replace(student, drop_path=0.0) == replace(base.encoder.trained, drop_path=0.0)
    return Distill(
        seed=args.seed,
        encoder=student,
        head=head_of(base),
        views=args.views.of(base.views),
        optim=args.optim,
        train=classifiers.stage_train(
            classifiers.batch_for(args.batch_size, 4096, images, args.resources.workers), args.epochs, args.precision, args.compile
        ),
        watch=Watch(every_epochs=args.test_every_epochs),
        temperature=args.temperature if args.temperature is not None else 0.1 if alike else 1.0,
        alpha=args.alpha,
        teacher=classifiers.digest(directory),
        labels_sha256=labels_sha256,
    )
