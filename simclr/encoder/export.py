"""A published encoder for programs that do not have this package: an exported torch program, ONNX, torchvision's names.

ONNX takes uint8 pictures of any size, with the whole preprocessing in the graph; a program takes images (n, 3, size, size) in [0, 1]. Both
normalise. torchvision's ResNet is *not* quite ours: its max-pool pads one row and column on every side, the official one (TensorFlow's
'SAME') only at the end of an even side, so with torchvision's own pool the same weights see the image shifted by two pixels. One line makes
it ours, `TORCHVISION_POOL`: with `ceil_mode` and no padding the pool covers exactly the windows of 'SAME'. And its ResNet-18 and -34 have
no projection in the first block, where the official ones have one: `TORCHVISION_PROJECTION`.

Each function compares its file with the encoder on random images, in float32, and raises RuntimeError beyond `BOUND`: a user cannot mend
that.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr import files
from simclr.config import Encoder
from simclr.encoder.directory import PublishedEncoder
from simclr.errors import UserError
from simclr.networks.timm import TimmEncoder, call, plain

BOUND = 1e-4
"""Largest |theirs − ours|, relative to the largest |ours|."""
TORCHVISION_POOL = "model.maxpool = torch.nn.MaxPool2d(3, stride=2, ceil_mode=True)"
TORCHVISION_PROJECTION = (
    "model.layer1[0].downsample = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64))"
)
_SHALLOW = (18, 34)
_TAKES = "images (n, 3, size_px, size_px) in [0, 1], RGB, cropped and resized as preprocessing says; the graph normalises them"
_TAKES_PIXELS = "images (n, height, width, 3) of any size, uint8, RGB; the graph crops, resizes and normalises them"
_IMAGES = 3  # in the comparison; graphs are traced with two, so another number shows that n is free
_ONE_FILE = 1 << 30  # bytes of weights; ONNX holds at most 2 GiB in one file, so larger ones go into a second


class _FromPixels(nn.Module):
    """Images (n, 3, size, size) in [0, 1] → features (n, d_h)."""

    mean: Tensor
    std: Tensor

    def __init__(self, published: PublishedEncoder) -> None:
        super().__init__()
        self.encoder = published.encoder
        self.register_buffer("mean", published.get_buffer("mean"))
        self.register_buffer("std", published.get_buffer("std"))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder((images - self.mean) / self.std)
        return features


def program(published: PublishedEncoder, path: Path) -> float:
    """Write a `torch.export` program (`torch.export.load(path).module()` runs it); returns its difference from the encoder."""
    module, size = _FromPixels(published).eval(), published.preprocessing.size_px
    exported = torch.export.export(module, (_random(2, size),), dynamic_shapes={"images": {0: torch.export.Dim("n")}})
    with _scratch(path) as file:
        stated = {"takes": _TAKES, "preprocessing": json.dumps(asdict(published.preprocessing))}
        torch.export.save(exported, file, extra_files=stated)
        return _difference(module, torch.export.load(file).module(), size, path)


def onnx(published: PublishedEncoder, path: Path, prepared: bool = False) -> float:
    """Write an ONNX graph, input `images`, output `features`; returns its difference from the encoder, by ONNX Runtime on the CPU.

    `images` are uint8 (n, H, W, 3), n, H and W free; with `prepared` float32 (n, 3, size, size) in [0, 1], n free. The preprocessing is in
    the metadata, too. Weights of more than 1 GiB go to a second file, PATH.data. Needs the extra `onnx`.
    """
    import onnxruntime
    import onnxscript  # type: ignore[import-not-found,unused-ignore] # noqa: F401  torch's exporter needs it

    module, size = _FromPixels(published).eval(), published.preprocessing.size_px
    large = sum(p.numel() * p.element_size() for p in module.parameters()) > _ONE_FILE
    with _scratch(path) as file, _quiet():
        torch.onnx.export(
            module,
            (_random(2, size),),
            file,
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim("n")}},
            external_data=large,
        )
        from simclr.encoder import onnx_graph

        if not prepared:
            onnx_graph.take_pixels(file, "images", published.preprocessing)
        onnx_graph.state(file, published.preprocessing, _TAKES if prepared else _TAKES_PIXELS)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

        def runtime(x: Tensor) -> Tensor:
            return torch.as_tensor(session.run(None, {"images": x.numpy()})[0])

        if prepared:
            return _difference(module, runtime, size, path)
        # As it is, enlarged, reduced, and reduced by more than half, of which the larger part is antialiased.
        sides = ((size, size), (size // 2, size), (size + 1, 2 * size), (5 * size, 3 * size))
        return max(_apart(published.embed, runtime, _pixels(*side), path) for side in sides)


def torchvision(published: PublishedEncoder, classifier: dict[str, Tensor] | None, path: Path) -> tuple[float, float]:
    """Write the weights under torchvision's names as safetensors, with `classifier` (weight, bias; reading h) as `fc`, if given.

    Returns the differences of torchvision's network with `TORCHVISION_POOL`, and without. Its input must be normalised: this network does
    not apply mean and standard deviation. PATH.txt has the program that makes the network, and the file's metadata its lines and the
    preprocessing. Raises UserError where torchvision has no such network.
    """
    import torchvision

    config = Encoder(**published.config["encoder"])
    if config.vit:
        but = "as it is" if config.pool == "class" else "but for norm, which timm calls fc_norm behind a mean of patches"
        raise UserError(
            f"torchvision's names are for ResNets, and this is a {config.title}, whose encoder.safetensors has timm's names {but}; "
            "export a program (.pt2) or ONNX (.onnx), or use that file"
        )
    if config.depth not in (*_SHALLOW, 50, 101, 152) or config.width != 1 or config.sk_ratio or config.se_ratio or config.cifar_stem:
        raise UserError(
            "torchvision has no such network; its names fit ResNet-18 to -152 of width 1 with the ImageNet stem and neither "
            "selective kernels nor squeeze-and-excitation: export a program (.pt2) or ONNX (.onnx), which hold any encoder"
        )
    tensors = {torchvision_name(name): t for name, t in published.encoder.state_dict().items()}
    if classifier:
        tensors |= {f"fc.{name}": t for name, t in classifier.items()}
    with torch.device("meta"):  # initial weights would take longer than all the rest
        network = getattr(torchvision.models, f"resnet{config.depth}")(num_classes=len(classifier["bias"]) if classifier else 1)
        if config.depth in _SHALLOW:
            network.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
    size, lines = published.preprocessing.size_px, changes(config.depth)
    stated = {"torchvision": "\n".join(lines), "preprocessing": json.dumps(asdict(published.preprocessing))}
    with _scratch(path) as file:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, stated)
        files.usual_mode(file)
        file.with_name(f"{path.name}.txt").write_text(_program_of(path.name, config.depth, classifier, stated))
        missing, unexpected = network.load_state_dict(load_file(file), strict=False, assign=True)
        assert not unexpected and set(missing) <= {"fc.weight", "fc.bias"}, (missing, unexpected)
        network.eval().fc = nn.Identity()
        plain = _difference(published.encoder, network, size, path, bound=float("inf"))
        network.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        return _difference(published.encoder, network, size, path), plain


def timm(published: PublishedEncoder, path: Path) -> float:
    """Write the weights of a network of timm's under timm's names as safetensors; returns the difference of timm's own network with them,
    whose input must be normalised. PATH.txt has the program that makes it, and the file's metadata its line and the preprocessing."""
    assert isinstance(published.encoder, TimmEncoder)
    name, size = published.encoder.name, published.preprocessing.size_px
    stated = {"timm": call(name, size), "preprocessing": json.dumps(asdict(published.preprocessing))}
    with _scratch(path) as file:
        save_file({own: t.contiguous() for own, t in published.encoder.model.state_dict().items()}, file, stated)
        files.usual_mode(file)
        file.with_name(f"{path.name}.txt").write_text(_program_in_timm(path.name, stated))
        network = plain(name, size)
        network.load_state_dict(load_file(file))
        return _difference(published.encoder, network, size, path)


def changes(depth: int) -> list[str]:
    """The lines that make torchvision's ResNet of this depth compute what ours does."""
    return [*([TORCHVISION_PROJECTION] if depth in _SHALLOW else []), TORCHVISION_POOL]


def _program_of(name: str, depth: int, classifier: dict[str, Tensor] | None, stated: dict[str, str]) -> str:
    """What is written beside torchvision's weights: a program that makes the network of them."""
    classes = f"num_classes={len(classifier['bias'])}" if classifier else ""
    lines = [
        "# torchvision's network with these weights, which computes what the encoder does. Its input: RGB (n, 3, size_px, size_px) in",
        "# [0, 1], of the central square of centre_crop x the shorter side, minus mean, over std:",
        f"# {stated['preprocessing']}",
        "import torch",
        "import torchvision",
        "from safetensors.torch import load_file",
        "",
        f"model = torchvision.models.resnet{depth}({classes})",
        *changes(depth),
        *([] if classifier else ["model.fc = torch.nn.Identity()  # features, not classes"]),
        f"model.load_state_dict(load_file({name!r}))",
        "model.eval()",
    ]
    return "\n".join(lines) + "\n"


def _program_in_timm(name: str, stated: dict[str, str]) -> str:
    """What is written beside timm's weights."""
    lines = [
        "# timm's network with these weights, which computes what the encoder does. Its input: RGB (n, 3, size_px, size_px) in [0, 1], of",
        "# the central square of centre_crop x the shorter side, minus mean, over std:",
        f"# {stated['preprocessing']}",
        "import timm",
        "from safetensors.torch import load_file",
        "",
        f"model = {stated['timm']}",
        f"model.load_state_dict(load_file({name!r}))",
        "model.eval()",
    ]
    return "\n".join(lines) + "\n"


def torchvision_name(name: str) -> str:
    """The name that torchvision gives to the weight `name` of a ResNet."""
    part, _, kind = name.rpartition(".")
    if part in ("stem.0", "stem.1"):
        return f"{'conv1' if part == 'stem.0' else 'bn1'}.{kind}"
    found = re.fullmatch(r"groups\.(\d)\.(\d+)\.(body|shortcut)\.(\d)", part)
    assert found, name
    group, block, branch, layer = int(found[1]) + 1, found[2], found[3], int(found[4])
    inner = f"downsample.{layer}" if branch == "shortcut" else f"{'conv' if layer % 3 == 0 else 'bn'}{layer // 3 + 1}"
    return f"layer{group}.{block}.{inner}.{kind}"


def own_name(name: str) -> str | None:
    """The name here of the weight that torchvision calls `name`: the inverse of `torchvision_name`. None for what is no part of an
    encoder, such as fc."""
    if found := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"stem.{int(found[1] == 'bn')}.{found[2]}"
    found = re.fullmatch(r"layer([1-9])\.(\d+)\.(?:(conv|bn)([1-9])|downsample\.(\d))\.(\w+)", name)
    if found is None:
        return None
    group, block, kind, number, projection, parameter = found.groups()
    inner = f"body.{3 * (int(number) - 1) + (kind == 'bn')}" if kind else f"shortcut.{projection}"
    return f"groups.{int(group) - 1}.{block}.{inner}.{parameter}"


def _pixels(height: int, width: int) -> Tensor:
    """(n, H, W, 3) uint8."""
    return torch.from_numpy(np.random.default_rng(height).integers(0, 256, (_IMAGES, height, width, 3), dtype=np.uint8))


def _random(images: int, size: int) -> Tensor:
    return torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(images))


def _difference(ours: nn.Module, theirs: Callable[[Tensor], Tensor], size: int, path: Path, bound: float = BOUND) -> float:
    return _apart(ours, theirs, _random(_IMAGES, size), path, bound)


@torch.no_grad()
def _apart(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor, path: Path, bound: float = BOUND) -> float:
    expected = ours(x)
    difference = float((theirs(x) - expected).abs().max() / expected.abs().max())
    if not difference <= bound:
        raise RuntimeError(f"{path.name} differs from the encoder by {difference:.1e} of its largest feature, more than {bound:.0e}")
    return difference


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder (torch looks at the suffix, an ONNX graph names the file of its weights). At the end
    the files written there are moved beside `path`; if the writing or the comparison fails, they are removed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        yield Path(scratch) / path.name
        for written in sorted(Path(scratch).iterdir(), reverse=True):  # the weights of a graph before the graph
            written.replace(path.parent / written.name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's ONNX exporter prints its progress and warns of its own internals."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
