"""CPUs and accelerators of the machines that the cluster files name. Data only.

The figures were written from memory and not looked up: see the vendor's page before you rely on one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """One row of the catalogue; a TPU's row is one chip."""

    cpus: int
    """vCPUs."""
    accelerators: int = 0
    """GPUs, or TPU chips."""
    accelerator: str = ""
    """Their type and memory, for people."""


MACHINES = {
    "m7i.xlarge": Machine(4),
    "m7i.2xlarge": Machine(8),
    "m7i.4xlarge": Machine(16),
    "g6.xlarge": Machine(4, 1, "L4 24 GB"),
    "g6.12xlarge": Machine(48, 4, "L4 24 GB"),
    "g6.48xlarge": Machine(192, 8, "L4 24 GB"),
    "p4d.24xlarge": Machine(96, 8, "A100 40 GB"),
    "p5.48xlarge": Machine(192, 8, "H100 80 GB"),
    "n2-standard-4": Machine(4),
    "n2-standard-8": Machine(8),
    "g2-standard-4": Machine(4, 1, "L4 24 GB"),
    "g2-standard-48": Machine(48, 4, "L4 24 GB"),
    "g2-standard-96": Machine(96, 8, "L4 24 GB"),
    "a3-highgpu-8g": Machine(208, 8, "H100 80 GB"),
    "v4": Machine(60, 1, "TPU v4 32 GB"),
    "v5litepod": Machine(28, 1, "TPU v5e 16 GB"),
    "v6e": Machine(45, 1, "TPU v6e 32 GB"),
}
# The unit of a TPU type's number (`v4-16` is 8 chips, `v6e-16` is 16), and the chips of one host of a slice.
TPU_COUNTS_PER_CHIP = {"v4": 2, "v5litepod": 1, "v6e": 1}
TPU_CHIPS_PER_HOST = 4
