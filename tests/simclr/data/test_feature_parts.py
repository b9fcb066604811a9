"""Features as Parquet parts: what was written is read, in order, and what is none of ours, or of another job, is refused."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from simclr.data.feature_parts import About, failures, merge, open_features, write_failed, write_part
from simclr.errors import UserError

ABOUT = About(encoder="ab", preprocessing={"size_px": 32}, source="photos", d=4, key="k")
H = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)


def columns(first: int, count: int) -> dict[str, list[Any]]:
    ids = list(range(first, first + count))
    return {
        "id": ids,
        "split": ["train"] * count,
        "path": [f"a/{i}.jpg" for i in ids],
        "sha256": ["0" * 64] * count,
        "label": [None if i % 2 else "cat" for i in ids],
        "width": [640] * count,
        "height": [480] * count,
    }


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    write_part(tmp_path / "part-00000.parquet", ABOUT, columns(0, 6), H[:6])
    write_part(tmp_path / "part-00001.parquet", ABOUT, columns(6, 4), H[6:])
    write_failed(tmp_path / "failed-00001.parquet", ABOUT, [(11, "train", "z.jpg", None, "the file is empty")])
    return tmp_path


def test_rows_come_back_in_order(parts: Path) -> None:
    table = open_features(parts)
    assert (len(table), table.d, table.about) == (10, 4, ABOUT)
    assert table.table(["id", "label"]) == {name: columns(0, 10)[name] for name in ("id", "label")}
    blocks = list(table.blocks(4))
    assert [first for first, _ in blocks] == [0, 4, 6]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), H)
    np.testing.assert_array_equal(table.take(np.array([7, 2, 9, 0, 2])), H[[7, 2, 9, 0, 2]])
    assert table.failures() == [{"id": 11, "split": "train", "path": "z.jpg", "label": None, "reason": "the file is empty"}]
    merge(table.parts, parts / "all.parquet")
    np.testing.assert_array_equal(open_features(parts / "all.parquet").take(np.arange(10)), H)
    with pytest.raises(UserError, match="features have no column class; expected id, split"):
        table.table(["class"])


def test_names_of_any_bytes_are_written_out(tmp_path: Path) -> None:
    strange = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    write_part(tmp_path / "part-00000.parquet", ABOUT, columns(0, 1) | {"path": [strange], "label": [strange]}, H[:1])
    write_failed(tmp_path / "failed-00000.parquet", ABOUT, [(1, "train", strange, None, strange)])
    table = open_features(tmp_path)
    assert table.table(["path"])["path"] == ["caf\\udce9.png"] and table.failures()[0]["reason"] == "caf\\udce9.png"


def test_many_parts_are_merged_with_few_open_files(tmp_path: Path) -> None:
    paths = [tmp_path / f"part-{i:05d}.parquet" for i in range(40)]
    for i, path in enumerate(paths):
        write_part(path, ABOUT, columns(i, 1), H[:1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 12, hard))
    try:
        merge(paths, tmp_path / "all.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_features(tmp_path / "all.parquet").table(["id"])["id"] == list(range(40))


def test_other_tools_read_them(parts: Path) -> None:
    table = pyarrow.parquet.read_table(parts / "part-00001.parquet")
    assert table.schema.field("feature").type == pyarrow.list_(pyarrow.float32(), 4)
    assert table.column("feature")[1].as_py() == H[7].tolist() and table.column("path")[0].as_py() == "a/6.jpg"


def test_half_precision_rounds_and_is_read_as_float32(tmp_path: Path) -> None:
    write_part(tmp_path / "part-00000.parquet", replace(ABOUT, dtype="float16"), columns(0, 10), H)
    (_, found), *_ = open_features(tmp_path).blocks()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, H.astype(np.float16))


def test_what_is_none_of_ours_is_one_sentence(parts: Path, tmp_path: Path) -> None:
    write_part(parts / "part-00002.parquet", replace(ABOUT, key="other"), columns(10, 2), H[:2])
    with pytest.raises(UserError, match=r"part-00002.parquet has features of another job than part-00000.parquet beside it"):
        open_features(parts)
    write_part(parts / "part-00002.parquet", ABOUT, columns(10, 2), np.full((2, 4), np.nan, np.float32))
    with pytest.raises(UserError, match=r"part-00002.parquet has features that are no finite numbers"):
        list(open_features(parts).blocks())
    (parts / "part-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="is no Parquet file that can be read"):
        open_features(parts)
    pyarrow.parquet.write_table(pyarrow.table({"feature": [1.0]}), parts / "part-00002.parquet")
    with pytest.raises(UserError, match="has no features of `simclr embed`"):
        open_features(parts)
    (parts / "empty").mkdir()
    with pytest.raises(UserError, match=r"there are no features at .*empty \(no part-00000.parquet\); `simclr embed"):
        open_features(parts / "empty")
    with pytest.raises(UserError, match="is no Parquet file that can be read"):
        failures([tmp_path / "nowhere.parquet"])


def test_a_column_that_unpacks_to_far_more_than_names_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simclr.data.sources.parquet_pages._BOMB_BYTES", 4 << 20)
    count, rows = 200, columns(0, 200)
    rows["path"] = ["a" * (1 << 17)] * count
    path = tmp_path / "part-00000.parquet"
    write_part(path, replace(ABOUT, d=1), rows, np.zeros((count, 1), np.float32))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(UserError, match="bytes of the column path unpack to 25 MiB and 200 values, which no features do"):
        open_features(tmp_path)
