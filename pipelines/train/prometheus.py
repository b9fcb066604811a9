"""A training's numbers as Prometheus gauges, beside Ray's own at each node's metrics port; `cluster/grafana.json` draws them.

Ray's agent on every node collects them from the workers every ten seconds. They cost the step nothing; of the values set between two
collections only the last counts. A worker's series end with its process. The stragglers are also named.
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
"""Prefix of every gauge's name in Prometheus."""
OF_RANKS = {
    "speed/step_p50_s": ("simclr_step_p50_seconds", "Median step since the last report."),
    "speed/step_p95_s": ("simclr_step_p95_seconds", "95th percentile of the steps since the last report."),
    "speed/step_max_s": ("simclr_step_max_seconds", "Longest step since the last report."),
    "speed/own_s": ("simclr_step_own_seconds", "Median step without the wait for other ranks."),
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
    "eval/knn_top1": ("simclr_knn_top1_ratio", "kNN accuracy at the last online evaluation."),
    "eval/top1": ("simclr_top1_ratio", "Test accuracy of a classifier at the last online evaluation."),
}
"""Rank 0 exports these."""


class Gauges:
    """The gauges of this rank of the training in `run`. Every rank must make them, because the ranks exchange their host names."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        from simclr.collectives import every_ranks, rank

        self.rank, self.hosts = rank(), every_ranks(socket.gethostname())
        self.tags = {"run": run.rstrip("/").rpartition("/")[2], "rank": str(self.rank)}
        table = OF_RANKS | (OF_RUN if self.rank == 0 else {})
        self.gauges: dict[str, Any] = {metric: Gauge(name, text, tuple(self.tags)) for metric, (name, text) in table.items()}

    def show(self, report: Report) -> str:
        """Set the gauges. Returns ranks and hosts of stragglers, for people."""
        run_wide = {"step": float(report.step), "total_steps": float(report.total_steps), **report.metrics}
        values = {m: v for m, v in run_wide.items() if m not in OF_RANKS} | {m: each[self.rank] for m, each in report.ranks.items()}
        for metric, gauge in self.gauges.items():
            if metric in values:
                gauge.set(values[metric], self.tags)
        return ", ".join(f"rank {r} on {self.hosts[r]}" for r in report.stragglers)


def with_last_checkpoint(reports: Iterator[Report], folder: Path, saver: Saver | None) -> Iterator[Report]:
    """`reports`. A Diverged error, which every rank raises, gets the name of the last good checkpoint in `folder`.

    All ranks add what rank 0 found: the driver shows the first error that comes, and another node's disk has no checkpoints."""
    try:
        yield from reports
    except Diverged as error:
        from simclr import checkpoint
        from simclr.collectives import from_rank_zero

        with_it = ""
        if saver is not None:
            with contextlib.suppress(OSError):  # the disk may be full too
                saver.wait()
            # Weights are saved only at reports, and they were finite at each of these.
            found = checkpoint.list_checkpoints(folder)
            with_it = f"the last checkpoint, {found[-1].name}, is still good" if found else "there is no checkpoint yet"
        raise Diverged(f"{error}; {from_rank_zero(with_it)}") from None
