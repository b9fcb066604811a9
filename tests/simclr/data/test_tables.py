"""Parquet and Arrow tables of pictures: columns, class names, splits, rows without bytes, damage."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from simclr.data.sources.parquet import is_parquet_folder, parquet_tree, tables_tree
from simclr.data.sources.source import Part, Source
from simclr.errors import UserError
from tests.simclr.data.test_archives import read

IMAGE = {"_type": "Image"}


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def cells(shades: Sequence[int], names: Sequence[str | None]) -> list[dict[str, Any]]:
    return [{"bytes": png(shade), "path": name} for shade, name in zip(shades, names, strict=True)]


def table(columns: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> pyarrow.Table:
    made = pyarrow.table(dict(columns))
    noted = {"huggingface": json.dumps({"info": {"features": dict(features)}})} if features else None
    return made.replace_schema_metadata(noted)


def written(path: Path, made: pyarrow.Table, rows: int = 3) -> Path:
    """`made` as a Parquet file, or as an Arrow stream or file, in groups of `rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(made, path, row_group_size=rows)
        return path
    kind = pyarrow.ipc.new_file if "feather" in path.name else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as file, kind(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=rows)
    return path


def classes(*names: str) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": list(names)}


def test_a_repository_of_hugging_face_as_it_lies_on_a_disk(tmp_path: Path) -> None:
    """Two files of the training split, whose rows have no names; a validation split; a test split without labels (−1)."""
    features = {"img": IMAGE, "label": classes("plane", "car", "bird")}
    for number, labels in ((0, [2, 0, 1, 2, 0]), (1, [1, 1, -1, 0])):
        shades = [100 * number + i for i in range(len(labels))]
        made = table({"img": cells(shades, [None] * len(labels)), "label": labels}, features)
        written(tmp_path / f"data/train-0000{number}-of-00002.parquet", made)
    for split, label in (("validation", 0), ("test", -1)):
        made = table({"img": cells([200, 201], ["x.png", f"{split}.png"]), "label": [label, label]}, features)
        written(tmp_path / f"data/{split}-00000-of-00001.parquet", made)
    (tmp_path / "README.md").write_text("---\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/train.parquet").write_bytes(b"half fetched")
    tree = parquet_tree(tmp_path)
    expected = {f"data/train/00000{i}.png": png(i) for i in range(5)}
    expected |= {f"data/train/train-00001-of-00002_00000{i}.png": png(100 + i) for i in range(4)}
    expected |= {f"data/{split}/{name}.png": png(200 + i) for split in ("validation", "test") for i, name in enumerate(("x", split))}
    assert read(tree) == expected
    assert [len(part.names) for part in tree.parts] == [2, 3, 2, 3, 1, 2]
    labels = ["bird", "plane", "car", "bird", "plane", "car", "car", None, "plane"]
    stated = dict(zip(expected, labels, strict=False))
    assert tree.stated == {k: v for k, v in stated.items() if v} | {f"data/validation/{n}.png": "plane" for n in ("x", "validation")}
    assert not tree.notes and tree.identity and tree.times
    some = tuple(tree.parts[1].names[i] for i in (0, 2))
    assert list(tree.read(Part(tree.parts[1].name, some))) == [(name, expected[name]) for name in some]
    source = Source(spec="", parts=tree.parts, read=tree.read)  # type: ignore[arg-type]
    assert [name for name, _ in source.sample(4)] == [list(read(tree))[i] for i in (0, 3, 6, 9)]  # type: ignore[misc]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [tree] * 4)) == [expected] * 4


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "feather.arrow"])
def test_a_dataset_saved_to_a_disk(tmp_path: Path, name: str) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, shade in (("train", 0), ("test", 50)):
        made = table(
            {"image": cells([shade, shade + 1, shade + 2, shade + 3], [f"{i}.png" for i in range(4)]), "label": [0, 1, 1, None]},
            {"image": IMAGE, "label": classes("no", "yes")},
        )
        written(tmp_path / split / name, made)
    written(tmp_path / "train/cache-0123456789.arrow", table({"x": [1]}))
    tree = parquet_tree(tmp_path)
    folder = name.partition("-")[0].removesuffix(".arrow")
    assert read(tree) == {f"{split}/{folder}/{i}.png": png(s + i) for split, s in (("test", 50), ("train", 0)) for i in range(4)}
    assert tree.stated == {f"{split}/{folder}/{i}.png": "no" if i == 0 else "yes" for split in ("train", "test") for i in range(3)}
    assert len(tree.parts) == 4
    alone = parquet_tree(tmp_path / "test" / name)  # the name of a lone file is no folder
    assert set(read(alone)) == {f"{i}.png" for i in range(4)}
    assert is_parquet_folder(["README.md", f"test/{name}"]) and not is_parquet_folder(["train/cache-01.arrow", ".cache/x.parquet", "a.jpg"])


def test_of_several_labels_the_finer_ones_are_the_classes(tmp_path: Path) -> None:
    columns = {"img": cells([1, 2, 3, 4], [None] * 4), "mask": cells([5, 6, 7, 8], [None] * 4)}
    labels = {"coarse_label": [0, 0, 1, 1], "fine_label": [3, 0, 2, 1], "label": [[0], [1], [0, 1], []]}
    features = {"img": IMAGE, "mask": IMAGE, "fine_label": classes("a", "b", "c", "d"), "coarse_label": classes("p", "q")}
    tree = tables_tree("", {"x": written(tmp_path / "x.parquet", table(columns | labels, features))})
    assert list(tree.stated.values()) == ["d", "a", "c", "b"]
    assert tree.notes == (
        "pictures are those of the column img; mask are left out",
        "the column label (list<element: int64>) states no single class a row, and is left out",
        "classes are those of the column fine_label (4); coarse_label (2) is left out",
    )
    plain = {"image": [png(i) for i in range(4)], "class": [0, 1, 2, 2], "class_name": ["x", "y", "z", "z"], "label": [0, 0, 1, 1]}
    tree = tables_tree("", {"x": written(tmp_path / "plain.parquet", table(plain))})
    assert tree.stated == {f"x/00000{i}.png": name for i, name in enumerate("xyzz")}  # names before numbers of as many classes


def test_pictures_are_found_without_a_word_about_columns(tmp_path: Path) -> None:
    """Bytes that are no pictures (a hash, a sound) are not taken for them, whatever the column is called."""
    columns = {"data": [b"hash", b"hush"], "photo": [None, png(2)], "audio": [{"bytes": b"RIF", "path": "a.wav"}] * 2, "y": ["b ", ""]}
    tree = tables_tree("", {"a/x": written(tmp_path / "x.parquet", table(columns))})
    assert read(tree) == {"a/x/000000.png": b"", "a/x/000001.png": png(2)} and tree.stated == {"a/x/000000.png": "b"}
    with pytest.raises(UserError, match="no column of pictures, only data, y; expected a column of encoded pictures"):
        tables_tree("", {"x": written(tmp_path / "y.parquet", table({"data": [b"hash"], "y": ["b"]}))})
    other = written(tmp_path / "other.parquet", table({"image": [png(1)]}))
    with pytest.raises(UserError, match=r"other.parquet has no column photo, which .*x.parquet has"):
        tables_tree("", {"x": tmp_path / "x.parquet", "y": other})
    empty = written(tmp_path / "empty.parquet", table(columns).slice(0, 0))
    assert len(read(tables_tree("", {"e": empty, "x": tmp_path / "x.parquet"}))) == 2


def test_pictures_whose_names_are_not_their_own_are_called_by_their_rows(tmp_path: Path) -> None:
    for names in (["a.png"] * 3, ["a.png", "b", "c.png"], ["a.png", None, "c.png"]):
        made = table({"image": cells([1, 2, 3], names), "label": ["x", "y", "z"]})
        tree = tables_tree("", {"": written(tmp_path / "x.parquet", made)})
        assert read(tree) == {f"00000{i}.png": png(i + 1) for i in range(3)} and list(tree.stated.values()) == ["x", "y", "z"]


def test_a_row_without_bytes_names_a_file_below_the_table(tmp_path: Path) -> None:
    root = tmp_path / "data"
    paths = ["images/a.png", "images/gone.png", "../secret.png", "images/b.png"]
    made = table({"image": [{"bytes": png(9) if "b.png" in path else None, "path": path} for path in paths]}, {"image": IMAGE})
    file = written(root / "x.parquet", made)
    (root / "images").mkdir()
    (root / "images/a.png").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    found = read(tables_tree("", {"x": file}))
    assert found == {
        "x/a.png": root / "images/a.png",
        "x/gone.png": root / "images/gone.png",  # skipped where it is encoded, with the reason
        "x/secret.png": b"",
        "x/b.png": png(9),
    }


def test_a_damaged_table_and_folders_of_tables_called_alike(tmp_path: Path) -> None:
    file = written(tmp_path / "en/x.parquet", table({"image": [png(i) for i in range(9)], "label": list(range(9))}))
    other = written(tmp_path / "de/x.parquet", table({"image": [png(i) for i in range(9)]}))
    tree = parquet_tree(tmp_path)
    assert tree.notes == ("tables called alike lie in 2 folders (de, en) and all are read; give one to read it alone",)
    assert len(read(tree)) == 18
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"en/x.parquet ends early or is damaged \(.*\); fetch it again"):
        parquet_tree(tmp_path)
    stream = written(tmp_path / "x.arrow", table({"image": [png(i) for i in range(9)]}))
    stream.write_bytes(stream.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"x.arrow and .*x.parquet are called alike; move one of them away"):
        written(tmp_path / "x.parquet", table({"image": [png(1)]}))
        parquet_tree(tmp_path)
    with pytest.raises(UserError, match=r"x.arrow ends early or is damaged"):
        tables_tree("", {"x": stream})
    damaged = bytearray(other.read_bytes())
    damaged[40:200] = bytes(160)
    other.write_bytes(damaged)
    with pytest.raises(UserError, match=r"de/x.parquet ends early or is damaged"):
        read(tables_tree("", {"x": other}))
