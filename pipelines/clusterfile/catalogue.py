"""Machines that the cluster files name: what is in them and what an hour of them costs. Data only."""

from __future__ import annotations

from dataclasses import dataclass

AS_OF = "July 2025"
SOURCE = (
    "approximately list prices, on demand, written down from memory and not looked up: see the vendor's page;"
    " us-east-1 on AWS, us-central1 on Google Cloud (TPU v4: us-central2, v6e: us-east5); without disks and traffic, and spot costs less"
)


@dataclass(frozen=True, slots=True)
class Machine:
    """One row of the catalogue; a TPU's row is one chip."""

    usd_per_h: float
    """US dollars for an hour, as SOURCE says."""
    cpus: int
    """vCPUs."""
    accelerators: int = 0
    """GPUs, or TPU chips."""
    accelerator: str = ""
    """What they are, for people."""


# AWS after the price cut of June 2025 (p4d and p5).
MACHINES = {
    "m7i.xlarge": Machine(0.2016, 4),
    "m7i.2xlarge": Machine(0.4032, 8),
    "m7i.4xlarge": Machine(0.8064, 16),
    "g6.xlarge": Machine(0.8048, 4, 1, "L4 24 GB"),
    "g6.12xlarge": Machine(4.6016, 48, 4, "L4 24 GB"),
    "g6.48xlarge": Machine(13.3504, 192, 8, "L4 24 GB"),
    "p4d.24xlarge": Machine(21.96, 96, 8, "A100 40 GB"),
    "p5.48xlarge": Machine(55.04, 192, 8, "H100 80 GB"),
    "n2-standard-4": Machine(0.1942, 4),
    "n2-standard-8": Machine(0.3885, 8),
    "g2-standard-4": Machine(0.71, 4, 1, "L4 24 GB"),
    "g2-standard-48": Machine(4.00, 48, 4, "L4 24 GB"),
    "g2-standard-96": Machine(8.00, 96, 8, "L4 24 GB"),
    "a3-highgpu-8g": Machine(88.25, 208, 8, "H100 80 GB"),
    "v4": Machine(3.22, 60, 1, "TPU v4 32 GB"),
    "v5litepod": Machine(1.20, 28, 1, "TPU v5e 16 GB"),
    "v6e": Machine(2.70, 45, 1, "TPU v6e 32 GB"),
}
# What a TPU type's number counts (`v4-16` is 8 chips, `v6e-16` is 16), and the chips of one host of a slice.
TPU_COUNTS_PER_CHIP = {"v4": 2, "v5litepod": 1, "v6e": 1}
TPU_CHIPS_PER_HOST = 4
