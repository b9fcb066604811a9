"""`simclr export`: a published encoder → a torch program, ONNX, or torchvision's names."""

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

_SUFFIXES = ".pt2 (a torch.export program), .onnx, or .safetensors (torchvision's names, ResNet-50, -101 and -152)"


@dataclass(frozen=True)
class Args:
    """Write an encoder for programs without this package, compare it with the encoder, and print the largest difference."""

    encoder: Annotated[Path, tyro.conf.Positional]
    """A published encoder's directory (`simclr pull`, or RUN/encoder), or s3://bucket/prefix of one."""
    to: Path
    """File to write. Its suffix is the format: .pt2 (a torch.export program), .onnx, or .safetensors (torchvision's names)."""


def main(args: Args) -> None:
    if args.to.suffix not in (".pt2", ".onnx", ".safetensors"):
        raise UserError(f"--to {args.to} does not say what to write; expected a file ending in {_SUFFIXES}")
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
    if args.to.suffix == ".safetensors":
        fixed, plain = export.torchvision(encoder, linear, args.to)
        show(f"{args.to}: torchvision's resnet{encoder.config['encoder']['depth']}, {'with' if linear else 'without'} fc")
        show(f"  deviates by {fixed:.1e} after  {export.TORCHVISION_POOL}")
        show(f"  and by {plain:.1e} without that line: torchvision pads its max-pool otherwise")
        show(f"  takes {preprocessing(asdict(encoder.preprocessing))}")
    else:
        deviation = (export.onnx if args.to.suffix == ".onnx" else export.program)(encoder, args.to)
        show(f"{args.to}: images (n, 3, {size}, {size}) in [0, 1] → features (n, {encoder.d_h}); deviates by {deviation:.1e}")
