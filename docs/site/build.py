"""The site from the pages of the repository, and the notebook with its outputs. `make docs` and `make notebook` run it.

The pages go to build/docs/pages at their own paths, with the files that they link to; so a link is the same link on the site, and MkDocs
checks it with its anchor. Then no page may ask a browser to fetch anything from elsewhere.
"""

from __future__ import annotations

import ast
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "docs"
NOTEBOOK = ROOT / "docs" / "photos.ipynb"
_RECIPES = "<!-- On the site the text of each recipe follows here. -->"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FETCHED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//|<link\b[^>]*\bhref=["'](?:https?:)?//""")


def pages() -> list[Path]:
    named = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*named, *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md"), *ROOT.glob("tests/*/README.md")]


def stage(into: Path) -> None:
    """Copy all pages to `into`, and what they link to; the notebook becomes a page."""
    for page in pages():
        there = into / page.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text(_LINK.sub(lambda found, page=page: _linked(found, page, into), page.read_text()))
    listed = into / "docs" / "recipes.md"
    listed.write_text(listed.read_text().replace(_RECIPES, recipes()))
    body, resources = MarkdownExporter(exclude_input_prompt=True).from_filename(str(NOTEBOOK))
    (into / "docs" / NOTEBOOK.name).with_suffix(".md").write_text(body)
    for name, data in resources["outputs"].items():
        (into / "docs" / name).write_bytes(data)


def recipes() -> str:
    """What each recipe's docstring says, below its name; its commands as commands."""
    tree = ast.parse("".join((ROOT / "simclr" / f"recipes_{name}.py").read_text() for name in ("simclr", "siblings")))
    found = []
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and not function.args.args and not function.name.startswith("_"):
            text = ast.get_docstring(function) or ""
            text = re.sub(r"^(?:simclr .*\n?)+", lambda block: f"```\n{block[0].strip()}\n```\n", text, flags=re.MULTILINE)
            found.append(f"## {function.name}\n\n{text}\n")
    assert len(found) > 5
    return "\n".join(found)


def _linked(found: re.Match[str], page: Path, into: Path) -> str:
    """A link of `page`, whose target is copied. A link to a folder, or to the notebook, becomes what the site has."""
    bang, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if re.match(r"\w+:", target):
        return found[0]
    path = (page.parent / target).resolve()
    if path == NOTEBOOK:
        return f"{bang}[{text}]({target.removesuffix('.ipynb')}.md{anchor})"
    if path.is_dir():
        return text
    if path.is_file() and path.suffix != ".md":
        copy = into / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # A browser shows what is called .txt. LICENSE and code have no page.
        name = copy.name if copy.suffix in (".png", ".json", ".yaml") else f"{copy.name}.txt"
        shutil.copy(path, copy.with_name(name))
        return f"{bang}[{text}]({target}{name.removeprefix(copy.name)})"
    return found[0]


def site() -> None:
    logging.basicConfig(format="%(message)s")  # its warnings end the build
    shutil.rmtree(BUILD, ignore_errors=True)
    stage(BUILD / "pages")
    build(load_config(str(HERE / "mkdocs.yml")))
    wrong = [f"{path.relative_to(BUILD)}: {found[0]}" for path in BUILD.rglob("*.html") if (found := _FETCHED.search(path.read_text()))]
    if wrong:
        sys.exit("pages fetch from elsewhere:\n" + "\n".join(wrong))


def notebook() -> None:
    """Run the notebook in an empty folder and write it with its outputs."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # the same picture as PNG lies beside it
    book.metadata.pop("widgets", None)
    nbformat.write(book, NOTEBOOK)


if __name__ == "__main__":
    {"site": site, "notebook": notebook}[sys.argv[1]]()
