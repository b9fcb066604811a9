"""`simclr curate`: features → which pictures to train on, with reasons: without near duplicates, diverse ones, without outliers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.evaluation import inputs
from pipelines.runs import sync
from pipelines.terminal import show
from simclr import files
from simclr.data.s3.uri import address
from simclr.errors import UserError


@dataclass(frozen=True)
class Args:
    """Choose pictures by their features, one way at a time. OUT gets list.txt, which `simclr pretrain --subset` and `simclr finetune
    --label-file` take, reasons.csv, and page.html with the pictures."""

    features: Annotated[Path, tyro.conf.Positional]
    """What `simclr embed` wrote: a directory or s3://bucket/prefix of Parquet parts, or a .parquet file."""
    near_duplicates: float | None = None
    """Cosine from which two pictures are near duplicates, as 0.95; what such pairs connect is one group. list.txt has one of each group,
    the largest picture or, of equal ones, the first, and all other pictures."""
    diverse: int | None = None
    """Number of pictures that cover the others best: each is the farthest from those chosen before. list.txt has them."""
    outliers: int | None = None
    """Number of pictures that are farthest from their --k nearest neighbours, by the mean cosine distance. list.txt has the others."""
    k: int = 10
    """Neighbours of --outliers."""
    split: str = "train"
    """The split whose images are chosen from; of prepared shards train and test."""
    seed: int = 0
    """Seed of the first picture of --diverse."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    out: Path | None = None
    """Directory to write to. Default: near-duplicates/, diverse/ or outliers/."""

    def __post_init__(self) -> None:
        ways = [name for name in ("near-duplicates", "diverse", "outliers") if getattr(self, name.replace("-", "_")) is not None]
        if len(ways) != 1:
            asked = f"--{' and --'.join(ways)}" if ways else "none"
            raise UserError(f"which pictures? give one of --near-duplicates 0.95, --diverse N and --outliers N; here {asked}")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise UserError(f"--near-duplicates is {self.near_duplicates}; expected a cosine above 0 and at most 1, as 0.95")
        for name in ("diverse", "outliers", "k"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} is {value}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed is {self.seed}; expected a whole number from 0 to 2^63 - 1")
        if self.out is not None and address(self.out) is not None:
            raise UserError(f"--out {sync.shown(self.out)} is in S3; expected a directory of this machine")


def main(args: Args) -> None:
    device = inputs.device_of(args.device)
    from pipelines.evaluation import curated
    from pipelines.evaluation.bank import Features

    out = args.out or Path("near-duplicates" if args.near_duplicates is not None else "diverse" if args.diverse is not None else "outliers")
    files.require_folder(out)
    features = Features(args.features, args.split)
    if args.near_duplicates is not None:
        found = curated.near_duplicates(features, args.near_duplicates, device)
    elif args.diverse is not None:
        found = curated.diverse(features, args.diverse, args.seed, device)
    else:
        assert args.outliers is not None
        found = curated.outliers(features, args.outliers, args.k, device)
    features.tell_zeros()
    curated.write(out, features, found)
    show(f"{out}: {found.told}")
