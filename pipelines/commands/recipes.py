"""`simclr recipes`: the named configs and their docstrings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipelines.terminal import show
from simclr.recipes import RECIPES, recipe


@dataclass(frozen=True)
class Args:
    """List the recipes, or show one in full."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A recipe to show with every field."""


def main(args: Args) -> None:
    if args.name is None:
        for name, function in RECIPES.items():
            show(f"{name:<26} {(inspect.getdoc(function) or '').splitlines()[0]}")
        return
    config = recipe(args.name)
    show(f"{args.name}\n\n{inspect.getdoc(RECIPES[args.name])}\n")
    for path, value in config.flat().items():
        show(f"  {path:<32} {value}")
