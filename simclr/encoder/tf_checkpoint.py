"""TensorFlow's checkpoint files → names, shapes, arrays. The door to TensorFlow, an extra that nothing else here needs.

Name-based checkpoints (TF1), object-based ones (TF2) and the variables of SavedModels and hub modules are all one file format.
Only the keys differ: TF1's key is the variable's name; TF2's is the shortest path to it through Python objects, which in the official
SavedModels is `trainable_variables_list/17`. The object graph beside it has every variable's name, which is used here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.errors import UserError

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


@dataclass(frozen=True)
class Bundle:
    """The variables of one checkpoint; values are read one at a time, since the largest checkpoints have gigabytes."""

    source: str
    """Where they come from, for messages and the model card."""
    shapes: dict[str, tuple[int, ...]]
    """Variable name → shape."""
    read: Callable[[str], NDArray[Any]]
    """Variable name → value."""
    step: int | None = None
    """Optimizer steps, if the checkpoint or its file name states them."""
    ignored: tuple[str, ...] = ()
    """Keys that are no variables of the model: the optimizer's slots and settings, counters."""


def open_bundle(path: Path) -> Bundle:
    """The checkpoint at `path`: its prefix (`…/model.ckpt-1000`), one of its files, or a folder with one in it.

    Raises UserError where there is none or several, or where TensorFlow cannot read the files.
    """
    prefix = find(path)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read at import; silences start-up notices that do not concern the user
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(str(prefix))
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise UserError(f"{prefix} cannot be read as a TensorFlow checkpoint: {str(error).strip().splitlines()[0][:200]}") from None

    def read(key: str) -> NDArray[Any]:
        try:
            return np.asarray(reader.get_tensor(key))
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            raise UserError(f"{prefix}: variable {key} cannot be read: {str(error).strip().splitlines()[0][:200]}") from None

    shapes = {key: tuple(shape) for key, shape in reader.get_variable_to_shape_map().items()}
    names, ignored = {key: key for key in shapes}, tuple[str, ...]()
    if _GRAPH in shapes:
        from tensorflow.core.protobuf import trackable_object_graph_pb2

        graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(read(_GRAPH).item())
        full = {a.checkpoint_key: a.full_name for node in graph.nodes for a in node.attributes}
        names, ignored = named(full, list(shapes))
    counter = next((key for key in ("global_step", "global_step" + _SUFFIX, "optimizer/iter" + _SUFFIX) if key in shapes), None)
    numbered = re.search(r"-(\d+)$", prefix.name)
    step = int(read(counter)) if counter else int(numbered[1]) if numbered else None
    return Bundle(path.name or str(path), {n: shapes[k] for n, k in names.items()}, lambda name: read(names[name]), step, ignored)


def named(full: dict[str, str], keys: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(variable name → key, keys that are no variables of the model) of an object-based checkpoint with these `keys`, whose
    object graph gives each key its name as `full`. Raises UserError where two variables have one name."""
    names: dict[str, str] = {}
    ignored = []
    for key in keys:
        if key == _GRAPH or ".OPTIMIZER_SLOT/" in key or re.match(r"(optimizer|global_step|save_counter)/", key):
            ignored.append(key.removesuffix(_SUFFIX))
            continue
        name = full.get(key) or key.removesuffix(_SUFFIX)
        if name in names:
            raise UserError(f"two variables of the checkpoint are named {name}: {names[name]} and {key}; it cannot be told which is which")
        names[name] = key
    return names, tuple(ignored)


def find(path: Path) -> Path:
    """The prefix (without `.index`) of the checkpoint that `path` names. Raises UserError if it names none, or several."""
    if path.is_dir():
        return _in_folder(path)
    prefix = path.with_name(re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name))
    if _index(prefix).is_file():
        return prefix
    if not path.parent.is_dir():
        raise UserError(f"there is no {path}; give a checkpoint's prefix, or the folder that holds it")
    there = _prefixes(path.parent)
    raise UserError(f"there is no checkpoint {prefix}: {prefix.name}.index is absent; " + _choose(path.parent, there))


def _in_folder(folder: Path) -> Path:
    saved = folder / "variables" / "variables"  # a SavedModel's, and a hub module's
    if _index(saved).is_file():
        return saved
    there = _prefixes(folder)
    if (folder / "checkpoint").is_file():
        stated = re.search(r'^model_checkpoint_path: "(.*)"', (folder / "checkpoint").read_text(errors="replace"), re.MULTILINE)
        newest = folder / Path(stated[1]).name if stated else None  # the path is often another machine's
        if newest in there:
            return newest
    if len(there) == 1:
        return there[0]
    raise UserError(f"{folder} holds {'no TensorFlow checkpoint' if not there else 'several checkpoints'}; " + _choose(folder, there))


def _choose(folder: Path, there: list[Path]) -> str:
    if there:
        return f"give one of {', '.join(str(p) for p in there[:5])}{' …' if len(there) > 5 else ''}"
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and (_index(p / "variables" / "variables").is_file() or _prefixes(p)))
    if inner:
        return f"give the folder inside it, {' or '.join(str(p) for p in inner[:5])}"
    return "expected NAME.index beside NAME.data-…, or variables/variables.index (a SavedModel)"


def _prefixes(folder: Path) -> list[Path]:
    return sorted(p.with_name(p.name.removesuffix(".index")) for p in folder.glob("*.index"))


def _index(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")
