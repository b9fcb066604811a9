"""Checks of values from a file that a person may have edited or a disk may have damaged. A value that does not fit raises UserError."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from simclr.errors import UserError

T = TypeVar("T")


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`, as JSON has them: an int also serves as a float, a list as a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in inner)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        return len(hints) == len(value) and all(map(fits, value, hints))
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items())
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # false for NaN
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def shown(hint: Any) -> str:
    """A type, as messages show it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("None" if choice is types.NoneType else shown(choice) for choice in get_args(hint))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint).replace("typing.", "")


def require(values: Mapping[str, Any], hints: Mapping[str, Any], where: object, instead: str) -> None:
    """Raise UserError if `values`, from the file `where`, lack a field of `hints` or have one of another type. `instead` tells the user
    what to do."""
    for name, hint in hints.items():
        if name not in values:
            raise UserError(f"{where} is damaged: it has no {name!r}; {instead}")
        if not fits(values[name], hint):
            raise UserError(f"{where} is damaged: {name} is {short(values[name])}, expected {shown(hint)}; {instead}")


def build(kind: type[T], values: Mapping[str, Any], where: object, instead: str, /, **given: Any) -> T:
    """The dataclass `kind` from `values`, which the file `where` states (lists become tuples where `kind` wants them), and from the
    fields `given`. Raises UserError as `require` does, and for an unknown field."""
    hints, known = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise UserError(f"{where} has an unknown field {short(name)}; {instead}")
    optional = {n for n, f in known.items() if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING}
    require(values, {name: hints[name] for name in known if name not in given and (name in values or name not in optional)}, where, instead)
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list) and get_origin(hints[name]) is tuple}
    return kind(**{**values, **tuples, **given})


def short(value: Any) -> str:
    """A value, as messages show it: its beginning."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
