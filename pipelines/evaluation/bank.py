"""A table of features as searches and curation read it: unit rows in blocks on a device, and what is known of each row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.runs import sync
from pipelines.terminal import say
from simclr.data.feature_parts import open_features
from simclr.data.manifest import line_of
from simclr.errors import UserError
from simclr.evaluation.search import Bank

_ROWS, _BYTES = 1 << 14, 128 << 20  # of a block
_COLUMNS = ("id", "split", "path", "label", "width", "height")


class Features:
    """The features at a place, or those of one split. The small columns of all rows are in memory, the features are not."""

    def __init__(self, place: Path, split: str | None = None) -> None:
        """Raises UserError where there are no features, or none of that split."""
        self.place, self.parts = sync.shown(place), open_features(place)
        self.about, self.d = self.parts.about, self.parts.d
        self.columns: dict[str, list[Any]] = self.parts.table(_COLUMNS)
        self.rows = np.arange(len(self.parts))
        self.zeros = 0
        """Rows without a direction, once all have been read."""
        if not len(self.rows):
            raise UserError(f"{self.place} has no rows: none of its images could be embedded")
        if split is not None:
            self._select(split)

    def _select(self, split: str) -> None:
        found = np.flatnonzero(np.array(self.columns["split"]) == split)
        if not len(found):
            known = ", ".join(sorted(set(self.columns["split"])))
            raise UserError(f"{self.place} has no image of the {split} split, only of {known}; give --split {known.partition(',')[0]}")
        if others := len(self.rows) - len(found):
            say(f"{others:,} rows of other splits than {split} are left out")
            self.columns = {name: [values[row] for row in found.tolist()] for name, values in self.columns.items()}
        self.rows = found

    def __len__(self) -> int:
        return len(self.rows)

    def bank(self, device: torch.device) -> Bank:
        """The features on `device`."""
        most = max(min(_ROWS, _BYTES // (4 * self.d)), 1)

        def blocks() -> Iterator[tuple[int, Tensor]]:
            at = zeros = 0
            for first, dense in self.parts.blocks(most):
                end = int(np.searchsorted(self.rows, first + len(dense)))
                if end > at:
                    block = self._unit(dense[self.rows[at:end] - first], device)
                    zeros += int((block == 0).all(1).sum())
                    yield at, block
                at = end
            self.zeros = zeros

        return Bank(len(self), blocks, lambda some: self._unit(self.parts.take(self.rows[some]), device))

    @staticmethod
    def _unit(dense: NDArray[np.float32], device: torch.device) -> Tensor:
        return F.normalize(torch.from_numpy(dense).to(device), dim=1)

    def tell_zeros(self) -> None:
        """Say how many features have no direction."""
        if self.zeros:
            say(f"{self.zeros:,} features are all zeros: their cosine with every other is taken for 0")

    def named(self, word: str) -> int:
        """The row that a user names, by path or id. Raises UserError if there is none, or more than one."""
        by_path = [row for row, path in enumerate(self.columns["path"]) if path == word]
        if len(by_path) > 1:
            ids = ", ".join(str(self.columns["id"][row]) for row in by_path[:5])
            raise UserError(f"{len(by_path):,} rows of {self.place} have the path {word!r}; name one by its id: {ids}")
        by_id = [row for row, number in enumerate(self.columns["id"]) if str(number) == word]
        if not (found := by_path or by_id):
            raise UserError(
                f"{self.place} has no row with the path or id {word!r}; expected one as {self.columns['path'][0]!r} or "
                f"{self.columns['id'][0]}, or, with --encoder, a picture or a folder of pictures"
            )
        return found[0]

    def line(self, row: int) -> str:
        """The picture as `simclr pretrain --subset` and `finetune --label-file` read it: its name in the source, or, of shards that have
        no names, its sample id."""
        number, path = self.columns["id"][row], self.columns["path"][row]
        return str(number) if not path or path == f"{self.columns['split'][row]}/{number}" else line_of(path)

    def called(self, row: int) -> str:
        """The picture, for people."""
        return str(self.columns["path"][row] or self.columns["id"][row])
