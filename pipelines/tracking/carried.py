"""The code that a registered version carries: of this package what embedding pictures needs, under a name of its own.

The name holds a digest of the code. So a version is read where this package is not installed, where another release of it is, or the other
project that has its name on the public index; and versions of different code are read in one process.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

_LOADER = "pipelines.tracking.pyfunc"
_ROOT = Path(__file__).resolve().parents[2]  # where the packages lie
_OURS = ("simclr", "pipelines")
_NOTHING = "# Not empty: requests sends an empty file in chunks, which some proxies do not pass on.\n"


def write(folder: Path) -> str:
    """Write the package into the new folder `folder`. Returns the name of the module in it that MLflow loads a version by."""
    sources = {name: _file(name).read_text() for name in modules()}
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(sources.items())).encode()).hexdigest()
    package = f"simclr_encoder_{digest[:12]}"
    for name, text in sources.items():
        path = (folder / package / name.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(renamed(text, package) or _NOTHING)
    for inside in [folder / package, *(path for path in (folder / package).rglob("*") if path.is_dir())]:
        if not (inside / "__init__.py").exists():
            (inside / "__init__.py").write_text(_NOTHING)
    (folder / package / "__init__.py").write_text('"""What embeds the pictures of this model version; SimCLR, Apache-2.0."""\n')
    return f"{package}.{_LOADER}"


def modules() -> list[str]:
    """The loader, and all of this package that it imports, whenever it does, by the names of their modules."""
    found, waiting = set[str](), [_LOADER]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(_file(name).read_text())
    return sorted(found)


def renamed(text: str, package: str) -> str:
    """The source `text` of a module as it stands in `package`: its imports of this package, and the names under which torch knows its
    operations, which may be there once in a process."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line[: node.col_offset] + line[node.col_offset :].replace("from ", f"from {package}.", 1)
    return "\n".join(lines).replace('custom_op("simclr::', f'custom_op("{package}::')


def _imports(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if _file(name).is_file() else str(node.module) for name in within]
        elif isinstance(node, ast.Import):
            assert not any(_is_ours(alias.name) for alias in node.names), "it would be another module in the package"
    return found


def _is_ours(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _OURS


def _file(module: str) -> Path:
    return (_ROOT / module.replace(".", "/")).with_suffix(".py")
