"""Spaces: which fields of the config a sweep varies, and over which values. Data, checked against the config before anything starts.

A value is the field's own, or a rule that derives it from the recipe: `Times(2)` is twice the recipe's value. So one space serves a
ResNet-8 on two cores and a ResNet-50 on a cluster.
"""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, field
from typing import Any, get_args

from simclr.config import Operation
from simclr.errors import UserError

OPERATIONS: tuple[Operation, ...] = get_args(Operation)


@dataclass(frozen=True, slots=True)
class Times:
    """The recipe's value, times `factor`; whole numbers stay whole."""

    factor: float


@dataclass(frozen=True, slots=True)
class Peak:
    """The base_lr with which the recipe's own batch gets `factor` times the recipe's learning rate, under the trial's scaling rule:
    so both rules agree at the recipe's batch size, as the paper's 0.3 · N / 256 and 0.075 · √N do at N = 4096 (App. B.1)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Between:
    """Any number from `low` to `high`, uniform, or uniform in its logarithm. For --search random and optuna."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class PeakBetween:
    """`Peak` with a factor from `low` to `high`, uniform in its logarithm."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WholeBetween:
    """Any whole number from `low` to `high`, both among them."""

    low: int
    high: int
    log: bool = False


Distribution = Between | PeakBetween | WholeBetween


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of a space: fields that vary together."""

    paths: tuple[str, ...]
    """Field paths of the config; several change together, and a value is then a tuple of as many."""
    values: tuple[Any, ...] | Distribution
    """All values, or a distribution of them."""
    label: str
    """Its name in figures, with its unit."""

    @property
    def key(self) -> str:
        return ", ".join(self.paths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The axes that a sweep varies. Its trials are all combinations of the axes' values, or samples of them."""

    name: str
    repeats: str
    """Figure or table of the paper, or "" for a space of our own."""
    why: str
    """A sentence: the fields that vary and the lesson."""
    axes: tuple[Axis, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields that differ from the recipe in every trial."""
    label_shares: tuple[float, ...] = ()
    """Shares of the training labels with which the probe is also fitted at the end."""


_V1, _V2 = "arXiv:2002.05709", "arXiv:2006.10029"
_PAIRS = tuple((op,) for op in OPERATIONS) + tuple(itertools.permutations(OPERATIONS, 2))
_DEPTHS = Axis(paths=("encoder.depth",), values=(8, 14, 20, 18, 34, 50, 101, 152), label="depth")
_HEADS = ((0, 128), *itertools.product((1, 2), (32, 64, 128, 256, 512, 1024, 2048)))

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        Space(
            name="smoke",
            repeats="",
            why="Eight short trials of temperature and learning rate: checks in minutes that everything works.",
            axes=(
                Axis(paths=("loss.temperature",), values=(0.1, 0.2, 0.5, 1.0), label="temperature τ"),
                Axis(paths=("optim.base_lr",), values=(Peak(0.5), Peak(1)), label="base learning rate"),
            ),
            fixed={"train.epochs": Times(1 / 4), "optim.warmup_epochs": Times(1 / 4), "watch.every_epochs": 1.0},
        ),
        Space(
            name="temperature-lr",
            repeats=f"{_V1}, Table 5 and App. B.1",
            why="Temperature, learning rate, its scaling rule and the batch size: which τ is best, and which rule holds when N changes.",
            axes=(
                Axis(paths=("loss.temperature",), values=(0.05, 0.1, 0.5, 1.0), label="temperature τ"),
                Axis(paths=("optim.scaling",), values=("linear", "sqrt"), label="scaling rule"),
                Axis(paths=("optim.base_lr",), values=(Peak(0.5), Peak(1), Peak(2)), label="base learning rate"),
                Axis(paths=("train.batch_size",), values=(Times(1 / 2), Times(1), Times(2)), label="batch size N, images"),
            ),
        ),
        Space(
            name="augmentation-pairs",
            repeats=f"{_V1}, Fig. 5",
            why="Each operation alone and each pair in either order, on one branch: which composition makes a task worth learning.",
            axes=(Axis(paths=("views.operations",), values=_PAIRS, label="operations on one branch"),),
        ),
        Space(
            name="colour-strength",
            repeats=f"{_V1}, Table 1",
            why="The strength of the colour distortion, without blur and at last with it: contrasting wants more than supervision does.",
            axes=(
                Axis(
                    paths=("views.colour_strength", "views.blur_p"),
                    values=((1 / 8, 0.0), (1 / 4, 0.0), (1 / 2, 0.0), (1.0, 0.0), (1.0, 0.5)),
                    label="colour strength s",
                ),
            ),
        ),
        Space(
            name="projection-head",
            repeats=f"{_V1}, Fig. 8",
            why="No head, a linear one and a nonlinear one, by the size of their output: the effect of the head on the representation.",
            axes=(Axis(paths=("head.layers", "head.d_out"), values=_HEADS, label="dimension of z"),),
        ),
        Space(
            name="losses",
            repeats=f"{_V1}, Table 4",
            why="NT-Xent, the logistic and the triplet loss, these with and without semi-hard negatives.",
            axes=(
                Axis(
                    paths=("loss.name", "loss.semi_hard"),
                    values=(
                        *(("margin_triplet", False), ("nt_logistic", False), ("margin_triplet", True), ("nt_logistic", True)),
                        ("nt_xent", False),
                    ),
                    label="loss",
                ),
            ),
        ),
        Space(
            name="normalisation-temperature",
            repeats=f"{_V1}, Table 5",
            why="NT-Xent with cosines at four temperatures and with plain products at two: why projections are normalised.",
            axes=(
                Axis(
                    paths=("loss.name", "loss.temperature"),
                    values=(*(("nt_xent", t) for t in (0.05, 0.1, 0.5, 1.0)), *(("nt_xent_dot", t) for t in (10.0, 100.0))),
                    label="temperature τ",
                ),
            ),
        ),
        Space(
            name="batch-epochs",
            repeats=f"{_V1}, Fig. 9",
            why="Batch size against length: large batches see more negatives per step, which matters less the longer one trains.",
            axes=(
                Axis(paths=("train.batch_size",), values=(Times(1 / 4), Times(1 / 2), Times(1), Times(2)), label="batch size N, images"),
                Axis(paths=("train.epochs",), values=(Times(1 / 4), Times(1 / 2), Times(1)), label="epochs"),
            ),
        ),
        Space(
            name="width-depth",
            repeats=f"{_V1}, Fig. 7",
            why="Depth and width of the encoder: contrasting gains from size.",
            axes=(_DEPTHS, Axis(paths=("encoder.width",), values=(1, 2, 4), label="width multiplier")),
        ),
        Space(
            name="labels-fraction",
            repeats=f"{_V2}, Table 1 in miniature",
            why="Larger encoders scored with 1 %, 10 % and all of the labels: the fewer labels, the more size helps.",
            axes=(_DEPTHS, Axis(paths=("encoder.width",), values=(1, 2), label="width multiplier")),
            label_shares=(0.01, 0.1, 1.0),
        ),
        Space(
            name="search",
            repeats="",
            why="Temperature, learning rate and colour strength as continuous quantities, for --search random and optuna.",
            axes=(
                Axis(paths=("loss.temperature",), values=Between(0.05, 1.0, log=True), label="temperature τ"),
                Axis(paths=("optim.base_lr",), values=PeakBetween(0.25, 4.0), label="base learning rate"),
                Axis(paths=("views.colour_strength",), values=Between(0.1, 1.2), label="colour strength s"),
            ),
        ),
    )
}


def space(name: str) -> Space:
    """The space called `name`. If there is none, raises UserError with the nearest names."""
    if name not in SPACES:
        near = difflib.get_close_matches(name, SPACES, n=3, cutoff=0.3) or list(SPACES)
        raise UserError(f"unknown space {name!r}; nearest: {', '.join(near)} (`simclr sweep --list` describes all)")
    return SPACES[name]


def listing() -> str:
    """All spaces, each with its figure, its sentence, its axes and its number of combinations."""
    lines = []
    for found in SPACES.values():
        lines.append(f"{found.name}{f'  ({found.repeats})' if found.repeats else ''}\n  {found.why}")
        for axis in found.axes:
            lines.append(f"    {axis.key}: {text_of(axis)}")
        lines.append("")
    return "\n".join(lines).rstrip()


def text_of(axis: Axis) -> str:
    """The values of an axis, for people."""
    if not isinstance(axis.values, tuple):
        return _text(axis.values)
    return ", ".join(map(_text, axis.values[:8])) + (f", … {len(axis.values)} in all" if len(axis.values) > 8 else "")


def _text(value: Any) -> str:
    match value:
        case Times(factor):
            return f"×{factor:g}"
        case Peak(factor):
            return f"lr ×{factor:g}"
        case Between(low, high) | WholeBetween(low, high):
            return f"{low:g} … {high:g}"
        case PeakBetween(low, high):
            return f"lr ×{low:g} … ×{high:g}"
        case tuple():
            return " + ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
