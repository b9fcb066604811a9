"""`simclr bench methods`: methods trained for the same epochs by the same batch, a few seeds each, and one table of their scores. A row
names the encoder where it is another than the first's: MAE takes a ViT.

Each run leaves checkpoints and, at its end, a file of its scores in the folder --out: the same command again goes on, and trains nothing
twice. Two commands with other recipes may share a folder, for two cores.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipelines.allocator import keep_freed_memory
from pipelines.bench.result import Row
from pipelines.evaluation.whole import scores_of
from pipelines.terminal import say
from simclr import checkpoint, fields, files
from simclr.config import Config, Optim, Train
from simclr.data import labels, loader
from simclr.data.manifest import read_manifest
from simclr.errors import UserError
from simclr.family import MAE, method_name, pretraining
from simclr.footprint import footprint
from simclr.methods.choice import method_of
from simclr.methods.method import Start
from simclr.papers import named
from simclr.recipes import recipe
from simclr.stages import FineTune
from simclr.train import train

Precision = Literal["float32", "tf32", "bfloat16"]
_ROW = {"name": str, "method": str, "seed": int, "config": dict[str, Any]}
_ROW |= dict.fromkeys(("knn_top1", "probe_top1", "loss", "step_ms", "train_s", "tuned_top1", "memory_mib"), float)
_CHECKPOINT_S, _SAY_S = 60.0, 20.0  # seconds between two checkpoints of a run, and between two lines about it
_FEW = 0.1  # share of the labels that fine-tuning sees
_SGD = Optim(name="sgd", base_lr=0.2, nesterov=True, warmup_epochs=0, weight_decay=0.0)
_ADAMW = Optim(name="adamw", base_lr=8e-3, weight_decay=0.05, layer_decay=0.75, warmup_epochs=3)


def methods(
    names: tuple[str, ...],
    seeds: int,
    epochs: int | None,
    data: Path,
    out: Path,
    threads: int,
    device: torch.device,
    precision: Precision | None = None,
    compile: bool = False,
    like: Config | None = None,
) -> Iterator[Row]:
    """Print the table of the recipes `names` and give its runs, row by row: kNN (the recipe's watch.k) and linear probe on all images of
    the shards in `data`, and the median time of a step. Without `epochs` and `precision`, the recipes'. Of `like`
    all of them take encoder, epochs and batch. It needs no Ray.

    Raises UserError, before anything is trained, for recipes of different epochs or batch.
    """
    base = [_shortened(_like(recipe(name), like), epochs, precision, compile) for name in names]
    if not base or seeds < 1:
        raise UserError(f"--recipes has {len(base)} recipes and --seeds is {seeds}; expected at least 1 of each")
    for name, config in zip(names, base, strict=True):
        for what, ours, theirs in zip(("epochs", "batch"), _same(base[0]), _same(config), strict=True):
            if ours != theirs:
                instead = "--like RECIPE gives all of them the encoder, epochs and batch of one"
                raise UserError(f"{name} and {names[0]} differ in {what}, and a table compares methods alone; {instead}")
    manifest = read_manifest(data)
    if not manifest.classes or "test" not in manifest.splits:
        raise UserError(f"{data} has no labelled test split to score on; use other shards")
    torch.set_num_threads(threads)
    keep_freed_memory()
    rows: list[Row] = []
    for seed in range(seeds):  # a seed of every method first: an interrupted table compares already
        for name, config in zip(names, base, strict=True):
            rows.append(_row(name, replace(config, seed=seed), data, out / f"{name}-{seed}", device))
            yield rows[-1]
    for line in table(rows):
        print(line)


def _like(config: Config, other: Config | None) -> Config:
    if other is None:
        return config
    same = replace(config.train, batch_size=other.train.batch_size, epochs=other.train.epochs, steps=other.train.steps)
    encoder = replace(other.encoder, drop_path=0.0) if isinstance(config, MAE) else other.encoder  # which MAE has not
    return replace(config, encoder=encoder, train=same)


def _shortened(config: Config, epochs: int | None, precision: Precision | None, compile: bool) -> Config:
    train = config.train if epochs is None else replace(config.train, epochs=float(epochs), steps=None)
    train = replace(train, precision=precision or train.precision, compile=compile or train.compile)
    return replace(config, train=train, watch=replace(config.watch, every_epochs=0, bank=512, queries=256))


def _same(config: Config) -> tuple[object, ...]:
    return (config.train.epochs, config.train.steps), config.train.batch_size


def _row(name: str, config: Config, data: Path, folder: Path, device: torch.device) -> Row:
    """The row of one run, which is trained from its newest checkpoint in `folder` unless its scores are there."""
    file, instead = folder / "scores.json", f"remove {folder}, or use another --out"
    if file.is_file():
        found = files.read_json(file, instead)
        fields.require(found, _ROW, file, instead)
        if found["config"] != json.loads(json.dumps(config.to_dict())):
            raise UserError(f"{folder} is a run of another config of {name}; {instead}")
        if found.get("tuned_by", asdict(_SGD)) != asdict(_tuning(config)):  # runs of before do not say it, and a ViT had another rate
            raise UserError(f"{folder} was fine-tuned with other settings than today's; {instead}")
        return Row(found)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    newest = checkpoint.latest(checkpoints, say) if checkpoints.is_dir() else None
    if newest is not None and checkpoint.read(newest).config != config.to_dict():
        raise UserError(f"{folder} has a checkpoint of another config of {name}; {instead}")
    last, began, steps_ms = None, time.perf_counter(), []
    written = said = began
    for report in train(config, Start(data, device, checkpoint=newest, threads=torch.get_num_threads())):
        speed, now = report.metrics["speed/images_per_s"], time.perf_counter()
        if report.due or now - written > _CHECKPOINT_S:
            checkpoint.write(checkpoints, report.state, config.train.keep_checkpoints)
            written = time.perf_counter()
        if now - said > _SAY_S:
            say(f"{name}, seed {config.seed}: step {report.step:,} of {report.total_steps:,}, {speed:,.0f} images/s")
            said = now
        steps_ms.append(1000 * config.train.batch_size / speed)
        last = report
    if last is None:
        raise UserError(f"{folder} has a checkpoint of the last step and no scores; {instead}")
    encoder = {key.removeprefix("model.encoder."): t for key, t in last.state.tensors.items() if key.startswith("model.encoder.")}
    row: Row = {"name": name, "method": method_name(config), "seed": config.seed, "config": config.to_dict()}
    row |= scores_of(encoder, config, data, device, config.watch.k)
    row |= {"tuned_top1": _tuned(encoder, config, data, device), "tuned_by": asdict(_tuning(config))}
    row |= {"memory_mib": _in_use(config, device)}
    row |= {"loss": last.metrics["train/loss"], "step_ms": statistics.median(steps_ms), "train_s": time.perf_counter() - began}
    files.write_text(file, json.dumps(row, indent=1) + "\n")
    shutil.rmtree(checkpoints)
    say(f"{name}, seed {config.seed}: kNN {100 * row['knn_top1']:.1f} %, probe {100 * row['probe_top1']:.1f} %, {row['train_s']:.0f} s")
    return row


def table(rows: list[Row]) -> Iterator[str]:
    """Lines of Markdown: a row for each recipe, in the order of `rows`, with mean and range over its seeds; a step's time is the median's
    over its runs, and ÷ that of the first recipe."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    of = {name: [row for row in rows if row["name"] == name] for name in names}
    base = statistics.median(row["step_ms"] for row in of[names[0]])
    yield "| method | recipe | kNN, % | linear probe, % | fine-tuned on 10 %, % | ms a step | ÷ the first | MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, mine in of.items():
        scores = [_spread([100 * row[score] for row in mine]) for score in ("knn_top1", "probe_top1", "tuned_top1")]
        ms = statistics.median(row["step_ms"] for row in mine)
        own, first = (pretraining(of[one][0]["config"]).encoder for one in (name, names[0]))
        title = named(mine[0]["method"]).title + (f", {own.title}" if own != first else "")
        memory = max(row["memory_mib"] for row in mine)
        yield f"| {title} | `{name}` | {' | '.join(scores)} | {ms:,.0f} | {ms / base:.2f} | {memory:,.0f} |"
    seeds = sorted({row["seed"] for row in rows})
    yield f"\nMean and range of seeds {', '.join(map(str, seeds))}." if len(seeds) > 1 else f"\nSeed {seeds[0]}, one run each."


def _tuning(config: Config) -> Optim:
    """How the encoder is fine-tuned: a ResNet with SGD and Nesterov's momentum, as SimCLR v1 (arXiv:2002.05709, App. B.5) but at four times
    its rate, since there are few steps; a ViT with AdamW and layer decay, as MAE (arXiv:2111.06377, App. A.1) but at eight times its rate:
    at MAE's own, 180 steps leave it nearly as it was."""
    return _ADAMW if config.encoder.vit else _SGD


def _tuned(encoder: dict[str, Tensor], config: Config, data: Path, device: torch.device) -> float:
    """Test accuracy of the encoder with these weights, fine-tuned from h as a whole on a tenth of the labels."""
    manifest, ids = read_manifest(data), labels.subset(loader.labels(data), _FEW, config.seed)
    settings = Train(batch_size=min(64, len(ids)), epochs=30, precision=config.train.precision, compile=config.train.compile)
    tuning = FineTune(seed=config.seed, encoder=config.encoder, views=config.views, optim=_tuning(config), train=settings, tap=0)
    start = Start(data, device, ids=ids, threads=torch.get_num_threads())
    method = method_of(tuning, start, manifest)
    method.published["encoder"].load_state_dict(encoder)
    nn.init.zeros_(method.published["classifier"].get_parameter("weight"))
    return [report.metrics for report in train(tuning, start, method)][-1]["eval/top1"]


def _in_use(config: Config, device: torch.device) -> float:
    """MiB of weights, optimizer, views and step, as `simclr pretrain --dry-run` estimates them."""
    found = footprint(config, device=device.type)
    return (found.weights + found.momentum + found.views + found.step) / 2**20


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f} … {max(values):.1f})"
