"""The parts of a prepare: how a source is cut, what counts as done, and lists that are made of notes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from simclr.data import copies, outputs, shards
from simclr.data.manifest import Manifest, read_manifest, read_names
from simclr.data.note import SPLITS, opened
from simclr.data.options import Options
from simclr.data.shard_parts import make_parts, plan
from simclr.data.sources.open import open_source
from simclr.data.sources.source import Item, Part, Source
from simclr.data.survey import Choice
from simclr.data.verify import verify
from simclr.errors import UserError
from tests.simclr.data.test_archives import packed
from tests.simclr.data.test_shards import encoded, noise
from tests.support.s3 import Proxy
from tests.support.sources import source_of

MIB = Options(shard_mib=1)


def prepare(source: Source, out: Path, options: Options = MIB, **more: Any) -> Manifest:
    return shards.prepare(source, out, options, 2, lambda done: None, **more)


def photos(count: int, side: int = 150, first: int = 0, split: str = "train") -> list[Item]:
    return [Item(split, "ab"[i % 2], f"{split}-{first + i}.jpg", encoded(noise(side, side, first + i), quality=95)) for i in range(count)]


def sized(each: float, unnamed: int = 0) -> Choice:
    return Choice("jpeg", 256, {}, "", (), each, unnamed)


def cut(parts: list[Part], choice: Choice) -> list[list[tuple[str, int, int]]]:
    source = Source(spec="s", parts=parts, read=lambda part: iter(()))
    return [[(run.part.name, run.begin, run.end) for run in runs] for runs in plan(source, choice, MIB)]


def named(name: str, count: int) -> Part:
    return Part(name, tuple(f"{name}/{i}" for i in range(count)))


def test_a_plan_cuts_files_to_measure_and_leaves_whole_what_cannot_be_divided() -> None:
    hundred = sized((1 << 20) / 100)
    assert cut([named("a", 150), named("b", 130)], hundred) == [
        [("a", 0, 100)],
        [("a", 100, 150), ("b", 0, 50)],
        [("b", 50, 130)],
    ]
    assert cut([named("a", 30), named("tar", 5000), named("b", 10)], hundred) == [[("a", 0, 30)], [("tar", 0, 5000)], [("b", 0, 10)]]
    inner = [Part(f"{i}.tar") for i in range(7)]
    assert [len(runs) for runs in cut(inner, sized((1 << 20) / 100, 33))] == [3, 3, 1]
    assert [len(runs) for runs in cut(inner, sized((1 << 20) / 100, 100))] == [1] * 7
    assert max(len(runs) for runs in cut([Part(f"{i}.tar") for i in range(5000)], sized(1 << 30, 1))) == 5


def test_pictures_that_are_counted_when_they_are_read_come_in_the_order_of_the_source(tmp_path: Path) -> None:
    """Five inner archives, of which two hold both splits; the parts are those of the plan, the order is the source's."""
    inner = {f"{n}.tar": [*photos(12, 100, 20 * n), *photos(n % 2 * 5, 100, 20 * n, "test")] for n in range(5)}
    source = Source(spec="s", parts=[Part(name) for name in inner], read=lambda part: iter(inner[part.name]))
    manifest = prepare(source, tmp_path / "out")
    assert [len(read_names(tmp_path / "out", split, manifest.examples(split)) or ()) for split in SPLITS] == [60, 10]
    for split in SPLITS:
        expected = [item.name for items in inner.values() for item in items if item.split == split]
        assert read_names(tmp_path / "out", split, manifest.examples(split)) == expected
    assert not any(found.wrong for found in verify(tmp_path / "out"))


def test_a_part_that_turns_out_larger_rolls_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample has small pictures alone."""
    monkeypatch.setattr("simclr.data.survey.SAMPLE", 2)
    items = [*photos(1, 80), *photos(60, 200, 1), *photos(1, 80, 61)]
    source = source_of(items)
    monkeypatch.setattr(Source, "sample", lambda self, count: iter([items[0], items[-1]]))
    manifest = prepare(source, tmp_path / "out")
    names = [shard.name for shard in manifest.splits["train"]]
    assert names[:2] == ["train-00000.beton", "train-00000-1.beton"] and len(names) > 2
    assert read_names(tmp_path / "out", "train", 62) == [item.name for item in items]
    assert max(shard.bytes for shard in manifest.shards) < 1.25 * 2**20 + 2 * (2 << 20)  # and the pages of 2 MiB
    assert not any(found.wrong for found in verify(tmp_path / "out"))


def stopped(source: Source, out: Path) -> list[Path]:
    """The notes that a prepare leaves which ends before the manifest."""

    def stop(manifest: Any, *rest: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write_manifest", stop)
        prepare(source, out)
    return sorted(out.glob(".writing-part-*.parquet"))


def test_what_is_no_note_of_ours_counts_as_none(tmp_path: Path) -> None:
    source, out = source_of(photos(90)), tmp_path / "out"
    notes = stopped(source, out)
    key = json.loads(pyarrow.parquet.read_schema(notes[0]).metadata[b"simclr"])["key"]
    assert opened(notes[0], key, 0) is not None
    assert opened(notes[0], key, 1) is None and opened(notes[0], "another", 0) is None
    table = pyarrow.parquet.read_table(notes[0])
    about = json.loads(table.schema.metadata[b"simclr"])
    wrong: dict[str, dict[str, Any]] = {
        "a path": {"shards": [[about["shards"][0][0], "../train-00000.beton", *about["shards"][0][2:]]]},
        "no shards": {"shards": []},
        "more samples": {"shards": [[*about["shards"][0][:4], 10**6]]},
        "no number": {"rows": "many"},
        "fewer classes": {"labels": []},
    }
    for name, change in wrong.items():
        path = tmp_path / "wrong.parquet"
        pyarrow.parquet.write_table(table.replace_schema_metadata({b"simclr": json.dumps(about | change)}), path)
        assert opened(path, key, 0) is None, name
    for content in (b"", b"PAR1 no table PAR1", notes[0].read_bytes()[:-9]):
        path.write_bytes(content)
        assert opened(path, key, 0) is None
    path.unlink()
    path.symlink_to(notes[0])
    assert opened(path, key, 0) is None
    if os.geteuid() == 0:
        path.unlink()
        shutil.copy(notes[0], path)
        os.chown(path, 12345, -1)
        assert opened(path, key, 0) is None
    (out / notes[1].name).write_bytes(b"damaged")
    went_on: list[int] = []
    whole = prepare(source, tmp_path / "whole")
    assert prepare(source, out, resumed=went_on.append) == whole and 0 < went_on[0] < 90
    assert read_manifest(out) == whole and not any(found.wrong for found in verify(out))


def test_what_an_earlier_version_left_begins_again(tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[str]()
    out.mkdir()
    for name in (".writing-train-00000.beton", "train-00001.beton", "skipped.csv"):
        (out / name).write_bytes(b"of before")
    for number in range(2):
        (out / f".writing-train-0000{number}.beton.json").write_text("{}")
    manifest = prepare(source_of(photos(30)), out, says=said.append)
    assert said == [f"the unfinished shards in {out} are of another source or version, or of other options; it begins again"]
    assert manifest == prepare(source_of(photos(30)), tmp_path / "whole")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_a_sample_of_an_earlier_version_is_taken_again(tmp_path: Path) -> None:
    """It did not say how many pictures make a shard."""
    source, out = source_of(photos(90)), tmp_path / "out"
    stopped(source, out)
    known = json.loads((out / ".writing-choice.json").read_text())
    for name in ("size_px", "mean_bytes", "images_unnamed"):
        del known[name]
    (out / ".writing-choice.json").write_text(json.dumps(known))
    assert prepare(source, out) == prepare(source, tmp_path / "whole")


def test_a_node_with_another_disk_says_so(tmp_path: Path) -> None:
    source = source_of(photos(4))
    settings: dict[str, Any] = {}

    def run(make: Any, given: Any, parts: Any) -> Any:
        settings.update(json.loads(json.dumps(given)) | {"threads": 1})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", elsewhere=shards.Elsewhere(run=run, reading=shards.Reading()))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"does not see .*/out as the node does that runs this; give --out on a disk that all nodes share"):
        make_parts(settings)


def test_a_node_with_another_copy_of_an_archive_says_so(tmp_path: Path) -> None:
    """Before it writes a picture, whose class and caption would be another's."""

    def write(first: int) -> Source:
        return open_source(str(packed(tmp_path / "a.tar", {f"{i}.jpg": encoded(noise(150, 150, first + i), quality=95) for i in range(4)})))

    def run(make: Any, given: Any, parts: Any) -> Any:
        each = make(json.loads(json.dumps(given)) | {"threads": 1})
        write(10)
        for part in parts:
            yield part, each(json.loads(json.dumps(part)))

    with pytest.raises(UserError, match=r"sees another .*/a.tar than was listed: names, sizes or contents of its files differ"):
        prepare(write(0), tmp_path / "out", elsewhere=shards.Elsewhere(run=run, reading=shards.Reading()))


def test_one_prepare_at_a_time_writes_to_an_address(s3: Proxy, tmp_path: Path) -> None:
    out = Path("s3://photos/alone")

    def second(done: int) -> None:
        if done == 1:
            with pytest.raises(
                UserError, match=r"s3://photos/alone is being written by .* \(process \d+, for .*, last seen .*; wait for it"
            ):
                prepare(source_of(photos(4)), out)

    shards.prepare(source_of(photos(4)), out, MIB, 1, second)
    with outputs.opened(out) as output:
        assert isinstance(output, outputs.Prefix)
        assert sorted(o.name for o in output.store.listing(output.at)) == ["manifest.json", "names-train.txt", "train-00000.beton"]
        gone = {"who": "a@another", "pid": 1, "process": "elsewhere", "length_s": 0.5}
        (output.scratch / "mark").write_text(json.dumps(gone))
        output.store.upload(output.scratch / "mark", output.at / ".parts" / "writer.json")
        with output.alone(lambda line: None):  # it gives no sign for as long as its lease has
            pass
        assert ".parts/writer.json" not in [o.name for o in output.store.listing(output.at)]


def naive(samples: list[tuple[str, int, str | None]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of places, by a double loop."""
    same, conflicts = [], []
    for i, (_, digest, label) in enumerate(samples):
        earlier = [j for j in range(i) if samples[j][1] == digest]
        if earlier:
            same.append((i, earlier[0]))
        labelled = [j for j in earlier if samples[j][2] is not None]
        if label is not None and labelled and samples[labelled[0]][2] != label:
            conflicts.append((i, labelled[0]))
    return same, conflicts


@pytest.mark.parametrize("at_once", [1 << 22, 7])
def test_copies_are_those_of_a_double_loop_in_any_number_of_buckets(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(copies, "_AT_ONCE", at_once)
    draw = np.random.default_rng(0)
    rows = [(SPLITS[draw.integers(2)], int(draw.integers(40)), (None, "a", "b", "c")[draw.integers(4)]) for _ in range(300)]

    class Made:
        """A note of some rows."""

        def __init__(self, rows: list[tuple[str, int, str | None]]) -> None:
            self.rows = rows
            self.about = SimpleNamespace(labels=["c", "a", "b"])

        def columns(self, *names: str) -> list[Any]:
            labels = {"c": 0, "a": 1, "b": 2, None: -1}
            of = {
                "split": np.array([SPLITS.index(split) for split, _, _ in self.rows], np.int8),
                "label": np.array([labels[label] for _, _, label in self.rows], np.int32),
                "digest": np.array([digest for _, digest, _ in self.rows], np.uint64),
                "reason": np.array([""] * len(self.rows), object),
            }
            return [of[name] for name in names]

    notes: Any = [Made(rows[:120]), Made(rows[120:])]
    examples = {split: sum(of == split for of, _, _ in rows) for split in SPLITS}
    in_order = [row for split in SPLITS for row in rows if row[0] == split]
    pairs = copies.copies(notes, examples)
    assert (list(map(tuple, pairs.same.tolist())), list(map(tuple, pairs.conflicts.tolist()))) == naive(in_order)
    assert len(pairs.conflicts) > 20
