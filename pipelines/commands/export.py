"""`simclr export`: a published encoder → a torch program, ONNX, or torchvision's or timm's names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.runs import sync
from pipelines.terminal import show
from pipelines.tracking.card import preprocessing
from simclr import files
from simclr.errors import UserError

_SUFFIXES = ".pt2 (a torch.export program), .onnx, or .safetensors (torchvision's names, ResNet-18 to -152; timm's of its networks)"


@dataclass(frozen=True)
class Args:
    """Write an encoder for programs without this package, compare it with the encoder, and print the largest difference."""

    encoder: Annotated[Path, tyro.conf.Positional]
    """A published encoder's directory (`simclr pull`, or RUN/encoder), or s3://bucket/prefix of one."""
    to: Path
    """File to write. Its suffix is the format: .pt2 (a torch.export program), .onnx, or .safetensors (torchvision's names, or timm's
    of a network of its)."""
    prepared: bool = False
    """ONNX for images that are cropped and resized already, (n, 3, size, size) in [0, 1], instead of uint8 pictures (n, H, W, 3) of any
    size; for runtimes without `Resize` of opset 18."""


def main(args: Args) -> None:
    if args.to.suffix not in (".pt2", ".onnx", ".safetensors"):
        raise UserError(f"--to {args.to} does not say what to write; expected a file ending in {_SUFFIXES}")
    if args.prepared and args.to.suffix != ".onnx":
        raise UserError(f"--prepared is for ONNX, and {args.to.name} is none; leave it out")
    files.require_file(args.to)
    import simclr
    from simclr.encoder import export
    from simclr.encoder.directory import read_classifier

    with sync.directory(args.encoder) as directory:
        encoder = simclr.load_encoder(directory)
        stated = encoder.config.get("classifier")
        reads_h = stated is not None and stated["tap"] == 0
        linear = dict(read_classifier(directory)[0].classifier.state_dict()) if reads_h and args.to.suffix == ".safetensors" else None
    args.to.parent.mkdir(parents=True, exist_ok=True)
    size = encoder.preprocessing.size_px
    if args.to.suffix == ".safetensors" and (name := encoder.config["encoder"].get("timm")):
        deviation, of = export.timm(encoder, args.to), f"timm's {name}{', without its classifier' if linear else ''}"
        show(f"{args.to}: {of}; {args.to.name}.txt has the program, in which it deviates by {deviation:.1e}")
        show(f"  takes {preprocessing(asdict(encoder.preprocessing))}")
    elif args.to.suffix == ".safetensors":
        fixed, plain = export.torchvision(encoder, linear, args.to)
        depth = encoder.config["encoder"]["depth"]
        show(f"{args.to}: torchvision's resnet{depth}, {'with' if linear else 'without'} fc")
        for line in export.changes(depth):
            show(f"  {line}")
        show(f"  deviates by {fixed:.1e} with these lines, which {args.to.name}.txt has in a program,")
        show(f"  and by {plain:.1e} with torchvision's own max-pool, which pads otherwise")
        show(f"  takes {preprocessing(asdict(encoder.preprocessing))}")
    else:
        graph = args.to.suffix == ".onnx"
        deviation = export.onnx(encoder, args.to, args.prepared) if graph else export.program(encoder, args.to)
        takes = "uint8 (n, H, W, 3), any size" if graph and not args.prepared else f"(n, 3, {size}, {size}) in [0, 1]"
        show(f"{args.to}: images {takes} → features (n, {encoder.d_h}); deviates by {deviation:.1e}")
