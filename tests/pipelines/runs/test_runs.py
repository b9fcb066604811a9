"""`simclr runs`: states, steps, rates and checkpoints of runs on disk and in S3; and the size of a submitted job's code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.runs.directory import open_run
from simclr import files
from simclr.errors import UserError
from simclr.recipes import patterns_tiny, recipe
from tests.support.paths import ROOT
from tests.support.s3 import Proxy


def run(folder: Path, data: Path, name: str, steps: list[int], age_s: float, checkpoints: list[int]) -> None:
    """A run directory as `simclr pretrain` leaves it, its last report `age_s` seconds ago."""
    made = open_run(folder / name, "patterns_tiny", patterns_tiny(), data)
    made.save()
    rows = [{"time": time.time() - age_s, "step": s, "total_steps": 40, "speed/images_per_s": 512.4, "train/loss": 3.25} for s in steps]
    (made.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in checkpoints:
        (made.checkpoints / f"step-{step:09d}").mkdir(parents=True)
        (made.checkpoints / f"step-{step:09d}/checkpoint.json").write_text("{}")


def some_runs(folder: Path, data: Path) -> None:
    run(folder, data, "done", [20, 40], 5000, [20, 40])
    run(folder, data, "going", [5, 10], 3, [5])
    run(folder, data, "silent", [30], 3000, [])
    run(folder, data, "fresh", [], 0, [])
    with (folder / "going/metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "spe')  # being written now
    (folder / "silent/checkpoints/step-000000030").mkdir(parents=True)  # not whole: it has no checkpoint.json


def listed(at: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    cli.main(["runs", at, "--json"])
    return {row["run"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}


def check(found: dict[str, dict[str, object]]) -> None:
    assert {name: (row["state"], row["step"], row["checkpoint"]) for name, row in found.items()} == {
        "done": ("complete", 40, 40),
        "going": ("running", 10, 5),
        "silent": ("stopped", 30, None),
        "fresh": ("new", 0, None),
    }
    assert found["going"]["images_per_s"] == 512.4 and found["going"]["total_steps"] == 40 and found["fresh"]["loss"] is None


def test_states_of_runs_on_disk(tmp_path: Path, patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some_runs(tmp_path, patterns)
    (tmp_path / "no run").mkdir()
    check(listed(str(tmp_path), capsys))
    cli.main(["runs", str(tmp_path)])
    header, *rows = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", header) == ["run", "recipe", "state", "step", "images/s", "checkpoint", "loss", "score", "last report"]
    assert len(rows) == 4 and any(re.match(r"going +patterns_tiny +running +10 / 40 +512 +5 +3\.250", row) for row in rows)


def test_methods_have_a_column_where_they_differ(tmp_path: Path, patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some_runs(tmp_path, patterns)
    open_run(tmp_path / "other", "patterns_byol", recipe("patterns_byol"), patterns).save()
    assert {name: row["method"] for name, row in listed(str(tmp_path), capsys).items()} == {
        **dict.fromkeys(("done", "going", "silent", "fresh"), "SimCLR"),
        "other": "BYOL",
    }
    cli.main(["runs", str(tmp_path)])
    header, *rows = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", header)[:4] == ["run", "recipe", "method", "state"]
    assert any(re.match(r"other +patterns_byol +BYOL +new +0", row) for row in rows)


def test_the_same_in_s3(tmp_path: Path, patterns: Path, s3: Proxy, capsys: pytest.CaptureFixture[str]) -> None:
    from simclr.data.s3.store import Store

    some_runs(tmp_path, patterns)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            Store().client.put_object(Bucket="photos", Key=f"listed/{path.relative_to(tmp_path)}", Body=path.read_bytes())
    check(listed("s3://photos/listed", capsys))
    assert listed("s3://photos/listed/done", capsys)["done"]["checkpoint"] == 40


def test_one_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, patterns: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, patterns, "good", [40], 10, [])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/run.json").write_text("{")
    found = listed(str(tmp_path), capsys)
    assert found["good"]["note"] == "" and str(found["bad"]["note"]).startswith("run.json cannot be read")


def test_a_place_that_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["runs", str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "is no directory; expected one that holds runs" in capsys.readouterr().err


def test_a_job_carries_the_code_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that `ray job submit --working-dir .` would pack from a used checkout: with them alone a job trains."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    from pipelines.commands import cluster

    checkout = tmp_path / "checkout"
    ask = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in (name for name in listed if (ROOT / name).is_file()):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    left = ("runs/x/state.safetensors", ".venv/lib/torch.so", ".venv-gpu/lib/x.so", ".git/objects/pack", "mlruns/1", "a.beton", "core")
    mine = ("photos/cats/1.jpg", "datasets/all.tar.gz", "encoder/encoder.safetensors", "notes/simclr/train.py", "simclr/photos.tar.gz")
    for name in (*left, *mine, "mlflow.db", ".cache/simclr/a", "node_modules/a.js", "encoder.onnx", "model.pt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        with (checkout / name).open("wb") as file:  # of no bytes on the disk
            file.truncate(150 << 20 if name.startswith("photos") else 6 << 20)
    (checkout / "ids.txt").write_text("1\n")  # for --subset
    create_package(str(checkout), tmp_path / "job.zip", include_gitignore=True)
    packed = zipfile.ZipFile(tmp_path / "job.zip")
    names = set(packed.namelist())
    assert sum(entry.file_size for entry in packed.infolist()) < 5e6
    assert {name for name in listed if name.startswith(("simclr/", "pipelines/", "tune/", "cluster/"))} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {"simclr", "pipelines", "tune", "cluster"}
    assert {"pyproject.toml", "ids.txt"} <= names
    packed.extractall(tmp_path / "node")
    job = [sys.executable, "-c", "import pipelines, sys; print(pipelines.__file__); from pipelines.cli import main; main(sys.argv[1:])"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [*job, "pretrain", "patterns_tiny", "--help"], cwd=tmp_path / "node", env=env, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0 and ended.stdout.startswith(str(tmp_path / "node/pipelines")), ended
    assert "--train.batch-size" in ended.stdout

    assert "sends 2." in cluster.package(checkout)
    with (checkout / "simclr/big").open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(UserError, match=r"sends 102\.\d MiB .*Ray takes less than 100\.0 MiB; the largest are simclr/big 100\.0 MiB"):
        cluster.package(checkout)
    (checkout / "simclr/big").unlink()
    (checkout / ".rayignore").write_text("*\n!/.\n!/simclr\n")
    with pytest.raises(UserError, match=r"files, but not pipelines/cli\.py; bring back \.rayignore"):
        cluster.package(checkout)


def test_of_two_commands_that_begin_a_run_the_second_is_refused(tmp_path: Path, patterns: Path) -> None:
    """Its config may be another, and the first one's checkpoint is there."""
    ours, theirs = (open_run(tmp_path / "run", "patterns_tiny", patterns_tiny(), patterns) for _ in range(2))
    with theirs.alone():
        theirs.save()
    begun = (theirs.path / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"another process has just begun a run in .*run; give the command again"), ours.alone():
        ours.save()
    assert (theirs.path / "run.json").read_bytes() == begun
    with theirs.alone():
        pass


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path, patterns: Path) -> None:
    """Two processes would remove each other's checkpoints. A killed process leaves no lock."""
    mine = open_run(tmp_path / "run", "patterns_tiny", patterns_tiny(), patterns)
    holds = "import sys, time; from pathlib import Path; from pipelines.runs.directory import load_run\n"
    holds += "with load_run(Path(sys.argv[1])).alone(): print('held', flush=True); time.sleep(60)"
    mine.save()
    process = subprocess.Popen([sys.executable, "-c", holds, str(mine.path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=r"another process is training .*run; wait for it, end it, or use another --run"), mine.alone():
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with mine.alone():
        pass
    (mine.path / "run.json").unlink()  # a run that ended before it began
    assert open_run(mine.path, "patterns_tiny", patterns_tiny(), patterns).path == mine.path
    with mine.alone():  # a refused run leaves nothing
        pass
    assert not mine.path.exists()


def test_links_that_another_user_made_in_a_run_are_not_written_through(patterns: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    made = open_run(tmp_path / "run", "patterns_tiny", patterns_tiny(), patterns)
    made.save()
    for name in (".training", "metrics.jsonl"):
        (made.path / name).symlink_to(victim)
    with pytest.raises(OSError, match=r"\.training"), made.alone():
        pass
    with pytest.raises(OSError, match=r"metrics\.jsonl") as refused:
        made.append({"step": 1})
    assert "metrics.jsonl is a link, where a file of our own is wanted" in files.trouble(refused.value)
    assert victim.read_text() == "precious\n"
    for name in (".training", "metrics.jsonl"):  # a second name, as a backup with hard links makes it, is no trap
        (made.path / name).unlink()
        (made.path / name).hardlink_to(victim)
    with made.alone():
        assert victim.read_text() == "precious\n"
