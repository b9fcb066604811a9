"""Which method a config asks for: each method is one line here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from simclr.config import Config, SimCLR
from simclr.data.manifest import Manifest, read_manifest
from simclr.family import BYOL, CLIP, DINO, MAE, MoCo, MoCoV3, SwAV
from simclr.methods.byol import byol
from simclr.methods.classifier import classifier
from simclr.methods.clip import clip
from simclr.methods.dino import dino
from simclr.methods.distill import distill
from simclr.methods.mae import mae
from simclr.methods.method import Method, Start
from simclr.methods.moco import moco
from simclr.methods.mocov3 import mocov3
from simclr.methods.simclr import simclr
from simclr.methods.swav import swav
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
            return pretraining(config, start, manifest)


def pretraining(config: Config, start: Start, manifest: Manifest | None = None) -> Method:
    """The method of a pretraining; without a manifest there are neither labels nor online evaluation."""
    match config:
        case SimCLR():
            return simclr(config, start, manifest)
        case BYOL():
            return byol(config, start, manifest)
        case MoCo():
            return moco(config, start, manifest)
        case MoCoV3():
            return mocov3(config, start, manifest)
        case SwAV():
            return swav(config, start, manifest)
        case DINO():
            return dino(config, start, manifest)
        case MAE():
            return mae(config, start, manifest)
        case CLIP():
            return clip(config, start, manifest)
        case _:
            raise TypeError(f"{type(config).__name__} is the config of no pretraining")


@dataclass(frozen=True, slots=True)
class _Shapes:
    """As much of a manifest as a method's shapes want."""

    classes: range
    splits: tuple[str, ...] = ()

    def examples(self, split: str, groups: int = 1) -> int:
        return 1 << 40


def shapes(config: Config, classes: int = 0) -> Method:
    """The method of a pretraining on the meta device, on data with so many labelled `classes`: names and shapes without memory. It
    evaluates nothing."""
    labelled: Manifest | None = _Shapes(range(classes)) if classes else None  # type: ignore[assignment]
    return pretraining(config, Start(Path(), torch.device("meta")), labelled)
