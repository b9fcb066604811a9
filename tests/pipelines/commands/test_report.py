"""A run's page from files that `evaluate` did not write."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.commands import report, runs
from pipelines.commands.report import _ARRAYS, _pictures
from pipelines.runs.directory import load_run
from simclr.errors import UserError
from tests.support.paths import GOLDEN

_SIDES = {"g": 2, "m": 3, "k": 4, "n": 5, "a": 3}


def written(path: Path, **changed: Any) -> Path:
    """pictures.npz of unlabelled images of 8 px, with some arrays changed."""
    fills: dict[type[np.generic], tuple[Any, Any]] = {np.uint8: (0, np.uint8), np.str_: ("a/b.jpg", "U9"), np.float32: (0, np.float32)}
    arrays = {
        name: np.full([_SIDES.get(side, 8) if isinstance(side, str) else side for side in shape], *fills.get(kind, (-1, kind)))
        for name, (shape, kind) in _ARRAYS.items()
    }
    np.savez_compressed(path, **{**arrays, **changed})
    return path


def test_pictures_come_back(tmp_path: Path) -> None:
    gallery, neighbours, points, attention, painted = _pictures(written(tmp_path / "pictures.npz"), 3)
    assert gallery.shape == (2, 3, 8, 8, 3) and neighbours.images.shape == (3, 4, 8, 8, 3) and points.xy.shape == (5, 2)
    assert attention.shape == (3, 8, 8, 8) and painted.shape == (8, 3, 8, 8, 3)


def test_pictures_of_earlier_versions_have_no_names(tmp_path: Path) -> None:
    with np.load(written(tmp_path / "pictures.npz")) as file:
        arrays = {name: file[name] for name in file if not name.endswith("names") and name not in ("attention", "painted")}
        assert file["neighbour_names"][2, 3] == "a/b.jpg"
    np.savez_compressed(tmp_path / "pictures.npz", **arrays)
    _, neighbours, _, attention, painted = _pictures(tmp_path / "pictures.npz", 3)
    assert attention.shape == (0, 0, 0, 0) and painted.shape == (0, 3, 0, 0, 3)
    assert neighbours.names is not None and neighbours.names.shape == (3, 4) and not neighbours.names.any()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"gallery": np.zeros((2, 3, 8, 8), np.uint8)}, r"gallery is uint8 \(2, 3, 8, 8\)"),
        ({"queries": np.zeros((2, 8, 8, 3), np.uint8)}, "query_labels is int64"),
        ({"map": np.zeros((5, 2), "S3")}, "map is "),
        ({"thumbs": np.zeros((5, 8, 8, 3), np.float64)}, "thumbs is float64"),
        ({"neighbours": np.zeros((3, 4, 8, 0, 3), np.uint8)}, r"neighbours is uint8 \(3, 4, 8, 0, 3\)"),
        ({"thumbs": np.zeros((5, 0, 8, 3), np.uint8)}, "thumbs has no pixels"),
        ({"attention": np.zeros((2, 1, 4, 4), np.float32)}, r"attention \(2, 1, 4, 4\) has no shares of 3 images"),
        ({"attention": np.full((3, 1, 4, 4), np.nan, np.float32)}, r"attention \(3, 1, 4, 4\) has no shares of 3 images"),
        ({"attention": np.zeros((3, 1, 4, 0), np.float32)}, r"attention \(3, 1, 4, 0\) has no shares of 3 images"),
        ({"painted": np.zeros((3, 2, 8, 8, 3), np.uint8)}, r"painted is uint8 \(3, 2, 8, 8, 3\)"),
        ({"painted": np.zeros((3, 3, 8, 0, 3), np.uint8)}, "painted has no pixels"),
        ({"map_labels": np.array([0, 1, 2, 3, 3])}, "map_labels has classes from 0 to 3, the data has 3"),
        ({"map": np.array([[{}, {}]] * 5, dtype=object)}, "allow_pickle"),
    ],
)
def test_pictures_of_other_shapes_are_a_sentence(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    path = written(tmp_path / "pictures.npz", **changed)
    with pytest.raises(UserError, match=f"pictures.npz is damaged .*{sentence}.*; `simclr evaluate .*` makes it again"):
        _pictures(path, 3)


def test_pictures_that_unpack_to_gigabytes_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "pictures.npz", gallery=np.zeros((1, 3, 1000, 1000, 3), np.uint8))
    monkeypatch.setattr(report, "_MOST_BYTES", 1 << 20)
    monkeypatch.setattr(np, "load", lambda path: pytest.fail("it was read"))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="it would unpack to 9 MiB"):
        _pictures(path, 3)


@pytest.mark.parametrize(
    "line",
    ['{"step": 1, "train/loss": "low"}', '{"step": 1, "epoch": [1]}', '{"step": true}', "[" * 100_000, "3", '{"step": ' + "9" * 5000 + "}"],
)
def test_a_line_that_is_no_report_is_named(tmp_path: Path, line: str) -> None:
    with tarfile.open(GOLDEN / "before.tar.xz") as archive:
        archive.extract("before/pretrained/run.json", tmp_path, filter="data")
    run = load_run(tmp_path / "before" / "pretrained")
    rows = [{"step": 1, "train/loss": float("nan"), "stragglers": "rank 1 on a host"}, {"step": 2, "train/loss": 3}]
    (run.path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert [row["step"] for row in run.history()] == [1, 2]
    run.fill([{"step": 2, "train/loss": 9.0}, {"step": 3, "train/loss": 1.0, "mark": "000-s0"}])
    assert [row["train/loss"] for row in run.history()[1:]] == [3, 1.0]
    (run.path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 3, is no report: .*; remove that line"):
        run.history()


@pytest.mark.parametrize("created", [-1, 1e300, 2**63])
def test_times_that_have_no_date_are_said(tmp_path: Path, created: float) -> None:
    with tarfile.open(GOLDEN / "before.tar.xz") as archive:
        archive.extract("before/pretrained/run.json", tmp_path, filter="data")
    path = tmp_path / "before" / "pretrained" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"created": created}))
    with pytest.raises(UserError, match=r"run.json is damaged: created is .*, expected a Unix time"):
        load_run(path.parent)
    one = runs.line("pretrained", path.read_text(), "", [])
    assert one.note == "its times are no Unix times" and runs.table([[one]])
