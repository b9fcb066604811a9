"""`simclr convert`: an official TensorFlow checkpoint → a published encoder's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.terminal import say, show
from pipelines.tracking.card import UNKNOWN_LICENCE, network, write_card
from pipelines.tracking.record import Record
from simclr import files
from simclr.errors import UserError


@dataclass(frozen=True)
class Args:
    """Convert a checkpoint of the official SimCLR code (v1 or v2, TensorFlow 1 or 2), with its head and classifier.

    Needs TensorFlow (`pip install 'simclr-cluster[tensorflow]'`); the result does not.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """Checkpoint (…/model.ckpt-250228), a folder that holds one, or a SavedModel's or hub module's folder."""
    to: Path
    """Directory to make."""
    tap: int | None = None
    """The head's layer that the classifier reads; 0 is the encoder's output h. Fine-tuned v2 checkpoints mostly read 1, linear
    evaluations 0. Default: the only layer that fits the shapes; h under a two-layer head."""
    licence: str = UNKNOWN_LICENCE
    """Licence of the weights, for the model card."""


def main(args: Args) -> None:
    files.require_folder(args.to)
    if args.to.exists() and (not args.to.is_dir() or any(args.to.iterdir())):
        raise UserError(f"{args.to} exists and is not empty; convert to a new directory")
    from simclr.encoder.convert import convert
    from simclr.encoder.directory import write_encoder
    from simclr.encoder.tf_checkpoint import open_bundle

    found = convert(open_bundle(args.path))
    if found.ignored:
        more = f" and {len(found.ignored) - 3:,} more" if len(found.ignored) > 3 else ""
        say(f"no weights, left out: {', '.join(found.ignored[:3])}{more}")
    tap = args.tap
    if tap is None and found.linear is not None:
        two_layers = found.head is None or len(found.head.layers) <= 2
        tap = found.taps[0] if len(found.taps) == 1 or two_layers else None
        if tap is None:
            say(
                f"the classifier is left out: it fits taps {', '.join(map(str, found.taps))} of the head alike; "
                "convert with --tap 1 (fine-tuned from the head's first layer) or --tap 0 (linear evaluation) to keep it"
            )
    linear = None if tap is None else dict(found.classifier(tap).classifier.state_dict())
    head = dict(found.head.state_dict()) if found.head else None
    published = {"recipe": "unknown", "step": found.step, "data": "unknown", "converted": found.source}
    write_encoder(dict(found.encoder.state_dict()), found.config, args.to, published, head=head, classifier=linear, tap=tap or 0)
    write_card(args.to, args.to.name, Record(), args.licence)
    parts = [network(found.config.to_dict()["encoder"]), f"{found.encoder.d_h:,} features"]
    parts.append(f"a head of {len(found.head.layers)} layers" if found.head else "no head")
    if linear is not None:
        parts.append(f"a classifier of {len(linear['bias']):,} classes at tap {tap}")
    show(f"{args.to}: {', '.join(parts)}")
