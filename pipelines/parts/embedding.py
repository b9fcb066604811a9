"""A process of `simclr embed`: pictures of a part → a Parquet part of features."""

from __future__ import annotations

import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines.parts.plan import id_of, reader
from pipelines.parts.run import CARRIED, THREADS, Plain, Work
from pipelines.terminal import say
from simclr.data.options import Options
from simclr.data.s3.place import Place
from simclr.errors import UserError

if TYPE_CHECKING:
    from simclr.data.depth import Rule
    from simclr.evaluation.decoding import Decoders
    from simclr.views.preprocessing import Preprocessing

PLAN = "plan.json"
"""In the output: on what its features depend."""
DECODERS, IMAGES = "decoders", "images"
"""Names in the settings: whether "threads" or "processes" decode, nothing = as it suits; the number of pictures, if it is known."""
_LEAST_CORES, _LEAST_IMAGES = 4, 2048


def make(settings: Plain) -> Work:
    """The function that embeds parts. settings: sources, reading, options, ranges, out, about, device, precision, batch_size, and may be
    DECODERS and IMAGES."""
    import torch

    import simclr
    from simclr.data.feature_parts import About, write_failed, write_part
    from simclr.evaluation.decoding import Picture
    from simclr.evaluation.embedding import Clock, embedded
    from simclr.precision import set_backends

    device = torch.device(settings["device"] if settings["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    set_backends(settings["precision"], device)
    encoder = simclr.load_encoder(Path(settings[CARRIED])).to(device).to(memory_format=torch.channels_last)
    rule = Options(**_tuples(settings["options"])).rule(_tuples(settings["ranges"]))
    about = About(**settings["about"])
    scratch = tempfile.TemporaryDirectory(prefix="simclr-embed-")
    decoders = _decoders(settings, device.type, encoder.preprocessing, rule)
    readers: dict[int, Callable[..., Any]] = {}
    out = Place(settings["out"])
    if out.read(PLAN) != settings["plan"].encode():
        raise UserError(
            f"{out} on {socket.gethostname()} is another folder than the command's; give --out a folder on a disk that all nodes see, or "
            "s3://bucket/prefix"
        )

    def work(part: Plain) -> Plain:
        from simclr.data.sources.portions import Portion

        index = part["source"]
        source = settings["sources"][index]
        if index not in readers:
            own = Path(scratch.name) / f"source-{index}"  # files of two sources may be called alike
            own.mkdir()
            readers[index] = reader(source, settings["reading"], own)
        clock, place = Clock(), 0
        rows: dict[str, list[Any]] = {name: [] for name in ("id", "split", "path", "sha256", "label", "width", "height")}
        features: list[NDArray[np.float32]] = [np.empty((0, about.d), np.float32)]
        failed: list[tuple[int, str, str, str | None, str]] = []
        done: Counter[str] = Counter()

        def note(found: Picture, number: int) -> None:
            item = found.item
            if found.reason:
                failed.append((number, item.split, item.name, item.label, found.reason))
                return
            done.update({"rescaled": found.rescaled, "clipped": found.clipped})
            values = (number, item.split, item.name, found.sha256, item.label, found.width, found.height)
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)

        items = readers[index](Portion.from_dict(part["portion"]))
        for pictures, h in embedded(encoder, items, decoders, device, settings["batch_size"], settings["precision"], clock):
            for found in pictures:
                note(found, id_of(part, place))
                place += 1
            if h.size:
                features.append(h)
        dense = np.concatenate(features)
        if not np.isfinite(dense).all():
            raise UserError(f"the encoder's features of part {part['number']} are no finite numbers; try --precision float32")
        name, folder = f"{part['number']:05d}.parquet", Path(scratch.name)
        if failed:
            write_failed(folder / f"failed-{name}", about, failed)
            out.put(f"failed-{name}", folder / f"failed-{name}")
        else:  # of another try
            out.remove(f"failed-{name}")
        write_part(folder / f"part-{name}", about, rows, dense)
        out.put(f"part-{name}", folder / f"part-{name}")  # last: a part that lies there is done
        return {
            "images": len(rows["id"]),
            "failed": len(failed),
            "rescaled": done["rescaled"],
            "clipped": done["clipped"],
            "first": f"{failed[0][2]} ({failed[0][4]})" if failed else "",
            "waited_s": clock.waited_s,
            "computed_s": clock.computed_s,
            "device": device.type,
        }

    return work


def _decoders(settings: Plain, device: str, preprocessing: Preprocessing, rule: Rule) -> Decoders:
    """Processes where a GPU waits for many pictures: their start takes seconds. On a CPU the encoder has the cores itself."""
    from simclr.evaluation.decoding import Processes, Threads

    cores, images = settings[THREADS], settings.get(IMAGES)
    many = device != "cpu" and cores >= _LEAST_CORES and (images is None or images >= _LEAST_IMAGES)
    how = (settings["batch_size"], preprocessing, rule)
    if settings.get(DECODERS, "processes" if many else "threads") == "processes":
        try:
            return Processes(max(cores - 1, 1), *how)  # a core for this process, which feeds the device
        except OSError as error:
            say(f"pictures are decoded in threads, since no processes can be started for it: {error.strerror}")
    return Threads(cores, *how)


def _tuples(values: Plain) -> Plain:
    """`values` with tuples in place of JSON's lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
