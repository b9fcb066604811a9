"""Run directories in which somebody has damaged a file: what `runs`, `report`, `publish` and the same command again read."""

from __future__ import annotations

import functools
import io
import json
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.attack import mutate
from tests.attack.mutate import damaged, damaged_json
from tests.support.paths import GOLDEN

_ENTRIES = ("gallery", "queries", "query_labels", "neighbours", "neighbour_labels", "similarity", "map", "map_labels", "map_predicted")


@functools.cache
def _sound() -> Path:
    """The run of 22 November, with pictures and an outbox."""
    folder = mutate.folder()
    with tarfile.open(GOLDEN / "before.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    run = folder / "before" / "pretrained"
    (run / "pictures.npz").write_bytes(_pictures(random.Random(0), sound=True))
    (run / "outbox.json").write_text(json.dumps({"sent": 0, "run": "0" * 32}))
    return run


def _pictures(draw: random.Random, sound: bool = False) -> bytes:
    """pictures.npz as `evaluate` writes it, or with arrays of other shapes, sizes and kinds."""
    shapes = ((2, 3, 8, 8, 3), (3, 8, 8, 3), (3,), (3, 4, 8, 8, 3), (3, 4), (3, 4), (20, 2), (20,), (20,))
    kinds = (np.uint8, np.uint8, np.int64, np.uint8, np.int64, np.float32, np.float32, np.int64, np.int64)
    arrays = {name: np.zeros(shape, kind) for name, shape, kind in zip(_ENTRIES, shapes, kinds, strict=True)}
    arrays["thumbs"] = np.zeros((20, 8, 8, 3), np.uint8)
    for name in () if sound else draw.sample(sorted(arrays), draw.choice((1, 2))):
        match draw.randrange(5):
            case 0:
                arrays[name] = arrays[name].reshape(-1)
            case 1:
                arrays[name] = arrays[name][:1]
            case 2:
                arrays[name] = arrays[name].astype(draw.choice((np.float64, np.int8, "S3", bool)))
            case 3:
                arrays[name] = arrays[name] + draw.choice((-1, 100))
            case _:
                arrays[name] = np.full(arrays[name].shape, np.nan)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def cases(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """(name, content of one of the run's files), the file's name in front of the case's."""
    draw, sound = random.Random(seed), _sound()
    for number in range(count):
        name = ("run.json", "metrics.jsonl", "evaluation.json", "timings.json", "pictures.npz", "outbox.json")[number % 6]
        before = (sound / name).read_bytes()
        if name == "pictures.npz":
            after = damaged(before, draw) if number % 4 == 0 else _pictures(draw)
        elif name == "metrics.jsonl":
            lines = before.splitlines()
            for at in draw.sample(range(len(lines)), draw.choice((1, 3))):
                lines[at] = damaged_json(lines[at].decode(), draw)
            after = b"\n".join(lines) + b"\n"
        else:
            after = damaged_json(before.decode(), draw)
        yield f"{name}:{number}", after


def place(folder: Path, name: str, content: bytes) -> Path:
    """The run with one file replaced."""
    directory = folder / "run"
    shutil.copytree(_sound(), directory)
    shards = folder / "shards"
    shutil.copytree(_sound().parent / "shards", shards)
    for shard in (shard for split in json.loads((shards / "manifest.json").read_text())["splits"].values() for shard in split):
        with (shards / shard["name"]).open("wb") as file:
            file.truncate(shard["bytes"])  # nothing here reads them
    (directory / name.partition(":")[0]).write_bytes(content)
    return directory


def use(path: Path) -> None:
    """List it, write its page, and read what the same command and `publish` read. All: a first refusal would hide the others."""
    from pipelines.commands import report, runs
    from simclr.errors import UserError

    troubles = []
    for read in (lambda: runs.main(runs.Args(path)), lambda: report.report(report.Args(path)), lambda: _go_on(path)):
        try:
            read()
        except UserError as error:
            troubles.append(error)
    if troubles:
        raise troubles[0]


def _go_on(path: Path) -> None:
    from pipelines.runs.directory import load_run
    from pipelines.train import driver

    run = load_run(path)
    run.timings()
    run.fill([{"step": 1}])
    driver.newest_tensors(run)
