"""What the card says that the training taught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.tracking.card import _limits
from simclr.config import SimCLR, Views

STILL = Views(flip_p=0.0, jitter_p=0.0, grey_p=0.0, blur_p=0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"flip_p": 0.5}, "cut and scaled and mirrored."),
        ({"blur_p": (0.0, 0.1)}, "cut and scaled and blurred."),
        ({"blur_p": (0.0, 0.0), "flip_p": 0.5}, "cut and scaled and mirrored."),
        ({"solarise_p": (0.0, 0.2)}, "cut and scaled and changed in colour."),
        ({"solarise_p": 0.2, "blur_p": 0.5}, "cut and scaled, changed in colour and blurred."),
        ({"jitter_p": 0.8, "blur_p": (1.0, 0.1), "solarise_p": (0.0, 0.2)}, "cut and scaled, changed in colour and blurred."),
    ],
)
def test_what_a_picture_stays_the_same_under(changes: dict[str, Any], said: str) -> None:
    """By config.json, which has pairs as lists."""
    views = SimCLR(views=replace(STILL, **changes)).to_dict()["views"]
    assert f"a picture stays the same when it is {said}" in _limits(views)


def test_crops_alone_teach_nothing_to_name() -> None:
    assert _limits(SimCLR(views=STILL).to_dict()["views"]).startswith("It knows what its training pictures show")
