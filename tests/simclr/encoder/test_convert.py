"""Official checkpoints: names and shapes → network, weights and outputs, from names whose values a formula gives; and the files
themselves, where TensorFlow is installed."""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.tracking import card
from simclr.config import Encoder
from simclr.encoder.convert import Converted, Shapes, convert, created, infer, load_tensorflow
from simclr.encoder.tf_checkpoint import Bundle, find, named
from simclr.errors import UserError
from simclr.networks.resnet import resnet
from tests.conftest import Within
from tests.support.paths import GOLDEN, SHARED
from tests.support.resnets import CASES, RESNET, deviation

NAMES = GOLDEN / "checkpoints"


def value(name: str, shape: tuple[int, ...], seed: int = 7) -> np.ndarray:
    """The second formula of the golden numbers' README, which the checkpoints' values follow."""
    r = np.random.RandomState(zlib.crc32(name.encode()) % 2**31 ^ seed)
    kind = name.rsplit("/", 1)[1]
    if kind == "gamma":
        return 1 + r.randint(-2, 3, shape) / 16
    if kind == "moving_variance":
        return 1 + r.randint(0, 4, shape) / 16
    if kind in ("beta", "bias", "moving_mean"):
        return r.randint(-2, 3, shape) / 16
    return r.randint(-2, 3, shape) * 2.0 ** round(np.log2(np.sqrt(2 / np.prod(shape[:-1])) * 0.7))


def bundle(tag: str, **more: tuple[int, ...]) -> Bundle:
    """The checkpoint `tag`; with variables added or changed (`/` as `__`), all values are 0."""
    shapes = {v["name"]: tuple(v["shape"]) for v in json.loads((NAMES / f"{tag}.json").read_text())}
    shapes |= {name.replace("__", "/"): shape for name, shape in more.items()}
    return Bundle(tag, shapes, lambda name: np.zeros(shapes[name], np.float32) if more else value(name, shapes[name]))


def check(found: Converted, golden: dict[str, np.ndarray], tap: int, within: Within) -> None:
    x = torch.tensor(golden["input"]).permute(0, 3, 1, 2)
    assert found.head is not None
    with torch.inference_mode():
        taps = found.head(found.encoder(x))
        within("features", deviation(taps[0], golden["features"]), 1e-4)
        within("z", deviation(taps[-1], golden["z"]), 1e-4)
        within("what fine-tuning sees", deviation(taps[tap], golden["finetune_input"]), 1e-4)
        within("logits", deviation(found.classifier(tap)(x), golden["logits"]), 1e-4)


@pytest.mark.parametrize(("tag", "tap"), [("tf1_resnet18_cifar", 0), ("tf1_resnet50_sk_imagenet", 0)])
def test_names_give_the_network_and_the_official_outputs(within: Within, tag: str, tap: int) -> None:
    found = convert(bundle(tag))
    assert found.config.encoder == (Encoder(depth=50, sk_ratio=0.0625) if "sk" in tag else Encoder(depth=18, cifar_stem=True))
    assert (found.config.views.size_px, found.config.head.layers, found.taps) == (224 if "sk" in tag else 32, 3, (0, 1, 2))
    check(found, dict(np.load(NAMES / f"{tag}.npz")), tap, within)


@pytest.mark.parametrize(("tag", "tap"), [("tf1_resnet18_cifar", 0), ("tf2_resnet18_cifar", 1)])
def test_checkpoint_files(within: Within, tmp_path: Path, tag: str, tap: int) -> None:
    pytest.importorskip("tensorflow", reason="TensorFlow, an extra, is not installed")
    if not (archive := SHARED / "golden" / f"{tag}.tar.xz").is_file():
        pytest.skip(f"{archive.name} is not here")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    from simclr.encoder.tf_checkpoint import open_bundle

    found = convert(open_bundle(tmp_path / tag))
    check(found, dict(np.load(tmp_path / tag / "expected.npz")), tap, within)
    assert found.step == 1000
    encoder, head = load_tensorflow(tmp_path / tag)
    assert torch.equal(encoder.state_dict()["stem.0.weight"], found.encoder.state_dict()["stem.0.weight"]) and head is not None


def official_shapes(encoder: Encoder) -> Shapes:
    """TF1's names for the variables of our own network, numbered as they are created."""
    with torch.device("meta"):
        network = resnet(encoder.depth, encoder.width, encoder.sk_ratio, encoder.se_ratio, encoder.cifar_stem)
    shapes: Shapes = {}
    convolutions = norms = 0
    for m in network.modules():
        if isinstance(m, torch.nn.Conv2d):
            layer = f"base_model/conv2d_{convolutions}".removesuffix("_0")
            shapes[f"{layer}/kernel"] = tuple(m.weight.permute(2, 3, 1, 0).shape)
            if m.bias is not None:
                shapes[f"{layer}/bias"] = tuple(m.bias.shape)
            convolutions += 1
        elif type(m).__name__ == "BatchNorm":
            layer = f"base_model/batch_normalization_{norms}".removesuffix("_0")
            shapes |= {f"{layer}/{kind}": tuple(m.weight.shape) for kind in ("gamma", "beta", "moving_mean", "moving_variance")}
            norms += 1
    return dict(sorted(shapes.items()))


PUBLISHED = [
    *(Encoder(depth=depth, width=width, sk_ratio=sk) for depth in (50, 101) for width in (1, 2) for sk in (0.0, 0.0625)),
    *(Encoder(depth=152, width=width, sk_ratio=sk) for width, sk in ((1, 0.0), (1, 0.0625), (2, 0.0), (2, 0.0625), (3, 0.0625))),
    *(Encoder(depth=50, width=4), Encoder(depth=200), Encoder(depth=34), Encoder(depth=18, width=2, sk_ratio=0.0625)),
    *(Encoder(depth=50, se_ratio=0.25), Encoder(depth=50, sk_ratio=0.125, se_ratio=0.0625)),
    Encoder(depth=34, cifar_stem=True, se_ratio=0.1),
]


@pytest.mark.parametrize("encoder", PUBLISHED, ids=lambda e: f"{e.depth}-{e.width}x-sk{e.sk_ratio}-se{e.se_ratio}")
def test_the_network_is_read_off_the_shapes(encoder: Encoder) -> None:
    """v2's 13 sizes (arXiv:2006.10029, Table 1), v1's widest, and others. `==`: the ratios, too, come back as they were."""
    shapes = official_shapes(encoder)
    found = infer(shapes)
    if encoder.se_ratio == 0.1:  # 51 of 512 channels: any ratio that gives each block its channels will do
        assert official_shapes(found) == shapes
    else:
        assert found == encoder


@pytest.mark.parametrize("tag", CASES)
def test_tf2_names_give_the_network(tag: str) -> None:
    variables = json.loads((RESNET / f"{tag}_variables.json").read_text())
    assert infer({v["name"]: tuple(v["shape"]) for v in variables if v["name"].startswith("resnet/")}) == Encoder(**CASES[tag])  # type: ignore[arg-type]


def test_variables_that_are_no_weights_are_listed_and_unknown_ones_named() -> None:
    slots = {"base_model__conv2d__kernel__Momentum": (3, 3, 3, 64), "global_step": (), "beta1_power": ()}
    found = convert(bundle("tf1_resnet18_cifar", **slots))
    assert found.ignored == ["base_model/conv2d/kernel/Momentum", "beta1_power", "global_step"]
    with pytest.raises(UserError, match=r"variables that no official SimCLR network has: base_model/conv2d/scale, other/kernel"):
        convert(bundle("tf1_resnet18_cifar", base_model__conv2d__scale=(64,), other__kernel=(3, 3)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base_model__conv2d_7__kernel": (3, 3, 64, 96)}, r"fit no ResNet of depth 18, .* with width 1"),
        ({"base_model__conv2d_99__kernel": (3, 3, 64, 64)}, "fit no ResNet"),
        ({"head_contrastive__nl_1__dense__kernel": (512, 256)}, "has a head of kernels .*expected 512 numbers in"),
        ({"head_contrastive__nl_2__batch_normalization__beta": (128,)}, "differ in head_contrastive/nl_2/batch_normalization/beta"),
        ({"head_supervised__linear_layer__dense__kernel": (300, 10)}, "expected a kernel .d, classes. with d one of .512, 512, 512, 128."),
    ],
)
def test_another_network_is_refused(changed: Shapes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(bundle("tf1_resnet18_cifar", **changed))


def test_the_tap_is_inferred_where_only_one_fits_and_another_is_refused() -> None:
    found = convert(bundle("tf1_resnet18_cifar", head_supervised__linear_layer__dense__kernel=(128, 10)))
    assert found.taps == (3,) and found.classifier(3).tap == 3
    with pytest.raises(UserError, match=r"takes 128 numbers, which tap 1 of the head does not give; give --tap 3"):
        found.classifier(1)


def test_object_based_keys_are_told_apart_by_their_graph() -> None:
    end = "/.ATTRIBUTES/VARIABLE_VALUE"
    full = {f"trainable_variables_list/0{end}": "resnet/conv2d/kernel", f"model/a/.OPTIMIZER_SLOT/optimizer/momentum{end}": "x"}
    names, ignored = named(full, [*full, f"optimizer/iter{end}", "_CHECKPOINTABLE_OBJECT_GRAPH", f"save_counter{end}"])
    assert names == {"resnet/conv2d/kernel": f"trainable_variables_list/0{end}"} and len(ignored) == 4
    with pytest.raises(UserError, match=r"two variables of the checkpoint are named a"):
        named({"k": "a", "l": "a"}, ["k", "l"])


def test_layers_are_ordered_by_number_not_by_alphabet() -> None:
    names = [f"base_model/conv2d_{i}/kernel" for i in (10, 9, 1)] + ["base_model/conv2d/kernel", "base_model/batch_normalization/gamma"]
    assert [layer.rpartition("/")[2] for layer in created(names)] == ["conv2d", "conv2d_1", "conv2d_9", "conv2d_10", "batch_normalization"]
    heads = [f"head_contrastive/nl_{i}/dense/kernel" for i in (2, 0, 1)]
    assert [layer.split("/")[1] for layer in created(heads)] == ["nl_0", "nl_1", "nl_2"]


def test_a_checkpoint_is_found_as_its_user_names_it(tmp_path: Path) -> None:
    several, saved, empty = tmp_path / "several", tmp_path / "saved", tmp_path / "empty"
    empty.mkdir()
    (saved / "1000" / "variables").mkdir(parents=True)
    (saved / "1000" / "variables" / "variables.index").touch()
    several.mkdir()
    for step in (5, 77):
        (several / f"model.ckpt-{step}.index").touch()
    assert find(several / "model.ckpt-5") == find(several / "model.ckpt-5.data-00000-of-00001") == several / "model.ckpt-5"
    with pytest.raises(UserError, match=r"several holds several checkpoints; give one of .*model.ckpt-5, .*model.ckpt-77"):
        find(several)
    (several / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt-77"\nall_model_checkpoint_paths: "model.ckpt-5"\n')
    assert find(several) == several / "model.ckpt-77"
    assert find(saved / "1000") == saved / "1000" / "variables" / "variables"
    with pytest.raises(UserError, match=r"saved holds no TensorFlow checkpoint; give the folder inside it, .*1000"):
        find(saved)
    with pytest.raises(UserError, match=r"model.ckpt-6.index is absent; give one of"):
        find(several / "model.ckpt-6")
    with pytest.raises(UserError, match=r"expected NAME.index beside NAME.data"):
        find(empty)


def test_convert_writes_a_directory_with_head_classifier_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import simclr
    from pipelines.commands import convert as command
    from simclr.encoder.directory import read_classifier

    monkeypatch.setattr("simclr.encoder.tf_checkpoint.open_bundle", lambda path: bundle("tf1_resnet18_cifar", global_step=()))
    command.main(command.Args(path=tmp_path, to=tmp_path / "bare"))
    told = capsys.readouterr()
    assert "the classifier is left out: it fits taps 0, 1, 2" in told.err and not (tmp_path / "bare" / "classifier.safetensors").exists()
    monkeypatch.setattr("simclr.encoder.tf_checkpoint.open_bundle", lambda path: bundle("tf1_resnet18_cifar"))
    command.main(command.Args(path=tmp_path, to=tmp_path / "whole", tap=0, licence="Apache-2.0"))
    assert "ResNet-18, CIFAR stem, 512 features, a head of 3 layers, a classifier of 10 classes at tap 0" in capsys.readouterr().out
    golden = np.load(NAMES / "tf1_resnet18_cifar.npz")
    encoder = simclr.load_encoder(tmp_path / "whole")
    model, classes = read_classifier(tmp_path / "whole")
    x = torch.tensor(golden["input"]).permute(0, 3, 1, 2)
    assert deviation(encoder(x), golden["features"]) < 1e-4 and deviation(model(x), golden["logits"]) < 1e-4 and len(classes) == 10
    assert (encoder.preprocessing.size_px, encoder.preprocessing.mean, encoder.preprocessing.std) == (32, (0, 0, 0), (1, 1, 1))
    text = (tmp_path / "whole" / "README.md").read_text()
    assert "| Licence | Apache-2.0 |" in text and "| Network | ResNet-18, CIFAR stem, 11.2 M parameters |" in text
    assert card.UNKNOWN_LICENCE in (tmp_path / "bare" / "README.md").read_text()
    with pytest.raises(UserError, match="exists and is not empty"):
        command.main(command.Args(path=tmp_path, to=tmp_path / "whole"))
