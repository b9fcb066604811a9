"""The plan of `simclr bench all`: the benches as plain commands, most valuable first, for a GPU, for a CPU, and at toy size."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.bench.result import Row

Size = Literal["gpu", "cpu", "dry"]
Figure = Callable[[list[Row]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One command of the plan."""

    name: str
    command: tuple[str, ...]
    """Its words, beginning with simclr or pytest; files are relative to the folder that it runs in."""
    expected_s: float
    limit_s: float
    """Seconds that it is expected to take, and after which it is ended."""
    figure: Figure
    """Its rows → the main result, in a line."""
    makes: str = ""
    """Shards that it makes."""
    beside: bool = False
    """Whether it runs beside the next phases, until one needs its shards."""
    needs: str = ""
    """The shards that it waits for."""
    lacks: str = ""
    """Why it cannot run here."""
    in_checkout: bool = False
    """Whether it runs in the project's root."""


@dataclass(frozen=True, slots=True)
class Run:
    """A phase at one size."""

    words: str
    expected_s: float
    limit_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A phase at every size; a sentence in the place of a `Run` says why there is none."""

    name: str
    what: str
    figure: Figure
    gpu: Run
    cpu: Run | str
    dry: Run
    needs: str = ""
    makes: str = ""


# ── Rows → a line ──────────────────────────────────────────────────────────────────────────────────────────────────


def _prepared(rows: list[Row]) -> str:
    return f"{rows[0]['images']:,} images, {rows[0]['images_per_s']:,.0f} images/s"


def _ceilings(rows: list[Row]) -> str:
    found = {row["name"]: row["median"] for row in rows}
    return f"copy {found['copy']:,.0f} GB/s, bfloat16 {found['product, bfloat16']:,.2f} TFLOP/s"


def _tests(rows: list[Row]) -> str:
    return f"{rows[0]['passed']} passed, {rows[0]['failed']} failed, {rows[0]['skipped']} skipped"


def _agreement(rows: list[Row]) -> str:
    views = max(row["deviation"] for row in rows if row["name"].startswith("views"))
    gradient = max(row["gradient"] for row in rows if row["name"].startswith("NT-Xent, float32"))
    steps = [row for row in rows if row["name"].startswith("first steps")]
    more = f", first steps {steps[0]['deviation']:.0e}" if steps else ""
    blocking = [sum(row["blocking"].values()) for row in steps if "blocking" in row]
    return f"views {views:.0e}, gradient {gradient:.0e}{more}" + (f"; {max(blocking)} blocking calls" if blocking else "")


def _loss(rows: list[Row]) -> str:
    compared = [row for row in rows if "ratio" in row]
    best = f", {compared[-1]['ratio']:.2f} × as fast as written out at {compared[-1]['name']}" if compared else ""
    return f"{rows[-1]['name']}: {rows[-1]['streamed_ms']:,.1f} ms{best}"


def _step(rows: list[Row]) -> str:
    found = {row["name"]: row for row in rows if "ratio" in row}
    first = next(iter(found.values()))
    said = [f"{first['median']:,.0f} images/s"]
    if "plain torch" in found:
        said.append(f"{found['plain torch']['ratio']:.3f} × plain torch")
    if "simclr, fed from shards" in found:
        said.append(f"fed {100 / found['simclr, fed from shards']['ratio']:.1f} % of resident")
    if first["peak_gib"] is not None:
        said.append(f"{first['peak_gib']:.1f} GiB")
    return ", ".join(said)


def _views(rows: list[Row]) -> str:
    large = [row for row in rows if row["size_px"] == 224]
    more = "".join(f", {row['ratio']:.2f} × {row['name']}" for row in large[1:])
    return f"224 px: {large[0]['median']:,.0f} views/s{more}"


def _cifar(rows: list[Row]) -> str:
    row = rows[0]
    return f"kNN {100 * row['knn_top1']:.1f} %, probe {100 * row['probe_top1']:.1f} %, {row['images_per_s']:,.0f} images/s"


def _loader(rows: list[Row]) -> str:
    return f"bicubic {rows[1]['median']:,.0f} images/s, {rows[1]['ratio']:.2f} × FFCV's two pipelines"


def _optim(rows: list[Row]) -> str:
    return f"LARS takes {rows[0]['ratio']:.2f} × SGD, foreach; {rows[1]['ratio']:.2f} × fused"


def _embed(rows: list[Row]) -> str:
    own = [row for row in rows if "waited" in row]
    return "; ".join(
        f"{row['name']} {row['median']:,.0f} images/s, {row['ratio']:.2f} × one after the other, "
        f"{100 * statistics.median(row['waited']):.0f} % waiting"
        for row in own
    )


def _train(rows: list[Row]) -> str:
    return f"{rows[1]['median']:,.0f} images/s, {100 * rows[1]['ratio']:.1f} % of the step on resident views"


# ── The plan ───────────────────────────────────────────────────────────────────────────────────────────────────────

_R50 = "--recipe imagenet_resnet50 --precision bfloat16"
_TINY = "--recipe patterns_tiny"
_TOY = "--recipe patterns_tiny --batch-size 8 --steps 6 --trials 1 --window-s 0"
# The limits at toy size end a phase that hangs; the others end a phase that takes more time than it is worth.
_PLAN = (
    Line(
        name="shards, small images",
        what="prepare --kind small --out small",
        makes="small",
        figure=_prepared,
        gpu=Run("--images 50000", 60, 120),
        cpu=Run("--images 4000", 15, 180),
        dry=Run("--images 200", 8, 180),
    ),
    Line(
        name="shards, photographs",
        what="prepare --out photographs",
        makes="photographs",
        figure=_prepared,
        gpu=Run("--images 2048", 12, 90),
        cpu=Run("--images 256", 8, 90),
        dry=Run("--images 16", 6, 180),
    ),
    Line(
        name="device",
        what="device",
        figure=_ceilings,
        gpu=Run("--steps 15", 10, 40),
        cpu=Run("--steps 10", 6, 40),
        dry=Run("--steps 6 --trials 1", 5, 180),
    ),
    Line(
        name="agreement",
        what="agreement",
        needs="small",
        figure=_agreement,
        gpu=Run("--data small", 62, 110),
        cpu="a CPU agrees with itself",
        dry=Run(f"--data small {_TINY}", 15, 180),
    ),
    Line(
        name="step, photographs",
        what="step --data photographs --profile step-photographs.txt",
        needs="photographs",
        figure=_step,
        gpu=Run(f"{_R50} --compile --batch-size 512 --steps 20", 190, 270),
        cpu=Run(f"{_TINY} --batch-size 64 --steps 10", 70, 150),  # the same path at 32 px: at 224 a step takes minutes
        dry=Run(_TOY, 15, 180),
    ),
    Line(
        name="cifar",
        what="cifar --data small",
        needs="small",
        figure=_cifar,
        gpu=Run("--batch-size 512 --precision bfloat16 --compile --epochs 30", 90, 130),
        cpu="30 epochs of ResNet-18 take a CPU a day",
        dry=Run(f"{_TINY} --batch-size 32 --epochs 1", 12, 180),
    ),
    Line(
        name="step, small images",
        what="step --data small --profile step-small.txt",
        needs="small",
        figure=_step,
        gpu=Run("--batch-size 512 --precision bfloat16 --compile --steps 100", 100, 150),
        cpu=Run("--recipe cifar10_resnet14 --batch-size 32 --steps 8", 50, 120),
        dry=Run(_TOY, 12, 180),
    ),
    Line(
        name="loss, bfloat16",
        what="loss --precision bfloat16",
        figure=_loss,
        gpu=Run("--batches 512 4096 8192 32768 131072", 18, 60),
        cpu=Run("--batches 512 1024", 30, 90),
        dry=Run("--batches 64 --trials 1", 10, 180),
    ),
    Line(
        name="embed",
        what="embed",
        figure=_embed,
        gpu=Run("--recipe imagenet_resnet50 --precision bfloat16 --images 1536", 75, 120),
        cpu=Run("--images 512", 60, 120),
        dry=Run(f"{_TINY} --images 256 --trials 1", 25, 180),
    ),
    Line(
        name="views",
        what="views",
        figure=_views,
        gpu=Run("--batch-size 512 --steps 8", 57, 90),
        cpu=Run("--batch-size 16 --steps 8", 10, 60),
        dry=Run("--batch-size 2 --steps 6 --trials 1", 6, 180),
    ),
    Line(
        name="gradient caching",
        what="step --sides cached",
        figure=_step,
        gpu=Run(f"{_R50} --batch-size 4096 --micro-batch 128 --steps 6 --trials 2 --window-s 0", 60, 100),
        cpu=Run(f"{_TINY} --batch-size 128 --micro-batch 32 --steps 7 --window-s 0", 35, 90),
        dry=Run(f"{_TOY} --micro-batch 4", 6, 180),
    ),
    Line(
        name="loss, float32",
        what="loss",
        figure=_loss,
        gpu=Run("--batches 4096 32768", 30, 60),
        cpu=Run("--batches 1024 2048", 40, 100),
        dry=Run("--batches 64 --trials 1", 10, 180),
    ),
    Line(
        name="loader",
        what="loader --data photographs",
        needs="photographs",
        figure=_loader,
        gpu=Run("--batch-size 512 --steps 12", 45, 75),
        cpu=Run("--batch-size 50 --steps 10", 40, 100),
        dry=Run("--batch-size 8 --steps 6 --trials 1", 15, 180),
    ),
    Line(
        name="optim",
        what="optim",
        figure=_optim,
        gpu=Run("--steps 30 --trials 5", 15, 40),
        cpu=Run("--steps 15", 15, 90),
        dry=Run("--steps 6 --trials 1", 6, 180),
    ),
    Line(
        name="gradient caching, N = 8,192",
        what="step --sides cached",
        figure=_step,
        gpu=Run(f"{_R50} --batch-size 8192 --micro-batch 128 --steps 6 --trials 1 --window-s 0", 60, 90),
        cpu="at 32 px it is the phase before",
        dry=Run(f"{_TOY} --micro-batch 2", 6, 180),
    ),
    Line(
        name="train, under Ray",
        what="train --data photographs",
        needs="photographs",
        figure=_train,
        gpu=Run(f"{_R50} --compile --batch-size 512 --steps 20", 120, 240),
        cpu=Run(f"{_TINY} --batch-size 64 --steps 10", 90, 200),
        dry=Run(_TOY, 45, 180),
    ),
)
_GPU_TESTS = {"gpu": (150.0, 200.0), "cpu": (8.0, 60.0), "dry": (8.0, 180.0)}


def plan(size: Size, threads: int, archives: dict[str, Path | None], tests: tuple[str, ...], ray: bool) -> tuple[Phase, ...]:
    """The phases for a machine; each bench uses `threads`. `archives`: the sources of the shards, None = rendered; `tests`: test files that
    need a GPU, () = none; `ray`: whether Ray is installed."""
    phases = [_phase(line, size, threads, archives, ray) for line in _PLAN]
    expected_s, limit_s = _GPU_TESTS[size]
    lacks = "" if tests else "neither tests nor pytest here"
    if tests and size == "cpu":
        lacks = "no GPU"
    of_tests = Phase(
        name="GPU tests",
        command=("pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *tests),
        expected_s=expected_s,
        limit_s=limit_s,
        figure=_tests,
        lacks=lacks,
        in_checkout=True,
    )
    return (*phases[:3], of_tests, *phases[3:])


def _phase(line: Line, size: Size, threads: int, archives: dict[str, Path | None], ray: bool) -> Phase:
    run = {"gpu": line.gpu, "cpu": line.cpu, "dry": line.dry}[size]
    lacks = run if isinstance(run, str) else ""
    if not ray and (line.what.startswith("train") or (line.what == "embed" and size != "gpu")):
        lacks = "ray is not installed"
    run = line.gpu if isinstance(run, str) else run
    under_ray = line.what.startswith("train") and threads > 1  # a core for Ray's own processes
    words = [*shlex.split(line.what), *shlex.split(run.words), "--threads", str(threads - under_ray)]
    if line.makes and (archive := archives[line.makes]) is not None:
        words += ["--data", str(archive)]
    if line.what.split()[0] not in ("prepare", "loader", "train"):
        words += ["--device", "cuda" if size == "gpu" else "cpu"]
    return Phase(
        name=line.name,
        command=("simclr", "bench", *words),
        expected_s=run.expected_s,
        limit_s=run.limit_s,
        figure=line.figure,
        makes=line.makes,
        beside=bool(line.makes) and size != "cpu",  # on a CPU it would take cores from the measured phase
        needs=line.needs,
        lacks=lacks,
    )
