"""From a space to configs: combinations and samples of its values, resolved by the recipe and checked against the dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simclr.config import Config
from simclr.errors import UserError
from simclr.family import foreign, pretraining
from tune.spaces import SPACES, Axis, Peak, PeakBetween, Space, Times, WholeBetween

MOST = 100_000
"""Trials of a sweep; a larger number is a mistake, or a damaged file."""
RESNETS = tuple(f"encoder.{name}" for name in ("depth", "width", "sk_ratio", "se_ratio", "cifar_stem"))
"""Fields that only a ResNet has a use for."""
DRAWS = 16
"""How often a space with a range is drawn from, if nobody says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One combination of values and a seed, for one trial."""

    values: dict[str, Any]
    """Field path → its value in the config."""
    seed: int
    config: Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """One combination and a seed in Ray Tune's form, for a trial."""

    axes: dict[str, int | float]
    """Axis key → number of the value, or the number drawn from a distribution."""
    seed: int
    name: str = ""
    """The trial's name; "" if the search draws the combination while the sweep runs."""


def restricted(space: Space, recipe: Config, only: dict[str, list[Any]]) -> Space:
    """The space without values that do not suit this recipe, and with only the given values on the axes in `only`.

    On an axis of operations a value is kept if all of its parts are given. Raises UserError for an axis that the space lacks, or if an
    axis has no values left.
    """
    _require_fields(space, recipe)
    shallow = recipe.encoder.depth in (8, 14, 20)
    axes = []
    unused = dict(only)
    for axis in space.axes:
        values = axis.values
        # Two families of networks, for small images and large. What a user names is as he means it.
        if axis.paths == ("encoder.depth",) and isinstance(values, tuple) and space.name in SPACES:
            values = tuple(d for d in values if (d in (8, 14, 20)) == shallow)
        for path in (p for p in axis.paths if p in only):
            wanted, at = unused.pop(path), axis.paths.index(path)
            if not isinstance(values, tuple):
                values = tuple(wanted)
                continue
            there = [_plain(space, recipe, path, v[at] if len(axis.paths) > 1 else v) for v in values]
            known = list(dict.fromkeys(part for v in there for part in (v if isinstance(v, tuple) else (v,))))
            if absent := [w for w in wanted if not any(_among(v, [w]) for v in known)]:
                raise UserError(f"{space.name} has no {path} {', '.join(map(str, absent))}; it has {', '.join(map(str, known))}")
            values = tuple(v for v, plain in zip(values, there, strict=True) if _among(plain, wanted))
            if not values:
                raise UserError(f"--only {path}={json.dumps(wanted)} leaves nothing of {space.name}; `simclr sweep --list` has its values")
        axes.append(dataclasses.replace(axis, values=values))
    if unused:
        paths = [p for axis in space.axes for p in axis.paths]
        raise UserError(f"space {space.name} does not vary {', '.join(unused)}; --only takes {', '.join(paths)}")
    return dataclasses.replace(space, axes=tuple(axes))


def _require_fields(space: Space, recipe: Config) -> None:
    """Raise UserError for a space with a field of another method, or one that the recipe's kind of network has no use for."""
    network = recipe.encoder.vit or recipe.encoder.timm
    for path in [*(path for axis in space.axes for path in axis.paths), *space.fixed]:
        if whose := foreign(path, recipe):
            raise UserError(f"space {space.name} does not go with the recipe: {whose}; --vary FIELD=A,B makes a space of any of its fields")
        if network and path in RESNETS:
            raise UserError(f"space {space.name} does not go with the recipe: {path} is a ResNet's, and its encoder is {network}")


def _among(value: Any, wanted: list[Any]) -> bool:
    if isinstance(value, tuple):
        return set(value) <= set(wanted)
    return any(math.isclose(value, w) if isinstance(value, float) and isinstance(w, int | float) else value == w for w in wanted)


def _plain(space: Space, recipe: Config, path: str, value: Any) -> Any:
    """The field's value, as far as the recipe alone decides it."""
    return value.factor if isinstance(value, Peak) else _resolved({path: value}, recipe, recipe)[path]


def tried(space: Space, search: str, trials: int | None, seed: int) -> list[dict[str, Any]]:
    """The combinations of a sweep, as axis key → value (not yet resolved), in order. For optuna, which draws its own, some of its kind."""
    if search == "grid":
        return combinations(space)
    if search == "mixed":
        lists = tuple(axis for axis in space.axes if isinstance(axis.values, tuple))
        drawn = samples(dataclasses.replace(space, axes=tuple(a for a in space.axes if a not in lists)), trials or DRAWS, seed)
        every = combinations(dataclasses.replace(space, axes=lists))
        if len(drawn) * len(every) > MOST:
            raise UserError(
                f"{space.name} has {len(drawn) * len(every):,} trials; expected at most {MOST:,}: fewer --trials, or fewer values"
            )
        return [{axis.key: (found | one)[axis.key] for axis in space.axes} for one in drawn for found in every]
    return samples(space, trials or (MOST if is_list(space) else DRAWS), seed)


def is_list(space: Space) -> bool:
    """Whether all axes have lists of values, and none a range."""
    return all(isinstance(axis.values, tuple) for axis in space.axes)


def combinations(space: Space) -> list[dict[str, Any]]:
    """All combinations, as axis key → value (not yet resolved). Raises UserError for an axis with a distribution."""
    for axis in space.axes:
        if not isinstance(axis.values, tuple):
            raise UserError(f"{axis.key} of space {space.name} has a distribution, which no grid covers; use --search random or optuna")
    if (many := math.prod(len(_values(axis)) for axis in space.axes)) > MOST:
        raise UserError(f"{space.name} has {many:,} combinations; expected at most {MOST:,}: use fewer values")
    return [dict(zip([a.key for a in space.axes], found, strict=True)) for found in itertools.product(*(_values(a) for a in space.axes))]


def _values(axis: Axis) -> tuple[Any, ...]:
    assert isinstance(axis.values, tuple)
    return axis.values


def samples(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` random combinations, the same for the same seed; without repetition if every axis has a list of values."""
    draw = random.Random(seed)
    if is_list(space):
        every = combinations(space)
        draw.shuffle(every)
        return every[:count]
    return [{axis.key: _drawn(axis, draw) for axis in space.axes} for _ in range(count)]


def _drawn(axis: Axis, draw: random.Random) -> Any:
    if isinstance(axis.values, tuple):
        return draw.choice(axis.values)
    low, high = axis.values.low, axis.values.high
    if isinstance(axis.values, PeakBetween):
        return Peak(math.exp(draw.uniform(math.log(low), math.log(high))))
    if isinstance(axis.values, WholeBetween):
        return round(math.exp(draw.uniform(math.log(low), math.log(high)))) if axis.values.log else draw.randint(int(low), int(high))
    return math.exp(draw.uniform(math.log(low), math.log(high))) if axis.values.log else draw.uniform(low, high)


def point(space: Space, recipe: Config, chosen: dict[str, Any], seed: int) -> Point:
    """The config of one combination. Raises UserError for a field that does not exist or does not take its value."""
    values: dict[str, Any] = dict(space.fixed)
    for axis in space.axes:
        parts = chosen[axis.key] if len(axis.paths) > 1 else (chosen[axis.key],)
        values |= dict(zip(axis.paths, parts, strict=True))
    later = {path: value for path, value in values.items() if isinstance(value, Peak)}
    config = changed(recipe, _resolved({k: v for k, v in values.items() if k not in later}, recipe, recipe))
    config = changed(config, _resolved(later, recipe, config) | {"seed": recipe.seed + seed})
    flat = {path: value_of(config, path) for axis in space.axes for path in axis.paths}
    return Point(values=flat, seed=recipe.seed + seed, config=config)


def _resolved(values: dict[str, Any], recipe: Config, trial: Config) -> dict[str, Any]:
    """`values` without Times and Peak."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        if isinstance(value, Times):
            base = value_of(recipe, path)
            found[path] = max(round(base * value.factor), 1) if isinstance(base, int) else base * value.factor
        elif isinstance(value, Peak):
            found[path] = float(f"{value.factor * _peak(recipe, trial):.6g}")
        else:
            found[path] = value
    return found


def _peak(recipe: Config, trial: Config) -> float:
    """The base_lr with which the recipe's batch gets the recipe's learning rate under the scaling rule of `trial`."""
    n = recipe.train.batch_size
    shares = {"linear": n / 256, "sqrt": math.sqrt(n)}
    return recipe.optim.base_lr * shares[recipe.optim.scaling] / shares[trial.optim.scaling]


def code(axis: Axis, value: Any) -> int | float:
    """The code of an axis' value; `chosen` is the inverse."""
    if isinstance(axis.values, tuple):
        return axis.values.index(value)
    if isinstance(axis.values, WholeBetween):
        return int(value)
    return float(value.factor if isinstance(axis.values, PeakBetween) else value)


def chosen(axis: Axis, code: Any) -> Any:
    """An axis' value from its code: the number of the value, or the number drawn from the distribution."""
    if isinstance(axis.values, tuple):
        return axis.values[int(code)]
    inside = min(max(float(code), axis.values.low), axis.values.high)
    if isinstance(axis.values, WholeBetween):
        return round(inside)
    return Peak(inside) if isinstance(axis.values, PeakBetween) else inside


def codes_of(space: Space, recipe: Config, config: Config) -> dict[str, int | float] | None:
    """The codes that give the values of `config` (`point` is the inverse): a trial's own config says what a search or a scheduler chose.
    None if no codes do."""
    found: dict[str, int | float] = {}
    for axis in space.axes:
        values = axis.values
        first = value_of(config, axis.paths[0])
        if isinstance(values, PeakBetween):
            found[axis.key] = min(max(first / _peak(recipe, config), values.low), values.high)
        elif isinstance(values, tuple):
            parts = [dict(zip(axis.paths, v if len(axis.paths) > 1 else (v,), strict=True)) for v in values]
            same = [i for i, part in enumerate(parts) if all(value_of(config, k) == v for k, v in _resolved(part, recipe, config).items())]
            if not same:
                return None
            found[axis.key] = same[0]
        else:
            found[axis.key] = first
    back = {axis.key: chosen(axis, found[axis.key]) for axis in space.axes}
    theirs, ours = config.flat(), point(space, recipe, back, 0).config.flat()
    return found if all(theirs[path] == ours[path] for axis in space.axes for path in axis.paths) else None


def value_of(config: Config, path: str) -> Any:
    """The value of field `path`, as "optim.base_lr". For an unknown field, raises UserError with the nearest names."""
    value: Any = config
    for name in path.split("."):
        if not dataclasses.is_dataclass(value) or name not in {f.name for f in dataclasses.fields(value)}:
            if whose := foreign(path, config):
                raise UserError(whose)
            known = list(config.flat())
            near = difflib.get_close_matches(path, known, n=3, cutoff=0.3) or known
            raise UserError(f"the config has no field {path!r}; nearest: {', '.join(near)}")
        value = getattr(value, name)
    return value


def changed(config: Config, values: dict[str, Any]) -> Config:
    """`config` with other values at some paths. Raises UserError for an unknown field or a value of another type."""
    whole = config.to_dict()
    for path, value in values.items():
        value_of(config, path)
        *groups, name = path.split(".")
        here: Any = whole
        for group in groups:
            here = here[group]
        here[name] = value
    return pretraining(whole)


def assignments(words: tuple[str, ...], flag: str) -> Iterator[tuple[str, str]]:
    """("optim.base_lr", "2.0") of "optim.base_lr=2.0". Raises UserError for a word without "="."""
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path or not text:
            raise UserError(f"{flag} {word!r} is no assignment; expected FIELD=VALUE, as in {flag} train.epochs=6")
        yield path, text


def read(config: Config, path: str, text: str) -> Any:
    """`text` of a command line as a value of field `path`: JSON, a word, or an operation."""
    value_of(config, path)
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return tuple(value) if isinstance(value, list) else value
