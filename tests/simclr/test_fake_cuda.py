"""The branches that only CUDA takes, on a fake device (`tests.support.fake_cuda`): shapes, dtypes, devices, and waits of the host.

The same promise on a GPU, if there is one: `test_between_two_reports_nothing_blocks_the_device`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from simclr import precision
from simclr.config import Config, Views
from simclr.data import loader, memory
from simclr.data.manifest import read_manifest
from simclr.evaluation import features
from simclr.loss import nt_xent
from simclr.methods.classifier import build_classifier
from simclr.methods.simclr import simclr
from simclr.telemetry.guards import Health
from simclr.telemetry.timing import Clock
from simclr.train import Start, train
from simclr.views import draw
from simclr.views.preprocessing import Preprocessing
from simclr.views.two_views import crop_and_flip, two_views
from tests.support.fake_cuda import CUDA, fake_cuda, stand_in_kernels
from tests.support.small import TINY, TUNED

# ── Views ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("operations", [None, ("crop", "cutout", "colour", "sobel", "noise", "blur", "rotate")])
@pytest.mark.parametrize("whole", [True, False])
def test_views_are_drawn_on_the_host_and_made_on_the_device(monkeypatch: pytest.MonkeyPatch, operations: Any, whole: bool) -> None:
    views = Views(size_px=16, operations=operations, mean=(0.4, 0.5, 0.3), std=(0.5, 0.6, 0.7))
    ids, launched = torch.arange(6), stand_in_kernels(monkeypatch)
    with fake_cuda(monkeypatch) as watched:
        images = torch.empty((6, 20, 18, 3) if whole else (6, 2, 16, 16, 3), dtype=torch.uint8, device=CUDA)
        seen = two_views(images, ids, 3, views, 7, CUDA)
        one = crop_and_flip(images, ids, 3, views, 7, CUDA)
    assert seen.device == one.device == CUDA and seen.dtype == one.dtype == torch.float32
    assert seen.shape == (12, 3, 16, 16) and one.shape == (6, 3, 16, 16)
    assert watched.copies >= 2 and watched.waits == []
    assert [one.name for one in launched] == ([] if operations else ["means_kernel", "colours_kernel", "blur_kernel"])
    for one in launched:  # one program per view; runs of 1,024 pixels and squares of 32 hold the whole view here
        assert one.grid == (12,) and one.settings["SIZE"] == 16


@pytest.mark.parametrize("some", [slice(0, 24), slice(8, 16)], ids=["all", "some"])
def test_the_network_gets_views_as_the_kernels_wrote_them(monkeypatch: pytest.MonkeyPatch, patterns: Path, some: slice) -> None:
    """In bfloat16, from crops and parameters that are on the device already: nothing is drawn, copied or converted in the step."""
    launched = stand_in_kernels(monkeypatch)
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision="bfloat16"))
    with fake_cuda(monkeypatch) as watched:
        method = simclr(config, Start(patterns, CUDA))
        stream = loader.on_device(loader.batches(config, patterns, 0, 0, 1), CUDA)
        batch = next(stream)
        monkeypatch.setattr(draw, "draw_colours", None)
        watched.waits.clear()  # the weights' copies
        copies = watched.copies
        views = method.inputs(batch, some)["views"]
        assert watched.copies == copies and watched.waits == []
        stream.close()
    n = some.stop - some.start
    assert views.dtype == torch.bfloat16 and views.shape == (2, n, 3, 32, 32)
    assert views[0].is_contiguous(memory_format=torch.channels_last)
    assert [(one.grid, one.settings["SIZE"]) for one in launched] == [((2 * n,), 32)] * 3
    _, block, _, unblurred, out = launched[1].arguments[:5]
    assert block.shape == (2, n, 17) and unblurred.dtype == torch.float16 and out.dtype == torch.bfloat16
    assert launched[1].settings["BYTES"] is False, "whole images were cropped before, to float32"


def test_the_stand_in_sees_every_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three docstrings promised no wait, and a list of numbers broke it: each of these would stop a GPU's queue."""
    with fake_cuda(monkeypatch) as watched:
        x = torch.ones(3, device=CUDA)
        x.new_tensor([1.0, 2.0])
        torch.tensor([1.0], device=CUDA)
        torch.zeros(2).to(CUDA, non_blocking=True)
        x.sum().item()
        x.cpu()
        assert watched.waits == [
            *["a blocking copy to the device"] * 2,
            "a copy from memory that is not page-locked",
            "aten._local_scalar_dense.default",
            "a copy to the host",
        ]
        torch.zeros(2).pin_memory().to(CUDA, non_blocking=True)
        assert len(watched.waits) == 5


# ── Loss ───────────────────────────────────────────────────────────────────────────────────────────────────────────


ONE_GRADIENT = ["weighted_kernel", "gradient_kernel"]


@pytest.mark.parametrize(
    ("dtype", "d", "tiled"),
    [(torch.float32, 128, True), (torch.float32, 300, False), (torch.bfloat16, 512, True), (torch.bfloat16, 768, False)],
)
def test_on_cuda_the_loss_takes_tiles_or_blocks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, d: int, tiled: bool) -> None:
    launched = stand_in_kernels(monkeypatch)
    with fake_cuda(monkeypatch) as watched:
        z = torch.empty(96, d, dtype=dtype, device=CUDA).requires_grad_()
        loss = nt_xent(z, 0.1)
        (gradient,) = torch.autograd.grad(loss, z)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype and gradient.shape == z.shape and gradient.device == CUDA
    assert watched.waits == []
    assert [one.name for one in launched] == (["sums_kernel", "losses_kernel", *ONE_GRADIENT] if tiled else [])
    for one in launched:
        assert all(x.is_contiguous() and x.device == CUDA for x in one.arguments if isinstance(x, torch.Tensor))
        rows, settings = one.arguments[0], one.settings
        assert rows is one.arguments[1] and settings.get("BY_OUTER", True) and settings.get("BY_INNER", True), "one rank: keys are queries"
        two = dtype == torch.float32  # planes of float16
        assert (rows.dtype, rows.shape) == ((torch.float16, (2, 96, d)) if two else (dtype, (96, d))) and settings["PARTS"] == 1 + two
        assert settings["D"] == d <= settings["WIDE"] and settings["FIXED"]
    if tiled:
        sums, losses, weighted, last = launched
        assert sums.arguments[2].shape == (1, sums.grid[1], 96) and sums.grid[0] == -(-96 // sums.settings["OUTER"])
        assert weighted.arguments[3].shape == (weighted.grid[1], 96, d) and weighted.grid[0] == -(-96 // weighted.settings["OUTER"])
        assert losses.grid == last.grid == (-(-96 // (2048 // last.settings["WIDE"])),) and last.arguments[5].dtype == dtype


def test_a_queue_and_other_ranks_keys_have_a_gradient_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """96 rows, and 104 more in the queue; rows as long as a tile are loaded without masks."""
    launched = stand_in_kernels(monkeypatch)
    with fake_cuda(monkeypatch) as watched:
        z = torch.empty(96, 128, dtype=torch.bfloat16, device=CUDA).requires_grad_()
        (gradient,) = torch.autograd.grad(nt_xent(z, 0.02, torch.empty(104, 128, device=CUDA)), z)
    assert gradient.shape == z.shape and watched.waits == []
    assert [one.name for one in launched] == ["sums_kernel", "losses_kernel", *ONE_GRADIENT, *ONE_GRADIENT]
    assert not any(one.settings["FIXED"] for one in launched)
    sums, _, *gradients = launched
    assert sums.grid == (1, 4) and sums.settings["WHOLE"] and sums.arguments[2].shape == (2, 4, 96)
    assert [(one.settings["BY_OUTER"], one.settings["BY_INNER"]) for one in gradients] == [(True, False)] * 2 + [(False, True)] * 2
    assert [one.grid for one in gradients] == [(2, 2), (6,), (4, 1), (13,)]
    assert [one.settings["WHOLE"] for one in gradients[::2]] == [True, False], "queries are fewer than a tile's rows"
    assert [tuple(one.arguments[3].shape) for one in gradients[::2]] == [(2, 96, 128), (1, 200, 128)]


# ── Loader ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batches_travel_one_ahead_and_the_last_copy_is_waited_for(monkeypatch: pytest.MonkeyPatch, patterns: Path) -> None:
    with fake_cuda(monkeypatch) as watched:
        streams: list[Any] = []
        made = torch.cuda.Stream
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(made(device)) or streams[-1])
        stream = loader.on_device(loader.batches(TINY, patterns, 0, 0, 1), CUDA)
        found = list(itertools.islice(stream, 3))
        assert not streams[0].synchronized and watched.copies == 8  # crops and their parameters; one batch more is on its way
        stream.close()
    assert [batch.step for batch in found] == [0, 1, 2] and streams[0].synchronized and watched.waits == []
    assert all(batch.images[0].device == CUDA and batch.ids.device.type == batch.labels.device.type == "cpu" for batch in found)
    assert len(torch.cuda.current_stream().waited) == 3


@pytest.mark.parametrize(
    ("images", "size_px", "count", "mib"),
    [(512, 224, 3, 512), (4096, 224, 3, 4096), (256, 224, 3, 256), (512, 32, 5, 16), (512, np.uint16(32), 5, 16)],
)
def test_slots_share_one_page_locked_block(monkeypatch: pytest.MonkeyPatch, images: int, size_px: Any, count: int, mib: int) -> None:
    """Also where a side is a uint16, as FFCV gives it for raw images: the products of such sides overflow."""
    asked: list[tuple[int, ...]] = []
    empty = torch.empty

    def pinned(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        asked.append(shape)
        return empty(shape, dtype=dtype)  # untouched, so it takes no memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", pinned)
    queries = (SimpleNamespace(shape=(2, size_px, size_px, 3), dtype=np.dtype("u1")), SimpleNamespace(shape=(), dtype=np.dtype("i4")))
    slots = memory.slots_for(queries, images)
    assert asked == [(count, images, 2, size_px, size_px, 3)] and len(slots) == count
    assert 2 ** math.ceil(math.log2(math.prod(asked[0]))) == mib * 2**20  # the size that torch's allocator makes of it
    assert all(pixels.base is slots[0][0].base and status.dtype == np.int32 for pixels, status in slots)


# ── Clock, health, evaluation ──────────────────────────────────────────────────────────────────────────────────────


def test_timestamps_are_events_and_the_report_alone_reads(monkeypatch: pytest.MonkeyPatch, patterns: Path) -> None:
    with fake_cuda(monkeypatch) as watched:
        model = nn.Linear(4, 4).to(CUDA)
        health, clock = Health(model, CUDA, 4, patterns, 5.0, "advice"), Clock(0, CUDA)
        watched.waits.clear()  # the weights' copy
        for step in (1, 2, 3):
            clock.leaves()
            health.see(step, torch.arange(4), torch.randn(8, 4, device=CUDA), torch.ones((), device=CUDA))
            clock.step_over()
        assert watched.waits == []
        pace = clock.pace()
        assert pace.steps == 3 and pace.p50_s == 1e-3 and pace.outside_s == 1e-3


def test_features_are_embedded_on_the_device(monkeypatch: pytest.MonkeyPatch, patterns: Path) -> None:
    with fake_cuda(monkeypatch) as watched:
        encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 30 * 30, 7)).to(CUDA)
        found = features.embed_split(encoder, patterns, "test", Preprocessing.of(TINY.views), None, CUDA, batch_size=32)
    assert found.h.shape == (60, 7) and found.h.device == found.y.device == CUDA and found.h.dtype == torch.float32
    # Labels and ids go once, at the end.
    assert set(watched.waits) <= {"a blocking copy to the device"}


@pytest.mark.parametrize("side", [20, 40, 90])
def test_pictures_become_the_encoders_input_without_waiting(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    with fake_cuda(monkeypatch) as watched:
        found = Preprocessing.of(Views(size_px=32)).resized(torch.zeros(3, side, side + 10, 3, dtype=torch.uint8, device=CUDA))
    assert found.shape == (3, 3, 32, 32) and found.device == CUDA and found.dtype == torch.float32
    assert watched.waits == []


# ── The loops ──────────────────────────────────────────────────────────────────────────────────────────────────────


def loops(changes: dict[str, Any], optimizer: Any, memory_rows: int) -> Config:
    settings = dataclasses.replace(TINY, loss=dataclasses.replace(TINY.loss, memory=memory_rows))
    changed = dataclasses.replace(settings.train, report_every_steps=4, checkpoint_every_steps=100, steps=12, **changes)
    limits = {"clip_norm": 1.0, "clip_each": 1.0} if optimizer == "adamw" else {}
    return dataclasses.replace(settings, train=changed, optim=dataclasses.replace(settings.optim, name=optimizer, **limits))


CASES = [
    ({"precision": "bfloat16"}, "lars", 0),
    ({"precision": "float32", "micro_batch": 8}, "sgd", 0),
    ({"precision": "tf32"}, "lars", 96),
    ({"precision": "float32"}, "adamw", 0),
]


@pytest.mark.parametrize(("changes", "optimizer", "memory_rows"), CASES)
def test_between_two_reports_the_host_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, patterns: Path, changes: dict[str, Any], optimizer: Any, memory_rows: int
) -> None:
    """The whole loop on a fake device: views, network, loss, backward pass, optimizer, clock and health of steps 2 to 4."""
    stand_in_kernels(monkeypatch)
    before: list[int] = []
    report = Health.report
    with fake_cuda(monkeypatch) as watched:
        monkeypatch.setattr(Health, "report", lambda *a: (before.append(len(watched.waits)), report(*a))[1])
        stream = train(loops(changes, optimizer, memory_rows), Start(patterns, CUDA))
        assert next(stream).step == 1
        watched.waits.clear()
        copies = watched.copies
        told = next(stream)
        stream.close()
    assert told.step == 4 and {"memory/peak_gib", "train/loss"} <= set(told.metrics) and len(told.ranks["memory/peak_gib"]) == 1
    assert watched.copies - copies >= 9, "images, their parameters and labels travel, of three steps at least"
    assert watched.waits[: before[-1]] == [] and watched.waits[before[-1] :], "the report reads values, and the stand-in sees that"


def test_fine_tuning_waits_for_nothing_between_two_reports(monkeypatch: pytest.MonkeyPatch, patterns: Path) -> None:
    config = dataclasses.replace(TUNED, train=dataclasses.replace(TUNED.train, report_every_steps=4, steps=12))
    ids = np.arange(len(loader.labels(patterns)))
    assert build_classifier(config, len(read_manifest(patterns).classes), 0).classifier.out_features == 10
    before: list[int] = []
    report = Health.report
    with fake_cuda(monkeypatch) as watched:
        monkeypatch.setattr(Health, "report", lambda *a: (before.append(len(watched.waits)), report(*a))[1])
        stream = train(config, Start(patterns, CUDA, ids=ids))
        assert next(stream).step == 1
        watched.waits.clear()
        assert next(stream).step == 4
        stream.close()
    assert watched.waits[: before[-1]] == [] and watched.waits[before[-1] :]


def test_precision_decides_what_cuda_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, matmul = SimpleNamespace(allow_tf32=True, benchmark=False), SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    precision.set_backends("tf32", torch.device("cpu"))
    assert not cudnn.benchmark and not matmul.allow_tf32, "a CPU's run leaves them alone"
    for name, rounded in (("tf32", True), ("float32", False), ("bfloat16", False)):
        precision.set_backends(name, CUDA)
        assert cudnn.allow_tf32 is matmul.allow_tf32 is rounded and cudnn.benchmark


def test_a_gpu_keeps_a_core_for_its_launches() -> None:
    assert Start(Path(), CUDA, threads=16).loader_threads == 15 and Start(Path(), CUDA).loader_threads == 1
    assert Start(Path(), threads=16).loader_threads == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("changes", "optimizer", "memory_rows"), CASES)
def test_between_two_reports_nothing_blocks_the_device(patterns: Path, changes: dict[str, Any], optimizer: Any, memory_rows: int) -> None:
    """torch itself raises at the first call that synchronises, in steps 5 to 7 of a run on the device."""
    stream = train(loops(changes, optimizer, memory_rows), Start(patterns, torch.device("cuda")))
    assert [next(stream).step, next(stream).step] == [1, 4]
    report = Health.report
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Health, "report", lambda *a: (torch.cuda.set_sync_debug_mode("default"), report(*a))[1])
            assert next(stream).step == 8
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stream.close()
