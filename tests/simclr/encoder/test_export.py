"""Exported encoders: another program computes from them the same features as the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import simclr
from pipelines.commands import export as command
from pipelines.tracking import card
from pipelines.tracking.record import Record
from simclr.config import Encoder, SimCLR, Views
from simclr.encoder import export
from simclr.encoder.directory import PublishedEncoder, write_encoder
from simclr.encoder.weights import of_file
from simclr.errors import UserError
from simclr.methods.simclr import build_model
from simclr.networks.encoders import build_encoder
from simclr.networks.heads import Classifier
from simclr.views.preprocessing import Preprocessing
from tests.conftest import Within


def published(directory: Path, encoder: Encoder, size: int, classes: int = 0, mean: float = 0.0) -> PublishedEncoder:
    """A directory with weights that are nowhere 0, 1 or alike."""
    config = SimCLR(encoder=encoder, views=Views(size_px=size, mean=(mean,) * 3, std=(1 - mean,) * 3))
    model = build_model(config)
    for t in model.state_dict().values():
        if t.ndim == 1:
            t.add_(torch.rand(t.shape, generator=torch.Generator().manual_seed(len(t))) / 2)
    linear = dict(Classifier(model.encoder, None, 0, classes).classifier.state_dict()) if classes else None
    write_encoder(dict(model.encoder.state_dict()), config, directory, {"recipe": "none", "step": 7, "data": "none"}, classifier=linear)
    return simclr.load_encoder(directory)


def test_torchvision_computes_the_same_with_our_pool(within: Within, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torchvision

    encoder = published(tmp_path / "encoder", Encoder(depth=50), 64, classes=3)
    command.main(command.Args(encoder=tmp_path / "encoder", to=tmp_path / "resnet50.safetensors"))
    told = capsys.readouterr().out
    assert "torchvision's resnet50, with fc" in told and export.TORCHVISION_POOL in told
    assert (tmp_path / "resnet50.safetensors").stat().st_mode == (tmp_path / "encoder/config.json").stat().st_mode
    with torch.device("meta"):
        model = torchvision.models.resnet50(num_classes=3)
    model.load_state_dict(load_file(tmp_path / "resnet50.safetensors"), assign=True)  # strict: every name is there
    exec(export.TORCHVISION_POOL, {"model": model, "torch": torch})
    x = torch.rand(2, 3, 64, 96)
    fc, model.fc = model.fc, torch.nn.Identity()
    with torch.no_grad():
        h = encoder(x)
        within("torchvision's features", float((model.eval()(x) - h).abs().max() / h.abs().max()), 1e-6)
        model.maxpool = torch.nn.MaxPool2d(3, 2, padding=1)  # its own
        assert float((model(x) - h).abs().max() / h.abs().max()) > 1e-3
    assert fc.weight.shape == (3, 2048)
    found, ours = of_file(tmp_path / "resnet50.safetensors"), encoder.encoder.state_dict()  # what is written is read back, bit for bit
    assert found.encoder.keys() == ours.keys() and all(torch.equal(t, ours[name]) for name, t in found.encoder.items())
    assert sorted(found.unused) == ["fc.bias", "fc.weight"]


def test_what_lies_beside_torchvisions_weights_makes_its_network_compute_the_same(
    within: Within, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ResNet-18, whose first block has a projection that torchvision's has not."""
    encoder = published(tmp_path / "encoder", Encoder(depth=18), 64, mean=0.25)
    monkeypatch.chdir(tmp_path)
    command.main(command.Args(encoder=tmp_path / "encoder", to=Path("resnet18.safetensors")))
    made: dict[str, Any] = {}
    exec((tmp_path / "resnet18.safetensors.txt").read_text(), made)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        h = encoder(x)
        within("features", float((made["model"](x) - h).abs().max() / h.abs().max()), 1e-6)
    with safe_open("resnet18.safetensors", "pt") as file:
        stated = file.metadata()
    assert stated["torchvision"].splitlines() == [export.TORCHVISION_PROJECTION, export.TORCHVISION_POOL]
    assert json.loads(stated["preprocessing"])["mean"] == [0.25] * 3
    ours = encoder.encoder.state_dict()
    assert all(torch.equal(t, ours[name]) for name, t in of_file(tmp_path / "resnet18.safetensors").encoder.items())


@pytest.mark.parametrize("encoder", [Encoder(depth=18, cifar_stem=True), Encoder(depth=50, width=2), Encoder(depth=8, cifar_stem=True)])
def test_other_networks_have_no_torchvision_names(tmp_path: Path, encoder: Encoder) -> None:
    with torch.device("meta"):
        network = PublishedEncoder(build_encoder(encoder), SimCLR(encoder=encoder).to_dict())
    with pytest.raises(UserError, match=r"torchvision has no such network; .*export a program"):
        export.torchvision(network, None, tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_program_runs_any_number_of_images_and_normalises(within: Within, tmp_path: Path) -> None:
    encoder = published(tmp_path / "encoder", Encoder(depth=8, cifar_stem=True), 32, mean=0.4)
    command.main(command.Args(encoder=tmp_path / "encoder", to=tmp_path / "made" / "encoder.pt2"))
    program = torch.export.load(tmp_path / "made" / "encoder.pt2").module()
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    features = program(torch.as_tensor(images).permute(0, 3, 1, 2) / 255)
    within("program", float((features.detach() - encoder.embed(images)).abs().max()), 1e-5)
    stated = {"takes": "", "preprocessing": ""}
    torch.export.load(tmp_path / "made" / "encoder.pt2", extra_files=stated)
    assert json.loads(stated["preprocessing"])["size_px"] == 32
    assert program(torch.rand(1, 3, 32, 32)).shape == (1, 64) and [p.name for p in (tmp_path / "made").iterdir()] == ["encoder.pt2"]


def test_onnx_computes_the_same(within: Within, tmp_path: Path) -> None:
    encoder = published(tmp_path / "encoder", Encoder(depth=8, cifar_stem=True), 32)
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX, an extra, is not installed")
    within("ONNX", export.onnx(encoder, tmp_path / "encoder.onnx"), 1e-5)
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    pictures = np.random.default_rng(0).integers(0, 256, (7, 90, 50, 3), dtype=np.uint8)
    features = session.run(["features"], {"images": pictures})[0]
    within("of pictures", float(np.abs(features - encoder.embed(pictures).numpy()).max()), 1e-5)
    stated = session.get_modelmeta().custom_metadata_map
    assert json.loads(stated["preprocessing"])["size_px"] == 32 and stated["takes"].startswith("images (n, height, width, 3)")
    within("ONNX of prepared images", export.onnx(encoder, tmp_path / "prepared.onnx", prepared=True), 1e-5)
    session = onnxruntime.InferenceSession(str(tmp_path / "prepared.onnx"))
    assert session.run(["features"], {"images": np.zeros((7, 3, 32, 32), np.float32)})[0].shape == (7, 64)


@pytest.mark.parametrize("resize", ["bicubic", "bilinear", "area"])
@pytest.mark.parametrize(("px", "share"), [(32, 1.0), (41, 0.875)])
def test_preprocessing_in_a_graph(within: Within, tmp_path: Path, resize: Any, px: int, share: float) -> None:
    """Pictures of noise, smaller and larger than the input and not square, in shades of 1."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    from simclr.encoder import onnx_graph

    seen = Preprocessing(size_px=px, centre_crop=share, resize=resize, mean=(0, 0, 0), std=(1, 1, 1))
    kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3, px, px]) for name in ("images", "features")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["images"], ["features"])], "nothing", kinds[:1], kinds[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(tmp_path / "graph.onnx"))
    onnx_graph.take_pixels(tmp_path / "graph.onnx", "images", seen)
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)
    session = runtime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    for size in ((px, px), (px, px + 1), (11, 17), (1, 1), (2 * px, 2 * px + 1), (3 * px, 5 * px + 1), (500, 333)):
        pictures = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
        ours = seen.resized(torch.from_numpy(pictures)).numpy()
        within("pixels", float(np.abs(session.run(None, {"images": pictures})[0] - ours).max()), 3e-5)


def test_a_graph_that_differs_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = published(tmp_path / "encoder", Encoder(depth=8, cifar_stem=True), 32)
    save = torch.export.save

    def wrong(program: torch.export.ExportedProgram, file: Path, **more: Any) -> None:
        program.state_dict["encoder.stem.0.weight"] = torch.nn.Parameter(program.state_dict["encoder.stem.0.weight"] * 1.1)
        save(program, file, **more)

    monkeypatch.setattr(torch.export, "save", wrong)
    with pytest.raises(RuntimeError, match=r"encoder.pt2 differs from the encoder by .* of its largest feature, more than 1e-04"):
        export.program(encoder, tmp_path / "encoder.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["encoder"]


def test_the_suffix_says_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not say what to write; expected a file ending in .pt2"):
        command.main(command.Args(encoder=tmp_path, to=tmp_path / "encoder.pth"))


def test_the_card_says_what_the_config_says() -> None:
    config = SimCLR(encoder=Encoder(depth=152, width=3, sk_ratio=0.0625)).to_dict()
    config |= {"published": {"recipe": "imagenet_resnet152_3x_sk", "step": 250_228, "data": "a|b"}}
    views = {"size_px": 224, "centre_crop": 0.875, "resize": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    text = card.card(config | {"preprocessing": views}, 795_000_000, "big", Record(scores={"knn_top1": 0.5, "rankme": 31.24}), "CC-BY-4.0")
    for row in (
        "| Network | ResNet-152, 3× width, selective kernels, 795.0 M parameters |",
        "the central square of 87.5 % of the shorter side, 224 × 224 px (bicubic), in [0, 1], then minus (0.5, 0.5, 0.5), over (0.2, ",
        "| Steps | 250,228 |",
        "| Trained on | a/b |",
        "| Licence | CC-BY-4.0 |",
        "| `knn_top1` | 50.0 % |",
        "| `rankme` | 31.2 |",
    ):
        assert row in text, row


def test_a_vision_transformer_is_a_program_and_has_timms_names(tmp_path: Path, within: Within) -> None:
    encoder = published(tmp_path / "encoder", Encoder(vit="micro"), 32)
    within("program", export.program(encoder, tmp_path / "vit.pt2"), 1e-5)
    with pytest.raises(UserError, match=r"this is a ViT-micro/16, whose encoder\.safetensors has timm's names as it is; export a program"):
        export.torchvision(encoder, None, tmp_path / "vit.safetensors")
    mean = published(tmp_path / "mean", Encoder(vit="micro", pool="mean"), 32)
    with pytest.raises(UserError, match=r"has timm's names but for norm, which timm calls fc_norm behind a mean of patches; export"):
        export.torchvision(mean, None, tmp_path / "vit.safetensors")


def test_a_vision_transformer_is_a_graph(tmp_path: Path, within: Within) -> None:
    pytest.importorskip("onnxscript")
    within("graph", export.onnx(published(tmp_path / "encoder", Encoder(vit="micro"), 32), tmp_path / "vit.onnx", prepared=True), 1e-5)
