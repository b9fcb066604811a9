"""The metrics of a report, over all ranks in one collective, and the guards that stop a run that is not finite or diverges.

No step waits for the device. It keeps, per rank, the first bad step and its bad images; the host keeps their ids until the next report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr.collectives import means_and_rows, rank, world_size
from simclr.data.manifest import read_manifest, read_names
from simclr.errors import Diverged
from simclr.shares import shares
from simclr.telemetry.straggler import Stragglers
from simclr.telemetry.timing import Pace

NAMED = 8
"""The most images that an error names."""
DIVERGED = 10.0
"""A loss diverges at this many times the chance-level loss, or the first report's loss if that was higher. A diverging loss grows from
three to ten times in a few steps, so waiting costs nothing; a passing spike must not end a run. (NT-Xent cannot get there: it is at most
2 / temperature above chance level. A rate that is too high makes it collapse, which `simclr.telemetry.collapse` detects.)"""
_WEIGHTS, _LOSS = 0.75, 0.5  # added to the bad step if the projections were finite, but not the weights or the loss

_PER_RANK = ("speed/step_p50_s", "speed/step_p95_s", "speed/step_max_s", "speed/own_s", "speed/data_wait_pct", "speed/communication_pct")
_MEMORY = "memory/peak_gib"


class Health:
    """Checks every step of this rank; `report` gives the metrics, or stops the run."""

    def __init__(self, model: nn.Module, device: torch.device, images: int, data: Path, chance: float, advice: str) -> None:
        """`images` per step on all ranks, of the training split in `data`; `chance`: the chance-level loss, 0 = not known; `advice` ends
        the error's sentence."""
        self.model, self.device, self.data, self.chance, self.advice = model, device, data, chance, advice
        self.bad_at = torch.full((), math.inf, device=device, dtype=torch.float64)
        self.images = images
        self.bad = torch.zeros(shares(images, world_size())[rank()], dtype=torch.bool, device=device)
        self.ids: dict[int, Tensor] = {}
        self.reference, self.above = 0.0, 0
        self.stragglers = Stragglers(world_size(), images)

    def see(self, step: int, ids: Tensor, rows: Tensor, loss: Tensor) -> None:
        """Step `step` (1-based) of images `ids` (n,) gave `rows` (crops · n, …) and `loss`, the whole objective."""
        self.ids[step] = ids
        bad = rows.detach().flatten(1).isfinite().all(1).logical_not().view(-1, len(ids)).any(0)
        # A NaN among the keys reaches every rank's loss. It counts half a step later, so that the rank of the bad image comes first.
        at = torch.where(bad.any(), float(step), torch.where(loss.detach().isfinite(), math.inf, step + _LOSS)).double()
        self.bad = torch.where(self.bad_at.isinf() & bad.any(), bad, self.bad)
        self.bad_at = torch.minimum(self.bad_at, at)

    def report(self, step: int, values: dict[str, Tensor], pace: Pace) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
        """Means over ranks of `values` and metrics of the ranks' `pace`; and each rank's value of some metrics, in rank order.

        Raises Diverged, the same on every rank, where a step since the last report or the weights are not finite,
        or where values["train/loss"] says that the run diverges.
        """
        mine = [pace.p50_s, pace.p95_s, pace.max_s, pace.outside_s, pace.data_wait_pct, pace.communication_pct]
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        row = [*self._bad_row(step), *mine, pace.inside_s, peak]
        means, rows = means_and_rows(torch.stack([v.double() for v in values.values()]), row)
        found = dict(zip(values, means, strict=True))
        self._require_finite([r[: 2 + NAMED] for r in rows])
        self._require_bounded(step, found["train/loss"])
        self.ids.clear()
        columns = [list(column) for column in zip(*(r[2 + NAMED :] for r in rows), strict=True)]
        # Waits inside are unknown. A rank that waits for no other has the shortest inside time, so that one counts for all.
        columns[3] = [outside + min(columns[6]) for outside in columns[3]]
        ranks = {name: tuple(column) for name, column in zip(_PER_RANK, columns, strict=False)}
        if self.device.type == "cuda":
            ranks[_MEMORY] = tuple(columns[7])
        found |= {name: max(ranks[name]) for name in ("speed/step_p50_s", _MEMORY) if name in ranks}
        if world_size() > 1:
            found["speed/communication_pct"] = sum(ranks["speed/communication_pct"]) / world_size()
            found |= self.stragglers.see(ranks["speed/own_s"], pace.steps)
        return found, ranks

    def _bad_row(self, step: int) -> list[float]:
        """First bad step of this rank (0 = none), how many images were bad, and 1 + the ids of the first of them, filled up with 0."""
        at = float(self.bad_at)
        if math.isinf(at):
            # A gradient may overflow under a finite loss. A checkpoint of such weights would be useless.
            norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
            at = 0.0 if bool(torch.stack([n.double() for n in norms]).isfinite().all()) else step + _WEIGHTS
        ids: list[int] = self.ids[int(at)][self.bad.cpu()].tolist() if at and at == int(at) else []
        return [at, float(len(ids)), *(1.0 + i for i in ids[:NAMED]), *[0.0] * (NAMED - len(ids[:NAMED]))]

    def _require_finite(self, rows: list[list[float]]) -> None:
        bad = {r: row for r, row in enumerate(rows) if row[0] > 0}
        if not bad:
            return
        first = min(row[0] for row in bad.values())
        whose = [r for r, row in bad.items() if row[0] == first]
        if first == int(first) + _WEIGHTS:
            raise Diverged(f"the weights are not finite after step {int(first)}, whose loss was finite; {self.advice}")
        where = f"the loss is not finite at step {int(first)} on rank {', '.join(map(str, whose))}"
        count = int(sum(bad[r][1] for r in whose))
        if not count:
            raise Diverged(f"{where}, though all projections are finite; {self.advice}")
        ids = sorted(int(i) - 1 for r in whose for i in bad[r][2:] if i)[:NAMED]
        named = ", ".join(places(self.data, ids)) + (f" and {count - len(ids):,} more" if count > len(ids) else "")
        every = count == self.images
        why = " (every image of the step: BatchNorm or the weights spread the fault of one image)" if every and count > 1 else ""
        raise Diverged(f"{where}, of image{'s' if count > 1 else ''} {named}{why}; {self.advice}")

    def _require_bounded(self, step: int, loss: float) -> None:
        """Raise Diverged for a finite loss of more than `DIVERGED` times the reference in two reports in a row. A single one may be a
        passing spike."""
        self.reference = self.reference or max(self.chance, loss)
        self.above = self.above + 1 if loss > DIVERGED * self.reference > 0 else 0
        if self.above > 1:
            what = f"{'chance level is' if self.reference == self.chance else 'it began at'} {self.reference:.4g}"
            raise Diverged(f"the loss diverges: it is {loss:.4g} at step {step}, where {what}; {self.advice}")


def places(data: Path, ids: Iterable[int]) -> list[str]:
    """Where the training images `ids` of the shards in `data` come from: "17 (cats/17.jpg)", the name in their source, or, where no
    names were kept, "17 (sample 5 of train-00001.beton)"."""
    shards = read_manifest(data, look=False).splits["train"]
    names = read_names(data, "train", sum(shard.samples for shard in shards))
    found = []
    for i in ids:
        if names is not None:
            found.append(f"{i} ({names[i]})")
            continue
        at = i
        for shard in shards:
            if at < shard.samples:
                found.append(f"{i} (sample {at} of {shard.name})")
                break
            at -= shard.samples
    return found
