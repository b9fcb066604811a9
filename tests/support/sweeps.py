"""Directories of sweeps that were never trained, with scores from a formula."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.runs.directory import Run
from tune import resolve
from tune.sweep_dir import Sweep, Trial


def a_sweep(path: Path, space: str, **fields: Any) -> Sweep:
    """The sweep of `simclr sweep SPACE --recipe patterns_tiny`."""
    given: dict[str, Any] = {
        "path": path,
        "space": space,
        "recipe": "patterns_tiny",
        "data": "/data/patterns",
        "only": {},
        "changes": {},
        "search": "grid",
        "scheduler": "none",
        "metric": "eval/knn_top1",
        "trials": None,
        "seeds": 1,
        "keep": 3,
        "resources": {"workers": 1, "cpus_per_worker": 1, "device": "auto", "address": None, "max_failures": 3},
        "max_concurrent": 0,
        "command": f"simclr sweep {space} --recipe patterns_tiny --data runs/patterns",
        "created": time.time(),
    }
    return Sweep(**(given | fields))


def trained(sweep: Sweep, score: Callable[[resolve.Point], float]) -> list[Trial]:
    """Write the sweep's directory as if each trial had finished with the probe accuracy `score`. Returns the trials."""
    sweep.save()
    space, found = sweep.restricted, []
    every = resolve.samples(space, 12, 0) if sweep.search == "random" else resolve.tried(space, sweep.search, sweep.trials, 0)
    for seed in range(sweep.seeds):
        for i, chosen in enumerate(every):
            point = resolve.point(space, sweep.base, chosen, seed)
            name, value = f"{i:03}-s{seed}", score(point)
            directory = sweep.path / "trials" / name
            shares = {f"eval/probe_top1_at_{s:g}": value * (0.6 + 0.2 * k) for k, s in enumerate(space.label_shares)}
            scores = {"eval/probe_top1": value, "eval/knn_top1": 0.9 * value, "health/rankme": 10 * value, "health/align_uniform": -value}
            trial = Trial(name=name, values=point.values, seed=point.seed, status="finished", step=9, total_steps=9, scores=scores | shares)
            Run(
                path=directory,
                recipe="patterns_tiny",
                config=point.config,
                data=Path("/data/patterns"),
                data_digest="0",
                command="simclr pretrain",
                created=0.0,
                environment={},
            ).save()
            trial.save(directory)
            found.append(trial)
    return found
