"""`simclr embed`: encoder + images → features, as Parquet parts or in one file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from pipelines.evaluation.inputs import opened
from pipelines.parts.embedding import PLAN
from pipelines.parts.run import Plain, Where, run
from pipelines.runs import sync
from pipelines.terminal import Bar, say, show
from simclr import files
from simclr.data.depth import remarks
from simclr.data.options import Options
from simclr.data.pixels import MOST_PIXELS
from simclr.data.s3.place import Place
from simclr.data.s3.uri import address
from simclr.data.sources.reading import Reading
from simclr.errors import UserError
from simclr.extras import has
from simclr.papers import unscored

if TYPE_CHECKING:
    from simclr.data.feature_parts import About

_LOCK = ".embedding-lock"
_FILES = (".npz", ".parquet")


@dataclass(frozen=True)
class Args:
    """Features of images, with the preprocessing of the encoder's training. The same command goes on after any death."""

    encoder: Annotated[Path, tyro.conf.Positional]
    """A published encoder's directory (`simclr pull`, or RUN/encoder), s3://bucket/prefix of one, or NAME@alias of the registry."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, and all that `simclr prepare` reads: folders, archives, Parquet, WebDataset, s3://bucket/prefix, prepared shards, a
    dataset's name; or an .npy file of uint8 images (n, H, W, 3)."""
    out: Path = Path("features.npz")
    """Directory or s3://bucket/prefix for Parquet parts (id, path, sha256, label, width, height, feature …), FILE.parquet, or, for few
    images, FILE.npz: features (n, d) and names (n,)."""
    where: Annotated[Where, tyro.conf.arg(name="")] = field(default_factory=Where)
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for each worker where there is one."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """How the encoder multiplies; tf32 and bfloat16 are faster on GPUs, and change features in the third digit."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the features in Parquet parts."""
    batch_size: int = 64
    """Images that the encoder sees at a time."""
    value_range: tuple[float, float] | None = None
    """Black and white point of pixels of more than 8 bits and of floats, as `prepare` said or was told for the training images; without
    it a sample of these images decides."""
    bands: tuple[int, int, int] | None = None
    """Which bands are red, green and blue, as for `prepare`."""
    max_pixels: int = MOST_PIXELS
    """A picture with more pixels is left out, as `prepare` does; a JPEG may have twice as many."""
    tracking_uri: str | None = None
    """MLflow address, for an encoder of the registry. Default: $MLFLOW_TRACKING_URI, else the database under runs/."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; expected at least 1")


def main(args: Args) -> None:
    show(run_embed(args))


def run_embed(args: Args) -> str:
    """Write the features; returns how many there are, and where."""
    if not args.images:
        raise UserError("which images? give files, folders, archives, s3://bucket/prefix, shards or an .npy file")
    if args.reading.captions != "none":
        raise UserError("--captions is for `simclr prepare`: features of pictures have no use for captions; leave it out")
    one_file = args.out.suffix.lower() in _FILES
    if address(args.out) is not None and one_file:
        raise UserError(f"{sync.shown(args.out)}: in S3 features are parts below a prefix; leave out {args.out.suffix}")
    if address(args.out) is not None:
        files.require_folders_name(args.out)
    elif one_file:
        files.require_file(args.out)
    else:
        files.require_folder(args.out, _FILES)
    place = Place(args.out.with_name(f".{args.out.name}.parts") if one_file else args.out)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(opened(args.encoder, args.tracking_uri))
        stack.enter_context(_alone(place))
        about, total, done = _embed(args, directory, place, one_file, stack)
    failed = _failed(place)
    count = _count(place, total - len(failed) if total is not None else None)
    for line in remarks({**done, "ranges": about.ranges, "stated": args.value_range is not None}):
        say(line)
    if failed:
        first = f"{failed[0]['path']} ({failed[0]['reason']})"
        if count == 0:
            if one_file:
                shutil.rmtree(place.path)
            raise UserError(f"none of the {len(failed)} files can be read as an image; the first: {first}")
        what = "file is no image that can be read and was" if len(failed) == 1 else "files are no images that can be read and were"
        say(f"{len(failed):,} {what} left out; the first: {first}")
    if one_file:
        _join(place, args.out)
        shutil.rmtree(place.path)
    return f"{sync.shown(args.out)}: {count if count is not None else 'all'} × {about.d} features"


@contextlib.contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Keep another embed out of a folder; for a prefix see `_writing`."""
    if place.at is not None:
        yield
        return
    place.path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(place.path / _LOCK, wait=False))
        except BlockingIOError:
            raise UserError(f"another embed is writing to {place}; wait for it, or use another --out") from None
        stack.callback(_leave, place.path)
        yield


@contextlib.contextmanager
def _writing(place: Place) -> Iterator[None]:
    """Keep another embed out of a prefix."""
    if place.at is None:
        yield
        return
    from simclr.data.s3 import lease

    register = lease.Register(place.store, place.at / ".parts" / "writer.json")
    with lease.alone(lease.Lease(register, str(place)), "wait for it, or use another --out", say):
        yield


def _leave(folder: Path) -> None:
    """Remove the lock, and a folder that nothing came into."""
    (folder / _LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds something
        folder.rmdir()


def _embed(
    args: Args, directory: Path, place: Place, one_file: bool, stack: contextlib.ExitStack
) -> tuple[About, int | None, Counter[str]]:
    """Do the parts that `place` does not have; for `one_file` it is a folder of our own. Until `stack` is left no other embed writes there.
    Returns what the features are, the number of images, if it is known, and how many were rescaled and clipped now."""
    from pipelines.parts import embedding
    from pipelines.parts.plan import plan
    from simclr.data.feature_parts import About
    from simclr.encoder.directory import preprocessing_of, read_text, weights_digest, width_of

    text = read_text(directory)
    method = str(text.get("method", ""))
    options = Options(value_range=args.value_range, bands=args.bands, max_pixels=args.max_pixels)
    planned = plan(args.images, args.reading, options)
    preprocessing = dataclasses.asdict(preprocessing_of(text))
    stated: Plain = {
        "encoder": weights_digest(directory),
        "preprocessing": preprocessing,
        "images": planned.key,
        "options": [options.value_range, options.bands, options.max_pixels, planned.ranges],
        "precision": args.precision,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
    }
    key = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    about = About(
        encoder=stated["encoder"],
        preprocessing=preprocessing,
        source=shlex.join(args.images),
        d=width_of(text),
        dtype=args.dtype,
        key=key,
        ranges=dict(options.rule(planned.ranges).ranges),
        bands=args.bands or (),
        method=method if unscored(method) else "",
    )
    parts = _left(planned.parts, place, stated, one_file)
    if parts:
        stack.enter_context(_writing(place))  # not before: features that are complete are only read
        parts = _left(planned.parts, place, stated, one_file)  # another embed may have ended meanwhile
    if not parts:
        say(f"{place} holds these features already; nothing to do")
        return about, planned.total, Counter()
    told_plan = json.dumps(stated)
    place.write(PLAN, told_plan.encode())
    if len(parts) < len(planned.parts):
        say(f"going on with {place}: {len(planned.parts) - len(parts):,} of {len(planned.parts):,} parts are there")
    settings: Plain = {
        "sources": planned.sources,
        "reading": {f.name: getattr(args.reading, f.name) for f in dataclasses.fields(args.reading)},
        "options": {"value_range": options.value_range, "bands": options.bands, "max_pixels": options.max_pixels},
        "ranges": planned.ranges,
        "out": str(place.at or place.path.absolute()),
        "plan": told_plan,
        "about": {name: getattr(about, name) for name in about.__slots__},
        "device": args.device,
        "precision": args.precision,
        "batch_size": args.batch_size,
        embedding.IMAGES: planned.total,
    }
    waited, computed, counts = 0.0, 0.0, Counter[str]()
    device = "cpu"
    with Bar("embed", planned.total) as bar:
        for _, told in run(embedding.make, settings, parts, args.where, args.device, carry=directory):
            bar.advance(told["images"] + told["failed"])
            counts.update({name: told[name] for name in ("rescaled", "clipped")})
            waited, computed, device = waited + told["waited_s"], computed + told["computed_s"], told["device"]
            if told["failed"]:
                bar.update(bar.done, f"left out: {told['first']}")
    if not has("ffcv"):
        say("FFCV is not installed, so Pillow decoded JPEGs: a level or two from the pixels that a training on shards sees")
    say(f"{device} waited for pictures {100 * waited / max(waited + computed, 1e-9):.0f} % of the time")
    there = place.names()
    if missing := [part["number"] for part in parts if f"part-{part['number']:05d}.parquet" not in there]:
        raise UserError(
            f"{len(missing):,} parts were written where this machine does not see them (part {missing[0]} is not in {place}); "
            "give --out a folder on a disk that all nodes see, or s3://bucket/prefix"
        )
    return about, planned.total, counts


def _left(parts: Sequence[Plain], place: Place, stated: Plain, one_file: bool) -> list[Plain]:
    """The parts that are not done."""
    done = _done(place, json.loads(json.dumps(stated)), one_file)
    return [part for part in parts if f"part-{part['number']:05d}.parquet" not in done]


def _done(place: Place, stated: Plain, one_file: bool) -> set[str]:
    """Names of the parts that are done. What another command left in a folder of our own goes; elsewhere it is refused."""
    from simclr.data.feature_parts import FAILED, PART

    there = place.names()
    done = {name for name in there if PART.fullmatch(name)}
    differ = _different(place, stated) if done else []
    if differ and one_file:
        done = set()  # left by another command that did not end
    elif differ:
        words = {"images": "images (or they have changed since)"}
        raise UserError(
            f"{place} holds features with another {', another '.join(words.get(name, name) for name in differ)}; use another --out, or "
            "remove it"
        )
    elif not done and (left := sorted(name for name in there if name != PLAN and not name.startswith((".", "failed-")))):
        raise UserError(f"{place} is not empty and has no features (it holds {', '.join(left[:3])}); use another --out")
    if not done:
        for name in there:
            if PART.fullmatch(name) or FAILED.fullmatch(name):
                place.remove(name)
    return done


def _different(place: Place, stated: Plain) -> list[str]:
    """What of the features in `place` was otherwise than `stated`."""
    text = place.read(PLAN)
    before = files.json_in(text, f"{place}/{PLAN}", "use another --out") if text is not None else {}
    return [name for name, value in stated.items() if before.get(name) != value]


def _failed(place: Place) -> list[Plain]:
    """The images that were left out."""
    from simclr.data.feature_parts import FAILED, failures

    with tempfile.TemporaryDirectory(prefix="simclr-") as scratch:
        return failures([place.get(name, Path(scratch)) for name in sorted(place.names()) if FAILED.fullmatch(name)])


def _count(place: Place, expected: int | None) -> int | None:
    """Rows of the parts; in S3, where every part would be fetched for it, as many as are `expected`."""
    from simclr.data.feature_parts import open_features

    return len(open_features(place.path)) if place.at is None else expected


def _join(place: Place, out: Path) -> None:
    """One file of all parts."""
    from simclr.data.feature_parts import merge, open_features

    table = open_features(place.path)
    if out.suffix.lower() == ".parquet":
        merge(table.parts, out)
        return
    names = table.table(["path"])["path"]
    with files.whole(out) as scratch, scratch.open("wb") as file:
        np.savez(file, features=np.concatenate([rows for _, rows in table.blocks()]), names=np.array(names))
