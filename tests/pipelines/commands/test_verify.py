"""`simclr verify` by parts: a shard a part, in any order and on any node; the table comes in the manifest's order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.commands import prepare, verify
from pipelines.parts.run import Where
from simclr.data.manifest import read_manifest
from simclr.data.options import Options
from simclr.data.s3 import remote
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address
from simclr.errors import UserError
from tests.support.s3 import Proxy

Plain = dict[str, Any]


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own stands for those of Ray: values go through JSON, the last part comes first."""

    def run(make: Callable[[Plain], Any], settings: Plain, parts: Sequence[Plain], where: Where) -> Iterator[tuple[Plain, Plain]]:
        work = make(json.loads(json.dumps(settings)) | {"threads": 1})
        for part in reversed(parts):
            yield part, json.loads(json.dumps(work(part)))

    monkeypatch.setattr(verify, "run", run)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "shards"
    prepare.prepare(prepare.Args("patterns:train=700,test=60,size=32", out, options=Options(shard_mib=1), threads=2))
    assert len(read_manifest(out).shards) == 4
    return out


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3 << 20] ^= 1
    path.write_bytes(bytes(data))


def test_workers_say_what_one_process_says(
    several: Path, backwards: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify.main(verify.Args(several, threads=1))
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()] == [shard.name for shard in read_manifest(several).shards]
    monkeypatch.chdir(several.parent)
    verify.main(verify.Args(Path("shards"), where=Where(workers=2)))
    assert capsys.readouterr().out == table


def test_shards_in_s3_are_fetched_one_by_one_and_none_is_kept(
    several: Path, backwards: None, s3: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Address("photos", "to/verify")
    remote.push(several, place, lambda done, total: None, Store())
    args = verify.Args(Path("s3://photos/to/verify"), where=Where(workers=2))
    verify.main(args)
    assert capsys.readouterr().out.count("whole") == 4 and not list(tmp_path.rglob("*.beton*"))
    first, second = (several / shard.name for shard in read_manifest(several).shards[:2])
    other = tmp_path / "other"
    other.write_bytes(first.read_bytes())
    damage(other)
    Store().upload(other, place / first.name)
    Store().delete(place / second.name)
    with pytest.raises(UserError, match="2 of 4 shards of s3://photos/to/verify are damaged; prepare or fetch the data again"):
        verify.main(args)
    rows = capsys.readouterr().out.splitlines()
    assert (
        rows[0].split("damaged: ")[1].startswith("its bytes do not have the manifest's sha256")
        and rows[1].endswith("damaged: it is missing")
        and "whole" in rows[2]
    )


def test_a_node_that_does_not_see_the_shards_does_not_call_them_damaged(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from simclr.data.verify import make_verified

    monkeypatch.chdir(tmp_path)
    settings = {"data": "gone", "manifest": "", "from": str(tmp_path), "threads": 1}
    with pytest.raises(UserError, match=r".* does not see gone; give a folder on a disk that all nodes share, or s3://bucket/prefix"):
        make_verified(settings)
    with pytest.raises(UserError, match=r".* sees other shards in .*; give a folder on a disk that all nodes share"):
        make_verified(settings | {"data": str(several)})
