"""What fine-tuning and distilling share: the encoder to start from, the choice of labels, the classifier that they publish."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run
from pipelines.runs.scores import HELD_LABELS, TEST, WHOLE, Measured, intervals_of, write
from pipelines.terminal import say
from pipelines.tracking import registry
from pipelines.tracking import uri as mlflow_uri
from pipelines.train import driver, subset
from simclr.config import Config, Encoder, SimCLR, Train, Views
from simclr.data.manifest import Manifest, read_manifest
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError
from simclr.sections import Size
from simclr.sense import mild_crops
from simclr.stages import FineTune

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from simclr.methods.method import Method


NO_TEST = "no test split"


@dataclass(frozen=True)
class Shape:
    """Fields that differ from the given network's. None = as the given network."""

    depth: Literal[8, 14, 20, 18, 34, 50, 101, 152, 200] | None = None
    """Layers of a ResNet."""
    width: int | None = None
    """Width multiplier."""
    sk_ratio: float | None = None
    """Selective kernels' reduction ratio; 0 = none."""
    cifar_stem: bool | None = None
    """Whether a ResNet begins with one 3 × 3 convolution, for images of about 32 px. Behind a network of another kind it does not, unless
    it is said."""
    vit: Size | None = None
    """A vision transformer of this size; with a depth instead it is a ResNet."""
    patch_px: int | None = None
    """Side of a vision transformer's patches, in pixels."""
    heads: int | None = None
    """Attention heads of a vision transformer. Of another size than the given one, it has that size's."""
    pool: Literal["class", "mean"] | None = None
    """What a vision transformer's h is: its class token, or the mean of its patches, as MAE is fine-tuned. It needs no other weights."""
    drop_path: float | None = None
    """Largest probability that a vision transformer's attention or MLP is left out for an image. It needs no other weights."""
    timm: str | None = None
    """A network of timm's by its name."""

    @property
    def other_weights(self) -> bool:
        """Whether a network with weights is no longer itself with these fields."""
        return replace(self, drop_path=None, pool=None) != Shape()

    def of(self, encoder: Encoder) -> Encoder:
        """`encoder` with these fields, all of it to train, and of the kind that they belong to."""
        asked = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        base, resnets = encoder.trained, {"depth", "width", "sk_ratio", "cifar_stem"} & set(asked)
        if resnets and (self.vit or self.timm or ((base.vit or base.timm) and self.depth is None)):
            flag = min(resnets).replace("_", "-")
            raise UserError(f"--encoder.{flag} is a ResNet's, and the network is none; give --encoder.depth for a ResNet, or leave it out")
        if (self.timm or resnets) and base.vit:
            base = Encoder(batchnorm=base.batchnorm)
        elif self.vit not in (None, base.vit):
            base = replace(base, heads=None)
        if resnets or self.vit:
            base = replace(base, timm="")
        return replace(base, **asked)

    @classmethod
    def free(cls, encoder: Encoder) -> Shape:
        """What of `encoder` needs no other weights."""
        return cls(drop_path=encoder.drop_path, pool=encoder.pool) if encoder.vit else cls()

    @classmethod
    def like(cls, encoder: Encoder) -> Shape:
        """The shape of `encoder`, in full."""
        if encoder.vit:
            kept = ("vit", "patch_px", "heads", "pool", "drop_path")
            return cls(**{name: getattr(encoder, name) for name in kept})
        if encoder.timm:
            return cls(timm=encoder.timm)
        return cls(depth=encoder.depth, width=encoder.width, sk_ratio=encoder.sk_ratio, cifar_stem=encoder.cifar_stem)


@dataclass(frozen=True)
class Crops:
    """How images are cropped and mirrored. None = as in the training of the given network."""

    area: tuple[float, float] | None = None
    """Smallest and largest area of a crop, as a share of the image."""
    flip_p: float | None = None
    """Probability of a left-right flip."""

    def of(self, views: Views) -> Views:
        """`views` with these fields."""
        return replace(views, area=self.area or views.area, flip_p=views.flip_p if self.flip_p is None else self.flip_p)

    def inherited(self, views: Views) -> str:
        """A sentence where crops are taken over from the given network's `views` that few train a classifier with; "" elsewhere."""
        found, flags = mild_crops(self.of(views)), {"area": "--views.area 0.08 1", "flip_p": "--views.flip-p 0.5"}
        inherited = [name for name in found if getattr(self, name) is None]
        if not inherited:
            return ""
        said, given = (" and ".join(texts[name] for name in inherited) for texts in (found, flags))
        return f"{said}, as in the training of the given network; classifiers mostly have {given}"


def settings_of(config: Config, run: Path) -> dict[str, Any]:
    """What both stages' commands can repeat of a `run` with this config, as their flags."""
    labels = run / "labels.txt"
    return {
        "label_file": labels if labels.is_file() else None,
        "epochs": config.train.epochs,
        "batch_size": config.train.batch_size,
        "views": Crops(config.views.area, config.views.flip_p),
        "optim": config.optim,
        "seed": config.seed,
        "test_every_epochs": config.watch.every_epochs,
        "precision": config.train.precision,
        "compile": config.train.compile,
    }


@contextlib.contextmanager
def published(start: Path, tracking_uri: str | None) -> Iterator[tuple[Path, Path | None]]:
    """(directory of the published encoder, the data it was trained on, None if unknown). `start` is a run or a published directory, on
    disk or at s3://…, or NAME@alias in the registry."""
    if not start.exists() and "@" in str(start) and s3_uri.address(start) is None:
        with tempfile.TemporaryDirectory() as folder:
            uri = mlflow_uri.tracking_address(tracking_uri)
            mlflow_uri.check(uri)
            registry.pull(uri, str(start), Path(folder) / "encoder", lambda done, total: None)
            yield Path(folder) / "encoder", None
        return
    with sync.directory(start) as directory:
        if not (directory / "run.json").is_file():
            yield directory, None
            return
        run = load_run(directory)
        if not run.encoder.is_dir():
            raise UserError(f"{start} has no encoder yet; finish it with the command that began it: {run.command}")
        yield run.encoder, Path(run.origin)


def digest(directory: Path) -> str:
    """sha256 of the weights published in `directory`."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(path.name.encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def recipe_of(directory: Path) -> str:
    """Name of the recipe that made the encoder in `directory`."""
    from simclr.encoder.directory import read_text

    return str(read_text(directory).get("published", {}).get("recipe") or "encoder")


@dataclass(frozen=True)
class Labels:
    """The training images whose labels are seen."""

    ids: NDArray[np.int64]
    """Sample ids, ascending."""
    y: NDArray[np.int64]
    """Their labels."""
    others: NDArray[np.int64]
    """The training images with labels that are not seen, ascending."""
    names: list[str] | None
    """Names of all training images; None if the shards have no names."""
    chosen: dict[str, object]
    """How they were chosen, for labels.txt."""


def choose_labels(data: Path, at: Path, manifest: Manifest, share: float, file: Path | None, seed: int) -> Labels:
    """The images that `file` lists, else `share` of each class. The shards lie in `data`; of those `at` s3://…, whose copy it is, only the
    tables and the names are fetched."""
    import numpy as np

    from simclr.data import labels, loader

    remote = s3_uri.address(at)
    if remote is not None:
        from simclr.data.s3 import tables
        from simclr.data.s3.store import Store

        every = tables.labels(remote, manifest, "train", Store())
    else:
        every = loader.labels(data)
    names = subset.names_at(data, at, len(every))
    chosen: dict[str, object] = {"label file": file} if file is not None else {"share of each class": share, "seed": seed}
    ids = labels.read(file, every, names) if file is not None else labels.subset(every, share, seed)
    others = np.setdiff1d(np.flatnonzero(every >= 0), ids)
    return Labels(ids, every[ids], others, names, chosen)


def hold_back(seen: Labels, share: float, seed: int, most: int) -> tuple[Labels, NDArray[np.int64], str]:
    """(the labels that are left to see, the images to score on, a sentence about them), for data without a test split. These are the images
    whose labels are not seen anyway; where they are fewer than `share` of all that have labels, `share` of each class besides, of which one
    stays. Of more than `most` a keyed choice is taken. With a `share` of 0 there are none."""
    import numpy as np

    from simclr import keyed
    from simclr.data import labels

    if not 0 <= share < 1:
        raise UserError(f"--hold-back is {share:g}; expected a share of the labelled images, at least 0 and below 1")
    if not share:
        return seen, seen.others[:0], f"{NO_TEST}: nothing is held back to score on"
    if len(seen.others) >= share * (len(seen.ids) + len(seen.others)):
        held, what = seen.others, "labelled images whose labels training does not see"
    else:
        y = np.full(int(seen.ids.max()) + 1, -1)
        y[seen.ids] = seen.y
        taken = labels.subset(y, share, seed)
        last = [label for label in np.unique(y[taken]) if np.count_nonzero(y[taken] == label) == np.count_nonzero(y == label)]
        taken = taken[~np.isin(y[taken], last)]
        left = ~np.isin(seen.ids, taken)
        held, what = np.union1d(taken, seen.others), "labelled images, which are held back (--hold-back 0 trains on all)"
        seen = replace(seen, ids=seen.ids[left], y=seen.y[left], chosen=seen.chosen | {"held back": len(taken)})
    if len(held) > most:
        words = keyed.bits(seed, "subset", 1, held, 0, 2)
        held = np.sort(held[np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")[:most]])
    return seen, held, f"{NO_TEST}: scored on {len(held):,} {what}"


def write_labels(run: Run, seen: Labels) -> None:
    """labels.txt of a run, for people and for other runs (`--label-file`)."""
    from simclr.data import labels

    notes = {"data": run.origin, "sha256 of the data's manifest": run.data_digest, **seen.chosen, "images": len(seen.ids)}
    labels.write(run.path / "labels.txt", seen.ids, seen.names, notes)


def batch_for(asked: int | None, usual: int, images: int, workers: int) -> int:
    """The batch size `asked` for, else the `usual` one or, with fewer images than that, the largest number that `workers` share evenly."""
    if asked is not None and asked <= images:
        return asked
    size = min(asked or usual, images) // workers * workers
    if size < 2:
        raise UserError(f"{images} labelled images are too few for {workers} workers; use fewer --workers or more --labels")
    if asked is not None:
        raise UserError(f"--batch-size {asked:,} is larger than the {images:,} images to train on; use --batch-size {size} or less")
    if size < usual:
        say(f"batch size {size} instead of {usual:,}: there are {images:,} images")
    return size


def stage_train(batch_size: int, epochs: float, precision: Literal["float32", "tf32", "bfloat16"], compile: bool) -> Train:
    return Train(batch_size=batch_size, epochs=epochs, precision=precision, compile=compile)


def pretrained(directory: Path) -> dict[str, str]:
    """By which method the encoder in `directory` was pretrained, for the `published` of what is made of it; {} = SimCLR."""
    from simclr.encoder.directory import read_text

    text = read_text(directory)
    method = text.get("published", {}).get("pretrained") or text.get("method")
    return {"pretrained": str(method)} if method else {}


def pooled(directory: Path, config: FineTune) -> dict[str, str]:
    """With which pooling the frozen weights of the encoder in `directory` were trained, for the `published` of a run of `config` that pools
    them otherwise: the weights alone do not tell its features from theirs; {} = as the run pools them."""
    from simclr.encoder.directory import read_text, trained_pool

    before = trained_pool(read_text(directory)) if config.linear and config.encoder_sha256 else config.encoder.pool
    return {"trained_pool": before} if before != config.encoder.pool else {}


def publish(run: Run, classes: tuple[str, ...], tap: int, notes: dict[str, object], method: Method | None = None) -> None:
    """Write the newest checkpoint's network with its classifier to run/encoder, and its test scores to run/evaluation.json."""
    from simclr.encoder.directory import write_encoder

    step, parts = driver.newest_tensors(run, method)
    scores = scores_of(run)
    about: dict[str, Any] = {"recipe": run.recipe, "step": step, "data": run.data.name, **notes, "scores": scores}
    on = held_note(run)
    about |= {"scored_on": on} if on else {}
    # A published head is a ProjectionHead, or its first layers; a classifier holds the layers alone.
    head = {f"layers.{name}": t for name, t in parts["head"].items()}
    plain = SimCLR(**{f.name: getattr(run.config, f.name) for f in dataclasses.fields(SimCLR)})
    write_encoder(parts["encoder"], plain, run.encoder, about, head=head, classifier=parts["classifier"], tap=tap, classes=list(classes))
    if scores:
        measured = _measured(run, step, scores, on)
        write(run, [{"name": run.stage, **scores}], measured, **({"scored_on": on} if on else {}))


def _measured(run: Run, step: int, scores: dict[str, float], held: str) -> Measured:
    """What the scores of `step` were measured on; `held` is `held_note`. Where the shards of a test split are not on this machine, it is
    not known how many images these were."""
    about: dict[str, Any] = {"split": HELD_LABELS if held else TEST, "limit": WHOLE, "step": step}
    about["protocols"] = dict.fromkeys(scores, "the classifier's own answer, central crop")
    count = re.search(r"scored on ([\d,]+)", held)
    images = dict.fromkeys(scores, int(count[1].replace(",", ""))) if count else dict[str, int]()
    if not (run.data / "manifest.json").is_file():
        about |= {"images": images, "intervals": intervals_of(scores, images)}
        return Measured(data=run.origin, manifest_sha256=run.data_digest, time=time.time(), **about)
    from simclr.data import loader

    manifest = read_manifest(run.data, look=False)
    if not held and all((run.data / shard.name).is_file() for shard in manifest.splits.get("test", ())):
        images = dict.fromkeys(scores, int((loader.labels(run.data, "test") >= 0).sum()))
    return Measured.of(run.data, manifest, run.origin, images=images, intervals=intervals_of(scores, images), **about)


def scores_of(run: Run) -> dict[str, float]:
    """{"top1", "top5", "mean_per_class"} of the test split at the last evaluation; {} where there was none. Runs of before have no mean
    per class."""
    tested = [row for row in run.history() if "eval/top1" in row]
    names = ("top1", "top5", "mean_per_class")
    return {name: tested[-1][f"eval/{name}"] for name in names if f"eval/{name}" in tested[-1]} if tested else {}


def told(run: Run, shown: str) -> str:
    """The result as one line."""
    scores, on = scores_of(run), held_note(run)
    said = ", ".join(f"{n.replace('_', ' ')} {100 * v:.1f} %" for n, v in scores.items())
    return f"{shown}: {said or 'no labelled test split to score it on'}{f' ({on})' if on and scores else ''}"


def held_note(run: Run) -> str:
    """What a run without a test split was scored on; "" for one with it."""
    return next((note for note in run.notes if note.startswith(NO_TEST)), "")


def require_classes(manifest: Manifest, data: Path) -> tuple[str, ...]:
    """The data's classes. Raises UserError if it has none."""
    if not manifest.classes:
        raise UserError(f"{data} has no labels to learn; prepare it from a folder of class/file")
    return manifest.classes
