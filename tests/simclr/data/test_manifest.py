"""A manifest comes from somebody else: what it states is held against what can be true, and against the files, before it is used."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simclr.config import SimCLR, Train, Views
from simclr.data import loader
from simclr.data.manifest import read_manifest
from simclr.data.memory import PAGE, copied, mapped
from simclr.data.s3.uri import Corrupt
from simclr.data.verify import damaged
from simclr.errors import UserError
from tests.attack.use import with_digests

TABLE = {"images": 1, "labelled": 1, "classes": {"a": 1}, "examples": [["a/1.jpg", "a"]]}


def changed(data: Path, tmp_path: Path, **values: Any) -> Path:
    """A directory with the shards of `data`, under its manifest with other `values`; those of `shard` are of its first shard."""
    out = tmp_path / "changed"
    out.mkdir(exist_ok=True)
    text = json.loads((data / "manifest.json").read_text())
    text["splits"]["train"][0] |= values.pop("shard", {})
    (out / "manifest.json").write_text(json.dumps(text | values))
    for file in data.glob("*.beton"):
        if not (out / file.name).exists():
            (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"shard": {"name": "../train.beton"}}, "it names a shard '../train.beton', which is no file name of a shard"),
        ({"shard": {"name": "manifest.json"}}, "it names a shard 'manifest.json'"),
        ({"shard": {"name": "test-00000.beton"}}, "it names no shard, or one of them twice"),
        ({"shard": {"samples": 10**12}}, "train-00000.beton is said to hold 1000000000000 images in "),
        ({"shard": {"samples": -240}}, "train-00000.beton is said to hold -240 images"),
        ({"shard": {"bytes": 10**18}}, "train-00000.beton is said to hold 240 images in 1000000000000000000 bytes"),
        ({"shard": {"sha256": "0"}}, "sha256 of train-00000.beton is '0'"),
        ({"splits": {"../x": []}}, "it names a split '../x'"),
        ({"splits": {}}, "it names no shard"),
        ({"kind": "png"}, "kind is 'png', expected one of raw, jpeg"),
        ({"height_px": [32, 10**12]}, "the smallest and the largest height are 32 and 1000000000000 px"),
        ({"width_px": [16, 32]}, "the smallest and the largest width are 16 and 32 px"),  # pixels of one size
        ({"mean": [0.5, 0.5]}, r"mean is \[0.5, 0.5\], expected tuple"),
        ({"std": [float("nan")] * 3}, r"std is \[nan, nan, nan\]"),
        ({"std": [1e300] * 3}, "mean and standard deviation of pixels between 0 and 1 are"),
        ({"mean": [10**400] * 3}, "mean is "),
        ({"classes": ["a", 1]}, "classes is "),
        ({"options": []}, "options is "),
        ({"skipped": -1}, "a number of images is negative"),
        ({"understood": {"splits": {"train": {}}}}, "understood is "),
        ({"understood": {"splits": {"train": TABLE | {"classes": {"a": "many"}}}}}, "understood is "),
        ({"understood": {"splits": {"train": TABLE | {"examples": [["a"]]}}}}, "understood is "),
        ({"understood": {"left_out": {"a": None}}}, "understood is "),
        ({"pixels": [[[]]]}, "pixels is "),
    ],
)
def test_what_cannot_be_true_is_one_sentence(patterns: Path, tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    out = changed(patterns, tmp_path, **values)
    with pytest.raises(UserError, match=f"{out}/manifest.json is damaged: {sentence}.*; prepare the data again"):
        read_manifest(out, look=False)


def test_what_is_true_is_read(patterns: Path, tmp_path: Path) -> None:
    for values in ({}, {"understood": {"splits": {"train": TABLE}, "notes": []}}, {"std": [0, 0, 0]}, {"understood": {}}):
        assert read_manifest(changed(patterns, tmp_path, **values)).examples("train") == 240


def test_numbers_that_a_shard_does_not_bear_out_take_no_memory(patterns: Path, tmp_path: Path) -> None:
    """40 GiB are declared, in a file that is as large and takes no room."""
    out = changed(patterns, tmp_path, shard={"bytes": 40 << 30, "samples": (40 << 30) // 24})
    with (out / "train-00000.beton").open("r+b") as file:
        file.truncate(40 << 30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use_it in (lambda: loader.labels(out, "train"), lambda: next(loader.batches(CONFIG, out, 0, 0, 1))):
        with pytest.raises(Corrupt, match=r"its header does not describe 1789569706 labelled images"):
            use_it()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + (256 << 10)


CONFIG = SimCLR(train=Train(batch_size=8, steps=6), views=Views(size_px=16))


def test_a_shard_is_mapped_as_large_as_its_manifest_says(tmp_path: Path) -> None:
    """It grew after its size was looked at: its end would lie over the next shard, or over what else is in memory."""
    one, two = tmp_path / "one.beton", tmp_path / "two.beton"
    one.write_bytes(b"1" * 1000)
    two.write_bytes(b"2" * 1000)
    both, bases = [(one, 1000), (two, 1000)], [0, PAGE, 2 * PAGE]
    for read in (mapped, copied):
        region = read(both, bases)
        assert (region[:1000] == ord("1")).all() and (region[PAGE : PAGE + 1000] == ord("2")).all()
    one.write_bytes(b"1" * (1 << 22))
    for read in (mapped, copied):
        with pytest.raises(Corrupt, match=r"shard \S+one.beton has 4,194,304 bytes, the manifest says 1,000; prepare or fetch") as found:
            read(both, bases)
        assert found.value.shard == "one.beton"


def test_two_samples_in_one_place_are_of_one_size(photographs: Path, tmp_path: Path) -> None:
    """The reader finds a sample's size by its place, so the other's would be taken."""
    out = changed(photographs, tmp_path)
    shard = out / "train-00000.beton"
    image, _, table = loader_rows(shard)
    first, second = np.argsort(table["size"])[[0, -1]]
    content = bytearray(shard.read_bytes())
    for at in (int(image["data_ptr"][first]), int(image["data_ptr"][second])):
        assert content.count(at.to_bytes(8, "little")) == 2  # in its row, and in the table
    content = content.replace(int(image["data_ptr"][second]).to_bytes(8, "little"), int(image["data_ptr"][first]).to_bytes(8, "little"))
    shard.write_bytes(content)
    (out / "manifest.json").write_bytes(with_digests((out / "manifest.json").read_bytes(), out))
    with pytest.raises(Corrupt, match=r"sample \d+ is damaged: its place, size or label contradicts the file"):
        loader.labels(out)


def loader_rows(path: Path) -> tuple[Any, Any, Any]:
    from simclr.data.ffcv.reader import read_rows

    return read_rows(path)


def test_what_reads_a_shard_that_shrinks_is_killed_and_the_next_look_names_it(photographs: Path, tmp_path: Path) -> None:
    """Another process shortens a shard that is mapped: no code of ours runs any more in the process that reads it."""
    out = changed(photographs, tmp_path)
    shard = read_manifest(out).shards[0]
    child = os.fork()
    if not child:
        try:
            faulthandler.disable()
            region = mapped([(out / shard.name, shard.bytes)], [0, -(-shard.bytes // PAGE) * PAGE])
            os.truncate(out / shard.name, 1 << 21)
            print(region[shard.bytes - 1])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
    for look in (lambda: read_manifest(out), lambda: next(loader.batches(CONFIG, out, 0, 0, 1))):  # a worker that is started again
        with pytest.raises(Corrupt, match=f"shard {shard.name} of {out} has 2,097,152 bytes, the manifest says "):
            look()
    assert damaged(out) == [shard.name]  # read, not mapped


def test_sizes_are_looked_at_before_each_epoch(patterns: Path, tmp_path: Path) -> None:
    out = changed(patterns, tmp_path)
    stream = loader.batches(SimCLR(train=Train(batch_size=80), views=Views(size_px=16)), out, 0, 0, 1)  # three steps an epoch
    next(stream)
    with (out / "train-00000.beton").open("ab") as file:
        file.write(b"more")
    with pytest.raises(Corrupt, match=r"train-00000.beton of .* bytes, the manifest says"):
        for _ in range(12):
            next(stream)
    stream.close()
