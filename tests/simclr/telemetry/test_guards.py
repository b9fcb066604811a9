"""When a run stops: the error names step, ranks and images with their source; no other state stops a run."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pipelines.train.prometheus import with_last_checkpoint
from simclr import checkpoint
from simclr.collectives import rank, world_size
from simclr.errors import Diverged
from simclr.telemetry.guards import Health, places
from simclr.telemetry.timing import Pace
from simclr.train import Report
from tests.support.ranks import Ranks

_PACE = Pace(1, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


def health(data: Path, images: int = 4, chance: float = 1.0) -> Health:
    return Health(torch.nn.Linear(2, 2), torch.device("cpu"), images, data, chance, "advice")


def told(seen: Health, step: int, loss: float = 1.0) -> str:
    """The message that a report after `step` raises, "" for none."""
    try:
        seen.report(step, {"train/loss": torch.tensor(loss)}, _PACE)
    except Diverged as error:
        return str(error)
    return ""


def rows(images: int, *bad: int) -> Tensor:
    """(2 · images, 3): projections of two views, of which rows `bad` are not finite."""
    z = torch.zeros(2 * images, 3)
    z[list(bad), 1] = math.nan
    return z


def spoilt(data: str, bad: list[dict[int, tuple[int, ...]]], images: int) -> str:
    """Five steps of `images` a rank, with ids 100 · step + 10 · rank + position; `bad`: of each rank, step → rows."""
    seen = health(Path(data), images * world_size())
    for step in range(1, 6):
        mine = bad[rank()].get(step, ())
        loss = torch.tensor(math.nan if any(step in steps for steps in bad) else 1.0)
        seen.see(step, torch.arange(images) + 10 * rank() + 20 * (step - 1), rows(images, *mine), loss)
    return told(seen, 5)


def test_the_first_bad_step_names_its_images_on_every_rank(ranks: Ranks, patterns: Path) -> None:
    """Step 2 is the first bad one: view 1 of rank 0's image 2, both views of rank 1's image 0 and view 0 of its image 3. Later steps do
    not count."""
    texts = ranks(2, spoilt, str(patterns), [{2: (6,), 3: (0, 1)}, {2: (0, 3, 4), 4: (1,)}], 4)
    shard = "of train-00000.beton"
    places = f"22 (sample 22 {shard}), 30 (sample 30 {shard}), 33 (sample 33 {shard})"
    assert texts == [f"the loss is not finite at step 2 on rank 0, 1, of images {places}; advice"] * 2
    texts = ranks(2, spoilt, str(patterns), [{}, {4: (1,)}], 4)  # rank 0's loss is NaN too
    assert texts == [f"the loss is not finite at step 4 on rank 1, of image 71 (sample 71 {shard}); advice"] * 2
    (text, _) = ranks(2, spoilt, str(patterns), [{1: tuple(range(6))}, {1: (9,)}], 10)
    assert text.startswith("the loss is not finite at step 1 on rank 0, 1, of images 0 (sample 0 of") and ", 19 (" in text
    (text, _) = ranks(2, spoilt, str(patterns), [{1: tuple(range(10))}, {1: (9, 8)}], 10)
    assert text.count("sample") == 8 and " and 4 more; advice" in text
    (text, _) = ranks(2, spoilt, str(patterns), [{1: tuple(range(10))}, {1: tuple(range(10, 20))}], 10)
    assert " and 12 more (every image of the step: BatchNorm or the weights spread the fault of one image); advice" in text


def test_a_loss_that_is_not_finite_without_an_image_to_blame_says_so(patterns: Path) -> None:
    seen = health(patterns)
    seen.see(1, torch.arange(4), rows(4), torch.tensor(math.inf))
    seen.see(2, torch.arange(4), rows(4, 0), torch.tensor(math.nan))  # came of it
    assert told(seen, 2) == "the loss is not finite at step 1 on rank 0, though all projections are finite; advice"


def test_weights_that_are_not_finite_end_the_run_before_a_checkpoint_has_them(patterns: Path) -> None:
    seen = health(patterns)
    seen.see(1, torch.arange(4), rows(4), torch.tensor(1.0))
    assert told(seen, 1) == ""
    with torch.no_grad():
        next(seen.model.parameters())[0, 0] = math.inf
    seen.see(2, torch.arange(4), rows(4), torch.tensor(1.0))
    assert told(seen, 2) == "the weights are not finite after step 2, whose loss was finite; advice"


def test_a_loss_that_diverges_ends_the_run_and_a_spike_does_not(patterns: Path) -> None:
    seen = health(patterns, chance=2.0)
    assert [told(seen, step, loss) for step, loss in enumerate((1.0, 19.0, 1000.0, 3.0, 21.0), 1)] == [""] * 5
    assert told(seen, 6, 22.0) == "the loss diverges: it is 22 at step 6, where chance level is 2; advice"
    seen = health(patterns, chance=0.0)  # for a loss of unknown scale, the first report is the reference
    assert [told(seen, step, loss) for step, loss in enumerate((50.0, 499.0, 501.0), 1)] == [""] * 3
    assert told(seen, 4, 600.0) == "the loss diverges: it is 600 at step 4, where it began at 50; advice"


def test_an_image_is_named_as_in_its_source(photographs: Path, patterns: Path) -> None:
    assert places(photographs, [0, 239]) == ["0 (000.jpg)", "239 (239.jpg)"]
    assert places(patterns, [7]) == ["7 (sample 7 of train-00000.beton)"]


def ends(folder: str) -> list[str]:
    """This rank's error in a training whose checkpoints rank 0 has in `folder`, before the first checkpoint and after."""
    said = []

    def broken() -> Iterator[Report]:
        yield cast(Report, "a report")
        raise Diverged("the loss is not finite at step 9")

    def full() -> None:
        raise OSError(errno.ENOSPC, "no space left")

    saver: Any = SimpleNamespace(wait=full) if rank() == 0 else None
    for step in (4, 8):
        stream = with_last_checkpoint(broken(), Path(folder) / str(rank()), saver)
        assert cast(str, next(stream)) == "a report"
        with pytest.raises(Diverged) as caught:
            next(stream)
        said.append(str(caught.value))
        checkpoint.write(Path(folder) / str(rank()), checkpoint.State(step + rank(), {}, {"w": torch.zeros(1)}), 1)
    return said


def test_the_error_says_which_checkpoint_is_good(ranks: Ranks, tmp_path: Path) -> None:
    """Every rank names the checkpoint of rank 0, because the driver shows the error that comes first."""
    expected = [
        "the loss is not finite at step 9; there is no checkpoint yet",
        "the loss is not finite at step 9; the last checkpoint, step-000000004, is still good",
    ]
    assert ranks(2, ends, str(tmp_path)) == [expected] * 2
