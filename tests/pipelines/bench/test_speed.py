"""The benches of speed: their tables and files appear on a tiny setting, and the model of communication by hand-computable cases."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.bench import loss as bench_loss
from pipelines.bench import timing
from pipelines.bench import train as train_bench
from pipelines.bench.agreement import agreement
from pipelines.bench.cifar import cifar
from pipelines.bench.loop import around, timed
from pipelines.bench.loss import loss
from pipelines.bench.prepare import prepare
from pipelines.bench.result import busiest, compared, cost, in_turn
from pipelines.bench.scale import EXPECTED_RANKS, scale
from pipelines.bench.scale_model import (
    WAYS,
    Cluster,
    Link,
    Work,
    expected,
    ring_all_gather_s,
    ring_all_reduce_s,
    tree_all_reduce_s,
    two_level_all_gather_s,
    two_level_all_reduce_s,
    two_level_tree_s,
)
from pipelines.bench.step import our_step, plain_step, resident, resident_rows, step
from pipelines.bench.timing import host_waits, rate
from pipelines.bench.train import train
from pipelines.commands import bench
from simclr.config import Config, Encoder, Head, SimCLR, Train, Views
from simclr.errors import UserError
from tests.conftest import Within

CPU = torch.device("cpu")


def tiny(batch_size: int = 4) -> Config:
    return SimCLR(
        encoder=Encoder(depth=8, cifar_stem=True),
        head=Head(d_out=16),
        views=Views(size_px=8),
        train=Train(batch_size=batch_size, steps=10),
    )


# ── Step ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_sides_of_bench_step_compute_the_same_loss() -> None:
    config = replace(tiny(8), train=Train(batch_size=8, precision="float64"))
    views = resident_rows(config, CPU)
    ours, plain = our_step(config, CPU)(resident(views)), plain_step(config, views)()
    assert ours.item() == pytest.approx(plain.item(), abs=1e-12)


def test_bench_step_prints_a_table_and_writes_profile_and_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profile, result = tmp_path / "profile.txt", tmp_path / "new" / "step.json"
    toy: dict[str, Any] = {"recipe": "patterns_tiny", "batch_size": 2, "steps": 6, "trials": 1, "micro_batch": 1, "window_s": 0.0}
    bench.main(bench.Args(what="step", **toy, profile=profile, json=result, device="cpu"))
    out = capfd.readouterr().out
    for part in ("simclr ", "plain torch ", "1 at a time", "an image costs", "s for an epoch of 1,281,167 images", "energy —"):
        assert part in out
    assert "waits for the device between two reports: —" in out and "convolution" in profile.read_text()
    text = json.loads(result.read_text())
    assert {"what", "machine", "versions", "date", "setting", "n", "rows"} <= set(text)
    assert text["what"] == "step" and text["n"] == 1 and text["complete"] and text["setting"]["batch_size"] == 2
    assert [row["name"] for row in text["rows"]] == ["simclr", "plain torch", "simclr, 1 at a time", "host synchronisations", "cost"]


def test_host_waits_count_inside_the_steps_only() -> None:
    span = ("steps between two reports", 10.0, 20.0)
    inside, outside, other = ("cudaStreamSynchronize", 12.0, 13.0), ("cudaDeviceSynchronize", 21.0, 22.0), ("cudaLaunchKernel", 14.0, 15.0)
    assert host_waits([span, inside, outside, other]) == {"cudaStreamSynchronize": 1}
    assert host_waits([span, outside, other]).total() == 0


def test_the_fed_step_and_its_parts_are_sides_of_bench_step(patterns: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sides = list(step(tiny(), 6, 1, 1, CPU, None, patterns))
    assert [row["name"] for row in sides] == [
        *("simclr", "simclr, fed from shards", "plain torch", "views alone", "loader alone", "cost"),
    ]
    assert min(row["median"] for row in sides[:-1]) > 0 and sides[-1]["images_per_s"] == sides[1]["median"]
    assert "% of the step on resident views" in capfd.readouterr().out
    cached = replace(tiny(), train=replace(tiny().train, micro_batch=2))
    assert [row["name"] for row in step(cached, 6, 1, 1, CPU, None, None, ("cached",))] == ["simclr, 2 at a time", "cost"]
    with pytest.raises(UserError, match="--sides fed needs --data"):
        list(step(tiny(), 6, 1, 1, CPU, None, None, ("fed",)))


def test_a_window_lasts_as_long_as_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's own: a step takes 1/64 s."""
    clock, asked = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def one(ready: int = 0) -> None:
        asked.append(0)
        clock[0] += 1 / 64 if len(asked) > ready else 0.0

    assert rate(one, 7, 16, CPU) == 16 * 64 and len(asked) == 5 + 2
    asked.clear()
    # 5 steps, of which 4 last 1/16 s; 8 more for the estimate; then the steps that last 2 s.
    assert rate(one, 6, 16, CPU, 2.0) == 16 * 64 and len(asked) == 5 + 8 + 128
    asked.clear()
    # Nine are ready at once: of the next 8, four take no time, so the estimate takes 16 more.
    assert rate(partial(one, 9), 6, 16, CPU, 2.0) == 16 * 64 and len(asked) == 5 + 8 + 16 + 128


def test_bench_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps 5; expected at least 1 trial of more than 5 steps"):
        bench.main(bench.Args(what="step", steps=5))
    with pytest.raises(UserError, match=r"a folder in the path .* is a file"):
        (tmp_path / "file").touch()
        bench.main(bench.Args(what="step", json=tmp_path / "file" / "step.json"))
    with pytest.raises(UserError, match="--sides cached needs --micro-batch"):
        bench.main(bench.Args(what="step", recipe="patterns_tiny", batch_size=4, micro_batch=4, sides=("cached",)))
    with pytest.raises(UserError, match="--window-s is -1"):
        bench.main(bench.Args(what="step", window_s=-1))
    with pytest.raises(UserError, match="which data"):
        bench.main(bench.Args(what="cifar"))
    with pytest.raises(UserError, match="--latency-us is 0"):
        scale(tiny(), 6, 1, 1, "cpu", latency_us=0)


# ── Agreement ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cpu_agrees_with_itself_but_for_the_precision(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare("small", None, tmp_path / "shards", 16, 1)
    rows = {row["name"]: row for row in agreement(tiny(), tmp_path / "shards", 1, CPU)}
    same = [row for name, row in rows.items() if "bfloat16" not in name]
    assert len(same) == 2 + 7 + 1 and all(row.get("deviation", row.get("gradient")) == 0 for row in same)
    half = rows["first steps, bfloat16"]
    assert 0 < half["deviation"] < 1 and len(half["losses"]) == len(half["cpu_losses"]) == 1 + 3 and "blocking" not in half
    out = capfd.readouterr().out
    assert "views, 224 px              4 images, largest difference 0.0e+00" in out and "NT-Xent, bfloat16, d = 2048 loss 0.0e+00" in out


def test_cifar_wants_labels_and_an_epoch(photographs: Path, patterns: Path) -> None:
    with pytest.raises(UserError, match="has 0 classes and train; expected labelled images, also to test"):
        cifar("tiny", tiny(), photographs, 1, 1, CPU)
    with pytest.raises(UserError, match="--epochs is 0"):
        cifar("tiny", tiny(), patterns, 0, 1, CPU)


# ── Train ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bench_train_prints_its_share_and_says_that_lightly_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[Config] = []
    monkeypatch.setattr(train_bench, "held", lambda make: contextlib.nullcontext(Fake()))
    monkeypatch.setattr(train_bench, "under_ray", lambda config, data, threads: asked.append(config) or [0.05, 0.05])
    monkeypatch.setattr(train_bench.importlib.util, "find_spec", lambda name: object() if name == "ray" else None)
    rows = train("tiny", tiny(), Path("shards"), steps=10, trials=2, threads=1, peer="lightly")
    out = capfd.readouterr().out
    assert "lightly is not installed, so ours is timed alone; `pip install" in out
    assert "80.0 images/s   80.0 % of it (pairs 0.800 … 0.800 ×)" in out and "energy —" in out
    assert [row["name"] for row in rows] == ["step on resident views", "Ray Train, end to end", "cost"]
    # A step takes 0.04 s, so 50 steps last 2 s. One job takes three windows, of which the first does not count.
    assert [(c.train.steps, c.train.report_every_steps, c.train.linear_eval) for c in asked] == [(150, 50, False)]


class Fake:
    """A side whose step takes 0.04 s."""

    def step_s(self, steps: int) -> float:
        return 0.04


def test_a_job_is_compared_with_what_lies_evenly_around_it() -> None:
    """A machine that slows down steadily, 1, 2, 3 before and 7, 8, 9 behind: in the middle it does 5."""
    assert around({"a": [1.0, 2.0, 3.0]}, {"a": [7.0, 8.0, 9.0]}) == {"a": [5.0, 5.0, 5.0]}
    config = timed(tiny(), 7, 3)
    assert (config.train.steps, config.train.report_every_steps, config.train.checkpoint_every_steps) == (28, 7, 28)


def test_without_ray_train_and_loop_say_so_before_they_measure(monkeypatch: pytest.MonkeyPatch, patterns: Path) -> None:
    monkeypatch.setattr(train_bench.importlib.util, "find_spec", lambda name: None)
    for what in ("train", "loop"):
        with pytest.raises(UserError, match=f"ray is not installed, and `simclr bench {what}` trains under it"):
            bench.main(bench.Args(what=what, data=patterns))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"blur_p": (1.0, 0.1)}, {"solarise_p": 0.2}, {"saturation": 0.5}])
def test_the_peer_is_not_compared_on_views_that_it_cannot_make(changes: dict[str, Any]) -> None:
    config = replace(tiny(), views=Views(size_px=8, **changes))
    with pytest.raises(UserError, match="lightly's SimCLR blurs both views alike, solarises none"):
        train("tiny", config, Path("shards"), steps=10, trials=1, threads=1, peer="lightly")


def test_the_peer_needs_its_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_bench.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="--peer-data DIR"):
        train("tiny", tiny(), Path("shards"), steps=10, trials=1, threads=1, peer="lightly")
    (tmp_path / "one.jpg").touch()
    with pytest.raises(UserError, match="holds 1 photographs"):
        train("tiny", tiny(), Path("shards"), steps=10, trials=1, threads=1, peer="lightly", peer_data=tmp_path)


# ── Scale ──────────────────────────────────────────────────────────────────────────────────────────────────────────


SLOW = Link(2.0, 1e6)  # 2 GB/s, a second for a message


def test_collectives_by_hand() -> None:
    # 4 ranks, 8 GB at 2 GB/s: 6/4 · 4 s, and 6 messages of 1 s. Gathering: 3/4 · 4 s, and 3. A tree of depth 2: 4 messages.
    four = Cluster(4, 1, SLOW, SLOW)
    assert ring_all_reduce_s(8e9, four) == pytest.approx(6.0 + 6.0)
    assert ring_all_gather_s(8e9, four) == pytest.approx(3.0 + 3.0)
    assert tree_all_reduce_s(8e9, four) == pytest.approx(6.0 + 4.0)
    assert tree_all_reduce_s(0, Cluster(1024, 1, SLOW, SLOW)) == pytest.approx(20.0)
    for way in WAYS.values():
        assert [collective(8e9, Cluster(1, 8, SLOW, SLOW)) for collective in way] == [0, 0, 0]


def test_collectives_of_two_levels_by_hand() -> None:
    """8 GB on 2 nodes of 4 ranks: 4 GB/s and 1 s a message within, 1 GB/s and 10 s between."""
    eight = Cluster(8, 4, Link(4.0, 1e6), Link(1.0, 1e7))
    # Flat, all bytes at 1 GB/s: 14/8 · 8 s; of 7 messages in a row one leaves its node, there and back. A tree of depth 3 knows no nodes.
    assert ring_all_reduce_s(8e9, eight) == pytest.approx(14.0 + 2 * (6 * 1 + 10))
    assert ring_all_gather_s(8e9, eight) == pytest.approx(7.0 + 16.0)
    assert tree_all_reduce_s(8e9, eight) == pytest.approx(14.0 + 6 * 10)
    # Within 3/4 · 8 GB at 4 GB/s and 3 messages, between half of a rank's 2 GB at 1 GB/s and a message; twice for an all-reduce.
    assert two_level_all_gather_s(8e9, eight) == pytest.approx(1.5 + 3 + 1.0 + 10)
    assert two_level_all_reduce_s(8e9, eight) == pytest.approx(31.0)
    # A chain of 3 and a tree of depth 1, up and down; 6/4 · 8 GB within, 8 GB between.
    assert two_level_tree_s(8e9, eight) == pytest.approx(2 * 3 + 2 * 10 + 3.0 + 8.0)


WORK = Work(step_s=0.12, gradient_bytes=1e8, buckets=4, z_bytes=1e7, norm_bytes=5e6, layers=5)
FAST = Link(1.0, 1e3)  # 1 GB/s, a millisecond for a message


def test_the_model_by_hand() -> None:
    # Two ranks. Gradients: 100 MB once, and 2 ms for each of 4 buckets. z: 2 · 10 MB, half travels, twice, each 1 ms.
    # BatchNorm: 2 · 5 all-reduces of 2 ms and 1 MB. On two ranks both ways are the same.
    for way in WAYS:
        found = expected(WORK, Cluster(2, 1, FAST, FAST), way)
        assert (found.gradients_s, found.gather_s, found.norm_s) == pytest.approx((0.108, 0.022, 0.030))
        assert found.step_s == pytest.approx(0.28) and found.efficiency == pytest.approx(0.12 / 0.28)
        # 80 ms of the gradients' 108 hide behind the backward pass; the last of 4 buckets takes 27.
        assert found.overlapped_efficiency == pytest.approx(0.12 / (0.12 + 0.028 + 0.052))
    # Of two buckets the last takes 52 ms, and nothing computes beside it.
    large = expected(replace(WORK, buckets=2), Cluster(2, 1, FAST, FAST), "flat ring")
    assert large.gradients_s == pytest.approx(0.104) and large.overlapped_efficiency == pytest.approx(0.12 / (0.12 + 0.052 + 0.052))


def test_the_model_of_batchnorm_in_groups_by_hand() -> None:
    """Five norms of 1 MB on 2 nodes of 4 ranks. Groups of 4 gather 4 MB within their node, 3/4 of it on the way in 3 messages; backward
    6 messages of a chain, and 6/4 MB. Groups of one exchange nothing."""
    eight = Cluster(8, 4, FAST, Link(0.1, 1e5))
    assert expected(replace(WORK, norm_ranks=4), eight, "hierarchical").norm_s == pytest.approx(5 * (0.003 + 0.003 + 0.006 + 0.0015))
    # All 8: forward and backward a chain of 3 within and a message between, up and down, 6/4 MB within and 1 MB at 0.1 GB/s between.
    both = 2 * (6 * 0.001 + 2 * 0.1 + 0.0015 + 0.010)
    for ranks in (None, 8, 16):
        assert expected(replace(WORK, norm_ranks=ranks), eight, "hierarchical").norm_s == pytest.approx(5 * both)
    assert expected(replace(WORK, norm_bytes=0, layers=0), eight, "flat ring").norm_s == 0


def test_the_model_of_one_rank() -> None:
    for way in WAYS:
        alone = expected(WORK, Cluster(1, 8, FAST, FAST), way)
        assert alone.efficiency == alone.overlapped_efficiency == 1 and alone.step_s == 0.12


def test_bench_scale_prints_measured_and_expected(capfd: pytest.CaptureFixture[str]) -> None:
    grouped = replace(tiny(), encoder=replace(tiny().encoder, batchnorm=4))
    rows = scale(grouped, 6, 1, 1, "cpu", bandwidth_gb_s=50, latency_us=5, node_bandwidth_gb_s=300, node_latency_us=2, ranks_per_node=4)
    out = capfd.readouterr().out
    for part in ("W = 1, measured", "W = 2, measured", "2 × W = 1, at once", "W = 2, by the model", "the model leaves out: waiting for"):
        assert part in out
    assert "expected at 50.00 GB/s and 5.0 µs between nodes of 4 ranks, 300.00 GB/s and 2.0 µs within" in out
    assert "12 BatchNorms of " in out and " in all over 4 ranks in a row\n" in out
    measured = rows[1]
    assert measured["name"] == "W = 2" and min(measured[key] for key in ("gradients_s", "gather_s", "norm_s", "bandwidth_gb_s")) > 0
    assert measured["z_bytes"] == 4 * 8 * 16 and measured["layers"] == 10 + 2
    for way in WAYS:
        assert [row["ranks"] for row in rows if row["name"] == f"expected, {way}"] == list(EXPECTED_RANKS)


# ── Loss ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bench_loss_compares_time_memory_and_gradients(
    capfd: pytest.CaptureFixture[str], within: Within, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,048 rows: 16 MiB a table of logits, of which the written-out form holds several and the other one block at a time."""
    row, *_ = loss((1024,), 1, 1, torch.device("cpu"))
    assert "N =   1,024" in capfd.readouterr().out
    assert row["streamed_ms"] > 0 and row["written_ms"] > 0 and row["ratio"] == pytest.approx(row["written_ms"] / row["streamed_ms"])
    assert row["written_mib"] > 2 * 16
    within("gradient, streamed against written out", row["deviation"], 1e-5)
    monkeypatch.setattr(bench_loss, "_peak_mib", lambda *_: 0.0)  # two processes, whose memory the row above has
    (half,) = loss((8,), 1, 1, CPU, "bfloat16")
    within("gradient, z in bfloat16 against float32", half["deviation"], 2e-2)


# ── What they share ────────────────────────────────────────────────────────────────────────────────────────────────


def test_sides_take_turns_and_ratios_are_of_pairs() -> None:
    order: list[str] = []
    found = in_turn({name: (lambda name=name: order.append(name) or float(len(order))) for name in "ab"}, 3, "s")
    assert "".join(order) == "abbaab" and found == {"a": [1, 4, 5], "b": [2, 3, 6]}
    row = compared(found, "s", "a")[1]
    assert (row["median"], row["ratio"], row["low"], row["high"]) == (3, 1.2, 0.75, 2)
    assert compared(found, "s", "a", inverted=True)[1]["ratio"] == pytest.approx(1 / 1.2)


def test_cost_by_hand() -> None:
    row = cost(1_281_167 / 36, 500.0)
    assert (row["epoch_s"], row["hours"], row["kwh"]) == pytest.approx((36.0, 1.0, 0.5))
    assert cost(100.0, None)["kwh"] is None


def test_power_is_the_busiest_gpus_while_it_works() -> None:
    assert busiest("0, 80.0\n1, 70.0\n0, 500.0\n1, 70.0\n0, 600.0\n1, [N/A]\n0, 4") == [550.0]
    assert busiest("0, [N/A]\n") == [] and busiest("") == []
