"""Whether a change moved a number:  python -m tests.support.same_numbers FILE [--worlds 1,2]

Twenty steps of every kind of run on a few rendered images. FILE gets, for each, sha256 of the whole state at the end (each tensor by
its bytes, names left out, so that renaming changes nothing) and every report. If FILE exists already, it is compared with, and
differences are printed; the exit code is then 1. Run it on the commit before, then on the change, on one machine: processors and versions
of torch round differently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr import checkpoint
from simclr.config import Config, Loss
from simclr.data import labels, loader, shards
from simclr.data.manifest import read_manifest
from simclr.data.sources.open import open_source
from simclr.encoder.directory import write_encoder
from simclr.methods.classifier import build_classifier, first_state
from simclr.methods.simclr import build_model
from simclr.stages import Distill, FineTune
from simclr.train import Report, Start, train
from tests.support.ranks import Ranks
from tests.support.small import TINY, TUNED
from tests.support.sources import source_of

_UNSTEADY = ("speed/", "eval/seconds", "memory/")
replace = dataclasses.replace


def _of(**train: Any) -> Config:
    settings = {"report_every_steps": 5, "checkpoint_every_steps": 20, **train}
    return replace(TINY, train=replace(TINY.train, **settings), watch=replace(TINY.watch, every_epochs=1))


BASE = _of()
RUNS: dict[str, tuple[Config, str]] = {
    "LARS": (BASE, "patterns"),
    "SGD": (replace(BASE, optim=replace(BASE.optim, name="sgd", nesterov=True, weight_decay=1e-4)), "patterns"),
    "queue": (replace(BASE, loss=Loss(temperature=0.2, memory=96, memory_decay=0.9)), "patterns"),
    "nt_xent_dot": (replace(BASE, loss=Loss(name="nt_xent_dot", temperature=5.0)), "patterns"),
    "nt_logistic": (replace(BASE, loss=Loss(name="nt_logistic", temperature=0.3)), "patterns"),
    "nt_logistic, semi-hard": (replace(BASE, loss=Loss(name="nt_logistic", temperature=0.3, semi_hard=True)), "patterns"),
    "margin_triplet": (replace(BASE, loss=Loss(name="margin_triplet", margin=0.4)), "patterns"),
    "micro-batch": (_of(micro_batch=3), "patterns"),
    "float32": (_of(precision="float32"), "patterns"),
    "bfloat16": (_of(precision="bfloat16"), "patterns"),
    "queue, bfloat16": (replace(_of(precision="bfloat16"), loss=Loss(temperature=0.2, memory=96, memory_decay=0.9)), "patterns"),
    "micro-batch, bfloat16": (_of(precision="bfloat16", micro_batch=3), "patterns"),
    "JPEG, no labels": (BASE, "photographs"),
    "JPEG, float32": (_of(precision="float32"), "photographs"),
    "operations": (
        replace(BASE, views=replace(BASE.views, operations=("colour", "cutout", "noise", "crop", "rotate", "sobel"))),
        "patterns",
    ),
    "operations, JPEG": (replace(BASE, views=replace(BASE.views, operations=("crop", "blur"))), "photographs"),
    "a third of the labels missing": (BASE, "partly"),
    "BatchNorm of each worker": (replace(BASE, encoder=replace(BASE.encoder, batchnorm="per_worker")), "patterns"),
    "fine-tuning": (replace(TUNED, train=replace(BASE.train, batch_size=8)), "patterns"),
    "fine-tuning, linear": (replace(TUNED, train=replace(BASE.train, batch_size=8), linear=True), "patterns"),
    "distillation": (Distill(encoder=BASE.encoder, views=BASE.views, train=BASE.train, optim=TUNED.optim, temperature=0.5), "patterns"),
}
RUNS["distillation, some labels"] = (replace(RUNS["distillation"][0], alpha=0.7), "patterns")


def prepare(folder: Path) -> None:
    """Shards, a published encoder, the first checkpoint of fine-tuning, and a teacher."""
    from PIL import Image

    from simclr.data.sources.patterns import render

    (folder / "jpg").mkdir()
    for i, image in enumerate(render(np.arange(240), 0, 96, True)[0]):
        Image.fromarray(image[:72]).save(folder / "jpg" / f"{i:03}.jpg", quality=90)
    source = open_source("patterns:train=240,test=60")
    some = [item if i % 3 else replace(item, label=None) for i, item in enumerate(source.items())]
    partly = source_of(some, "partly", identity="partly")
    for name, made in {"photographs": open_source(str(folder / "jpg")), "patterns": source, "partly": partly}.items():
        shards.prepare(made, folder / name, shards.Options(), 2, lambda done: None)
    config = replace(TINY, head=TUNED.head)
    model = build_model(replace(config, seed=5))
    write_encoder(model.encoder.state_dict(), config, folder / "encoder", {}, head=model.head.state_dict())
    for name in ("fine-tuning", "fine-tuning, linear"):
        asked = RUNS[name][0]
        assert isinstance(asked, FineTune)
        checkpoint.write(folder / f"begun {name}", first_state(asked, folder / "encoder", 10), 2)
    taught = build_classifier(replace(TUNED, seed=9), 10, 1)
    torch.nn.init.normal_(taught.classifier.weight, generator=torch.Generator().manual_seed(3))
    parts = {"head": {f"layers.{k}": v for k, v in taught.head.state_dict().items()}, "classifier": taught.classifier.state_dict()}
    classes = list(read_manifest(folder / "patterns").classes)
    write_encoder(taught.encoder.state_dict(), config, folder / "teacher", {}, **parts, tap=1, classes=classes)


def start_of(name: str, folder: Path) -> Start:
    config, data = RUNS[name]
    start = Start(folder / data)
    if isinstance(config, FineTune):
        ids = labels.subset(loader.labels(start.data), 0.1, 0)
        return replace(start, checkpoint=checkpoint.latest(folder / f"begun {name}", print), ids=ids)
    if isinstance(config, Distill):
        known = labels.subset(loader.labels(start.data), 0.3, 0) if config.alpha < 1 else None
        return replace(start, teacher=folder / "teacher", labelled=known)
    return start


def twenty_steps(name: str, folder: Path) -> dict[str, Any]:
    """The state's digest after twenty steps, and the reports without times."""
    rows, last = [], None
    for last in train(RUNS[name][0], start_of(name, folder)):
        rows.append({key: value for key, value in sorted(last.metrics.items()) if not key.startswith(_UNSTEADY)})
    assert isinstance(last, Report) and last.step == 20
    return {"sha256": digest(last.state.tensors), "tensors": len(last.state.tensors), "reports": rows}


def digest(tensors: dict[str, Tensor]) -> str:
    each = [
        f"{t.dtype} {tuple(t.shape)}".encode() + t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for t in tensors.values()
    ]
    return hashlib.sha256("".join(sorted(hashlib.sha256(text).hexdigest() for text in each)).encode()).hexdigest()


def main(path: Path, worlds: tuple[int, ...]) -> int:
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found: dict[str, Any] = {}
    pool = Ranks(patience_s=900)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name in RUNS:
            for world in worlds:
                key = f"{name}, W = {world}"
                found[key], *others = pool(world, twenty_steps, name, Path(folder))
                assert all(other["reports"] == found[key]["reports"] for other in others), f"{key}: ranks differ"
                said = "" if not known else "   the same" if found[key] == known.get(key) else "   DIFFERS"
                print(f"{found[key]['sha256'][:16]} {key}{said}", flush=True)
    pool.close()
    if not known:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(known) and any(known.get(key) != value for key, value in found.items()))


if __name__ == "__main__":
    given = sys.argv[sys.argv.index("--worlds") + 1] if "--worlds" in sys.argv else "1,2"
    raise SystemExit(main(Path(sys.argv[1]), tuple(map(int, given.split(",")))))
