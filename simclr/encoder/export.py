"""A published encoder for programs that do not have this package: an exported torch program, ONNX, torchvision's names.

The two graphs take images (n, 3, size, size) in [0, 1] and include the normalisation by mean and standard deviation. torchvision's ResNet
is *not* quite ours: its max-pool pads one row and column on every side, the official one (TensorFlow's 'SAME') only at the end of an even
side, so with torchvision's own pool the same weights see the image shifted by two pixels. One line makes it ours, `TORCHVISION_POOL`:
with `ceil_mode` and no padding the pool covers exactly the windows of 'SAME'.

Each function compares its file with the encoder on random images, in float32, and raises RuntimeError beyond `BOUND`: a user cannot mend
that.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr import files
from simclr.config import Encoder
from simclr.encoder.directory import PublishedEncoder
from simclr.errors import UserError

BOUND = 1e-4
"""Largest |theirs − ours|, relative to the largest |ours|."""
TORCHVISION_POOL = "model.maxpool = torch.nn.MaxPool2d(3, stride=2, ceil_mode=True)"
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
        torch.export.save(exported, file)
        return _difference(module, torch.export.load(file).module(), size, path)


def onnx(published: PublishedEncoder, path: Path) -> float:
    """Write an ONNX graph, input `images`, output `features`, n free; returns its difference from the encoder, as ONNX Runtime computes
    it on the CPU. Weights of more than 1 GiB go to a second file, PATH.data. Raises UserError without ONNX."""
    try:
        import onnxruntime
        import onnxscript  # type: ignore[import-not-found,unused-ignore] # noqa: F401  torch's exporter needs it
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name}, which ONNX export needs, is not installed; add it with `pip install '.[onnx]'`") from None
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
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return _difference(module, lambda x: torch.as_tensor(session.run(None, {"images": x.numpy()})[0]), size, path)


def torchvision(published: PublishedEncoder, classifier: dict[str, Tensor] | None, path: Path) -> tuple[float, float]:
    """Write the weights under torchvision's names as safetensors, with `classifier` (weight, bias; reading h) as `fc`, if given.

    Returns the differences of torchvision's network with `TORCHVISION_POOL`, and without. Its input must be normalised: this network does
    not apply mean and standard deviation. Raises UserError where torchvision has no such network.
    """
    import torchvision

    config = Encoder(**published.config["encoder"])
    if config.depth not in (50, 101, 152) or config.width != 1 or config.sk_ratio or config.se_ratio or config.cifar_stem:
        raise UserError(
            "torchvision has no such network; its names fit ResNet-50, -101 and -152 of width 1 with the ImageNet stem and neither "
            "selective kernels nor squeeze-and-excitation: export a program (.pt2) or ONNX (.onnx), which hold any encoder"
        )
    tensors = {torchvision_name(name): t for name, t in published.encoder.state_dict().items()}
    if classifier:
        tensors |= {f"fc.{name}": t for name, t in classifier.items()}
    with torch.device("meta"):  # initial weights would take longer than all the rest
        network = getattr(torchvision.models, f"resnet{config.depth}")(num_classes=len(classifier["bias"]) if classifier else 1)
    size = published.preprocessing.size_px
    with _scratch(path) as file:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)
        files.share(file)
        missing, unexpected = network.load_state_dict(load_file(file), strict=False, assign=True)
        assert not unexpected and set(missing) <= {"fc.weight", "fc.bias"}, (missing, unexpected)
        network.eval().fc = nn.Identity()
        plain = _difference(published.encoder, network, size, path, bound=float("inf"))
        network.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        return _difference(published.encoder, network, size, path), plain


def torchvision_name(name: str) -> str:
    """The name that torchvision gives to the weight `name` of a ResNet of bottlenecks."""
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


def _random(images: int, size: int) -> Tensor:
    return torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(images))


@torch.no_grad()
def _difference(ours: nn.Module, theirs: Callable[[Tensor], Tensor], size: int, path: Path, bound: float = BOUND) -> float:
    x = _random(_IMAGES, size)
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
