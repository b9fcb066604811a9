"""The first state of a pretraining that begins with given weights, in place of those that its seed draws."""

from __future__ import annotations

import torch
from torch import Tensor

from simclr.checkpoint import State
from simclr.config import Config
from simclr.encoder.directory import differences
from simclr.encoder.weights import Weights, require_fit
from simclr.methods.queue import Queue
from simclr.methods.simclr import build_model
from simclr.precision import weights_dtype


def warm_start(config: Config, weights: Weights, classes: tuple[str, ...], where: object) -> tuple[State, str]:
    """(the state at step 0 with the `weights`, which come from `where`; what was taken of them, in a sentence).

    The encoder is taken with BatchNorm's statistics, bit for bit; float16, bfloat16 and, but for a run in float64, float64 become float32.
    The projection head is taken if all its layers fit, the linear classifier if it tells the same `classes` apart as the data; else they
    begin with the initial weights of `config.seed`. A queue begins empty, its moving average with the same encoder and head. The optimizer
    begins anew: the state has no tensor of it.
    Raises UserError if the encoder does not fit: with the first differences, and the flags that would.
    """
    require_fit(config.encoder, weights, where)
    model = build_model(config, len(classes))
    taken: dict[str, Tensor] = {f"encoder.{name}": t for name, t in weights.encoder.items()}
    said = [f"{len(weights.encoder)} of {len(model.encoder.state_dict())} encoder tensors"]

    if wrong := differences(model.head.state_dict(), weights.head):
        said.append(f"head: new, {f'the given one differs ({wrong[0]})' if weights.head else 'none was given'}")
    else:
        taken |= {f"head.{name}": t for name, t in weights.head.items()}
        said.append("head: taken" if weights.head else "head: none")

    if model.classifier is None:
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

    tensors = {f"model.{name}": t for name, t in model.state_dict().items()} | {f"model.{name}": t for name, t in taken.items()}
    if config.loss.memory:
        queue = Queue(model.encoder, model.head, config.loss.memory, config.head.d_out, config.loss.memory_decay)
        beside = queue.state_dict() | {name: t for name, t in taken.items() if not name.startswith("classifier.")}
        tensors |= {f"state.{name}": t.clone() for name, t in beside.items()}
    return State(0, config.to_dict(), tensors), "; ".join(said)
