"""What a version of the registry says of itself: its scores, and on what and how they were measured, as tags that people can read."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.runs.scores import Measured, with_interval

_SCORE, _IMAGES, _PROTOCOL, _INTERVAL = "score.", "images.", "protocol.", "interval."
_MOST = 1000  # characters of a tag
# Tag → field of `Measured`.
_TAGS = {
    "evaluated.data": "data",
    "evaluated.manifest_sha256": "manifest_sha256",
    "evaluated.shards_sha256": "shards_sha256",
    "evaluated.split": "split",
    "evaluated.limit": "limit",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The scores of a version, and what they are of. Fields that are empty were not recorded, as by earlier versions of this code."""

    scores: dict[str, float] = field(default_factory=dict)
    measured: Measured = field(default_factory=Measured)
    metric: str = ""
    """The score that decides which version is the champion."""
    trained_on: str = ""
    """Address of the data that it was trained on."""
    trained_on_sha256: str = ""
    """Of that data's manifest."""

    def tags(self) -> dict[str, str]:
        """As tags of a version."""
        about = self.measured
        found = {tag: str(getattr(about, name)) for tag, name in _TAGS.items()}
        found |= {"metric": self.metric, "trained_on.data": self.trained_on, "trained_on.manifest_sha256": self.trained_on_sha256}
        found |= {"checkpoint.step": str(about.step) if about.step is not None else ""}
        for name, value in self.scores.items():
            found[_SCORE + name] = repr(float(value))
            found[_IMAGES + name] = str(about.images.get(name, ""))
            found[_PROTOCOL + name] = about.protocols.get(name, "")
            found[_INTERVAL + name] = " … ".join(f"{end:.6f}" for end in about.intervals.get(name, ()))
        return {tag: text[:_MOST] for tag, text in found.items() if text}

    def told(self, metric: str) -> str:
        """A score in words: "knn_top1 37.0 % (95 % interval 34.1 … 40.0) on 1,000 images of the test split of photos (sha256 …)"."""
        shown = with_interval(metric, self.scores[metric], self.measured.intervals.get(metric))
        return f"{shown} on {self.measured.told(metric)}"


def of_tags(tags: Mapping[str, Any]) -> Record:
    """The record in a version's `tags`. Other hands may have written them: what is no number is none."""
    about: dict[str, Any] = {name: str(tags[tag]) for tag, name in _TAGS.items() if tag in tags}
    intervals = {}
    for name, text in _below(tags, _INTERVAL).items():
        if ends := re.fullmatch(r"([01]\.\d+) … ([01]\.\d+)", text):
            intervals[name] = (float(ends[1]), float(ends[2]))
    images = {name: int(text) for name, text in _below(tags, _IMAGES).items() if re.fullmatch(r"\d{1,12}", text)}
    step = str(tags.get("checkpoint.step", ""))
    about["step"] = int(step) if re.fullmatch(r"\d{1,12}", step) else None
    return Record(
        scores=_scores(tags),
        measured=Measured(**about, images=images, intervals=intervals, protocols=_below(tags, _PROTOCOL)),
        metric=str(tags.get("metric", "")),
        trained_on=str(tags.get("trained_on.data", "")),
        trained_on_sha256=str(tags.get("trained_on.manifest_sha256", "")),
    )


def _below(tags: Mapping[str, Any], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): str(text) for key, text in tags.items() if key.startswith(prefix)}


def _scores(tags: Mapping[str, Any]) -> dict[str, float]:
    """Without NaN: no score compares with NaN, so such a champion would stay for ever."""
    found = {}
    for name, text in _below(tags, _SCORE).items():
        with contextlib.suppress(ValueError):
            if not math.isnan(value := float(text)):
                found[name] = value
    return found
