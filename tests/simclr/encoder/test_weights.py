"""Weights to begin with: read from every form that people hold them in, told apart by content, refused where they do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simclr.config import Encoder
from simclr.encoder import weights
from simclr.encoder.directory import write_encoder
from simclr.encoder.export import own_name, torchvision_name
from simclr.errors import UserError
from simclr.methods.simclr import build_model
from simclr.methods.warm_start import warm_start
from simclr.networks.encoders import build_encoder
from tests.support.small import TINY


def tensors_of(encoder: Encoder) -> dict[str, Tensor]:
    """Names and shapes of such an encoder, each tensor with one number of its own."""
    with torch.device("meta"):
        there = build_encoder(encoder).state_dict()
    return {name: torch.full(t.shape, float(i)) for i, (name, t) in enumerate(there.items())}


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_torchvisions_names_are_read_as_they_are_written(depth: int) -> None:
    for name in tensors_of(Encoder(depth=depth)):  # type: ignore[arg-type]
        assert own_name(torchvision_name(name)) == name
    assert [own_name(name) for name in ("fc.weight", "layer1.0.conv0.weight", "layer0.0.bn1.bias", "stem.0.weight")] == [None] * 4


@pytest.mark.parametrize("prefix", ["", "module.", "encoder_q."])
def test_torchs_files_are_read_behind_a_prefix_and_without_its_counters(tmp_path: Path, prefix: str) -> None:
    encoder = tensors_of(Encoder(depth=14))
    theirs = {f"{prefix}{torchvision_name(name)}": t for name, t in encoder.items()}
    theirs |= {f"{prefix}bn1.num_batches_tracked": torch.tensor(7), f"{prefix}fc.0.weight": torch.ones(2), "queue": torch.ones(3)}
    theirs[f"{prefix}conv1.weight"] = nn.Parameter(theirs[f"{prefix}conv1.weight"])
    torch.save({"epoch": 200, "arch": "resnet", "state_dict": theirs}, tmp_path / "checkpoint.pth.tar")
    found = weights.of_file(tmp_path / "checkpoint.pth.tar")
    assert alike(found.encoder, encoder) and found.unused == (f"state_dict.{prefix}fc.0.weight", "state_dict.queue")
    assert found.sha256 == weights.Weights(encoder=encoder).sha256


def test_the_names_here_are_read_too(tmp_path: Path) -> None:
    encoder = tensors_of(Encoder(depth=50, sk_ratio=0.0625))
    save_file(encoder, tmp_path / "encoder.safetensors")
    assert alike(weights.of_file(tmp_path / "encoder.safetensors").encoder, encoder)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_norm_behind_a_mean_of_patches_is_read_by_timms_name(tmp_path: Path, prefix: str) -> None:
    """As the Hub's model.safetensors has it; a run that pools otherwise is told."""
    config = dataclasses.replace(TINY, encoder=Encoder(vit="micro", pool="mean"), views=dataclasses.replace(TINY.views, size_px=224))
    encoder = tensors_of(config.encoder)
    theirs = {f"{prefix}{'fc_' * name.startswith('norm.')}{name}": t for name, t in encoder.items()}
    assert f"{prefix}fc_norm.weight" in theirs and f"{prefix}norm.weight" not in theirs
    save_file(theirs, tmp_path / "model.safetensors")
    found = weights.of_file(tmp_path / "model.safetensors", config)
    assert alike(found.encoder, encoder) and not found.unused
    weights.require_fit(config.encoder, found, "there")
    other = dataclasses.replace(config, encoder=Encoder(vit="micro"))
    assert "encoder.pool was mean, and is class here" in warm_start(other, found, (), "there")[1]
    assert "pool" not in warm_start(config, found, (), "there")[1]
    save_file(theirs | {f"{prefix}norm.weight": torch.ones(96)}, tmp_path / "both.safetensors")
    assert len(weights.of_file(tmp_path / "both.safetensors").unused) == 2  # then fc_norm is a classifier's


def test_files_that_are_no_single_network_are_refused(tmp_path: Path) -> None:
    path, encoder = tmp_path / "w.pth", {torchvision_name(name): t for name, t in tensors_of(Encoder(depth=8)).items()}
    torch.save({"student": encoder, "teacher": encoder}, path)
    with pytest.raises(UserError, match=r"holds 2 networks, under 'student\.' and 'teacher\.'; save the tensors of one alone"):
        weights.of_file(path)
    torch.save({"blocks.0.attn.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"holds no ResNet by torchvision's names .*, but blocks\.0\.attn\.weight; rename"):
        weights.of_file(path)
    torch.save(nn.Linear(2, 2), path)  # a pickled object, which could run any code
    with pytest.raises(UserError, match=r"cannot be read as tensors alone .*torch\.save\(model\.state_dict\(\), PATH\)"):
        weights.of_file(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        weights.of_file(path)
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        weights.of_file(tmp_path / "w.safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on saving them
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Tensor.to_sparse, "is sparse; save dense tensors"),
        (lambda t: t.flatten()[:1].expand(1 << 20, 1 << 20), "is a view of .* of fewer numbers; save dense"),
        (lambda t: t.flatten(1).to_sparse_csr(), "is sparse; save dense tensors"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantised; save dense"),
        (lambda t: t.to("meta"), "is without numbers; save dense"),
        (lambda t: t.index_fill(0, torch.tensor([1]), torch.nan), "has NaN or infinity in 147 of 2,352 places, and training needs finite"),
        (lambda t: -t / 0, "has NaN or infinity in 2,352 of 2,352 places"),
        (lambda t: t.double() + 1e300, "has NaN or infinity in 2,352 of 2,352 places"),  # in float32, that it becomes
    ],
)
def test_weights_that_are_no_finite_dense_numbers_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor], said: str) -> None:
    encoder = {torchvision_name(name): t for name, t in tensors_of(Encoder(depth=8)).items()}
    first = torch.full_like(encoder["conv1.weight"], 2.0)
    queue = {"queue": torch.eye(2).to_sparse(), "fc.weight": torch.full((2,), torch.nan)}  # nobody takes these
    torch.save(encoder | queue | {"conv1.weight": first}, tmp_path / "w.pth")
    assert len(weights.of_file(tmp_path / "w.pth").sha256) == 64
    torch.save(encoder | {"conv1.weight": change(first)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"^conv1\.weight in \S+w\.pth {said}"):
        weights.of_file(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (Encoder(depth=14), "--encoder.depth 14"),
        (Encoder(depth=50, width=2), "--encoder.depth 50 --encoder.width 2"),
        (Encoder(depth=18, cifar_stem=True), "--encoder.depth 18 --encoder.cifar-stem"),
        (Encoder(depth=50, sk_ratio=0.0625), "--encoder.depth 50 --encoder.sk-ratio 0.0625"),
    ],
)
def test_another_network_is_refused_with_the_flags_that_fit(given: Encoder, flags: str) -> None:
    found = weights.Weights(encoder=tensors_of(given))
    with pytest.raises(UserError, match=rf"the weights in w do not fit the encoder: \S+ .*and \d+ more; would fit: {flags}$"):
        weights.require_fit(Encoder(depth=8), found, "w")
    weights.require_fit(given, found, "w")


def test_of_a_published_encoder_the_shape_is_known() -> None:
    gated = Encoder(depth=8, se_ratio=0.25)
    found = weights.Weights(encoder=tensors_of(gated), shape=gated)
    with pytest.raises(UserError, match=r"would fit: --encoder.depth 8 --encoder.se-ratio 0.25 --encoder.no-cifar-stem$"):
        weights.require_fit(Encoder(depth=18, cifar_stem=True), found, "w")


def test_what_no_flag_mends_is_said() -> None:
    encoder = tensors_of(Encoder(depth=18))
    first = {name: t for name, t in encoder.items() if not name.startswith("groups.0.0.shortcut.")}
    for asked in (18, 50):
        with pytest.raises(UserError, match=r"do not fit .*torchvision's ResNet-18 and -34 have no projection"):
            weights.require_fit(Encoder(depth=asked), weights.Weights(encoder=first), "w")  # type: ignore[arg-type]
    wider = encoder | {"groups.3.1.body.3.weight": torch.ones(512, 512, 1, 1)}
    with pytest.raises(UserError, match=r"shape \(512, 512, 1, 1\), expected \(512, 512, 3, 3\); no network here has these weights"):
        weights.require_fit(Encoder(depth=18), weights.Weights(encoder=wider), "w")
    whole = encoder | {"stem.1.bias": torch.ones(64, dtype=torch.int64)}
    with pytest.raises(UserError, match=r"stem.1.bias is of torch.int64"):
        weights.require_fit(Encoder(depth=18), weights.Weights(encoder=whole), "w")


def test_the_digest_is_of_the_weights_wherever_they_lie(tmp_path: Path) -> None:
    model = build_model(TINY, 10)
    parts = {name: dict(getattr(model, name).state_dict()) for name in ("encoder", "head", "classifier")}
    held = weights.Weights(**parts)  # type: ignore[arg-type]
    write_encoder(parts["encoder"], TINY, tmp_path / "a", {"step": 3}, head=parts["head"], classifier=parts["classifier"])
    found = weights.of_directory(tmp_path / "a")
    assert found.sha256 == held.sha256 and found.step == 3 and found.norm == (TINY.views.mean, TINY.views.std)
    for part in parts:
        changed = {name: t.clone() for name, t in parts[part].items()}
        next(iter(changed.values())).view(-1)[0] += 1
        assert dataclasses.replace(held, **{part: changed}).sha256 != held.sha256
    half = {name: t.half() for name, t in parts["encoder"].items()}
    assert dataclasses.replace(held, encoder=half).sha256 != held.sha256
