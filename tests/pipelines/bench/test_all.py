"""`simclr bench all`: budget, limits, going on, the table, benches without Ray. No test checks a measured figure."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from pipelines.bench.all import ROOT, Outcome, bench_all, run, table
from pipelines.bench.held import held, steps_of
from pipelines.bench.plan import Phase, Size, plan
from pipelines.bench.result import Row
from pipelines.cli import parse
from pipelines.commands import bench
from pipelines.runs import environment
from simclr.errors import UserError

DAY = {"what": "all", "size": "dry", "machine": "one", "versions": "1", "absent": [], "data": {}, "date": "2026-11-26T12:00:00+00:00"}
ANSWER = """
import json, sys
def write(rows, complete):
    open(sys.argv[-1], "w").write(json.dumps({"n": 3, "complete": complete, "setting": {}, "rows": rows}))
"""
GOOD = ANSWER + 'write([{"value": 7}], True)'


def fake(name: str, code: str, **fields: Any) -> Phase:
    given: dict[str, Any] = {"expected_s": 1.0, "limit_s": 30.0} | fields
    return Phase(name=name, command=("python", "-c", code), figure=lambda rows: f"value {rows[0]['value']}", **given)


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie that waits for its parent counts as ended."""
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(") ")[2].startswith("Z")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_what_no_longer_fits_is_skipped_and_said(tmp_path: Path) -> None:
    phases = (
        fake("quick", GOOD),
        fake("too long", GOOD, expected_s=200.0),
        fake("dies", "raise SystemExit(3)"),
        fake("no Ray", GOOD, lacks="ray is not installed"),
        fake("shards", GOOD, needs="photographs"),
    )
    outcomes, whole = run(phases, tmp_path, tmp_path, 100.0, DAY)
    assert [o.code for o in outcomes] == [0, "skipped", 3, "skipped", "skipped"]
    assert outcomes[0].figure == "value 7" and outcomes[0].n == 3 and outcomes[0].complete and list(outcomes[0].rows) == [{"value": 7}]
    assert re.fullmatch(r"takes about 200 s, \d+ s of the budget are left", outcomes[1].figure)
    assert [o.figure for o in outcomes[2:]] == ["nothing; see the log", "ray is not installed", "there are no shards photographs"]
    shown = table(outcomes).splitlines()
    assert shown[0].split() == ["phase", "code", "seconds", "figure"] and len(shown) == 6
    assert re.fullmatch(r"quick +0 +\d+\.\d  value 7", shown[1]) and re.fullmatch(r"no Ray +skipped +0\.0  ray is not installed", shown[4])
    text = json.loads(whole.read_text())
    assert whole.name == "2026-11-26T1200-dry.json" and text["date"] == DAY["date"] and text["machine"] == "one"
    assert [p["phase"] for p in text["phases"]] == ["quick", "too long", "dies", "no Ray", "shards"]
    assert text["phases"][0]["rows"] == [{"value": 7}]
    log = (tmp_path / "bench.log").read_text()
    assert "===== quick at 0 s: python -c " in log and "===== quick: 0, " in log and "===== too long: skipped, 0 s, takes about" in log


def test_a_phase_is_ended_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    code = ANSWER + "import subprocess, time\nwrite([{'value': subprocess.Popen(['sleep', '60']).pid}], False)\ntime.sleep(60)"
    began = time.monotonic()
    (first, second), _ = run((fake("hangs", code, limit_s=2.0), fake("next", GOOD)), tmp_path, tmp_path, 100.0, DAY)
    assert first.code == "timeout" and 2 <= first.seconds < 5 and second.code == 0 and time.monotonic() - began < 20
    assert first.figure == "1 rows before it ended" and not first.complete
    assert gone(first.rows[0]["value"])


def test_a_child_of_a_phase_that_is_over_does_not_stay(tmp_path: Path) -> None:
    code = ANSWER + "import subprocess\nwrite([{'value': subprocess.Popen(['sleep', '60']).pid}], True)"
    ((outcome,), _) = run((fake("leaves one", code),), tmp_path, tmp_path, 100.0, DAY)
    assert outcome.code == 0 and outcome.seconds < 20
    assert gone(outcome.rows[0]["value"])


def test_the_same_command_goes_on_and_appends(tmp_path: Path) -> None:
    """In the first call one phase fails and one has no time left; the machine crashes in mid-line. Successful phases do not run again."""
    out, work = tmp_path / "out", tmp_path
    out.mkdir()
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n"
    well, fails = fake("well", count + GOOD), fake("fails", count + "raise SystemExit(1)")
    late = fake("late", count + GOOD, expected_s=1000.0)
    run((well, fails, late), out, work, 100.0, DAY)
    before = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(before + '{"phase": "fai')
    outcomes, whole = run((well, fails, replace(late, expected_s=1.0)), out, work, 100.0, DAY | {"date": "2026-11-27T08:00:00+00:00"})
    assert [o.code for o in outcomes] == [0, 1, 0] and (tmp_path / "count").read_text() == "xx" + "xx"
    assert (out / "results.jsonl").read_text().startswith(before) and whole.name == "2026-11-26T1200-dry.json"
    assert [json.loads(line)["phase"] for line in (out / "results.jsonl").read_text().splitlines()[-2:]] == ["fails", "late"]
    # Another command is another measurement.
    run((fake("well", count + GOOD + "\n#"),), out, work, 100.0, DAY)
    assert (tmp_path / "count").read_text() == "xxxxx"
    with pytest.raises(UserError, match="holds results of machine one, this is two; use another --out"):
        run((well,), out, work, 100.0, DAY | {"machine": "two"})


def test_shards_are_made_beside_the_first_phases_and_waited_for(tmp_path: Path) -> None:
    make = ANSWER + (
        "import pathlib, time\ntime.sleep(1.5)\npathlib.Path('photographs').mkdir()\n"
        "pathlib.Path('photographs/manifest.json').touch()\nwrite([{'value': 1}], True)"
    )
    early = "import pathlib\nassert not pathlib.Path('photographs').exists()\n" + GOOD
    late = "import pathlib\nassert pathlib.Path('photographs').exists()\n" + GOOD
    phases = (
        fake("shards", make, makes="photographs", beside=True),
        fake("early", early),
        fake("late", late, needs="photographs"),
        fake("on a GPU", late, needs="photographs", lacks="no GPU"),
    )
    outcomes, _ = run(phases, tmp_path, tmp_path, 100.0, DAY)
    assert [o.code for o in outcomes] == [0, 0, 0, "skipped"] and outcomes[0].seconds >= 1.5
    assert [line["phase"] for line in lines(tmp_path)[1:]] == ["early", "shards", "late", "on a GPU"]
    # In another work folder the shards are made again for the phases that still need them.
    (tmp_path / "again").mkdir()
    run(phases, tmp_path, tmp_path / "again", 100.0, DAY)
    assert not (tmp_path / "again" / "photographs").exists()
    run((*phases, fake("later", late, needs="photographs")), tmp_path, tmp_path / "again", 100.0, DAY)
    assert (tmp_path / "again" / "photographs").is_dir() and lines(tmp_path)[-1]["phase"] == "later" and lines(tmp_path)[-1]["code"] == 0


@pytest.mark.parametrize("size", get_args(Size))
def test_every_command_of_the_plan_is_one(size: Size) -> None:
    phases = plan(size, 2, {"small": Path("cifar10.tar.xz"), "photographs": None}, ("tests/simclr/test_ranks.py",), ray=False)
    assert len({p.name for p in phases}) == len(phases) == 17 and all(0 < p.expected_s < p.limit_s for p in phases)
    assert {p.needs for p in phases} - {""} == {p.makes for p in phases} - {""} == {"small", "photographs"}
    for phase in phases:
        if phase.command[0] == "simclr":
            args = parse("bench", bench.Args, list(phase.command[2:]))
            assert args.threads in (1, 2) and (args.data == Path("cifar10.tar.xz")) == (phase.makes == "small")
    assert phases[-1].lacks == "ray is not installed"
    # On a GPU the first five behind the shards fit into the default nine minutes; the same command again runs the others.
    assert size != "gpu" or sum(p.expected_s for p in phases[2:7]) < 540


def test_the_plan_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--budget-min is 0"):
        bench_all(0.0, tmp_path, "cpu", False, None)
    with pytest.raises(UserError, match="is no folder; expected one with"):
        bench_all(1.0, tmp_path, "cpu", False, tmp_path / "nowhere")


# ── A side in a process of its own ─────────────────────────────────────────────────────────────────────────────────


def _counting(path: str) -> Callable[[int], float]:
    """A side that counts how often it was made and asked."""
    with Path(path).open("a") as file:
        file.write("made\n")
    return lambda steps: float(steps) / 10 if steps < 100 else os._exit(3)


def test_a_side_is_made_once_and_asked_often(tmp_path: Path) -> None:
    with held(partial(_counting, str(tmp_path / "made"))) as side:
        assert [side.step_s(5), side.step_s(7)] == [0.5, 0.7] and steps_of(side, 8, 2.0) == 4 and steps_of(side, 30, 2.0) == 25
        with pytest.raises(RuntimeError, match="ended with code 3"):
            side.step_s(100)
    assert (tmp_path / "made").read_text() == "made\n" and not side.process.is_alive()


# ── The benches themselves, on a host without Ray ──────────────────────────────────────────────────────────────────

# As if Ray and the peers were not installed: their imports raise.
MAIN = """
import importlib, pathlib, sys
sys.modules |= dict.fromkeys(("ray", "mlflow", "kornia", "lightly"))
from pipelines.cli import main
if __name__ == "__main__":
    for words in sys.argv[1:]:
        main(words.split())
    folder = pathlib.Path(importlib.import_module("pipelines").__file__).parent
    print(*(importlib.import_module(f"pipelines.bench.{path.stem}").__name__ for path in (folder / "bench").glob("[a-z]*.py")))
"""
TOY = "--recipe patterns_tiny --batch-size 4 --steps 6 --trials 1 --window-s 0 --device cpu"
COMMANDS = (
    "device --steps 6 --trials 1 --device cpu",
    "prepare --kind small --images 16 --out small",
    "prepare --images 8 --out photographs",
    "loss --precision bfloat16 --batches 8 --trials 1 --device cpu",
    f"step {TOY} --data small --profile profile.txt",
    f"cifar {TOY} --data small --epochs 1",
)


def test_no_bench_but_those_of_ray_train_needs_ray_mlflow_or_a_peer(tmp_path: Path) -> None:
    """Some run, all are imported."""
    (tmp_path / "main.py").write_text(MAIN)
    words = [f"bench {command} --json {number}.json" for number, command in enumerate(COMMANDS)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "main.py", *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()[-1].split()) == len(list((ROOT / "pipelines" / "bench").glob("[a-z]*.py")))
    found: dict[str, list[Row]] = {}
    for number, command in enumerate(COMMANDS):
        text = json.loads((tmp_path / f"{number}.json").read_text())
        assert text["complete"] and text["what"] == shlex.split(command)[0]
        found[text["what"]] = text["rows"]
    assert [row["unit"] for row in found["device"]] == ["GB/s", "TFLOP/s", "TFLOP/s"] and min(row["median"] for row in found["device"]) > 0
    assert found["prepare"][0]["name"] == "8 photographs, rendered, 8 different ones" and found["prepare"][0]["images"] == 8
    assert "simclr, fed from shards" in [row["name"] for row in found["step"]] and (tmp_path / "profile.txt").is_file()
    assert found["cifar"][0]["test_images"] == 3 and 0 <= found["cifar"][0]["knn_top1"] <= 1


@pytest.mark.cluster  # `.ci/run` has it; `simclr bench all --dry` there runs every phase
def test_two_real_phases_leave_their_rows(tmp_path: Path) -> None:
    phases = plan("dry", 1, {"small": None, "photographs": None}, (), ray=False)
    chosen = tuple(p for p in phases if p.name in ("shards, small images", "device", "GPU tests"))
    out = tmp_path / "out"
    out.mkdir()
    outcomes, whole = run(chosen, out, tmp_path, 300.0, DAY)
    assert [(o.phase, o.code) for o in outcomes] == [("shards, small images", 0), ("device", 0), ("GPU tests", "skipped")]
    assert outcomes[0].figure.startswith("240 images, ") and outcomes[2].figure == "neither tests nor pytest here"
    assert re.fullmatch(r"copy \d+ GB/s, bfloat16 \d+\.\d\d TFLOP/s", outcomes[1].figure)
    text = whole.read_text()
    assert str(tmp_path) not in text and json.loads(text)["phases"][1]["rows"][0]["name"] == "copy"


def test_the_environment_names_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("ray", "mlflow", "triton"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    found = environment.environment()["versions"]
    assert "ray absent, mlflow absent, ffcv " in found and "torchvision " in found and "triton" not in found


def test_cuda_and_driver_are_versions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    says = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc 13"
    monkeypatch.setattr(environment, "_lines", lambda path: says.splitlines() if path.name == "version" else [])
    assert re.search(r"CUDA (\d+\.\d+|absent), driver 580\.65\.06$", environment.environment()["versions"])


def test_an_outcome_is_a_line(tmp_path: Path) -> None:
    assert table([Outcome("a phase", "timeout", 12.34, "", "simclr bench step")]).splitlines()[1] == "a phase  timeout     12.3"
