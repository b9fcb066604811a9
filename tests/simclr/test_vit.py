"""A vision transformer through the whole of it: pretrained on ranks and in pieces, resumed, published, fine-tuned, begun with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import simclr
from simclr import checkpoint
from simclr.config import Encoder, Head, SimCLR
from simclr.encoder import weights
from simclr.encoder.directory import write_encoder
from simclr.errors import UserError
from simclr.methods.classifier import first_state
from simclr.methods.warm_start import warm_start
from simclr.networks.encoders import build_encoder
from simclr.train import Start, train
from tests.conftest import Within
from tests.support.ranks import Ranks
from tests.support.small import TINY, TUNED, run

SMALL = Encoder(vit="micro", patch_px=16, positions="sin_cos", frozen_patches=True, drop_path=0.4)
VIT = replace(TINY, encoder=SMALL, train=replace(TINY.train, batch_size=13, steps=3, checkpoint_every_steps=2))


def trained(config: SimCLR, patterns: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of every step, and the state behind the last."""
    reports = list(train(config, Start(patterns)))
    return [report.metrics["train/loss"] for report in reports], {name: t.clone() for name, t in reports[-1].state.tensors.items()}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((t - b[name]).abs().max()) for name, t in a.items())


@pytest.fixture(scope="module")
def whole(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], dict[str, Tensor]]:
    """(checkpoints, losses, last state) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    reports = run(VIT, patterns, folder)
    return folder, [r.metrics["train/loss"] for r in reports.values()], {name: t.clone() for name, t in reports[3].state.tensors.items()}


@pytest.fixture(scope="module")
def published(whole: tuple[Path, list[float], dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published") / "encoder"
    found = {name.removeprefix("model.encoder."): t.float() for name, t in whole[2].items() if name.startswith("model.encoder.")}
    write_encoder(found, VIT, directory, {"recipe": "none", "step": 3})
    return directory


def test_two_ranks_train_what_one_does(
    whole: tuple[Path, list[float], dict[str, Tensor]], ranks: Ranks, patterns: Path, within: Within
) -> None:
    """13 images, which 2 does not divide; left-out paths, which belong to images and not to ranks."""
    _, losses, tensors = whole
    for found, state in ranks(2, trained, VIT, patterns):
        within("loss", max(abs(a - b) for a, b in zip(found, losses, strict=True)), 1e-10)
        within("state", apart(state, tensors), 1e-9)
    undropped = replace(VIT, encoder=replace(SMALL, drop_path=0.0), train=replace(VIT.train, steps=1))
    assert abs(trained(undropped, patterns)[0][0] - losses[0]) > 1e-4


def test_frozen_parts_stay_and_all_others_move(whole: tuple[Path, list[float], dict[str, Tensor]]) -> None:
    begun = build_encoder(SMALL, VIT.seed, 32).state_dict()
    stay = {name for name, t in begun.items() if torch.equal(t.double(), whole[2][f"model.encoder.{name}"])}
    assert stay == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_a_resumed_run_is_the_same_to_the_bit(whole: tuple[Path, list[float], dict[str, Tensor]], patterns: Path, tmp_path: Path) -> None:
    run(VIT, patterns, tmp_path, until=2)
    again = run(VIT, patterns, tmp_path)
    assert list(again) == [3] and all(torch.equal(t, whole[2][name]) for name, t in again[3].state.tensors.items())


def test_pieces_of_a_batch_have_its_gradient(patterns: Path, within: Within) -> None:
    """Without a head there is no BatchNorm: pieces see the same paths left out, and the whole batch's loss."""
    plain = replace(VIT, head=Head(layers=0), train=replace(VIT.train, steps=2))
    losses, tensors = trained(plain, patterns)
    found, state = trained(replace(plain, train=replace(plain.train, micro_batch=5)), patterns)
    within("loss", max(abs(a - b) for a, b in zip(found, losses, strict=True)), 1e-10)
    within("state", apart(state, tensors), 1e-9)


def test_a_published_one_is_read_and_embeds(published: Path, whole: tuple[Path, list[float], dict[str, Tensor]]) -> None:
    """Also of a size that 224 px, a config's default, would not be whole patches of; all of it can be trained."""
    encoder = simclr.load_encoder(published)
    ours = build_encoder(SMALL, 0, 32)
    ours.load_state_dict({name.removeprefix("model.encoder."): t for name, t in whole[2].items() if name.startswith("model.encoder.")})
    pictures = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder.embed(pictures), ours.eval()(encoder.prepared(pictures).to(memory_format=torch.channels_last)))
    assert encoder.d_h == 96 and encoder.encoder.get_parameter("patch_embed.proj.weight").requires_grad
    odd = replace(VIT, encoder=Encoder(vit="micro", patch_px=5), views=replace(VIT.views, size_px=40))
    write_encoder(dict(build_encoder(odd.encoder, 0, 40).state_dict()), odd, published.with_name("odd"), {})
    assert simclr.load_encoder(published.with_name("odd")).embed(pictures).shape == (3, 96)


def test_a_published_one_is_fine_tuned(published: Path, patterns: Path, tmp_path: Path) -> None:
    config = replace(TUNED, encoder=SMALL.trained, head=VIT.head, tap=0, train=replace(TUNED.train, steps=1, checkpoint_every_steps=1))
    state = first_state(config, published, 10)
    checkpoint.write(tmp_path, state, 1)
    (report,) = run(config, patterns, tmp_path).values()
    moved = {name for name, t in state.tensors.items() if not torch.equal(t.double(), report.state.tensors[name])}
    assert {"model.classifier.weight"} <= moved and report.metrics["train/loss"] > 0


def test_weights_that_do_not_fit_are_told_what_would(published: Path, tmp_path: Path) -> None:
    given = weights.of_directory(published)
    state, said = warm_start(VIT, given, (), "w")
    assert said.startswith("78 of 78 encoder tensors") and torch.equal(
        state.tensors["model.encoder.norm.weight"], given.encoder["norm.weight"]
    )
    with pytest.raises(UserError, match=r"stem\.0\.weight is missing.*; would fit: --encoder\.vit micro$"):
        weights.require_fit(Encoder(depth=8), given, "w", 32)
    with pytest.raises(UserError, match=r"pos_embed has shape \(1, 5, 96\), expected \(1, 17, 96\); would fit: --views\.size-px 32$"):
        weights.require_fit(SMALL, given, "w", 64)
    with pytest.raises(UserError, match=r"they are of 3 attention heads, not 6; would fit: --encoder\.heads 3$"):
        weights.require_fit(replace(SMALL, heads=6), given, "w", 32)
    torch.save(
        {"model": {f"module.{name}": t for name, t in given.encoder.items()} | {"module.head.weight": torch.ones(2)}}, tmp_path / "v.pth"
    )
    of_file = weights.of_file(tmp_path / "v.pth")
    assert of_file.unused == ("model.module.head.weight",) and of_file.encoder.keys() == given.encoder.keys()
    with pytest.raises(UserError, match=r"would fit: --encoder\.vit micro --views\.size-px 32$"):
        weights.require_fit(Encoder(vit="tiny"), of_file, "w", 64)
    weights.require_fit(SMALL, of_file, "w", 32)
