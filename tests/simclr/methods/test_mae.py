"""MAE: masks, loss and gradients are the authors', on any number of ranks; and the run that trains with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr import checkpoint, loss, sense
from simclr.config import Encoder, Optim, Views
from simclr.data.loader import batches
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.family import MAE
from simclr.gradient_cache import cached_gradient
from simclr.methods import mae as module
from simclr.methods import method
from simclr.methods.choice import shapes
from simclr.methods.mae import Network, completed, images_of, inputs_of, network_in, objective, orders, painted, patches_of, seen
from simclr.methods.method import Start
from simclr.networks.vit import Decoder, vit
from simclr.optim import dino_rule
from simclr.train import train
from simclr.views.draw import Crop
from tests.conftest import Within
from tests.support.paths import GOLDEN
from tests.support.ranks import Ranks
from tests.support.small import TINY, mine, resumed

FAMILY = GOLDEN / "family"
SMALL = MAE(
    encoder=Encoder(vit="micro", patch_px=8, positions="sin_cos"),
    views=dataclasses.replace(TINY.views, area=(0.2, 1.0)),
    optim=Optim(name="adamw", base_lr=0.01, warmup_epochs=0.1, weight_decay=0.05, beta2=0.95),
    train=dataclasses.replace(TINY.train, steps=3, checkpoint_every_steps=3),
    watch=TINY.watch,
    decoder_width=16,
    decoder_blocks=1,
    decoder_heads=4,
)
AUTHORS = dataclasses.replace(SMALL, encoder=Encoder(vit="micro", patch_px=4), views=Views(size_px=16), normalised=False)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(FAMILY / name) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


# ── Against the authors' numbers ───────────────────────────────────────────────────────────────────────────────────


def test_patches_and_masks_are_the_authors(within: Within) -> None:
    """From their noise; and how many patches stay, in floating point."""
    g = golden("mae.npz")
    assert torch.equal(patches_of(g["images"].double(), 4), g["patches"].double())
    assert torch.equal(images_of(g["unpatchify_in"].double(), 4), g["unpatchify_out"])
    order = g["noise"].argsort(1)
    for ratio in (0.5, 0.6, 0.75):
        config = dataclasses.replace(AUTHORS, mask_ratio=ratio)
        kept = g["masking_x"].gather(1, order[:, : config.kept, None].expand(-1, -1, 6))
        assert torch.equal(kept.double(), g[f"masking{ratio}_kept"])
        given = {"views": g["images"][None].double(), "order": order[None]}
        assert torch.equal(painted(given, config)["gone"][0].float(), g[f"masking{ratio}_mask"])
        assert torch.equal(order.argsort(1), g[f"masking{ratio}_restore"])
    for row in json.loads((FAMILY / "mae_tables.json").read_text())["kept_patches"]:
        side = round(row["patches"] ** 0.5)
        if side**2 == row["patches"] and row["kept"]:
            config = dataclasses.replace(AUTHORS, views=Views(size_px=4 * side), mask_ratio=row["ratio"])
            assert (config.patches, config.kept) == (row["patches"], row["kept"])


@pytest.mark.parametrize("normalised", [False, True])
def test_the_loss_and_its_gradient_are_the_authors(normalised: bool, within: Within) -> None:
    g, kind = golden("mae.npz"), "normpix" if normalised else "plain"
    config = dataclasses.replace(AUTHORS, normalised=normalised)
    targets = painted({"views": g["images"][None].double(), "order": g["noise"].argsort(1)[None]}, config)
    predicted = g["loss_pred"].double().requires_grad_()
    found = loss.masked_mean_square(predicted, targets["patches"][0], targets["gone"][0])
    found.backward()
    assert predicted.grad is not None
    within("loss", abs(float(found.detach() - g[f"loss_{kind}"])), 1e-12)
    within("gradient", float((predicted.grad - g[f"loss_{kind}_grad"]).abs().max()), 1e-12)


def authors() -> Network:
    g, weights = golden("mae.npz"), golden("mae_weights.npz")
    network = Network(vit(32, 2, 4, 4, 16), Decoder(32, 16, 1, 4, 4, 4), 4).double()
    network.encoder.pos_embed.requires_grad_(False)
    network.encoder.pos_embed.copy_(g["pos_embed"][None])
    network.decoder.pos_embed.copy_(g["decoder_pos_embed"][None])
    for name, p in network.named_parameters():
        if not name.endswith("pos_embed"):
            p.data.copy_(weights[theirs(name)])
    return network


def theirs(name: str) -> str:
    part, _, rest = name.partition(".")
    return rest if part == "encoder" or rest == "mask_token" else f"decoder_{rest}"


def whole(ratio: float, normalised: bool) -> tuple[float, Tensor, dict[str, Tensor]]:
    """(loss of this rank's share, its prediction, gradients) of the authors' network, with their noise."""
    g, network = golden("mae.npz"), authors()
    config = dataclasses.replace(AUTHORS, mask_ratio=ratio, normalised=normalised)
    network.kept = config.kept
    rows = {"views": mine(g["images"].double())[None], "order": mine(g["noise"].argsort(1))[None]}
    out = network(rows)
    value, _ = objective(out, painted(rows, config), 0, len(g["images"]))
    value.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return value.item(), out["pred"][0].detach(), gradients


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("ratio", "kind"), [(0.75, "plain"), (0.75, "normpix"), (0.6, "plain60")])
def test_loss_prediction_and_gradients_are_the_authors(ratio: float, kind: str, world: int, ranks: Ranks, within: Within) -> None:
    """Three images, on two ranks in unequal shares."""
    g = golden("mae.npz")
    found = ranks(world, whole, ratio, kind == "normpix") if world > 1 else [whole(ratio, kind == "normpix")]
    within("loss", abs(sum(value for value, _, _ in found) / world - float(g[f"{kind}_total"])), 1e-10)
    if f"{kind}_pred" in g:
        within("prediction", float((torch.cat([part for _, part, _ in found]) - g[f"{kind}_pred"]).abs().max()), 1e-10)
    names = {f"{kind}_grad|{theirs(name)}": name for name in found[0][2]}
    listed = [name for name in g if name.startswith(f"{kind}_grad|")]
    assert all(name in names for name in listed) and (kind == "plain60" or len(listed) >= 8)
    for name in listed:
        mean = sum(gradients[names[name]] for *_, gradients in found) / world
        within("gradient", float((mean - g[name]).abs().max()), 1e-10)


def test_what_decays_is_the_authors() -> None:
    groups = json.loads((FAMILY / "mae_tables.json").read_text())["pretraining_groups"]
    seen = 0
    for name, p in authors().named_parameters():
        for kind, names in groups.items():
            if isinstance(names, list) and theirs(name) in names and p.requires_grad:
                assert dino_rule(name, p)[0] == (not kind.startswith("no")), name
                seen += 1
    assert seen >= 20


# ── Runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_masks_are_keyed_by_seed_epoch_and_image(patterns: Path) -> None:
    """The same at every call and for every share of a batch; another for each image, epoch and seed."""
    ids = np.arange(40, dtype=np.int64)
    order = orders(SMALL, 3, ids)
    assert order.shape == (40, 16) and torch.equal(order.sort(1).values, torch.arange(16).expand(40, -1))
    assert torch.equal(orders(SMALL, 3, ids[7:9]), order[7:9]) and len({tuple(row.tolist()) for row in order}) == 40
    for other in (orders(SMALL, 4, ids), orders(dataclasses.replace(SMALL, seed=1), 3, ids)):
        assert int((other != order).any(1).sum()) == 40
    crops = (Crop(count=1, views=SMALL.views, distorted=False),)
    stream = batches(SMALL, patterns, 0, 0, 1, crops=crops)
    batch = next(stream)
    stream.close()
    a, b = (inputs_of(batch, some, crops, SMALL, torch.device("cpu")) for some in (slice(0, 24), slice(6, 12)))
    assert a["views"].shape == (1, 24, 3, 32, 32) and all(torch.equal(a[name][:, 6:12], b[name]) for name in a)
    later = inputs_of(dataclasses.replace(batch, epoch=5), slice(0, 24), crops, SMALL, torch.device("cpu"))
    assert torch.equal(later["order"][0], orders(SMALL, 5, batch.ids[:24].numpy())) and not torch.equal(later["order"], a["order"])


def test_targets_of_a_bfloat16_run_are_those_of_float32(patterns: Path, monkeypatch: pytest.MonkeyPatch, within: Within) -> None:
    """Also where views are written as bfloat16 for the network, on a GPU; and its step goes on under autocast."""
    monkeypatch.setattr(method, "views_dtype", lambda precision, device: torch.bfloat16 if precision == "bfloat16" else torch.float32)
    crops, found = (Crop(count=1, views=SMALL.views, distorted=False),), []
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, precision=precision, steps=1))
        with contextlib.closing(batches(config, patterns, 0, 0, 1, crops=crops)) as stream:
            rows = inputs_of(next(stream), slice(0, 24), crops, config, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            found.append(painted(rows, config)["patches"])
        assert steps(config, patterns)[0][0]["train/loss"] > 0
    assert found[1].dtype == torch.float32
    within("targets", float((found[0] - found[1]).abs().max()), 1e-6)


def steps(config: MAE, data: Path) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """Metrics and state after every step."""
    found = [(r.metrics, {name: t.clone() for name, t in r.state.tensors.items()}) for r in train(config, Start(data))]
    return [metrics for metrics, _ in found], [state for _, state in found]


def test_any_number_of_ranks_computes_what_one_does(patterns: Path, ranks: Ranks, within: Within) -> None:
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, batch_size=22))
    metrics, states = steps(config, patterns)
    for world in (2, 3, 4):
        for found, after in ranks(world, steps, config, patterns):
            within("loss", max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(metrics, found, strict=True)), 1e-10)
            within("state", max(float((after[-1][name] - t).abs().max()) for name, t in states[-1].items()), 1e-9)


def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(patterns: Path, tmp_path: Path) -> None:
    assert any(name.startswith("model.decoder.") for name in resumed(SMALL, patterns, tmp_path, until=2))


def test_pieces_give_the_whole_batchs_gradient(within: Within) -> None:
    network = module.build_network(SMALL).double()
    draw = torch.Generator().manual_seed(3)
    rows = {"views": torch.rand(1, 24, 3, 32, 32, generator=draw).double(), "order": torch.rand(1, 24, 16, generator=draw).argsort(2)}

    def objected(outputs: Any, targets: Any) -> Any:
        return objective(outputs, targets, 0, 24)

    value, _ = objected(network(rows), painted(rows, SMALL))
    trained = [p for p in network.parameters() if p.requires_grad]
    expected = torch.autograd.grad(value, trained)
    network.zero_grad()
    given: Any = (network, torch.nn.Module(), lambda some: {name: x[:, some] for name, x in rows.items()}, network)
    found = cached_gradient(*given, partial(painted, config=SMALL), objected, 24, 5)
    within("loss", abs(float(found[2] - value.detach())), 1e-12)
    for p, gradient in zip(trained, expected, strict=True):
        assert p.grad is not None
        within("gradient", float((p.grad - gradient).abs().max()), 1e-12)


def test_the_encoder_sees_the_kept_patches_alone() -> None:
    """Other pixels elsewhere change nothing; the order of all patches gives the tokens of the whole image."""
    network = module.build_network(SMALL)
    x = torch.rand(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        kept = network.encoder.visible(x, order[:, :4])
        patches = patches_of(x, 8)
        patches.scatter_(1, order[:, 4:, None].expand(-1, -1, 192), 0.5)
        assert torch.allclose(network.encoder.visible(images_of(patches, 8), order[:, :4]), kept, atol=1e-6)
        all_of = network.encoder.visible(x, torch.arange(16).expand(2, -1))
        assert torch.allclose(all_of[:, 0], network.encoder(x), atol=1e-5)


def test_pictures_show_the_patches_that_the_run_sees() -> None:
    x, ids = torch.rand(3, 3, 32, 32), torch.tensor([4, 0, 9])
    shown, order = patches_of(seen(x, SMALL, 2, ids), 8), orders(SMALL, 2, ids.numpy())
    for image, patches, own in zip(shown, patches_of(x, 8), order, strict=True):
        assert torch.equal(image[own[:4]], patches[own[:4]]) and bool((image[own[4:]] == 0.5).all())


@pytest.mark.parametrize("normalised", [True, False])
def test_a_completed_picture_has_its_seen_patches_and_painted_ones_in_their_scale(normalised: bool, within: Within) -> None:
    """Written out patch by patch; what `painted` asks for gives the picture back."""
    config, x = dataclasses.replace(SMALL, normalised=normalised), torch.rand(2, 3, 32, 32).double()
    order, pred = torch.rand(2, 16).argsort(1), torch.randn(2, 16, 192).double()
    found = patches_of(completed(pred, x, order, config), 8)
    for i, patches in enumerate(patches_of(x, 8)):
        for place, patch in enumerate(patches):
            if place in order[i, :4].tolist():
                assert torch.equal(found[i, place], patch)
                continue
            there = pred[i, place]
            if normalised:
                there = there * float(patch.var() + 1e-6) ** 0.5 + patch.mean()
            within("patch", float((found[i, place] - there).abs().max()), 1e-12)
    right = painted({"views": x[None], "order": order[None]}, config)["patches"][0]
    within("back", float((completed(right, x, order, config) - x).abs().max()), 1e-12)


def test_a_checkpoint_gives_the_decoder_back() -> None:
    network = module.build_network(dataclasses.replace(SMALL, seed=7))
    state = checkpoint.capture(3, SMALL.to_dict(), network, torch.optim.SGD(network.parameters(), 0.1))
    found = network_in(state, SMALL)
    rows = {"views": torch.rand(1, 2, 3, 32, 32), "order": torch.rand(1, 2, 16).argsort(2)}
    assert torch.equal(found(rows)["pred"], network(rows)["pred"]) and not found.training
    assert not torch.equal(module.build_network(SMALL)(rows)["pred"], network(rows)["pred"])
    with pytest.raises(UserError, match=r"the checkpoint of step 3 does not fit this config: model\.decoder"):
        network_in(state, dataclasses.replace(SMALL, decoder_width=24))


def test_the_network_compiles_in_one_graph() -> None:
    network = module.build_network(SMALL)
    rows = {"views": torch.rand(1, 4, 3, 32, 32), "order": torch.rand(1, 4, 16).argsort(2)}
    with torch.no_grad():
        expected = network(rows)
        found = torch.compile(network, backend="eager", fullgraph=True)(rows)
    assert expected["pred"].shape == (1, 4, 16, 192) and float((found["pred"] - expected["pred"]).abs().max()) < 1e-5


def test_chance_level_is_that_of_grey_patches(within: Within) -> None:
    """Each patch has variance 1 over 192 values, of which one is lost to the mean."""
    rows = {"views": torch.rand(1, 4, 3, 32, 32).double(), "order": torch.rand(1, 4, 16).argsort(2)}
    value, _ = objective({"pred": torch.zeros(1, 4, 16, 192).double()}, painted(rows, SMALL), 0, 4)
    within("loss", abs(float(value) - 191 / 192), 1e-4)
    assert shapes(SMALL).chance == 1.0


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"MAE hides patches, and ResNet-8 has none; give --encoder.vit small"):
        dataclasses.replace(SMALL, encoder=TINY.encoder)
    with pytest.raises(UserError, match=r"mask_ratio 0.97 of 16 patches leaves the encoder 0"):
        dataclasses.replace(SMALL, mask_ratio=0.97)
    with pytest.raises(UserError, match="decoder_width is 18; expected a multiple of decoder_heads"):
        dataclasses.replace(SMALL, decoder_width=18)
    assert MAE.from_dict(SMALL.to_dict()) == SMALL and MAE().encoder.vit == "base"


def test_paths_to_leave_out_are_refused_and_a_run_that_has_them_goes_on(patterns: Path) -> None:
    """MAE leaves none out; a run of before states them, and is read, evaluated and resumed."""
    config, manifest = dataclasses.replace(SMALL, encoder=dataclasses.replace(SMALL.encoder, drop_path=0.1)), read_manifest(patterns)
    assert MAE.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match=r"encoder.drop_path is 0.1, and MAE leaves no path out; leave it out, `simclr finetune` has it"):
        sense.notes(config, manifest, 240)
    said = sense.notes(config, manifest, 240, under_way=True)
    assert any("MAE leaves no path out; this run goes on all the same" in note for note in said)
