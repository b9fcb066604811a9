"""What a prepare finds out on its way: too many unreadable images, images of several sizes. What is done stays done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simclr.data import shard_parts, shards, survey
from simclr.data.options import Options
from simclr.data.sources.source import Item
from simclr.errors import UserError
from tests.simclr.data.test_junk import encoded
from tests.support.sources import source_of


def damaged(every: int, count: int = 400, begin: int = 0) -> list[Item]:
    """Pictures, every so many of which is no image."""
    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)), "PNG")
    bad = lambda i: i >= begin and i % every == every - 1  # noqa: E731
    return [Item("train", None, f"{i}.png", b"no image" if bad(i) else good) for i in range(count)]


def prepare(source: Any, out: Path, **more: Any) -> Any:
    options = {name: more.pop(name) for name in list(more) if name in Options.__dataclass_fields__}
    return shards.prepare(source, out, Options(**{"shard_mib": 1} | options), 2, more.pop("progress", lambda done: None), **more)


def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = shard_parts.encode

    def counted(item: Item, *rest: Any) -> Any:
        names.append(item.name)
        return real(item, *rest)

    monkeypatch.setattr(shard_parts, "encode", counted)
    return names


def test_too_many_damaged_files_stop_it_at_once_and_more_are_allowed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 % where 1 % may be: it is certain after 5 of the 400, that is after half; then the same command goes on."""
    monkeypatch.setattr(shards, "_ENOUGH", 100)
    items, out = damaged(50), tmp_path / "out"
    names = tried(monkeypatch)
    sentence = (
        r"5 of the first 250 images of made cannot be read, more than 1 % of all 400; the first: 49.png: cannot identify image file; "
        r"most often: cannot identify image file \(5\); mend the source, or allow more with --max-skipped-pct 2 or above; "
        r"the same command then goes on behind the 2\d\d images that are done"
    )
    with pytest.raises(UserError, match=sentence):
        prepare(source_of(items), out)
    assert 250 <= len(names) < 300
    done = len(list(out.glob(".writing-part-*.parquet")))
    assert done >= 2
    with pytest.raises(UserError, match="5 of the first 250"):  # nothing changed
        prepare(source_of(items), out)
    with pytest.raises(UserError, match="8 of 400 images of made cannot be read, more than 1 %; the first"):
        monkeypatch.setattr(shards, "_ENOUGH", 1000)  # so few are all tried
        prepare(source_of(items), out)
    names.clear()
    went_on: list[int] = []
    manifest = prepare(source_of(items), out, max_skipped_pct=2, resumed=went_on.append)
    assert manifest.skipped == 8 and went_on and went_on[0] > 300 and len(names) == 400 - went_on[0]
    assert prepare(source_of(items), tmp_path / "whole", max_skipped_pct=2) == manifest


def test_where_the_number_is_unknown_the_share_counts_from_a_thousand_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_ENOUGH", 100)
    items = damaged(50)
    with pytest.raises(UserError, match="2 of the first 100 images of made cannot be read, more than 1 %; the first"):
        prepare(source_of(items, known=False), tmp_path / "out")
    monkeypatch.undo()
    few = damaged(3, 400, 398)  # the last ones alone: found out at the end
    names = tried(monkeypatch)
    with pytest.raises(UserError, match=r"1 of 400 images .* more than 0\.1 %; .* goes on behind the \d\d\d images"):
        prepare(source_of(few, known=False), tmp_path / "end", max_skipped_pct=0.1)
    assert len(names) == 400
    names.clear()
    assert prepare(source_of(few, known=False), tmp_path / "end", max_skipped_pct=0.3).skipped == 1
    assert len(names) < 100


def icons(sizes: list[int]) -> list[Item]:
    made = {size: encoded(Image.fromarray(np.full((size, size, 3), size, np.uint8)), "PNG") for size in set(sizes)}
    return [Item("train", None, f"{i}.png", made[size]) for i, size in enumerate(sizes)]


def test_icons_before_photographs_are_stored_as_photographs(tmp_path: Path) -> None:
    """The sample is of the whole, not of the first."""
    said: list[str] = []
    manifest = prepare(source_of(icons([32] * 1033 + [200] * 30)), tmp_path / "out", says=said.append)
    assert manifest.kind == "jpeg" and not said


def test_a_photograph_that_no_sample_showed_begins_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SAMPLE", 40)
    items = icons([32] * 900 + [200] + [32] * 20)
    said: list[str] = []
    manifest = prepare(source_of(items, known=False), tmp_path / "out", says=said.append)
    assert said == ["900.png has 200 × 200 px, the images before it 32 × 32; it begins again and stores JPEG"]
    assert (manifest.kind, manifest.examples("train"), manifest.width_px) == ("jpeg", 921, (32, 200))
    assert prepare(source_of(items), tmp_path / "jpeg", kind="jpeg").shards == manifest.shards
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "jpeg").iterdir())


def test_raw_that_was_asked_for_ends_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tried(monkeypatch)
    with pytest.raises(UserError, match=r"\.png has 200 × 200 px, the images before it 32 × 32; raw shards hold one size: use --kind"):
        prepare(source_of(icons([32] * 1033 + [200] * 30)), tmp_path / "out", kind="raw")
    assert not names and not (tmp_path / "out").exists()
    monkeypatch.setattr(survey, "SAMPLE", 2)
    with pytest.raises(UserError, match=r"70\.png has 200 × 200 px, the images before it 32 × 32"):
        prepare(source_of(icons([32] * 70 + [200]), known=False), tmp_path / "out", kind="raw")
    assert not (tmp_path / "out").exists()
