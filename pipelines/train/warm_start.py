"""The weights that `simclr pretrain --start` and `--extend` begin with, and the run that begins with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from pipelines.runs import sync
from pipelines.runs.directory import Run, load_run
from pipelines.terminal import say
from pipelines.train import driver
from simclr.config import Config, Views
from simclr.data.manifest import read_manifest
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError
from simclr.sections import Resize

if TYPE_CHECKING:
    from simclr.encoder.weights import Weights

_TORCHVISION = Views(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def weights_in(directory: Path, place: Path, extends: bool = False) -> Weights:
    """The weights of the run or published encoder in `directory`, which may be a copy of that at `place`. Of a run it is what it published
    or, before its end, its newest checkpoint; the run that `extends` one of a sibling of SimCLR's wants more than that publishes, so the
    checkpoint comes first. Raises UserError where there is neither, or it is damaged."""
    from simclr import checkpoint
    from simclr.encoder import weights

    if not directory.exists():
        raise UserError(
            f"{place} is not there; --start takes a run, a published encoder, s3://bucket/prefix of either, NAME@alias in the registry, "
            "or a .safetensors or .pth file"
        )
    if not (directory / "run.json").is_file():
        return weights.of_directory(directory)
    run, home = load_run(directory), sync.Home(place)
    whole = extends and bool(run.config.METHOD)
    if run.encoder.is_dir() and not whole:
        return weights.of_directory(run.encoder)
    home.fetch_newest()
    newest = checkpoint.latest(home.path / "checkpoints", say)
    if newest is None and run.encoder.is_dir():
        return weights.of_directory(run.encoder)
    if newest is None:
        raise UserError(f"{sync.shown(place)} has neither an encoder nor a checkpoint yet; go on with it first: {run.command}")
    known = read_manifest(run.data).classes if (run.data / "manifest.json").is_file() else ()
    return weights.of_checkpoint(newest, run.config, known, extends)


def described(start: Path, weights: Weights, extends: bool) -> dict[str, Any]:
    """A run's `start` (see `Run`), without what is `taken`."""
    place = start if s3_uri.address(start) is not None or not start.exists() else start.absolute()
    return {"from": sync.shown(place), "step": weights.step, "sha256": weights.sha256, "extends": extends, "taken": ""}


def fitted(config: Config, weights: Weights | None) -> Config:
    """`config` with the views that timm's own weights of its network want, said on the terminal, where these are given to a config without
    a normalisation of its own."""
    views, plain = config.views, Views()
    if weights is None or weights.timm is None or (views.mean, views.std) != (plain.mean, plain.std):
        return config
    mean, std, interpolation = weights.timm
    known = interpolation in get_args(Resize) and views.resize == plain.resize
    views = replace(views, mean=mean, std=std, resize=cast(Resize, interpolation) if known else views.resize)
    say(f"as timm's own weights of {config.encoder.timm} want them: {_flags(views)} --views.resize {views.resize}")
    return replace(config, views=views)


def begin(run: Run, weights: Weights, classes: tuple[str, ...]) -> Run:
    """The new `run` with what it takes of the weights, said on the terminal, and the checkpoint of step 0 with them in its directory."""
    from simclr.methods.warm_start import warm_start

    state, taken = warm_start(run.config, weights, classes, run.start["from"])
    run = replace(run, start=run.start | {"taken": taken})
    say(f"begins with {run.began_with}: {taken}")
    if note := _normalised_otherwise(run.config.views, weights):
        say(note)
    driver.begin_with(run, state)
    return run


def _normalised_otherwise(views: Views, weights: Weights) -> str:
    """A sentence if the encoder's images were normalised otherwise than the run's will be, or if nobody knows."""
    here = f"this run has {_flags(views)}"
    if weights.timm is not None:
        mean, std, _ = weights.timm
        if (views.mean, views.std) == (mean, std):
            return ""
        own = _flags(replace(views, mean=mean, std=std))
        return f"the file does not say how its images were normalised; timm's own weights of this network want {own}, {here}"
    if weights.norm is None:
        if (views.mean, views.std) == (_TORCHVISION.mean, _TORCHVISION.std):
            return ""
        return f"the file does not say how its images were normalised; torchvision's own weights want {_flags(_TORCHVISION)}, {here}"
    if weights.norm == (views.mean, views.std):
        return ""
    mean, std = weights.norm
    return f"the encoder's images were normalised by {_flags(replace(views, mean=mean, std=std))}, {here}"


def _flags(views: Views) -> str:
    mean, std = (" ".join(f"{x:g}" for x in values) for values in (views.mean, views.std))
    return f"--views.mean {mean} --views.std {std}"


def parent(extend: Path) -> Run:
    """The complete pretraining behind --extend. Raises UserError for any other run."""
    with sync.directory(extend) as directory:
        run, shown = load_run(directory), sync.shown(extend)
    if run.stage != "pretrain":
        raise UserError(f"{shown} was made by `simclr {run.stage}`, and --extend goes on with a pretraining; use --start {shown}")
    rows = run.history()
    if not run.encoder.is_dir() or (rows and rows[-1]["step"] < rows[-1].get("total_steps", 0)):
        raise UserError(
            f"{shown} is not complete; finish it with the command that began it ({run.command}), "
            f"or begin with the weights that it has: your recipe with --start {shown}"
        )
    return run


def extension(run: Run) -> Config:
    """The config of a run that extends `run`, for flags to change. The seed is the next one: order, crops and colours are functions of
    seed and epoch, and with the same seed the run would see those of its parent's first epochs again."""
    return replace(run.config, seed=(run.config.seed + 1) % 2**63)
