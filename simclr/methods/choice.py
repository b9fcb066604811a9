"""The method that a config asks for. A new method is one line here."""

from __future__ import annotations

from simclr.config import Config
from simclr.data.manifest import Manifest, read_manifest
from simclr.methods.classifier import classifier
from simclr.methods.distill import distill
from simclr.methods.method import Method, Start
from simclr.methods.simclr import simclr
from simclr.stages import Distill, FineTune


def method_of(config: Config, start: Start, manifest: Manifest | None = None) -> Method:
    """The method of `config` on the data of `start`, whose `manifest` is read if it is not given."""
    manifest = manifest or read_manifest(start.data, look=False)
    match config:
        case FineTune():
            return classifier(config, start, manifest)
        case Distill():
            return distill(config, start, manifest)
        case _:
            return simclr(config, start, manifest)
