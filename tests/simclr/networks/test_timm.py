"""Networks of timm's as encoders: timm's own numbers but for BatchNorm, the same weights everywhere, nothing by chance, one graph."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.commands import export as command
from pipelines.tracking import flavor
from pipelines.tracking.card import write_card
from pipelines.tracking.record import Record
from pipelines.train import warm_start
from pipelines.train.classifiers import Shape
from simclr import load_encoder
from simclr.config import Encoder, SimCLR, Train, Views
from simclr.encoder import timm as form
from simclr.encoder import weights
from simclr.encoder.directory import write_encoder
from simclr.errors import UserError
from simclr.family import MoCo
from simclr.methods.choice import pretraining
from simclr.methods.method import Start
from simclr.methods.simclr import build_model
from simclr.networks import timm as networks
from simclr.networks.batchnorm import BatchNorm
from simclr.networks.encoders import build_encoder
from simclr.networks.initial import unfilled
from simclr.networks.timm import TimmEncoder, looked_at, plain, version
from tests.conftest import Within
from tests.simclr.test_ranks import resumed
from tests.support.paths import ROOT
from tests.support.ranks import Ranks
from tests.support.small import TINY as TINY_RUN

timm = pytest.importorskip("timm", reason="timm, of the extras `timm` and `dev`, is not installed")
CONFIG = SimCLR(encoder=Encoder(timm="test_resnet"), views=Views(size_px=32))
TINY = ("test_resnet", "test_convnext", "test_vit", "test_efficientnet")
"""timm's own networks for tests: a third of a million weights."""


def images(count: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(size))


def test_resnet18_is_there() -> None:
    assert version() == timm.__version__ and isinstance(build_encoder(Encoder(timm="test_resnet"), size_px=32), TimmEncoder)


@pytest.mark.parametrize("name", TINY)
def test_features_are_timms_and_training_too(name: str, within: Within) -> None:
    """By timm's network with the same weights, in evaluation and in training; its norms see one batch, as ours do in one process."""
    ours, theirs = TimmEncoder(name, 32, seed=3).double(), plain(name, 32).double()
    weights = {own.removeprefix("model."): t for own, t in ours.state_dict().items()}
    theirs.load_state_dict(weights)  # strict: every name is timm's
    x = images(6, 32, torch.float64)
    for training in (False, True):
        ours.train(training).zero_grad()
        theirs.train(training).zero_grad()
        h, expected = ours(x), theirs(x)
        assert h.shape == (6, ours.d_h)
        within("features", float((h - expected).detach().abs().max()), 1e-9)
        for side in (h, expected):
            side.square().sum().backward()
        for (own, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert p.grad is not None and q.grad is not None, own
            within("gradients", float((p.grad - q.grad).abs().max() / (q.grad.abs().max() + 1)), 1e-9)
    norms = [m for m in ours.modules() if isinstance(m, BatchNorm)]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in ours.modules()) and bool(norms) == (name in TINY[0::3])


def test_norms_keep_timms_settings_and_the_variance_is_the_biased_one(within: Within) -> None:
    """EfficientNet's moves by a tenth here; timm's `tf_` ones have eps 1e-3, MobileNet's momentum 0.01 elsewhere."""
    ours, theirs = TimmEncoder("test_efficientnet", 32, seed=1).double().train(), plain("test_efficientnet", 32)
    x = images(6, 32, torch.float64)
    seen: list[Tensor] = []
    ours.model.bn1.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))  # type: ignore[union-attr]
    ours(x)
    norm: Any = ours.model.bn1
    own: Any = theirs.bn1
    assert (norm.momentum, norm.eps) == (own.momentum, own.eps) and type(norm.act) is type(own.act)
    expected = 1 + norm.momentum * (seen[0].var((0, 2, 3), unbiased=False) - 1)
    within("running variance", float((norm.running_var - expected).abs().max()), 1e-12)
    assert {m.ranks for m in TimmEncoder("test_resnet", 32, 4).modules() if isinstance(m, BatchNorm)} == {4}


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = TimmEncoder("test_resnet", 32, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = TimmEncoder("test_resnet", 32, seed=7).state_dict(), TimmEncoder("test_resnet", 32, seed=8).state_dict()
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert any(not torch.equal(t, other[name]) for name, t in first.items())


def test_nothing_is_left_out_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """ghostnet has dropout 0.2 by default, nest drop path 0.5. A network that draws otherwise is refused."""
    for name in ("ghostnet_050", "nest_tiny"):
        looked_at(name, 224)
    looked_at.cache_clear()
    monkeypatch.setattr(networks, "_without_chance", lambda network: network)
    for name in ("ghostnet_050", "nest_tiny"):
        with pytest.raises(UserError, match=rf"encoder.timm {name} draws at random while it is trained \(aten.bernoulli_"):
            looked_at(name, 224)


def test_a_network_on_the_meta_device_has_all_its_values_once_it_is_filled() -> None:
    """coatnet's tables of relative positions are buffers that no state dict has."""
    encoder = TimmEncoder("test_coatnet", 32).eval()
    later = unfilled(lambda: TimmEncoder("test_coatnet", 32)).eval()
    later.load_state_dict(encoder.state_dict())
    assert set(dict(later.named_buffers())) - set(later.state_dict())
    assert torch.equal(later(images(2, 32)), encoder(images(2, 32)))


def test_parameters_that_h_does_not_depend_on_are_not_trained() -> None:
    """DDP would wait for their gradients."""
    with torch.device("meta"):
        encoder = TimmEncoder("efficientvim_m1", 64)
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == ["model.weights"]


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("resnet5", 32, r"timm has no network 'resnet5'; the nearest are resnet50"),
        ("hf-hub:a/b", 32, r"timm has no network 'hf-hub:a/b'; timm.list_models\(\) has all"),
        ("resnet50.a1_in1k", 32, r"names weights \(a1_in1k\), .* give --encoder.timm resnet50, and --start FILE"),
        ("vit_small_patch16_224", 40, "patches of 16 px, and views.size_px is 40; give a multiple of it"),
        ("inception_v3", 16, "encoder.timm inception_v3 cannot take images of 16 px: .*; give another size"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(name: str, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        TimmEncoder(name, size)


def test_maps_are_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: nn.Conv2d(3, 4, 3))
    with pytest.raises(UserError, match=r"test_convnext2 gives \(2, 4, 30, 30\) for 2 images, expected a vector for each, \(2, d\)"):
        TimmEncoder("test_convnext2", 32)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    error = ModuleNotFoundError("timm", name="timm")
    assert error.name == "timm"
    with pytest.raises(UserError, match=r"encoder.timm test_resnet3 wants timm, which is not installed here: pip install '.*\[timm\]'"):
        TimmEncoder("test_resnet3", 32)


def test_a_resnet50_of_timm_with_our_weights_gives_our_features(within: Within, tmp_path: Path) -> None:
    """With the one line about the max-pool, and not without it."""
    from simclr.encoder.export import TORCHVISION_POOL, torchvision_name

    ours = build_encoder(Encoder(depth=50)).eval()
    for t in ours.state_dict().values():
        if t.ndim == 1:
            t.add_(torch.rand(t.shape, generator=torch.Generator().manual_seed(len(t))) / 2)
    with torch.device("meta"):  # initial weights would take longer than the rest
        model = plain("resnet50", 64)
    model.load_state_dict({torchvision_name(name): t for name, t in ours.state_dict().items()}, assign=True)
    x = images(2, 64)
    with torch.no_grad():
        h = ours(x)
        assert float((model(x) - h).abs().max() / h.abs().max()) > 1e-3
        exec(TORCHVISION_POOL, {"model": model, "torch": torch})
        within("features of timm's resnet50", float((model(x) - h).abs().max() / h.abs().max()), 1e-5)


_LARGE = [("resnet50", 64), ("convnext_tiny", 64), ("vit_small_patch16_224", 224), ("test_vit", 32)]


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 32), *(pytest.param(*one, marks=pytest.mark.compile) for one in _LARGE)])
def test_one_graph(name: str, size: int, within: Within) -> None:
    """`fullgraph` raises at a break. The large ones: `make test-compile`."""
    found = []
    for compiling in (False, True):
        encoder = TimmEncoder(name, size).train()
        torch._dynamo.reset()
        network: Any = torch.compile(encoder, backend="eager", fullgraph=True) if compiling else encoder
        h = network(images(4, size))
        h.square().sum().backward()
        found.append([h.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    within("compiled", max(float((a - b).abs().max() / (a.abs().max() + 1e-9)) for a, b in zip(*found, strict=True)), 1e-4)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timm") / "encoder"
    write_encoder(dict(TimmEncoder("test_resnet", 32, seed=2).state_dict()), CONFIG, folder, {"recipe": "none", "step": 7, "data": "none"})
    return folder


def test_the_published_directory_is_read_as_it_was(published: Path) -> None:
    encoder, read = TimmEncoder("test_resnet", 32, seed=2).eval(), load_encoder(published)
    assert read.d_h == encoder.d_h == 96 and torch.equal(read(images(2, 32)), encoder(images(2, 32)))


def test_its_card_says_how_timm_takes_the_weights(published: Path) -> None:
    text = write_card(published, "photos", Record(), "MIT")
    assert "| Network | timm's test_resnet, 0.4 M parameters |" in text
    code = text.split("```python\nimport timm\n")[1].split("```")[0].replace("DIR", str(published))
    found: dict[str, Any] = {"timm": timm}
    exec(code, found)
    with torch.no_grad():
        assert torch.equal(found["model"](images(2, 32)), load_encoder(published)(images(2, 32)))


def test_timms_names_are_written_and_begun_with(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(command.Args(encoder=published, to=tmp_path / "w.safetensors"))
    assert "timm's test_resnet; w.safetensors.txt has the program, in which it deviates by 0.0e+00" in capsys.readouterr().out
    tensors = load_file(tmp_path / "w.safetensors")
    plain("test_resnet", 32).load_state_dict(tensors)
    torch.save(
        {"state_dict": {f"module.{name}": t for name, t in (tensors | {"fc.weight": torch.ones(3, 96)}).items()}}, tmp_path / "w.pth"
    )
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth", published / "encoder.safetensors"):
        found = weights.of_file(path, CONFIG)
        weights.require_fit(CONFIG.encoder, found, path, 32)
        assert all(torch.equal(t, tensors[name.removeprefix("model.")]) for name, t in found.encoder.items())
        assert found.unused == (("state_dict.module.fc.weight",) if path.suffix == ".pth" else ())
        assert "timm's own weights of this network want --views.mean 0.5" in warm_start._normalised_otherwise(CONFIG.views, found)
        fitted = warm_start.fitted(CONFIG, found).views
        assert (fitted.mean, fitted.std, fitted.resize) == ((0.5,) * 3, (0.5,) * 3, "bilinear")
        assert not warm_start._normalised_otherwise(fitted, found) and "--views.mean 0.5 0.5 0.5" in capsys.readouterr().err
        given = replace(CONFIG, views=replace(CONFIG.views, mean=(0.1, 0.2, 0.3)))
        assert warm_start.fitted(given, found) == given and warm_start.fitted(CONFIG, None) == CONFIG
    other = replace(CONFIG, encoder=Encoder(timm="test_vit"))
    with pytest.raises(UserError, match=r"holds no test_vit by timm's names \(cls_token, …\), but bn1"):
        weights.of_file(tmp_path / "w.safetensors", other)
    wide = {name: torch.ones(2, *t.shape) for name, t in found.encoder.items()}
    with pytest.raises(UserError, match=r"do not fit the encoder: .*; give weights of test_resnet for images of 32 px"):
        weights.require_fit(CONFIG.encoder, replace(found, encoder=wide), "w", 32)


def test_the_hub_gets_timms_own_config(published: Path, tmp_path: Path) -> None:
    encoder = load_encoder(published)
    assert not form.lacks(CONFIG.encoder)
    save_file(form.weights(encoder), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(encoder.config | form.config(encoder)))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(theirs(images(2, 32)), encoder(images(2, 32)))


def test_a_version_requires_timm_where_it_is_of_timm() -> None:
    assert set(flavor.requirements(timm=True)) - set(flavor.requirements()) == {f"timm=={timm.__version__}"}


def test_a_student_of_a_network_of_timms_may_be_a_resnet() -> None:
    teacher = Encoder(timm="test_resnet", depth=34)
    assert Shape().of(teacher) == teacher and Shape.like(teacher).of(Encoder()).timm == "test_resnet"
    assert Shape(depth=18).of(teacher) == Encoder(depth=18) and Shape(timm="test_vit").of(Encoder()).timm == "test_vit"


# ── In the loop: the second half of .ci/run, since every rank imports timm ─────────────────────────────────────────


@pytest.fixture
def patient() -> Iterator[Ranks]:
    """Ranks that wait for each other's imports."""
    pool = Ranks(patience_s=600)
    yield pool
    pool.close()


@pytest.mark.cluster
def test_steps_are_the_same_on_one_and_two_ranks_and_a_run_goes_on_to_the_bit(
    patient: Ranks, within: Within, patterns: Path, tmp_path: Path
) -> None:
    config = replace(TINY_RUN, encoder=Encoder(timm="test_resnet"), train=replace(TINY_RUN.train, steps=4, checkpoint_every_steps=1))
    losses, state = resumed(config, str(patterns), str(tmp_path / "whole"), 4)
    assert len(losses) == 4 and any(name.startswith("model.encoder.model.") for name in state)
    for found, two in patient(2, resumed, config, str(patterns), str(tmp_path / "two"), 4)[:1]:
        within("loss, W = 2", float(np.abs(np.subtract(found, losses)).max()), 1e-10)
        within("weights, W = 2", max(float((two[name] - t).abs().max()) for name, t in state.items()), 1e-10)
    for until in (2, 4):
        _, again = resumed(config, str(patterns), str(tmp_path / "parts"), until)
    assert again.keys() == state.keys() and all(torch.equal(t, again[name]) for name, t in state.items())

    encoder = build_model(config, 10).double()
    encoder.load_state_dict({name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")})
    parts = {name: t.float() for name, t in encoder.encoder.state_dict().items()}
    write_encoder(parts, config, tmp_path / "encoder", {})
    code = (
        "import simclr, sys, torch; e = simclr.load_encoder(sys.argv[1]); x = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(e(x).detach(), sys.argv[2])"
    )
    torch.save(images(3, 32), tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", code, tmp_path / "encoder", tmp_path / "x.pt"], check=True, cwd=ROOT)
    with torch.no_grad():
        expected = encoder.float().eval().encoder(images(3, 32))
    # Two processes may have other numbers of threads.
    torch.testing.assert_close(torch.load(tmp_path / "x.pt", weights_only=True), expected, rtol=1e-5, atol=1e-6)


def test_the_key_network_of_a_resumed_run_has_what_no_checkpoint_has(tmp_path: Path) -> None:
    """Tables of relative positions: a copy of the resumed network has them, memory that is not initialised has not."""
    config = MoCo(encoder=Encoder(timm="swin_tiny_patch4_window7_224"), views=Views(size_px=32), train=Train(batch_size=4), queue=64)
    resumed_one = pretraining(config, Start(tmp_path, checkpoint=tmp_path))
    ours, keys = (dict(network.get_submodule("encoder").named_buffers()) for network in (resumed_one.network, resumed_one.state))
    tables = looked_at(config.encoder.timm, 32).derived
    assert tables and all(torch.equal(ours[f"model.{name}"], keys[f"model.{name}"]) for name in tables)
