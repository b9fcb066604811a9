"""The vision transformer: tokens, blocks, features and gradients of DINO's code, positions of any size, initial weights, depths."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from simclr import keyed
from simclr.config import Config, Encoder, Train, Views
from simclr.data.loader import Batch
from simclr.errors import UserError
from simclr.family import BYOL, MoCo, MoCoV3
from simclr.methods.choice import pretraining
from simclr.methods.method import Start
from simclr.networks.encoders import build_encoder, depths
from simclr.networks.resnet import resnet
from simclr.networks.vit import SIZES, VisionTransformer, class_attention, drop_path_rates, path_factors, positions_at, sin_cos, vit
from tests.conftest import Within
from tests.support.paths import GOLDEN, SHARED

FAMILY = GOLDEN / "family"
SIDES = ("16", "24", "8", "24x16")


def arrays(name: str, folder: Path = FAMILY) -> dict[str, Tensor]:
    with np.load(folder / name) as found:
        return {key: torch.from_numpy(found[key]).double() for key in found.files}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return arrays("vit.npz")


@pytest.fixture(scope="module")
def network() -> VisionTransformer:
    """DINO's weights, which load by their names."""
    made = vit(width=32, blocks=2, heads=4, patch_px=4, size_px=16, enlarged=0.1).double()
    made.load_state_dict(arrays("vit_weights.npz"))
    return made


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max())


def gradients(network: VisionTransformer, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    (network(x) * g).sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


# ── The official numbers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", SIDES)
def test_tokens_blocks_and_features_are_dinos(side: str, golden: dict[str, Tensor], network: VisionTransformer, within: Within) -> None:
    x = golden[f"x{side}"]
    for name, ours in zip((f"tokens{side}", f"block0_{side}", f"block1_{side}"), network.stages(x), strict=True):
        within(name, apart(ours, golden[name]), 1e-10)
    within("normalised", apart(network.norm(network.stages(x)[-1]), golden[f"normalised{side}"]), 1e-10)
    within("cls", apart(network(x), golden[f"cls{side}"]), 1e-10)
    within("channels last", apart(network(x.to(memory_format=torch.channels_last)), golden[f"cls{side}"]), 1e-10)


def test_attention_is_dinos(golden: dict[str, Tensor], network: VisionTransformer, within: Within) -> None:
    """By the last block's own q and k, written out."""
    block: Any = network.blocks[-1]
    q, k, _ = block.attn.qkv(block.norm1(golden["block0_16"])).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    within("attention", apart(torch.softmax(q @ k.mT / math.sqrt(8), -1), golden["attention_last_16"]), 1e-10)


def test_the_class_tokens_attention_is_dinos(golden: dict[str, Tensor], network: VisionTransformer, within: Within) -> None:
    """The maps of their last block; with the token's attention to itself they add up to 1."""
    theirs, ours = golden["attention_last_16"], class_attention(network, golden["x16"])
    within("maps", apart(ours.flatten(2), theirs[:, :, 0, 1:]), 1e-10)
    within("whole", apart(ours.sum((2, 3)) + theirs[:, :, 0, 0], torch.ones(ours.shape[:2]).double()), 1e-10)


@pytest.mark.parametrize("positions", ["learned", "sin_cos"])
def test_the_class_tokens_attention_of_other_sizes(positions: Literal["learned", "sin_cos"], within: Within) -> None:
    """A softmax written out, image by image and head by head, over 6 × 4 patches of a network whose table has 4 × 4."""
    net, x = (
        vit(width=32, blocks=2, heads=4, patch_px=4, size_px=16, positions=positions, seed=3).double(),
        torch.rand(2, 3, 24, 16).double(),
    )
    block: Any = net.blocks[-1]
    for p in block.parameters():  # as after training: at first all scores are nearly alike
        p.data.mul_(3)
    found, tokens = class_attention(net, x), block.norm1(net.stages(x)[1])
    assert found.shape == (2, 4, 6, 4)
    weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
    for i in range(2):
        for head in range(4):
            of_q, of_k = slice(8 * head, 8 * head + 8), slice(32 + 8 * head, 32 + 8 * head + 8)
            q = weight[of_q] @ tokens[i, 0] + bias[of_q]
            scores = torch.stack([q @ (weight[of_k] @ token + bias[of_k]) / math.sqrt(8) for token in tokens[i]])
            shares = scores.exp() / scores.exp().sum()
            within("map", apart(found[i, head].flatten(), shares[1:]), 1e-12)
            within("whole", abs(float((found[i, head].sum() + shares[0]).detach()) - 1), 1e-12)
    assert float(found.detach().std()) > 1e-3 and apart(found[0], found[1]) > 1e-3


def test_gradients_are_dinos(golden: dict[str, Tensor], network: VisionTransformer, within: Within) -> None:
    x = golden["x16"].clone().requires_grad_()
    ours = gradients(network, x, golden["g"])
    assert x.grad is not None
    within("pixels", apart(x.grad, golden["grad_x16"]), 1e-10)
    named = [name for name in golden if name.startswith("grad|")]
    assert len(named) == 9
    for name in named:
        within("weights", apart(ours[name.removeprefix("grad|")], golden[name]), 1e-10)
    for side in SIDES[1:]:
        found = gradients(network, golden[f"x{side}"], golden[f"g{side}"])["pos_embed"]
        within("positions of another size", apart(found, golden[f"grad_pos_embed_{side}"]), 1e-10)


@pytest.mark.parametrize("side", SIDES[1:])
def test_positions_of_another_size(side: str, golden: dict[str, Tensor], network: VisionTransformer, within: Within) -> None:
    """DINO's, and by size, as timm and MAE have it."""
    rows, columns = (int(px) // 4 for px in (side.split("x") * 2)[:2])
    table = network.pos_embed.detach()
    dinos = positions_at(table, 4, rows, columns, 0.1)[0]
    within("dino", apart(dinos, golden[f"pos_embed_{side}"]), 1e-10)
    by_size = positions_at(table, 4, rows, columns)[0]
    within("by size", apart(by_size, golden[f"pos_embed_{side}_resized_by_size"]), 1e-10)
    assert apart(dinos, by_size) > 0.01


def test_sines_and_cosines_are_mocov3s(within: Within) -> None:
    with np.load(FAMILY / "mocov3_posembed.npz") as found:
        for grid, width in ((14, 384), (4, 64), (4, 32)):
            within("table", float(np.abs(sin_cos(grid, width) - found[f"grid{grid}_width{width}"]).max()), 7e-7)
    fixed = vit(width=32, blocks=1, heads=4, patch_px=4, size_px=16, positions="sin_cos", frozen_patches=True)
    assert np.array_equal(fixed.pos_embed.detach()[0], sin_cos(4, 32))
    assert {name for name, p in fixed.named_parameters() if not p.requires_grad} == {
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }


@pytest.mark.parametrize(("pool", "wanted"), [("class", "features_cls"), ("mean", "features_mean_pool")])
def test_both_features_are_maes(pool: Literal["class", "mean"], wanted: str, within: Within) -> None:
    if not (SHARED / "golden/family").is_dir():
        pytest.skip("without the larger reference files")
    inputs, weights, features = (arrays(name, SHARED / "golden/family") for name in ("mae.npz", "mae_weights.npz", "mae_finetune.npz"))
    ours = vit(width=32, blocks=2, heads=4, patch_px=4, size_px=16, pool=pool).double()
    ours.load_state_dict(weights | {"pos_embed": inputs["pos_embed"][None]}, strict=False)
    within(pool, apart(ours(inputs["images"]), features[wanted]), 1e-10)


# ── Sizes and initial weights ──────────────────────────────────────────────────────────────────────────────────────────


def test_sizes_have_the_papers_parameters() -> None:
    tables = json.loads((FAMILY / "vit_tables.json").read_text())
    for name, told in tables["sizes"].items():
        size = name.removesuffix("/16")
        with torch.device("meta"):
            encoder = build_encoder(Encoder(vit=size), size_px=224)
        assert (told["width"], told["depth"], told["heads"]) == SIZES[size] and encoder.d_h == told["width"]
        assert sum(p.numel() for p in encoder.parameters()) == told["parameters"]
    for name, rates in tables["drop_path_rates"].items():
        largest, blocks = (float(word.split()[1]) for word in name.split(", "))
        assert np.allclose(drop_path_rates(largest, int(blocks)), rates, rtol=0, atol=1e-8)


def test_initial_weights_are_mocov3s_in_law() -> None:
    """Bounds, means and deviations of one draw of the authors' code; q, k and v are three matrices."""
    told = json.loads((FAMILY / "mocov3_layers.json").read_text())["vit_small"]["initialisation_one_draw"]
    ours = vit(384, 1, 12, positions="sin_cos").state_dict()
    for name, law in told.items():
        if name.startswith("head.") or name not in ours:
            continue
        t = ours[name].double()
        assert list(t.shape) == law["shape"], name
        count, std = t.numel(), law["std"]
        mean = law["mean"] if std == 0 else 0.0  # norms' scales
        assert abs(float(t.std()) - std) <= 6 * std / math.sqrt(2 * count), name
        assert abs(float(t.mean()) - mean) <= 6 * std / math.sqrt(count), name
        if "bound" in law:
            assert 0.999 * law["bound"] < float(t.abs().max()) <= law["bound"] * (1 + 1e-6), name


def test_initial_weights_are_keyed() -> None:
    """By seed and name, from no generator; norms and biases have one beginning. A uniform weight is its word of 32 bits, scaled."""
    one, same, other = (vit(96, 1, 3, 16, 32, seed=seed).state_dict() for seed in (5, 5, 6))
    drawn = [name for name in one if "norm" not in name and not name.endswith("bias")]
    assert len(drawn) == 7
    for name in one:
        assert torch.equal(one[name], same[name]) and torch.equal(one[name], other[name]) == (name not in drawn), name
    word = keyed.bits(5, "weights", zlib.crc32(b"encoder.patch_embed.proj.weight"), np.zeros(1, np.int64), 0, 1)[0, 0]
    assert float(one["patch_embed.proj.weight"].flatten()[0]) == np.float32((2 * (float(word) + 0.5) / 2**32 - 1) / math.sqrt(768))
    before = torch.get_rng_state()
    vit(96, 1, 3, 16, 32)
    assert torch.equal(before, torch.get_rng_state())


# ── Drop path ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_path_is_left_out_or_enlarged() -> None:
    told = json.loads((FAMILY / "vit_tables.json").read_text())["drop_path_example"]
    uniform = np.array([[0.0, 0.0, u, u] for u in told["uniform"]])
    assert np.allclose(path_factors(uniform, told["rate"])[:, 2:], np.array(told["multiplier"])[:, None], rtol=1e-6)
    assert (path_factors(uniform, told["rate"])[:, :2] == 1).all()
    words = np.random.default_rng(0).random((4000, 12))
    assert np.allclose(path_factors(words, 0.5).mean(0), 1, atol=0.08)


def test_paths_multiply_attention_and_mlp(network: VisionTransformer, golden: dict[str, Tensor]) -> None:
    """In training mode; in evaluation mode nothing is left out."""
    x = golden["x16"]
    paths = torch.tensor([[1.0, 1, 0, 0], [2, 1, 1, 0]], dtype=torch.float64)
    tokens, first, second = network.stages(x, paths)
    plain = network.stages(x)
    assert torch.equal(second[0], first[0]) and torch.allclose(first[0], plain[1][0])
    block: Any = network.blocks[0]
    y = tokens[1:] + 2 * block.attn(block.norm1(tokens[1:]))
    assert torch.allclose(first[1:], y + block.mlp(block.norm2(y)))
    network.eval()
    assert torch.equal(network(x, paths), network(x))
    network.train()


# ── Settings that do not fit, and depths ───────────────────────────────────────────────────────────────────────────────


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(UserError, match=r"5 heads do not divide a width of 96; change encoder\.heads"):
        build_encoder(Encoder(vit="micro", heads=5))
    with pytest.raises(UserError, match=r"patches of 16 px do not divide images of 40 px"):
        build_encoder(Encoder(vit="micro"), size_px=40)
    with pytest.raises(UserError, match=r"encoder\.frozen_patches is True, and ResNet-50 has none; leave out --encoder\.frozen-patches"):
        Encoder(frozen_patches=True)
    with pytest.raises(ValueError, match="18 x 16 px are not whole patches of 4 px"):
        vit(32, 1, 4, 4, 16)(torch.zeros(1, 3, 18, 16))
    assert Config(encoder=Encoder(vit="micro", drop_path=0.1, patch_px=8), views=Views(size_px=40)).encoder.title == "ViT-micro/8"


def test_every_parameter_has_its_depth() -> None:
    with torch.device("meta"):
        found, count = depths(vit(32, 3, 4, 4, 16))
        assert count == 5 and found["cls_token"] == found["pos_embed"] == found["patch_embed.proj.weight"] == 0
        assert found["blocks.0.norm1.weight"] == 1 and found["blocks.2.mlp.fc2.bias"] == 3 and found["norm.weight"] == 4
        found, count = depths(resnet(50))
    assert count == 3 + 4 + 6 + 3 + 2 and set(found.values()) == set(range(count - 1))
    assert found["stem.0.weight"] == 0 and found["groups.0.0.body.0.weight"] == 1 and found["groups.3.2.body.0.weight"] == 16


@pytest.mark.compile
def test_it_compiles_as_one_graph(network: VisionTransformer, golden: dict[str, Tensor]) -> None:
    """With paths, and at another size than the table's, in bfloat16 and float32: no graph break."""
    small = vit(32, 1, 4, 4, 16)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    for side in ("16", "24"):
        x, paths = golden[f"x{side}"].float(), torch.tensor([[1.0, 0], [2, 1]])
        with torch.autocast("cpu", torch.bfloat16):
            h = compiled(x, paths)
            assert h.dtype == torch.float32 and torch.allclose(h, small(x, paths), atol=1e-2)
        h.sum().backward()
        assert torch.allclose(compiled(x, paths), small(x, paths), atol=1e-5)


@pytest.mark.parametrize("kind", [MoCo, MoCoV3, BYOL])
def test_blocks_are_left_out_of_the_trained_network_alone(kind: type[Config]) -> None:
    """Of no moving average: a target is what all of its network says."""
    shape = Encoder(vit="micro", patch_px=8, drop_path=0.5)
    small: dict[str, Any] = {"queue": 64, "d_out": 8} if kind is MoCo else {"hidden": 16, "d_out": 8}
    config = kind(encoder=shape, views=Views(size_px=16), train=Train(batch_size=4, steps=4), **small)
    method = pretraining(config, Start(Path()))
    crops = torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = method.inputs(Batch(0, 0, (crops,), torch.arange(4), torch.full((4,), -1)), slice(0, 4))
    assert rows["paths"].shape == (2, 4, 12) and (rows["paths"] == 0).any()
    whole = {"views": rows["views"]}
    with torch.no_grad():
        outputs = [next(iter(method.network(given).values())) for given in (rows, whole)]
        targets = [next(iter(method.targets(given).values())) for given in (rows, whole)]
    assert not torch.allclose(*outputs) and torch.equal(*targets)
