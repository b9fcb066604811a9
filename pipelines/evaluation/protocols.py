"""`simclr evaluate --protocol`: the papers' protocols one by one, each with its interval, classes and confusion picture."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.evaluation.confusion import confusion_picture
from pipelines.evaluation.inputs import held_back, require_common_classes
from pipelines.runs.scores import TEST, Measured, judged, limited_to, stated
from pipelines.terminal import Bar, say, show
from simclr import files
from simclr.config import Config
from simclr.data.manifest import Manifest, read_manifest
from simclr.errors import UserError
from simclr.papers import unscored

if TYPE_CHECKING:
    import torch

    from simclr.encoder.directory import PublishedEncoder
    from simclr.evaluation.features import Features
    from simclr.views.preprocessing import Preprocessing

Protocol = Literal["knn", "probe", "lbfgs", "sgd", "zero-shot"]
_BATCH = 256
_LISTED = 12  # classes on the terminal; the file has all


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the protocols. `None` = the config's, or by the data."""

    k: int | None
    temperature: float | None
    epochs: float
    batch_size: int | None
    resamples: int
    limit: int | None
    threads: int
    prompts: tuple[str, ...] = ()
    """Of zero-shot classification, with {} for a class's name; () = the config's."""
    published: Path | None = None
    """The encoder's directory, where its text tower lies."""


def run(
    protocols: tuple[Protocol, ...],
    published: PublishedEncoder,
    data: Path,
    config: Config,
    device: torch.device,
    settings: Settings,
    out: Path,
    name: str,
    shown: str,
) -> list[dict[str, Any]]:
    """Run each protocol on the encoder and the `data`, which people know as `shown`; write `out`/PROTOCOL.json and `out`/PROTOCOL.png (of
    some images: PROTOCOL-limited); return the results."""
    manifest, encoder = read_manifest(data), published.encoder.to(device)
    if not manifest.classes:
        raise UserError(f"{data} has no labels, and every protocol needs them; leave out --protocol for the effective rank (RankMe)")
    require_common_classes(data, manifest)
    if "sgd" in protocols and settings.limit is not None:
        raise UserError("--limit and --protocol sgd: it draws crops of the whole training split; leave one of them out")
    if "sgd" in protocols and (settings.batch_size or 0) > (images := manifest.examples("train")):
        raise UserError(f"--batch-size {settings.batch_size:,} is larger than the training split; use --batch-size {images} or less")
    if "sgd" in protocols and "test" not in manifest.splits:
        raise UserError(f"{data} has no test split, which --protocol sgd cannot hold back for itself; prepare the data with one")
    out.mkdir(parents=True, exist_ok=True)
    if "zero-shot" in protocols:
        require_texts(settings, manifest.classes)
    parts = (
        ("test",) if set(protocols) <= {"sgd", "zero-shot"} and "test" in manifest.splits else ("train", "test")
    )  # sgd embeds its own crops
    train, test = features(encoder, data, manifest, published.preprocessing, device, settings, parts)
    if not len(train.y) or not len(test.y):
        raise UserError(f"none of the {settings.limit or 'given'} images of a split of {data} has a label; raise --limit")
    limit, step = limited_to(manifest, settings.limit, settings.limit), published.config.get("published", {}).get("step")
    measured = Measured.of(data, manifest, shown, split=judged(manifest), limit=limit, step=step if isinstance(step, int) else None)
    rows = []
    for protocol in protocols:
        began = time.monotonic()
        if protocol == "sgd":
            scores, told = _sgd(encoder, data, config, device, settings, len(manifest.classes), test)
        elif protocol == "zero-shot":
            scores, told = _zero_shot(test, manifest.classes, settings)
        else:
            scores, told = FITTED[protocol](train, test, config, settings, len(manifest.classes))
        fitted = {"sgd": manifest.examples("train"), "zero-shot": 0}.get(protocol, len(train.y))
        told = {"protocol": protocol, "encoder": name, "train": fitted, "test": len(test.y), **told}
        rows.append(finish(scores, test.y, list(manifest.classes), settings, told, measured, out, began))
    return rows


def finish(
    scores: torch.Tensor,
    y: torch.Tensor,
    classes: list[str],
    settings: Settings,
    told: dict[str, Any],
    measured: Measured,
    out: Path,
    began: float,
) -> dict[str, Any]:
    """The result of a protocol's scores, written and shown; `told` are the settings that were used, `measured` says of which images, and
    `began` is when it began."""
    row = summary(scores, y, classes, settings.resamples) | {"settings": told}
    names, ends = [f"{told['protocol']}_{score}" for score in ("top1", "top5", "mean_per_class")], row["top1_interval"]
    measured = replace(
        measured,
        images=dict.fromkeys(names, len(y)),
        protocols=dict.fromkeys(names, _settings(told)),
        intervals={names[0]: (ends["low"], ends["high"])},
    )
    row |= stated(measured)
    row["seconds"] = time.monotonic() - began
    # Scores of some images leave those of all as they are.
    name = told["protocol"] + ("" if measured.whole else "-limited")
    write(row, classes, out, name)
    show(text(row, classes, measured))
    say(f"{out / name}.json, {out / name}.png")
    return row


def features(
    encoder: Any, data: Path, manifest: Manifest, seen: Preprocessing, device: torch.device, settings: Settings, parts: tuple[str, ...]
) -> tuple[Features, Features]:
    """The labelled rows of the training and the test split; if `parts` has only one of them, that one twice. Without a test split, a
    tenth is held back."""
    from simclr.data.loader import in_order
    from simclr.evaluation.features import Features, embed_each
    from simclr.evaluation.frozen import Unchanged

    found = {}
    splits = [s for s in parts if s in manifest.splits]
    images = sum(min(settings.limit or manifest.examples(s), manifest.examples(s)) for s in splits)
    with Bar("embed", images) as bar, Unchanged(encoder):
        for part in splits:
            batches = in_order(data, part, seen, _BATCH, settings.limit, settings.threads)
            count = min(settings.limit or manifest.examples(part), manifest.examples(part))
            (on_host,) = embed_each([encoder], batches, count, seen, device, bar.advance)
            found[part] = Features(on_host.h.to(device), on_host.y.to(device), on_host.ids.to(device))
    train, test = (found.get("train", found["test"]), found["test"]) if "test" in found else held_back(found["train"])
    return train.labelled(), test.labelled()


# ── The protocols: (features, settings) → (scores of the test rows, the settings that were used) ─────────────────────


def _knn(train: Features, test: Features, config: Config, settings: Settings, classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
    import torch.nn.functional as F

    from simclr.evaluation.knn import nearest

    k, temperature = settings.k or config.watch.k, settings.temperature or config.watch.temperature
    votes = nearest(train.h, train.y, test.h, k, temperature).votes
    return F.pad(votes, (0, classes - votes.shape[1])), {"k": min(k, len(train.y)), "temperature": temperature}


def _probe(train: Features, test: Features, config: Config, settings: Settings, classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
    from simclr.evaluation.linear import quick_probe

    scores, decay = quick_probe(train.h, train.y, test.h, classes)
    return scores, {"decay": decay}


def _lbfgs(train: Features, test: Features, config: Config, settings: Settings, classes: int) -> tuple[torch.Tensor, dict[str, Any]]:
    from simclr.evaluation.linear import held_out, swept_probe
    from simclr.evaluation.metrics import accuracy

    held = held_out(train.y, 0.2)
    fit, choose = train[~held], train[held]
    with Bar("L-BFGS", None, "iterations", "iterations/s") as bar:
        swept = swept_probe(
            *((fit.h, fit.y), (choose.h, choose.y), test.h, classes, lambda s, y: accuracy(s, y)["top1"]),
            progress=lambda iteration, moving: bar.update(iteration, f"{moving} of the fits still move"),
        )
    told = {"lambda": swept.penalty, "penalties": len(swept.validation), "converged": swept.converged}
    return swept.scores, told | {"refit_converged": swept.refit_converged, "validation_top1": list(swept.validation.items())}


def require_texts(settings: Settings, classes: Sequence[str]) -> None:
    """Raise UserError, before anything is computed, where class names cannot be read: without a text tower, for prompts without {}, or
    for such that say the same of two classes."""
    assert settings.published is not None, "the command refuses features"
    if wrong := [prompt for prompt in settings.prompts if prompt.count("{}") != 1]:
        raise UserError(f"--prompts has {wrong[0]!r}; expected texts with {{}} where the class stands")
    from simclr.data.tokens import judged_prompts, require_tokenizer
    from simclr.encoder.directory import read_towers

    require_tokenizer()
    _, config = read_towers(settings.published)
    alike, cut = judged_prompts(classes, settings.prompts or (config.prompt,), config.context)
    if alike:
        raise UserError(alike)
    if cut:
        say(cut)


def _zero_shot(test: Features, classes: Sequence[str], settings: Settings) -> tuple[torch.Tensor, dict[str, Any]]:
    from functools import partial

    import torch

    from simclr.encoder.directory import read_towers
    from simclr.evaluation.zero_shot import class_directions, similarities
    from simclr.methods.clip import texts_of

    assert settings.published is not None
    towers, config = read_towers(settings.published)
    towers = towers.to(test.h.device)
    prompts = settings.prompts or (config.prompt,)
    directions = class_directions(classes, prompts, partial(texts_of, towers, config.context))
    with torch.no_grad():
        images = towers.images(test.h.float())
    return similarities(images, directions).float(), {"prompts": list(prompts)}


FITTED = {"knn": _knn, "probe": _probe, "lbfgs": _lbfgs}


def _sgd(
    encoder: Any, data: Path, config: Config, device: torch.device, settings: Settings, classes: int, test: Features
) -> tuple[torch.Tensor, dict[str, Any]]:
    from simclr.evaluation.linear import batch_size_for, sgd_probe
    from simclr.sense import mild_crops

    if mild := mild_crops(config.views):
        say(f"sgd: {' and '.join(mild.values())}, as in the encoder's training; papers have 8 to 100 % and mirror one half")
    examples = read_manifest(data).examples("train")
    batch_size = settings.batch_size or batch_size_for(examples)
    with Bar("sgd", None) as bar:

        def progress(step: int, of: int, loss: float) -> None:
            bar.resize(of * batch_size)
            bar.update(step * batch_size, f"loss {loss:.3f}")

        classifier = sgd_probe(encoder, data, config, classes, batch_size, settings.epochs, device, settings.threads, progress)
    return classifier(test.h), {"epochs": settings.epochs, "batch_size": batch_size, "peak_lr": 0.1 * batch_size / 256, "weight_decay": 0.0}


def say_unscored(method: str, run: str = "ENCODER") -> None:
    """Say where neighbours and linear probes are no score of the `method` that pretrained an encoder, and what finds one of the `run`."""
    if aside := unscored(method, run):
        say(aside)


# ── The results ──────────────────────────────────────────────────────────────────────────────────────────────────


def summary(scores: torch.Tensor, y: torch.Tensor, classes: list[str], resamples: int) -> dict[str, Any]:
    """top1 with its interval, top5, mean per class, every class, and the confusion table, as plain values."""
    from simclr.evaluation.metrics import accuracy, bootstrap, confusion, mean_per_class, per_class

    scores, y = scores.cpu(), y.cpu()
    table = confusion(scores.argmax(1), y, len(classes))
    right = (scores.argmax(1) == y).double()
    interval = bootstrap(lambda rows: right[rows].mean().item(), len(y), resamples)
    shares = [None if share != share else share for share in per_class(table).tolist()]  # JSON knows no NaN
    return {
        **accuracy(scores, y),
        "top1_interval": {"low": interval[0], "high": interval[1], "confidence": 0.95, "resamples": resamples, "seed": 0},
        "mean_per_class": mean_per_class(table),
        "per_class": dict(zip(classes, shares, strict=True)),
        "confusion": table.tolist(),
    }


def write(result: dict[str, Any], classes: list[str], out: Path, name: str) -> None:
    """The result as JSON, and its confusion table as a picture."""
    import numpy as np

    files.write_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    title = f"{result['settings']['encoder']} · {name} · top-1 {100 * result['top1']:.1f} %"
    with files.whole(out / f"{name}.png") as scratch:
        confusion_picture(np.array(result["confusion"]), classes, title).save(scratch, "PNG")


def _settings(told: dict[str, Any]) -> str:
    """The settings that were used, in words."""
    shown = {key: value for key, value in told.items() if key not in ("validation_top1", "protocol", "encoder", "train", "test")}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())


def text(result: dict[str, Any], classes: list[str], measured: Measured) -> str:
    """A line with the settings, one with the scores, then the classes, the worst first."""
    name, train, test = (result["settings"][key] for key in ("protocol", "train", "test"))
    settings, of = _settings(result["settings"]), "" if measured.split == TEST else f" ({measured.split})"
    of += "" if measured.whole else f"; of {measured.limit}"
    at = result["top1_interval"]
    interval = f"95 % interval {100 * at['low']:.1f} … {100 * at['high']:.1f}, {at['resamples']} resamples"
    scores = f"top-1 {100 * result['top1']:.1f} % ({interval})"
    fitted = f"{train:,} training and " if train else ""
    lines = [f"{name}: {settings}; {fitted}{test:,} test images{of}", f"  {scores}"]
    lines[-1] += f", top-5 {100 * result['top5']:.1f} %, mean per class {100 * result['mean_per_class']:.1f} %"
    ranked = sorted((share, c) for c, share in result["per_class"].items() if share is not None)
    if len(ranked) > _LISTED:
        lines.append(f"  the {_LISTED} worst of {len(ranked)} classes:")
    lines += [f"  {100 * share:6.1f} %  {c}" for share, c in ranked[:_LISTED]]
    return "\n".join(lines)
