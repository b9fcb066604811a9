"""S3 with failures: through boto3 and a proxy that breaks requests, every byte arrives right or none does."""

from __future__ import annotations

import hashlib
import re
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest

from simclr.data.s3 import store
from simclr.data.s3.answers import Damaged, Missing
from simclr.data.s3.store import Store
from simclr.data.s3.uri import Address, address, copy_of
from simclr.errors import UserError
from tests.support.s3 import KEY_ID, REFUSED, SECRET, Proxy

PART = 16 << 10
BUCKET = Address("photos")


@pytest.fixture
def quick(s3: Proxy) -> Store:
    """A store with many tries, small parts and no pauses."""
    return Store(attempts=16, pause_s=0, answer_s=5, part_bytes=PART, threads=4)


def content(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def names(folder: Path) -> list[str]:
    """Names of all files there, hidden or not."""
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://photos", Address("photos")),
        ("s3://photos/", Address("photos")),
        ("s3://photos/a/b/", Address("photos", "a/b")),
        (Path("s3://photos/a"), Address("photos", "a")),  # a Path folds the slashes
        ("photos/a", None),
        (Path("/photos"), None),
    ],
)
def test_addresses(text: str | Path, expected: Address | None) -> None:
    assert address(text) == expected


def test_an_address_that_is_none_is_not_repeated_in_the_error() -> None:
    for text in (f"s3://{KEY_ID}:{SECRET}@photos/a", "s3:///a"):
        with pytest.raises(UserError, match="names no bucket; expected s3://bucket/prefix") as caught:
            address(text)
        assert KEY_ID not in str(caught.value)


def test_a_copy_is_named_by_address_and_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIMCLR_CACHE", str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    one = copy_of(Address("photos", "a/b"), "shards")
    assert one.name == "b" and one.parent.parent == tmp_path / "shards"
    assert one == copy_of(Address("photos", "a/b"), "shards") != copy_of(Address("photos", "b"), "shards")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://elsewhere")
    assert one != copy_of(Address("photos", "a/b"), "shards")


def test_two_hundred_faults_and_every_byte_is_right(s3: Proxy, quick: Store, tmp_path: Path) -> None:
    """Files of 0 to 24 parts up and down again, while a third of the requests fails."""
    sizes = [0, 1, PART - 1, PART, PART + 1, *(PART * n + 7 * n for n in range(2, 24)), 24 * PART]
    files = {f"deep/er/{i:02}": content(size, i) for i, size in enumerate(sizes)}
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    s3.rate = 1 / 3
    for name, data in files.items():
        path = tmp_path / "from" / Path(name).name
        path.write_bytes(data)
        assert quick.upload(path, BUCKET / "faults" / name).sha256 == hashlib.sha256(data).hexdigest()
    listed = quick.listing(BUCKET / "faults")
    assert [(o.name, o.bytes) for o in listed] == sorted((name, len(data)) for name, data in files.items())
    for name, data in files.items():
        path, counted = tmp_path / "to" / Path(name).name, [0]
        quick.download(BUCKET / "faults" / name, path, len(data), progress=counted.append)
        assert path.read_bytes() == data and sum(counted) == len(data)
        assert quick.read(BUCKET / "faults" / name) == data
    assert names(tmp_path / "to") == names(tmp_path / "from")  # and no part of anything
    harmful = s3.faults.total() - s3.faults["stall"]
    assert harmful >= 200
    assert min(s3.faults[kind] for kind in s3.kinds) > 0


def test_a_killed_download_goes_on_by_byte_range(s3: Proxy, quick: Store, tmp_path: Path) -> None:
    data = content(10 * PART)
    (tmp_path / "whole").write_bytes(data)
    quick.upload(tmp_path / "whole", BUCKET / "resume")
    target = tmp_path / "to" / "file"
    target.parent.mkdir()
    one = Store(attempts=1, pause_s=0, part_bytes=PART, threads=1)
    s3.quiet()
    s3.cut_after = 6  # a look, four parts, then silence
    with pytest.raises(UserError, match=r"s3://photos/resume failed 1 times"):
        one.download(BUCKET / "resume", target)
    assert names(target.parent) == [".file.partial", ".file.parts"]
    s3.quiet()
    quick.download(BUCKET / "resume", target)
    assert target.read_bytes() == data and names(target.parent) == ["file"]
    asked = sorted(int(re.sub(r"bytes=(\d+)-.*", r"\1", r)) for _, _, r in s3.log if r)
    assert asked == [PART * i for i in range(4, 10)]


def test_a_download_of_an_object_that_changed_begins_again(s3: Proxy, quick: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "to" / "file"
    target.parent.mkdir()
    source.write_bytes(content(6 * PART, 1))
    quick.upload(source, BUCKET / "changing")
    s3.quiet()
    s3.cut_after = 4
    with pytest.raises(UserError, match="failed 1 times"):
        Store(attempts=1, pause_s=0, part_bytes=PART, threads=1).download(BUCKET / "changing", target)
    s3.quiet()
    source.write_bytes(content(6 * PART, 2))
    quick.upload(source, BUCKET / "changing")
    quick.download(BUCKET / "changing", target)
    assert target.read_bytes() == content(6 * PART, 2)


def test_an_object_that_changes_during_its_download(s3: Proxy, quick: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, counted = tmp_path / "source", tmp_path / "file", [0]
    for seed in (1, 2):
        source.write_bytes(content(6 * PART, seed))
        quick.upload(source, BUCKET / f"both-{seed}")
    quick.upload(source, BUCKET / "both")
    old, looks = quick.look(BUCKET / "both-1"), []

    def look(place: Address) -> store.Object:
        looks.append(place)
        return old if len(looks) == 1 else Store.look(quick, place)

    monkeypatch.setattr(quick, "look", look)
    quick.download(BUCKET / "both", target, progress=counted.append)
    assert len(looks) == 2 and target.read_bytes() == content(6 * PART, 2) and sum(counted) == 6 * PART


def test_wrong_bytes_never_get_the_name(s3: Proxy, quick: Store, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(content(3 * PART))
    quick.upload(path, BUCKET / "wrong")
    with pytest.raises(Damaged, match=r"s3://photos/wrong has 49,152 bytes, expected 5; upload it again"):
        quick.download(BUCKET / "wrong", tmp_path / "a", size=5)
    with pytest.raises(Damaged, match=r"s3://photos/wrong failed 16 times, the last time with bytes that do not match their sha256"):
        quick.download(BUCKET / "wrong", tmp_path / "a", sha256="0" * 64)
    s3.rate, s3.kinds = 1.0, ("flipped",)
    with pytest.raises(Damaged, match="sha256"):
        quick.download(BUCKET / "wrong", tmp_path / "a")
    with pytest.raises(UserError, match="failed 16 times, the last time with bytes that do not match their checksum"):
        quick.read(BUCKET / "wrong")
    assert names(tmp_path) == ["source"]
    with pytest.raises(Damaged, match="source does not match its sha256"):
        quick.upload(path, BUCKET / "wrong", sha256="0" * 64)


def test_an_upload_that_fails_shows_nothing_and_leaves_no_parts(s3: Proxy, quick: Store, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(content(5 * PART))
    s3.cut_after = 4
    one = Store(attempts=2, pause_s=0, part_bytes=PART, threads=1)
    with pytest.raises(UserError, match=r"s3://photos/half failed 2 times, the last time with a connection that was reset"):
        one.upload(path, BUCKET / "half")
    s3.quiet()
    with pytest.raises(Missing, match=r"there is no s3://photos/half; correct the address"):
        quick.look(BUCKET / "half")

    s3.cut_after = 5  # parts only: the abort gets through
    s3.random.seed(1)
    real = s3.fault
    s3.fault = lambda method, path, body: real(method, path, body) if method == "PUT" else ""  # type: ignore[method-assign]
    try:
        with pytest.raises(UserError, match="failed 2 times"):
            one.upload(path, BUCKET / "aborted")
    finally:
        s3.fault = real  # type: ignore[method-assign]
    s3.quiet()
    left = [u["Key"] for u in quick.client.list_multipart_uploads(Bucket="photos").get("Uploads", ())]
    assert "aborted" not in left


def test_the_last_error_names_the_object_and_the_attempts_and_no_secret(
    s3: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    patient = Store(attempts=3, pause_s=0)
    said = []
    for kind, words in (("503", "503 SlowDown"), ("500", "500 InternalError"), ("reset before", "a connection that was reset")):
        s3.quiet()
        s3.rate, s3.kinds = 1.0, (kind,)
        with pytest.raises(UserError, match=f"s3://photos/a/b failed 3 times, the last time with {words}") as caught:
            patient.read(BUCKET / "a/b")
        assert len(s3.log) == 3 and caught.value.__context__ is None
        said.append(str(caught.value))
    s3.quiet()
    with pytest.raises(Missing, match=r"there is no s3://photos/a/b"):
        patient.read(BUCKET / "a/b")
    with pytest.raises(Missing, match=r"there is no bucket nowhere for s3://nowhere; make it, or correct the address"):
        patient.listing(Address("nowhere"))
    s3.rate, s3.kinds = 1.0, (REFUSED,)
    with pytest.raises(UserError, match=r"S3 refuses s3://photos/a/b to these credentials \(403 SignatureDoesNotMatch\)") as caught:
        patient.read(BUCKET / "a/b")
    said.append("".join(traceback.format_exception(caught.value)).partition("Error: ")[2])
    assert len(s3.log) == 3  # no request was retried
    for text in (*said, caplog.text):
        assert KEY_ID not in text and SECRET not in text and "Signature=" not in text and "Signature of" not in text


def test_no_endpoint_and_no_credentials(s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"s3://photos failed 2 times, the last time with no connection to 127\.0\.0\.1;"):
        Store(attempts=2, pause_s=0).listing(BUCKET)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    with pytest.raises(UserError, match="no address; expected AWS_ENDPOINT_URL_S3="):
        Store()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no AWS credentials for s3://photos/a; set AWS_ACCESS_KEY_ID"):
        Store().delete(BUCKET / "a")
    assert s3.log == []  # reading is tried without, see test_access


def test_a_transfer_can_be_ended_from_another_thread(s3: Proxy, tmp_path: Path) -> None:
    s3.rate, s3.kinds = 1.0, ("503",)
    patient = Store(attempts=50, pause_s=5)
    threading.Timer(0.3, patient.over.set).start()
    with pytest.raises(UserError, match="ended"):
        patient.read(BUCKET / "a")


def test_a_request_is_tried_eight_times_with_longer_and_longer_pauses(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second, doubled each time, 20 s at most, of which at least half is waited."""
    found, tried, pauses = Store(), [], list[float]()
    monkeypatch.setattr(found.over, "wait", pauses.append)

    def refused() -> None:
        tried.append(len(pauses))
        raise ConnectionError

    with pytest.raises(UserError, match=r"s3://photos/a failed 8 times, the last time with a connection that was reset"):
        found._tried(Address("photos", "a"), refused)
    assert tried == list(range(8))
    longest = [0.25, 0.5, 1, 2, 4, 8, 16]
    assert len(pauses) == 7 and all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    with pytest.raises(UserError, match="failed 12 times"):
        more = Store(attempts=12)
        monkeypatch.setattr(more.over, "wait", pauses.append)
        more._tried(Address("photos", "a"), refused)
    assert 10 <= pauses[-1] <= 20
