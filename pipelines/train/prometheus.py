"""A training's numbers as Prometheus gauges, beside Ray's own at each node's metrics port; `cluster/grafana.json` draws them.

Ray's agent, which every node runs anyway, collects them from the workers every ten seconds: they cost the step nothing, and what
is set between two collections is overwritten. A worker's series end with its process. Also who is slow, by name.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simclr.errors import Diverged

if TYPE_CHECKING:
    from pipelines.train.checkpoints import Saver
    from simclr.train import Report

PREFIX = "ray_"
"""Of every gauge's name, where Prometheus sees it."""
OF_RANKS = {
    "speed/step_p50_s": ("simclr_step_p50_seconds", "Median step since the last report."),
    "speed/step_p95_s": ("simclr_step_p95_seconds", "95th percentile of the steps since the last report."),
    "speed/step_max_s": ("simclr_step_max_seconds", "Longest step since the last report."),
    "speed/own_s": ("simclr_step_own_seconds", "Median step without what the rank waited for the others."),
    "speed/data_wait_pct": ("simclr_data_wait_percent", "Share of the time spent waiting for the rank's loader."),
    "speed/communication_pct": ("simclr_communication_percent", "Share of the time in collectives not hidden behind computing."),
    "memory/peak_gib": ("simclr_gpu_memory_peak_gibibytes", "Most GPU memory that tensors held at once."),
}
"""Metric → gauge and its description; each rank exports its own."""
OF_RUN = {
    "step": ("simclr_step", "Optimizer steps done."),
    "total_steps": ("simclr_total_steps", "Optimizer steps of the whole training."),
    "train/loss": ("simclr_loss", "Mean loss since the last report."),
    "train/lr": ("simclr_learning_rate", "Learning rate of the last step."),
    "speed/images_per_s": ("simclr_images_per_second", "Images, not views, over all ranks."),
    "speed/slowest_rank": ("simclr_slowest_rank", "Rank whose own time of a step is the longest."),
    "speed/straggle": ("simclr_straggle_ratio", "The slowest rank's own time over the median of ranks."),
    "speed/straggler_steps": ("simclr_straggler_steps", "For how many steps it has been slower than 1.2 times that."),
    "eval/knn_top1": ("simclr_knn_top1_ratio", "kNN accuracy at the last look."),
    "eval/top1": ("simclr_top1_ratio", "Test accuracy of a classifier at the last look."),
}
"""Rank 0 exports these."""


class Gauges:
    """The gauges of this rank of the training in `run`. To be made on every rank: they tell each other their hosts."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        from simclr.collectives import every_ranks, rank

        self.rank, self.hosts = rank(), every_ranks(socket.gethostname())
        self.tags = {"run": run.rstrip("/").rpartition("/")[2], "rank": str(self.rank)}
        table = OF_RANKS | (OF_RUN if self.rank == 0 else {})
        self.gauges: dict[str, Any] = {metric: Gauge(name, text, tuple(self.tags)) for metric, (name, text) in table.items()}

    def show(self, report: Report) -> str:
        """Set them. Returns ranks and hosts of stragglers, for people."""
        run_wide = {"step": float(report.step), "total_steps": float(report.total_steps), **report.metrics}
        values = {m: v for m, v in run_wide.items() if m not in OF_RANKS} | {m: each[self.rank] for m, each in report.ranks.items()}
        for metric, gauge in self.gauges.items():
            if metric in values:
                gauge.set(values[metric], self.tags)
        return ", ".join(f"rank {r} on {self.hosts[r]}" for r in report.stragglers)


def with_last_checkpoint(reports: Iterator[Report], folder: Path, saver: Saver | None) -> Iterator[Report]:
    """`reports`; a Diverged among them, which every rank has, says which checkpoint in `folder` one could go on from.

    All ranks say the same, what rank 0 found: whoever is first is heard, and on another node's disk there are none."""
    try:
        yield from reports
    except Diverged as error:
        from simclr import checkpoint
        from simclr.collectives import from_rank_zero

        with_it = ""
        if saver is not None:
            with contextlib.suppress(OSError):  # a disk that is full as well
                saver.wait()
            # The weights were finite at every report, and only there are they saved.
            found = checkpoint.list_checkpoints(folder)
            with_it = f"the last checkpoint, {found[-1].name}, is still good" if found else "there is no checkpoint yet"
        raise Diverged(f"{error}; {from_rank_zero(with_it)}") from None
