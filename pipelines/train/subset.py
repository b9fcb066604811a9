"""`simclr pretrain --subset`: the only images that a run sees, from a list of their names or sample ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.runs import sync
from pipelines.runs.directory import Run
from simclr.config import Config
from simclr.data.manifest import Manifest, read_names
from simclr.data.s3 import uri as s3_uri
from simclr.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "subset.txt"
"""In the run's directory: the list as the run understood it, which an extension of the run reads again."""


@dataclass(frozen=True)
class Subset:
    """The only training images of a run."""

    ids: NDArray[np.int64]
    """Sample ids, ascending."""
    names: list[str] | None
    """Names of all training images; None if the shards have no names."""
    described: dict[str, Any]
    """The run's `subset` (see `Run`)."""


def names_at(data: Path, at: Path, examples: int) -> list[str] | None:
    """Names of the `examples` training images of the shards in `data`, which may be a copy of those `at` s3://…; None if they have none."""
    remote = s3_uri.address(at)
    if remote is not None:
        from simclr.data.s3.remote import fetch_names
        from simclr.data.s3.store import Store

        fetch_names(remote, data, "train", Store())
    return read_names(data, "train", examples)


def read(file: Path, data: Path, at: Path, manifest: Manifest, config: Config) -> Subset:
    """The images that `file` lists, of the shards of `names_at`.

    Raises UserError where a line fits no image, or more than one, and where the images are fewer than a batch.
    """
    from simclr.data import labels

    if config.train.shard_groups > 1:
        raise UserError(f"--subset and --train.shard-groups {config.train.shard_groups} do not go together; leave out one of them")
    examples = manifest.examples("train")
    names = names_at(data, at, examples)
    ids = labels.read_subset(file, examples, names)
    if config.train.batch_size > len(ids):
        raise UserError(
            f"batch_size {config.train.batch_size} is larger than the subset ({len(ids):,} images of {file}); "
            f"use --train.batch-size {len(ids)} or less, or a longer list"
        )
    return Subset(ids, names, {"from": sync.shown(file.absolute()), "images": len(ids), "sha256": labels.digest(ids)})


def write(run: Run, subset: Subset) -> None:
    """subset.txt of a run, for people, for its extensions and for other runs."""
    from simclr.data import labels

    notes = {"data": run.origin, "sha256 of the data's manifest": run.data_digest, **subset.described}
    labels.write(run.path / FILE, subset.ids, subset.names, notes)
