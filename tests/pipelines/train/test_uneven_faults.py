"""Workers that hold different numbers of images lose one of them: the others go on, with the numbers of an undisturbed training."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.commands import pretrain
from pipelines.train import ray_train
from tests.conftest import Figures, Within
from tests.pipelines.train.test_faults import Story, nodes, said, small
from tests.support import faults
from tests.support.nodes import Nodes

pytestmark = pytest.mark.cluster
__all__ = ["nodes", "said"]  # fixtures


def test_one_of_three_nodes_dies_and_neither_three_nor_two_workers_divide_the_batch(
    nodes: Nodes, patterns: Path, tmp_path: Path, said: list[tuple[float, str]], within: Within, figures: Figures
) -> None:
    """61 images: 20, 20 and 21 on three workers, then 30 and 31 on two."""
    config = replace(small(), train=replace(small().train, batch_size=61))
    story = Story(tmp_path / "run", said)
    faults.plan(tmp_path / "run-faults", step_s=0.5)
    nodes.add()
    resources = ray_train.Resources(workers=3, min_workers=2, address=nodes.address)
    assert resources.counts(config) == [2, 3]
    arguments = pretrain.Args(data=patterns, config=config, recipe="patterns_tiny", run=story.run, resources=resources)
    with ThreadPoolExecutor(1) as aside:  # Ray starts nodes from a main thread only
        training = aside.submit(lambda: (pretrain.pretrain(arguments), None)[1])
        story.at_step(6, training)
        died = time.time()
        nodes.kill(nodes.others[-1])
        training.result()
    assert [text for _, text in said if text.startswith("starting again")] == ["starting again with 2 workers, 3 before"]
    figures(
        "a node dies, 3 → 2 workers of 61 images",
        story.first_said("failed: ", died) - died,
        story.went_on(died) - died,
        story.repeated(died),
    )
    story.equals(faults.undisturbed(config, patterns), within)
