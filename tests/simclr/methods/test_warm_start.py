"""A pretraining that begins with given weights: they are there bit for bit, and from then on it is a run like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import simclr
from simclr import checkpoint
from simclr.config import Config, SimCLR
from simclr.encoder.directory import write_encoder
from simclr.encoder.weights import Weights, of_checkpoint, of_directory
from simclr.errors import UserError
from simclr.family import BYOL, MoCo
from simclr.methods.simclr import Network, build_model
from simclr.methods.warm_start import warm_start
from tests.support.small import TINY, run

CLASSES = tuple("abcdefghij")


def given(config: SimCLR = TINY, classes: tuple[str, ...] = CLASSES) -> tuple[Network, Weights]:
    """A model of another seed whose statistics are not the initial ones."""
    model = build_model(dataclasses.replace(config, seed=9), len(classes))
    for t in model.state_dict().values():
        if t.ndim == 1:
            t.add_(torch.rand(t.shape, generator=torch.Generator().manual_seed(len(t))))
    parts: dict[str, Any] = {name: dict(getattr(model, name).state_dict()) for name in ("encoder", "head", "classifier")}
    return model, Weights(**parts, classes=classes)


def test_the_first_state_has_the_encoder_bit_for_bit(patterns: Path, tmp_path: Path) -> None:
    """Features of the run's first state are those of the given encoder; the optimizer has no state."""
    model, _ = given()
    parts = {name: dict(getattr(model, name).state_dict()) for name in ("encoder", "head", "classifier")}
    there = tmp_path / "encoder"
    write_encoder(parts["encoder"], TINY, there, {}, head=parts["head"], classifier=parts["classifier"], classes=list(CLASSES))
    state, said = warm_start(TINY, of_directory(there), CLASSES, there)
    assert said == f"{len(parts['encoder'])} of {len(parts['encoder'])} encoder tensors; head: taken; classifier: taken"
    assert state.step == 0 and not any(name.startswith("optimizer.") for name in state.tensors)
    began = build_model(TINY, 10)
    began.load_state_dict({name.removeprefix("model."): t for name, t in state.tensors.items()})
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(began.eval().encoder(x), simclr.load_encoder(there)(x))
        assert not torch.equal(began.encoder(x), build_model(TINY, 10).eval().encoder(x))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in began.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_become_float32_and_it_is_said(kind: torch.dtype) -> None:
    _, weights = given()
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision="float32"))
    encoder = {name: t.to(kind) for name, t in weights.encoder.items()}
    state, said = warm_start(config, dataclasses.replace(weights, encoder=encoder), CLASSES, "w")
    assert said.endswith(f"classifier: taken; {str(kind).removeprefix('torch.')} became float32")
    assert {t.dtype for t in state.tensors.values()} == {torch.float32}
    assert all(torch.equal(state.tensors[f"model.encoder.{name}"], t.float()) for name, t in encoder.items())
    assert "float32" not in warm_start(config, weights, CLASSES, "w")[1]


def test_a_run_in_float64_takes_float64_bit_for_bit() -> None:
    _, weights = given()
    encoder = {name: t.double() + 1e-12 for name, t in weights.encoder.items()}
    state, said = warm_start(TINY, dataclasses.replace(weights, encoder=encoder), CLASSES, "w")
    assert TINY.train.precision == "float64" and "float32" not in said
    assert all(torch.equal(state.tensors[f"model.encoder.{name}"], t) for name, t in encoder.items())


def test_whole_numbers_are_no_weights() -> None:
    _, weights = given()
    name = "stem.0.weight"
    with pytest.raises(UserError, match=f"the weights in w do not fit the encoder: {name} is of torch.int64"):
        warm_start(TINY, dataclasses.replace(weights, encoder=weights.encoder | {name: weights.encoder[name].long()}), CLASSES, "w")
    head = {name: t.int() for name, t in weights.head.items()}
    assert "head: new, the given one differs" in warm_start(TINY, dataclasses.replace(weights, head=head), CLASSES, "w")[1]


def test_the_run_goes_on_bitwise_as_uninterrupted(patterns: Path, tmp_path: Path) -> None:
    """The worker's way: the first state is the checkpoint of step 0, and a later one is taken in its place."""
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision="float32", steps=4, checkpoint_every_steps=1))
    _, weights = given()
    for part in ("whole", "parts"):
        checkpoint.write(tmp_path / part, warm_start(config, weights, CLASSES, "w")[0], 2)
    whole = run(config, patterns, tmp_path / "whole")
    run(config, patterns, tmp_path / "parts", until=2)
    rest = run(config, patterns, tmp_path / "parts")
    assert list(whole) == [1, 2, 3, 4] and list(rest) == [3, 4]
    a, b = (checkpoint.read(tmp_path / part / "step-000000004").tensors for part in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    scratch = run(config, patterns, tmp_path / "scratch", until=1)
    assert whole[1].metrics["train/loss"] != scratch[1].metrics["train/loss"]
    assert whole[1].metrics["train/lr"] == scratch[1].metrics["train/lr"]


def test_parts_that_do_not_fit_begin_anew_and_that_is_said() -> None:
    model, weights = given()
    fresh = build_model(TINY, 10).state_dict()

    def taken(config: Config = TINY, data: tuple[str, ...] = CLASSES, **changes: Any) -> tuple[dict[str, torch.Tensor], str]:
        state, said = warm_start(config, dataclasses.replace(weights, **changes), data, "w")
        return {name.removeprefix("model."): t for name, t in state.tensors.items()}, said.partition("encoder tensors; ")[2]

    tensors, said = taken(head={}, classifier={}, unused=("fc.weight", "fc.bias", "a", "b"))
    assert said == "head: new, none was given; classifier: new, none was given; not used: fc.weight, fc.bias, a and 1 more"
    for name, t in tensors.items():
        assert torch.equal(t, model.state_dict()[name] if name.startswith("encoder.") else fresh[name])
    deeper = dataclasses.replace(TINY, head=dataclasses.replace(TINY.head, layers=3))
    assert taken(deeper)[1] == (
        "head: new, the given one differs (layers.1.0.weight has shape (16, 64), expected (64, 64)); classifier: taken"
    )
    assert taken(data=CLASSES[::-1])[1].endswith("classifier: new, other classes")  # as many, in another order
    assert taken(data=CLASSES[:4])[1].endswith("classifier: new, other classes")
    assert taken(classes=())[1].endswith("classifier: new, its classes are not known")
    assert taken(data=())[1].endswith("head: taken; classifier: not used")
    with pytest.raises(UserError, match=r"the weights in w do not fit the encoder: stem\.0\.weight has shape"):
        taken(dataclasses.replace(TINY, encoder=dataclasses.replace(TINY.encoder, width=2)))


def test_a_queues_average_begins_with_the_same_weights_and_its_rows_empty(patterns: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, loss=dataclasses.replace(TINY.loss, memory=96))
    model, weights = given()
    state, _ = warm_start(config, weights, CLASSES, "w")
    for part in ("encoder", "head"):
        there = getattr(model, part).state_dict()
        assert all(torch.equal(state.tensors[f"state.{part}.{name}"], t) for name, t in there.items())
    assert not state.tensors["state.rows"].any()
    checkpoint.write(tmp_path, state, 2)
    assert list(run(config, patterns, tmp_path, until=1)) == [1]  # the loop takes it


@pytest.mark.parametrize("kind", [MoCo, BYOL])
def test_a_sibling_goes_on_with_all_that_its_run_had(patterns: Path, tmp_path: Path, kind: type[MoCo] | type[BYOL]) -> None:
    """Head, predictor, average and queue bit for bit; what does not fit, or is another method's, begins anew and is named."""
    sizes: dict[str, Any] = {"queue": 96} if kind is MoCo else {"hidden": 12}
    train = dataclasses.replace(TINY.train, steps=2, checkpoint_every_steps=2, precision="float32")
    config = kind(encoder=TINY.encoder, views=TINY.views, optim=TINY.optim, train=train, watch=TINY.watch, d_out=8, **sizes)
    run(config, patterns, tmp_path)
    newest = checkpoint.read(tmp_path / "step-000000002").tensors
    weights = of_checkpoint(tmp_path / "step-000000002", config, CLASSES, whole=True)
    longer = dataclasses.replace(config, seed=1)
    state, said = warm_start(longer, weights, CLASSES, "w")
    assert not (state.tensors.keys() ^ {name for name in newest if not name.startswith("optimizer.")})
    assert all(torch.equal(t, newest[name]) for name, t in state.tensors.items())
    parts = "head and state" if kind is MoCo else "projector and predictor and state"
    assert said.endswith(f"; {parts}: taken; classifier: taken")

    other = dataclasses.replace(longer, queue=48) if isinstance(longer, MoCo) else dataclasses.replace(longer, hidden=24)
    told = "head: taken; state: new" if kind is MoCo else "projector and predictor and state: new"
    state, said = warm_start(other, weights, CLASSES, "w")
    assert said.endswith(f"; {told}; classifier: taken")
    parts = ("state.encoder.", "state.head.") if kind is MoCo else ("state.encoder.",)
    average = [name for name in state.tensors if name.startswith(parts)]
    assert len(average) > 20  # each as the network that it is the average of
    assert all(torch.equal(state.tensors[name], state.tensors[name.replace("state", "model")]) for name in average)
    assert warm_start(TINY, weights, CLASSES, "w")[1].endswith("; head: new, none was given; classifier: taken")
