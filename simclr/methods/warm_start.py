"""The first state of a pretraining that begins with given weights, in place of those that its seed draws."""

from __future__ import annotations

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
    captions: bool = True

    def examples(self, split: str, groups: int = 1) -> int:
        return 1 << 40


def warm_start(config: Config, weights: Weights, classes: tuple[str, ...], where: object) -> tuple[State, str]:
    """(the state at step 0 with the `weights`, which come from `where`; what was taken of them, in a sentence).

    The encoder is taken with BatchNorm's statistics, bit for bit; float16, bfloat16 and, but for a run in float64, float64 become float32.
    The projection head is taken if all its layers fit, the linear classifier if it tells the same `classes` apart as the data; else they
    begin with the initial weights of `config.seed`. A queue begins anew, a moving average with the same encoder and head; what the run of a
    sibling of SimCLR's has beside its encoder is taken, part by part, by a run of the same method, its queue and average as one. The
    optimizer begins anew: the state has no tensor of it.
    Raises UserError if the encoder does not fit: with the first differences, and the flags that would.
    """
    require_fit(config.encoder, weights, where, config.views.size_px)
    method = pretraining(config, Start(Path()), _Classes(classes))  # type: ignore[arg-type]  # it reads no more of a manifest
    model, parts = method.network.state_dict(), method.published
    taken: dict[str, Tensor] = {f"encoder.{name}": t for name, t in weights.encoder.items()}
    said = [f"{len(weights.encoder)} of {len(parts['encoder'].state_dict())} encoder tensors"]

    beside = method.state.state_dict()
    rest: dict[str, Tensor] = {}
    if "head" not in parts:
        rest, told = _rest(config, weights, model, beside)
        said += told
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
    pool = weights.pool or (weights.shape.pool if weights.shape else "")
    if config.encoder.vit and pool and pool != config.encoder.pool:
        said.append(f"encoder.pool was {pool}, and is {config.encoder.pool} here")
    if weights.unused:
        said.append(f"not used: {', '.join(weights.unused[:3])}{f' and {len(weights.unused) - 3} more' if len(weights.unused) > 3 else ''}")

    tensors = {f"model.{name}": t for name, t in (model | taken).items()}
    tensors |= rest
    given = taken | {name.removeprefix("model."): t for name, t in rest.items()}
    beside |= {name: t for name, t in given.items() if name in beside}
    tensors |= {f"state.{name}": t.clone() for name, t in beside.items() if f"state.{name}" not in rest}
    return State(0, config.to_dict(), tensors), "; ".join(said)


def _rest(config: Config, weights: Weights, model: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(what is taken of `weights.rest`, by names in a checkpoint; what is taken and what begins anew, in words). `model` and `state` are
    the first tensors of the run's network and state; each part of the network is taken or not, and the state as a whole."""
    names = [f"model.{part}" for part in dict.fromkeys(name.partition(".")[0] for name in model) if part not in ("encoder", "classifier")]
    own = {f"model.{name}": t for name, t in model.items()} | {f"state.{name}": t for name, t in state.items()}
    given = weights.rest if weights.method == config.METHOD else {}
    taken: dict[str, Tensor] = {}
    said: dict[str, list[str]] = {"taken": [], "new": []}
    for part in [*names, *(["state"] if state else [])]:
        found, wanted = (
            {name: t for name, t in tensors.items() if name == part or name.startswith(f"{part}.")}  # a parameter is a part by itself
            for tensors in (given, own)
        )
        fits = not differences(wanted, found)
        taken |= {name: t.to(own[name].dtype) for name, t in found.items()} if fits else {}
        if given or part != "state":
            said["taken" if fits else "new"].append(part.removeprefix("model."))
    return taken, [f"{' and '.join(parts)}: {how}" for how, parts in said.items() if parts]
