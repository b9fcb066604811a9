"""A run's scores, with what they were measured on and how: evaluation.json of all images, evaluation-limited.json of some of them."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pipelines.runs.directory import Run, manifest_digest
from simclr import fields, files
from simclr.data.manifest import Manifest
from simclr.errors import UserError

WHOLE = "none"
"""`Measured.limit` of an evaluation of every image."""
TEST, HELD_BACK = "the test split", "a held-back tenth of the training split"
HELD_LABELS = "labelled images that a classifier has not seen"
"""Images that are judged, in words."""
_HIGHER = re.compile(r"(\w+_)?(top1|top5|mean_per_class)(_at_[\d.e-]+)?|rankme")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """On what, and how, scores were measured. "" and None are not recorded: earlier versions scored the run."""

    data: str = ""
    """Address of the evaluated data, for people."""
    manifest_sha256: str = ""
    """Of its manifest, as run.json has it of the data that a run was trained on."""
    shards_sha256: str = ""
    """Of its images and classes (`Manifest.shards_sha256`): the same photographs, prepared elsewhere, have the same one."""
    split: str = ""
    """Which images are judged, in words."""
    limit: str = ""
    """`WHOLE`, or the number of images that the evaluation was limited to, in words."""
    step: int | None = None
    """Of the checkpoint."""
    time: float = 0.0
    """Unix time."""
    images: dict[str, int] = field(default_factory=dict)
    """Score → the images that it was measured on."""
    protocols: dict[str, str] = field(default_factory=dict)
    """Score → how it was measured, in words: two scores with other words do not compare."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Score → its 95 % Wilson interval over test sets, of shares of images (`simclr.evaluation.metrics.wilson`)."""

    @property
    def whole(self) -> bool:
        return self.limit == WHOLE

    @classmethod
    def of(cls, data: Path, manifest: Manifest, shown: str, **others: Any) -> Self:
        """With the identity of `data`, which people know as `shown`, and the `others`."""
        return cls(
            data=shown, manifest_sha256=manifest_digest(data), shards_sha256=manifest.shards_sha256, time=round(time.time(), 3), **others
        )

    def told(self, metric: str) -> str:
        """What a score is of, in words: "1,000 images of the test split of runs/photos (sha256 0123456789ab…)"."""
        count = f"{self.images[metric]:,} images of " if metric in self.images else ""
        limited = "" if self.whole else f", of {self.limit}" if self.limit else ""
        if not self.data:
            return f"{count}unknown data"
        return f"{count}{self.split or 'an unknown split'} of {self.data} (sha256 {self.shards_sha256[:12] or 'unknown'}…){limited}"


def judged(manifest: Manifest) -> str:
    """The images that `simclr evaluate` judges, in words."""
    return TEST if "test" in manifest.splits else HELD_BACK


def limited_to(manifest: Manifest, train: int | None, test: int | None) -> str:
    """`Measured.limit` of at most `train` and `test` images of the splits (None = all): a limit above a split's size is none."""
    cut = {s: most for s, most in (("train", train), ("test", test)) if s in manifest.splits and most and most < manifest.examples(s)}
    names = {"train": "training", "test": "test"}
    return ("at most " + " and ".join(f"{most:,} {names[s]}" for s, most in cut.items()) + " images") if cut else WHOLE


def higher_is_better(score: str) -> bool:
    """Whether of this score more is better: of shares that are right, and of RankMe. A weight decay that was chosen is no score."""
    return bool(_HIGHER.fullmatch(score))


def intervals_of(scores: dict[str, float], images: dict[str, int]) -> dict[str, tuple[float, float]]:
    """95 % Wilson intervals of the `scores` that are shares of so many images. Means over classes and ranks have none."""
    from simclr.evaluation.metrics import wilson

    shares = {name: value for name, value in scores.items() if re.search(r"top[15](_at_|$)", name) and images.get(name)}
    return {name: wilson(value, images[name]) for name, value in shares.items()}


def write(run: Run, rows: list[dict[str, Any]], measured: Measured, **settings: Any) -> Path:
    """Write the `rows` (a name and scores each, weakest first; the last one is the run's own) with what was `measured`. A limited
    evaluation gets a file of its own, and leaves the whole one as it is. Returns the file."""
    path = run.evaluation_file(limited=not measured.whole)
    files.write_text(path, json.dumps({"scores": rows, **settings, **stated(measured)}, indent=1) + "\n")
    return path


def stated(measured: Measured) -> dict[str, Any]:
    """`measured` as fields of an evaluation's JSON."""
    values = asdict(measured)
    return {"data": values.pop("data"), "time": values.pop("time"), "measured": values}


def measured_in(text: dict[str, Any], where: Path) -> Measured:
    """What the JSON of an evaluation says that was measured; in a file of earlier versions it is little."""
    instead = f"evaluate the run again: `simclr evaluate {where.parent}`"
    stated: dict[str, Any] = {"measured": text.get("measured", {})}
    fields.require(stated, {"measured": dict[str, Any]}, where, instead)
    values = {name: text[name] for name in ("data", "time") if name in text} | stated["measured"]
    found = fields.build(Measured, values, f"measured in {where}", instead)
    for name in [name for name, (low, high) in found.intervals.items() if not low <= high]:
        raise UserError(f"{where} is damaged: the interval of {fields.short(name)} has no low and high end; {instead}")
    return replace(found, intervals={name: (low, high) for name, (low, high) in found.intervals.items()})


def newest(run: Run) -> tuple[dict[str, Any], Measured] | None:
    """The evaluation of all images or, if there is none, the limited one: (its JSON, what was measured). None if there is neither."""
    for limited in (False, True):
        if (text := run.evaluation(limited)) is not None:
            return text, measured_in(text, run.evaluation_file(limited))
    return None


def score_text(metric: str, value: float) -> str:
    """Shares in per cent, anything else as a number."""
    return f"{100 * value:.1f} %" if re.search(r"(top[15]|per_class)(_at_|$)", metric) else f"{value:.3g}"


def with_interval(metric: str, value: float, interval: tuple[float, float] | None) -> str:
    """A score with its interval, where it has one."""
    low, high = (100 * end for end in interval or (0.0, 0.0))
    return f"{metric} {score_text(metric, value)}" + (f" (95 % interval {low:.1f} … {high:.1f})" if interval else "")
