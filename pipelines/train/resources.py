"""Where the workers of a training run, and how many there may be. Knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.train import retry, tpu
from simclr import sense
from simclr.config import Config
from simclr.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Where the workers run."""

    workers: int = 2
    """Ray Train workers, one process each; with GPUs, one GPU each."""
    cpus_per_worker: int = 1
    """CPU cores of each worker: torch threads on a CPU, loader threads beside a GPU."""
    device: str = "auto"
    """auto (GPUs if the cluster has one for each worker), cpu, cuda, or tpu (which was never run on a TPU)."""
    topology: str | None = None
    """Chips of the TPU slice in each direction, as 4x4; one worker drives each."""
    accelerator_type: str | None = None
    """The TPU's kind, as TPU-V5LITEPOD."""
    address: str | None = None
    """Ray cluster to join: 'auto' on a cluster's node; nothing = a private Ray on this machine."""
    max_failures: int = 3
    """How many failures in a row, without a new checkpoint between them, are retried from the last checkpoint. Nodes with a preemption
    notice do not count."""
    min_workers: int | None = None
    """Go on with as few workers as this while nodes are missing, and with more when they are back; nothing = always --workers.
    The batch size stays the same; the workers need not divide it."""
    hang_timeout_s: float = 300.0
    """Seconds without progress after which the blocking rank is ended, and training goes on from the last checkpoint; at least five
    times the longest step. Twice as long for imports, an evaluation and a checkpoint, six times for the first batches, which compile."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers is {self.workers}; expected at least 1")
        if self.cpus_per_worker < 1:
            raise UserError(f"--cpus-per-worker is {self.cpus_per_worker}; expected at least 1")
        if self.device not in ("auto", "cpu", "cuda", "tpu"):
            raise UserError(f"--device is {self.device!r}; expected auto, cpu, cuda or tpu")
        if self.device == "tpu":
            tpu.check(self.workers, self.topology, self.accelerator_type)
            if self.min_workers is not None:
                raise UserError("--min-workers goes with single nodes that come and go; a TPU slice is used whole: leave it out")
        elif self.topology or self.accelerator_type:
            raise UserError("--topology and --accelerator-type are a TPU slice's; say --device tpu, or leave them out")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.workers:
            raise UserError(f"--min-workers is {self.min_workers}; expected 1 to --workers {self.workers}, or nothing")
        if self.hang_timeout_s <= 0:
            raise UserError(f"--hang-timeout-s is {self.hang_timeout_s}; expected a positive number of seconds")

    def counts(self, config: Config) -> list[int]:
        """Numbers of workers, ascending, that `config` may be trained with: from --min-workers to --workers, all that its groups allow.
        Raises UserError if --workers or --min-workers is not among them."""
        over = sense.statistics_over(config, self.workers)
        if self.device == "tpu" and 1 < over < self.workers:
            raise UserError(f"encoder.batchnorm is {over}; on TPUs expected global or per_worker")
        config.images_per_rank(self.workers)
        config.groups_of(0, self.workers)
        if self.device == "tpu":
            tpu.require_equal(config.train.batch_size, self.workers)
        least = self.min_workers or self.workers
        fits = [count for count in range(1, self.workers + 1) if retry.shares(config, count)]
        if least not in fits:
            near = sorted(sorted(fits, key=lambda count: abs(count - least))[:2])
            raise UserError(
                f"--min-workers is {least}, and so few workers cannot have the groups that the config asks for; "
                f"use {' or '.join(map(str, near))}, or leave it out"
            )
        return [count for count in fits if count >= least]
