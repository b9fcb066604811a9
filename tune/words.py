"""A space in a user's words: `--vary FIELD=VALUES …`, or the same in a file of YAML. Text in, axes out, checked by the config's own types.

head.layers=2,3              values, as JSON or names: each is tried with each value of the other fields
views.operations=crop+blur   a value of several parts; of numbers also [0.08,1],[0.2,1]
optim.base_lr=log:0.1:3      any number from 0.1 to 3, uniform in its logarithm; uniform:0.1:3 is uniform in itself
train.batch_size=x0.5,x1     multiples of the recipe's value. Those of optim.base_lr are multiples of the recipe's learning rate, under the
                             trial's scaling rule (`tune.spaces.Peak`)
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from simclr import files
from simclr.config import Config
from simclr.errors import UserError
from simclr.fields import fits, short, shown
from tune import resolve
from tune.spaces import SPACES, Axis, Between, Distribution, Peak, PeakBetween, Space, Times, WholeBetween, text_of

_RANGE = re.compile(r"(log|uniform):([^:]*):([^:]*)")
_LABELS = {axis.key: axis.label for space in SPACES.values() for axis in space.axes}
_PEAK = "optim.base_lr"
_FILE = "expected `vary:` with FIELD: VALUES below it, and perhaps `set:` with FIELD: VALUE"


def space(name: str, vary: Mapping[str, Any], base: Config) -> Space:
    """The space called `name` that varies the fields in `vary`: field path → its values in words. `base` is the recipe.

    Raises UserError for an unknown field, with the nearest ones, and for values that a field does not take.
    """
    axes = tuple(axis(base, path, given) for path, given in vary.items())
    listed = "; ".join(f"{axis.key} {text_of(axis)}" for axis in axes)
    return Space(name=name, repeats="", why=f"Fields of the user's own choice: {listed}.", axes=axes)


def axis(base: Config, path: str, given: Any) -> Axis:
    """The axis of field `path` over the values `given`: a text as in a command, or a list of values and such texts."""
    hint = hint_of(base, path)
    if path == "seed":
        raise UserError("the seed is varied by --seeds N, so that the figures have their spread; leave out seed")
    label = _LABELS.get(path, path)
    if isinstance(given, str) and given.startswith(("log:", "uniform:")):
        return Axis(paths=(path,), values=_range(base, path, hint, given), label=label)
    items = _items(given) if isinstance(given, str) else given if isinstance(given, list) else [given]
    if not items:
        raise UserError(f"{path} has no values; expected some, as {path}=1,2")
    values = tuple(_value(base, path, hint, item) for item in items)
    return Axis(paths=(path,), values=tuple(dict.fromkeys(values)), label=label)


def require_ends(base: Config, varied: Space) -> None:
    """Raise UserError unless the config takes both ends of each range: what is drawn later lies between."""
    for axis in varied.axes:
        if isinstance(axis.values, Between | WholeBetween):
            for end in (axis.values.low, axis.values.high):
                resolve.changed(base, {axis.paths[0]: end})


def hint_of(base: Config, path: str) -> Any:
    """The type of field `path`. Raises UserError for an unknown field, and for a group of fields."""
    if is_dataclass(resolve.value_of(base, path)):
        inside = [name for name in base.flat() if name.startswith(f"{path}.")]
        raise UserError(f"{path} is a group of fields; name one of them: {', '.join(inside)}")
    kind: Any = type(base)
    for name in path.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields that are varied, fields that are set) of a space in YAML, each field path → what the file says. Raises UserError for a file
    that says anything else."""
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise UserError(f"there is no space {path}; {_FILE}")
    files.require_small(path, "a space has some lines")
    try:
        found = yaml.safe_load(files.read_text(path, "save it as UTF-8"))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: 2026-02-30 is no date
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())[:200]}); {_FILE}") from None
    if not isinstance(found, dict) or not isinstance(found.get("vary"), dict) or not isinstance(found.get("set", {}), dict):
        raise UserError(f"{path} is no space; {_FILE}")
    if unknown := [str(name) for name in found if name not in ("vary", "set")]:
        raise UserError(f"{path} has {short(unknown[0])}; {_FILE}")
    for group in ("vary", "set"):
        for name, given in found.get(group, {}).items():
            if not isinstance(name, str) or not _is_plain(given):
                what = f"{short(name)}: {short(given)}"
                raise UserError(
                    f"{path} has {what} below {group}; expected a field as optim.base_lr, and its values as [0.1, 1] or log:0.1:3"
                )
    return found["vary"], found.get("set", {})


def _is_plain(given: Any) -> bool:
    if isinstance(given, list):
        return all(_is_plain(item) for item in given)
    return given is None or isinstance(given, str | int | float)


def value(base: Config, path: str, given: Any) -> Any:
    """One value of field `path`, from a file's value or a text."""
    return _plain(path, hint_of(base, path), given)


def _items(text: str) -> list[str]:
    """The parts of `text` between its commas, but for those inside brackets."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def _value(base: Config, path: str, hint: Any, item: Any) -> Any:
    """A value of an axis: the field's own, or a multiple of the recipe's."""
    if (factor := _factor(base, path, item)) is None:
        return _plain(path, hint, item)
    return Peak(factor) if path == _PEAK else Times(factor)


def _factor(base: Config, path: str, item: Any) -> float | None:
    """2.0 of "x2", None of what is no multiple. Raises UserError for a multiple of what is no number."""
    if not isinstance(item, str) or not re.fullmatch(r"[x×]\d+(\.\d*)?([eE][+-]?\d+)?", item.strip()):
        return None
    factor, here = float(item.strip()[1:]), resolve.value_of(base, path)
    if isinstance(here, bool) or not isinstance(here, int | float):
        raise UserError(f"{path} {item} is no multiple: the recipe's {path} is {here}, no number; give the values themselves")
    if not 0 < factor < float("inf"):
        raise UserError(f"{path} {item} is no multiple; expected a positive number behind the x, as x0.5")
    return factor


def _plain(path: str, hint: Any, item: Any) -> Any:
    """A value of the field's own type, from JSON, a name, or parts that + joins. Raises UserError for another."""
    found = item
    if isinstance(item, str):
        try:
            found = json.loads(item)
        except (ValueError, RecursionError):
            found = {"True": True, "False": False, "None": None, "none": None}.get(item, item)
        if isinstance(item, str) and fits(item, hint):  # a name, also one that is JSON by chance
            found = item
        elif isinstance(found, str) and not fits(found, hint) and fits(found.split("+"), hint):
            found = found.split("+")
    if not fits(found, hint):
        names = [str(choice) for kind in _kinds(hint) if get_origin(kind) is Literal for choice in get_args(kind)]
        near = difflib.get_close_matches(str(item), names, n=1)
        raise UserError(f"{path} does not take {short(item)}; expected {shown(hint)}{f'; nearest: {near[0]}' if near else ''}")
    if isinstance(found, list):
        return tuple(found)
    whole = isinstance(found, int) and not isinstance(found, bool)
    return float(found) if whole and not any(fits(found, kind) for kind in _kinds(hint) if kind is not float) else found


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _range(base: Config, path: str, hint: Any, text: str) -> Distribution:
    """The distribution that log:LOW:HIGH or uniform:LOW:HIGH asks for."""
    kinds, match = _kinds(hint), _RANGE.fullmatch(text.strip())
    if not {int, float} & set(kinds):
        raise UserError(f"{path} takes {shown(hint)}; {text} is a range of numbers: give the values themselves, one comma between two")
    if match is None:
        raise UserError(f"{path}={text} is no range; expected log:LOW:HIGH or uniform:LOW:HIGH, as log:0.1:3")
    log, ends = match[1] == "log", [match[2].strip(), match[3].strip()]
    factors = [_factor(base, path, end) for end in ends]
    if path == _PEAK and None not in factors:
        if not log:
            raise UserError(f"{path}={text}: multiples of the learning rate are drawn in their logarithm; use log:{ends[0]}:{ends[1]}")
        low, high = (factor or 0.0 for factor in factors)
    else:
        low, high = (_end(base, path, text, end, factor) for end, factor in zip(ends, factors, strict=True))
    if not low < high:
        raise UserError(f"{path}={text} has no room; expected the lower end first, as log:0.1:3")
    if log and low <= 0:
        raise UserError(f"{path}={text}: there is no logarithm of {low:g}; begin above 0, or use uniform:{low:g}:{high:g}")
    if path == _PEAK and None not in factors:
        return PeakBetween(low, high)
    if float not in kinds:
        if low != int(low) or high != int(high):
            raise UserError(f"{path} takes whole numbers; {text} begins or ends between two")
        return WholeBetween(int(low), int(high), log)
    return Between(low, high, log)


def _end(base: Config, path: str, text: str, end: str, factor: float | None) -> float:
    if factor is not None:
        here = resolve.value_of(base, path)
        return max(round(here * factor), 1) if isinstance(here, int) else here * factor
    try:
        found = json.loads(end)
    except (ValueError, RecursionError):
        found = None
    if not fits(found, float):
        raise UserError(f"{path}={text} is no range: {end!r} is no number; expected log:LOW:HIGH or uniform:LOW:HIGH, as log:0.1:3")
    return float(found)
