"""What is said of the settings of fine-tuning and distilling, which siblings of SimCLR come to with other networks and views."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from pipelines import cli
from pipelines.commands import finetune
from simclr.config import Encoder, Optim, Train, Views
from simclr.papers import unscored
from simclr.stages import Distill, FineTune
from tests.simclr.test_sense import notes

VIT = {"encoder": Encoder(vit="micro", patch_px=4), "views": Views(size_px=32)}
AUTHORS = Optim(name="adamw", base_lr=1e-3, weight_decay=0.05, layer_decay=0.75, warmup_epochs=5)  # arXiv:2111.06377, Tab. 9


def test_the_command_for_an_encoder_of_mae_has_its_authors_whole_setting() -> None:
    """With less than that, AdamW runs at LARS's rate, 0.16 for 1024 images, without decay and without a warm-up."""
    words = shlex.split(unscored("mae").partition(": ")[2])
    assert words[:2] == ["simclr", "finetune"]
    args = cli.parse("finetune", finetune.Args, words[2:])
    assert args.optim == AUTHORS and args.encoder.pool == "mean" and unscored("dino") == ""


@pytest.mark.parametrize(("stage", "peak", "base"), [(FineTune, 0.16, "1e-3"), (Distill, 6.4, "2.5e-4")])
def test_adamw_at_the_rate_of_lars_is_said(stage: type[FineTune | Distill], peak: float, base: str) -> None:
    given = replace(stage().optim, name="adamw")
    (said,) = notes(stage(**VIT, optim=given))  # type: ignore[arg-type]
    assert said.startswith(f"AdamW's rate rises to {peak:.2g}, as LARS's may") and f"--optim.base-lr {base} --optim.scaling linear" in said
    assert notes(stage(**VIT, optim=AUTHORS)) == ()  # type: ignore[arg-type]
    most = replace(AUTHORS, base_lr=0.02, warmup_epochs=0)
    assert notes(stage(**VIT, optim=most, train=Train(batch_size=256))) == ()  # type: ignore[arg-type]
    assert len(notes(stage(**VIT, optim=most, train=Train(batch_size=320)))) == 1  # type: ignore[arg-type]
