"""The first state of a pretraining that begins with given weights, in place of those that its seed draws."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simclr.checkpoint import State
from simclr.config import Config
from simclr.encoder.directory import differences
from simclr.encoder.weights import Weights, require_fit
from simclr.methods.choice import pretraining
from simclr.methods.method import Start
from simclr.precision import weights_dtype


@dataclass(frozen=True, slots=True)
class _Classes:
    """As much of a manifest as the first state wants."""

    classes: tuple[str, ...]
    splits: tuple[str, ...] = ()

    def examples(self, split: str, groups: int = 1) -> int:
        return 1 << 40


def warm_start(config: Config, weights: Weights, classes: tuple[str, ...], where: object) -> tuple[State, str]:
    """(the state at step 0 with the `weights`, which come from `where`; what was taken of them, in a sentence).

    The encoder is taken with BatchNorm's statistics, bit for bit; float16, bfloat16 and, but for a run in float64, float64 become float32.
    The projection head is taken if all its layers fit, the linear classifier if it tells the same `classes` apart as the data; else they
    begin with the initial weights of `config.seed`. A queue begins anew, a moving average with the same encoder and head. The optimizer
    begins anew: the state has no tensor of it.
    Raises UserError if the encoder does not fit: with the first differences, and the flags that would.
    """
    require_fit(config.encoder, weights, where, config.views.size_px)
    method = pretraining(config, Start(Path()), _Classes(classes))  # type: ignore[arg-type]  # it reads no more of a manifest
    model, parts = method.network.state_dict(), method.published
    taken: dict[str, Tensor] = {f"encoder.{name}": t for name, t in weights.encoder.items()}
    said = [f"{len(weights.encoder)} of {len(parts['encoder'].state_dict())} encoder tensors"]

    if "head" not in parts:
        said.append(f"{_listed(model)}: new")
    elif wrong := differences(parts["head"].state_dict(), weights.head):
        said.append(f"head: new, {f'the given one differs ({wrong[0]})' if weights.head else 'none was given'}")
    else:
        taken |= {f"head.{name}": t for name, t in weights.head.items()}
        said.append("head: taken" if weights.head else "head: none")

    if "classifier" not in parts:
        said += ["classifier: not used"] if weights.classifier else []
    elif not weights.classifier:
        said.append("classifier: new, none was given")
    elif weights.classes != classes:
        said.append(f"classifier: new, {'other classes' if weights.classes else 'its classes are not known'}")
    else:
        taken |= {f"classifier.{name}": t for name, t in weights.classifier.items()}
        said.append("classifier: taken")
    kept = {torch.float32, weights_dtype(config.train.precision)}
    others = {str(t.dtype).removeprefix("torch.") for t in taken.values() if t.dtype not in kept}
    if others:
        taken = {name: t if t.dtype in kept else t.float() for name, t in taken.items()}
        said.append(f"{' and '.join(sorted(others))} became float32")
    if weights.unused:
        said.append(f"not used: {', '.join(weights.unused[:3])}{f' and {len(weights.unused) - 3} more' if len(weights.unused) > 3 else ''}")

    tensors = {f"model.{name}": t for name, t in (model | taken).items()}
    beside = method.state.state_dict()
    beside |= {name: t for name, t in taken.items() if name in beside}
    tensors |= {f"state.{name}": t.clone() for name, t in beside.items()}
    return State(0, config.to_dict(), tensors), "; ".join(said)


def _listed(names: Iterable[str]) -> str:
    """The parts of a network beside its encoder and classifier."""
    parts = dict.fromkeys(name.partition(".")[0] for name in names)
    return " and ".join(part for part in parts if part not in ("encoder", "classifier"))
