"""A config as a file that a person edits: YAML with every field and what it means, or the run.json of an earlier run.

YAML 1.1, which most readers still follow, takes `1e-4` for text, `no` for false, `010` for eight and `1:30` for ninety, and the last of two
equal keys. Here a word is true, false, null or a decimal number only where YAML 1.2's core schema and everybody's eye agree; every other
word is text, and a field that wants something else refuses it by name, file and line.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from simclr import fields, files
from simclr.config import Config
from simclr.errors import UserError
from simclr.family import METHODS, foreign, method_name
from simclr.recipes import RECIPES, recipe
from simclr.stages import STAGES, read_config
from simclr.text import printable

if TYPE_CHECKING:  # an extra has it, and every command looks for --config
    import yaml  # type: ignore[import-untyped]

T = TypeVar("T")
_WIDTH = 140
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")  # it becomes the name of a folder
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?")
_INSTEAD = "give another run.json, or a YAML file as `simclr recipes NAME` writes it"
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


@dataclass(frozen=True, slots=True)
class Named:
    """A config, and the recipe that it is of."""

    recipe: str
    config: Config
    stage: str = "pretrain"


def given_to(flag: str, words: list[str]) -> str | None:
    """The value of `flag` among a command's `words`, the last of several; None where it has none."""
    found = [
        (word.partition("=")[2] or following)
        for word, following in zip(words, [*words, ""][1:], strict=True)
        if word.partition("=")[0] == flag
    ]
    return (found and found[-1]) or None


# ── Reading ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path, stage: str = "pretrain") -> Named:
    """The config of `stage` in `path`: a YAML file of `Config`'s fields, or run.json, or the run directory that it lies in.

    A YAML file may leave out fields if it has `recipe: NAME`: then they are that recipe's. Raises UserError, with file and line, for what
    is no field, has another type, or is there twice; and for a run of another stage.
    """
    path = at(path)
    if path.suffix == ".json":
        return _of_run(path, stage)
    written = entries(path)
    line, name = written.pop("recipe", (0, None))
    if line and (not isinstance(name, str) or not _NAME.fullmatch(name)):
        raise UserError(
            f"{printable(str(path))}, line {line}: recipe is {fields.short(name)}; expected a name, as `simclr recipes` lists them"
        )
    method, stated = written.pop("method", (0, "simclr"))
    if not isinstance(stated, str) or stated not in METHODS:
        near = difflib.get_close_matches(str(stated), METHODS, n=3, cutoff=0.3) or list(METHODS)
        raise UserError(f"{printable(str(path))}, line {method}: unknown method {fields.short(stated)}; nearest: {', '.join(near)}")
    if method and name in RECIPES and method_name(recipe(name)) != stated:
        of = method_name(recipe(name))
        raise UserError(f"{printable(str(path))}, line {method}: method is {stated}, and the recipe {name} is of {of}")
    whole = METHODS[stated]() if method or name not in RECIPES else recipe(name)
    missing = sorted(set(whole.flat()) - {"method", *written})
    if missing and name is None:
        raise UserError(
            f"{printable(str(path))} leaves out {missing[0]}{_more(missing)}, and names no recipe to take it from; add a line recipe: NAME"
        )
    if missing and name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3) or list(RECIPES)
        raise UserError(
            f"{printable(str(path))}, line {line}: unknown recipe {name!r}, and {missing[0]}{_more(missing)} would come from it; "
            f"nearest: {', '.join(near)}"
        )
    stem = re.sub(r"[^\w.-]", "_", path.stem).lstrip("._-") or "config"
    return Named(name or stem, changed(whole if name not in RECIPES else recipe(name), written, path))


def at(path: Path) -> Path:
    """The file meant by `path`, which may be a run directory. Raises UserError where there is none."""
    if path.is_dir() and (path / "run.json").is_file():
        return path / "run.json"
    if not path.is_file():
        raise UserError(f"--config {path} is no file; `simclr recipes NAME > run.yaml` writes one, and a run has its run.json")
    return path


def entries(path: Path) -> dict[str, tuple[int, Any]]:
    """Field path → (line, value) of a YAML file, e.g. {"train.epochs": (12, 100)}; lists as lists. A section without entries counts for
    nothing, as one of which every line is commented out. Raises UserError for what is no such file."""
    import yaml

    text = files.read_text(path, "save it as UTF-8")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{printable(str(path))} has an alias (*name); write the value itself")
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{printable(str(path))} is no YAML{where}: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{printable(str(path))} is nested too deeply to be a config") from None
    if root is None:
        raise UserError(f"{printable(str(path))} is empty; `simclr recipes NAME > {path.name}` writes a whole one")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{printable(str(path))} has no fields; expected lines such as seed: 0")
    found: dict[str, tuple[int, Any]] = {}
    for name, line, value in _leaves(root, "", path):
        if name in found:
            raise UserError(
                f"{printable(str(path))}, line {line}: {name} is there twice, first in line {found[name][0]}; remove one of them"
            )
        found[name] = line, value
    return found


def _leaves(node: yaml.MappingNode, prefix: str, path: Path) -> Iterator[tuple[str, int, Any]]:
    import yaml

    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{printable(str(path))}, line {line}: expected the name of a field")
        name = prefix + printable(key.value)
        if isinstance(value, yaml.MappingNode):
            yield from _leaves(value, f"{name}.", path)
        else:
            yield name, line, _plain(value, path)


def _plain(node: yaml.Node, path: Path) -> Any:
    import yaml

    line = node.start_mark.line + 1
    if node.tag.startswith("!") or node.tag == "tag:yaml.org,2002:binary":
        raise UserError(f"{printable(str(path))}, line {line}: {printable(node.tag)} is a tag; write the value alone")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{printable(str(path))}, line {line}: expected a value")
    if node.style is not None:  # in quotes, or a block of text
        return node.value
    word: str = node.value
    if word in _WORDS:
        return _WORDS[word]
    if len(word) <= 40 and _INT.fullmatch(word):
        return int(word)
    return float(word) if len(word) <= 40 and _FLOAT.fullmatch(word) else word


def changed(base: T, written: dict[str, tuple[int, Any]], path: Path, only: tuple[str, ...] | None = None) -> T:
    """The dataclass `base`, which may have dataclasses as fields, with what is `written` in `path`: field path → (line, value). `only`
    these of its own fields may be there, by default all."""
    known = {name: hint for name, hint in _fields(type(base)) if only is None or name.partition(".")[0] in only}
    for name, (line, value) in written.items():
        where = f"{printable(str(path))}, line {line}"
        sections = {section for field in known if (section := field.rpartition(".")[0])}
        if value is None and name in sections:
            continue
        if name in sections:
            raise UserError(f"{where}: {name} is {fields.short(value)}; expected its fields below it, as {_first(known, name)}")
        if name not in known and isinstance(base, Config) and (whose := foreign(name, base)):
            raise UserError(f"{where}: {whose}; a line method: NAME asks for another method")
        if name not in known:
            raise UserError(f"{where}: unknown field {name}; nearest: {', '.join(_nearest(name, known))}")
        if not fields.fits(value, known[name]):
            raise UserError(f"{where}: {name} is {_said(value)}; expected {_wanted(known[name])}")
    try:
        return _replaced(base, {name: value for name, (_, value) in written.items() if name in known}, "")
    except UserError as error:
        raise UserError(f"{printable(str(path))}: {error}") from None


def _replaced(base: T, values: dict[str, Any], prefix: str) -> T:
    mine: dict[str, Any] = {}
    for field in dataclasses.fields(base):  # type: ignore[arg-type]
        now, name = getattr(base, field.name), prefix + field.name
        if dataclasses.is_dataclass(now):
            if any(key.startswith(f"{name}.") for key in values):
                mine[field.name] = _replaced(now, values, f"{name}.")
        elif name in values:
            mine[field.name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
    return replace(base, **mine)  # type: ignore[type-var]


def _fields(cls: type[Any], prefix: str = "") -> tuple[tuple[str, Any], ...]:
    """(field path, type) of a dataclass and of those in it."""
    hints = get_type_hints(cls)
    found: list[tuple[str, Any]] = []
    for field in dataclasses.fields(cls):
        inner, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(inner):
            found += _fields(inner, f"{name}.")  # type: ignore[arg-type]
        else:
            found.append((name, inner))
    return tuple(found)


def _nearest(name: str, known: dict[str, Any]) -> list[str]:
    """Fields of a name like `name`'s, wherever they stand; else those like all of it."""
    last = name.rpartition(".")[2].replace("-", "_")
    ends = difflib.get_close_matches(last, {field.rpartition(".")[2] for field in known}, n=2, cutoff=0.6)
    found = [field for end in ends for field in known if field.rpartition(".")[2] == end]
    found.sort(key=lambda field: -difflib.SequenceMatcher(None, name, field).ratio())
    return (found or difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known))[:3]


def _first(known: dict[str, Any], section: str) -> str:
    return next(field for field in known if field.startswith(f"{section}."))


def _wanted(hint: Any) -> str:
    return re.sub(r"\b(int|float|bool|str|None)\b", lambda word: _KINDS[word[0]], fields.shown(hint))


def _said(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {fields.short(value)}"
    return {True: "true", False: "false", None: "empty"}[value] if value is None or isinstance(value, bool) else fields.short(value)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _of_run(path: Path, stage: str) -> Named:
    text = files.read_json(path, _INSTEAD)
    fields.require(text, {"config": dict[str, Any], "recipe": str}, path, _INSTEAD)
    of = text.get("stage", "pretrain")
    if of not in STAGES:
        raise UserError(f"{path} is damaged: stage is {fields.short(of)}; {_INSTEAD}")
    if of != stage:
        raise UserError(f"{path} is a run of `simclr {of}`, and `simclr {stage}` cannot take its config; give it to `simclr {of} --config`")
    if not _NAME.fullmatch(text["recipe"]):
        raise UserError(f"{path} is damaged: recipe is {fields.short(text['recipe'])}, expected a name; {_INSTEAD}")
    try:
        return Named(text["recipe"], read_config(of, text["config"]), of)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ── Writing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def written(value: Any, head: str = "", names: dict[str, str] | None = None, only: tuple[str, ...] | None = None) -> str:
    """The dataclass `value` as YAML that `entries` and `changed` read back to an equal one. Each field has its docstring as a comment.
    `head` is a comment at the top, `names` are lines before all fields, `only` the fields to write, by default all."""
    lines = [*_comment(head, ""), *(f"{name}: {text}" for name, text in (names or {}).items())]
    return "\n".join([*lines, *_section(value, "", only)]) + "\n"


def _section(value: Any, indent: str, only: tuple[str, ...] | None = None) -> Iterator[str]:
    said = docs(type(value))
    for field in dataclasses.fields(value):
        if only is not None and field.name not in only:
            continue
        inner = getattr(value, field.name)
        yield ""
        if dataclasses.is_dataclass(inner):
            yield from _comment((inspect.getdoc(type(inner)) or "").partition("\n\n")[0], indent)
            yield f"{indent}{field.name}:"
            yield from list(_section(inner, indent + "  "))[1:]
        else:
            yield from _comment(said.get(field.name, ""), indent)
            yield f"{indent}{field.name}: {_scalar(inner)}"


def _comment(text: str, indent: str) -> Iterator[str]:
    for paragraph in text.splitlines():
        yield from (f"{indent}# {line}".rstrip() for line in textwrap.wrap(paragraph, _WIDTH - len(indent) - 2) or [""])


def _scalar(value: Any) -> str:
    """A value as YAML 1.1 and 1.2 read it alike."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump([plain], default_flow_style=True, width=10**6)
    return text.strip()[1:-1]


def docs(cls: type[Any]) -> dict[str, str]:
    """Field → the docstring below it, of a dataclass and those that it inherits from, in one line."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name) or not isinstance(below, ast.Expr):
                continue
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                found[field.target.id] = " ".join(below.value.value.split())
    return found
