"""What a report says of a run, over all ranks in one collective, and when a run must stop: it is not finite, or it diverges.

In the step nothing is asked of the device. It keeps, per rank, the first step that was bad and which images were; their ids are
kept on the host until the next report looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr.collectives import means_and_rows, world_size
from simclr.data.manifest import read_manifest, read_names
from simclr.errors import Diverged
from simclr.telemetry.straggler import Stragglers
from simclr.telemetry.timing import Pace

NAMED = 8
"""Images that an error names at most."""
DIVERGED = 10.0
"""Times the loss at chance level, or of the first report where that was more. A loss that runs away grows from three to ten times in a few
steps, so waiting costs nothing; a spike that passes is not worth a run. (NT-Xent cannot get there: it is at most 2 / temperature above
chance level. What a rate too high makes of it is a collapse, which `simclr.telemetry.collapse` tells.)"""
_WEIGHTS, _LOSS = 0.75, 0.5  # added to the step of a rank whose projections were finite, but not these

_PER_RANK = ("speed/step_p50_s", "speed/step_p95_s", "speed/step_max_s", "speed/own_s", "speed/data_wait_pct", "speed/communication_pct")
_MEMORY = "memory/peak_gib"


class Health:
    """Sees every step of this rank; `report` tells of them and stops the run where it must."""

    def __init__(self, model: nn.Module, device: torch.device, images: int, data: Path, chance: float, advice: str) -> None:
        """`images` per step on this rank, of the training split in `data`; `chance`: loss at chance level, 0 = not known;
        `advice` ends the error's sentence."""
        self.model, self.device, self.data, self.chance, self.advice = model, device, data, chance, advice
        self.bad_at = torch.full((), math.inf, device=device, dtype=torch.float64)
        self.bad = torch.zeros(images, dtype=torch.bool, device=device)
        self.ids: dict[int, Tensor] = {}
        self.reference, self.above = 0.0, 0
        self.stragglers = Stragglers(world_size())

    def see(self, step: int, ids: Tensor, rows: Tensor, loss: Tensor) -> None:
        """Step `step` (1-based) of images `ids` (n,) gave `rows` (crops · n, …) and `loss`."""
        self.ids[step] = ids
        bad = rows.detach().flatten(1).isfinite().all(1).logical_not().view(-1, len(ids)).any(0)
        # A NaN among the keys is in every rank's loss: half a step later, so that whose it was comes first.
        at = torch.where(bad.any(), float(step), torch.where(loss.detach().isfinite(), math.inf, step + _LOSS)).double()
        self.bad = torch.where(self.bad_at.isinf() & bad.any(), bad, self.bad)
        self.bad_at = torch.minimum(self.bad_at, at)

    def report(self, step: int, values: dict[str, Tensor], pace: Pace) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
        """Means over ranks of `values`, and the metrics of every rank's `pace`; of some also each rank's, in order of ranks.

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
        # Nobody's inside is shorter than that of a rank for which nobody waits.
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
            # A gradient may overflow under a finite loss. A checkpoint of such weights would be no good.
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
            raise Diverged(f"{where}, though the projection of every image is; {self.advice}")
        ids = sorted(int(i) - 1 for r in whose for i in bad[r][2:] if i)[:NAMED]
        named = ", ".join(places(self.data, ids)) + (f" and {count - len(ids):,} more" if count > len(ids) else "")
        every = count == len(self.bad) * world_size()
        why = " (every image of the step: BatchNorm, or the weights, pass on what one image has)" if every and count > 1 else ""
        raise Diverged(f"{where}, of image{'s' if count > 1 else ''} {named}{why}; {self.advice}")

    def _require_bounded(self, step: int, loss: float) -> None:
        """A finite loss that is `DIVERGED` times what it should never exceed, in two reports on end. One may be a spike that passes."""
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
