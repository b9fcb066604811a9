"""`simclr recipes`: the named configs, as a list or as a file for --config."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.runs import config_file
from pipelines.terminal import show
from simclr.family import METHODS, method_name
from simclr.papers import named
from simclr.recipes import RECIPES, recipe


@dataclass(frozen=True)
class Args:
    """List the recipes by method, or write one in full, as YAML with what each field means: `simclr recipes NAME > run.yaml`, for
    `simclr pretrain --config run.yaml`. `finetune` and `distill` write the settings of those commands."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A recipe, or finetune or distill."""


def main(args: Args) -> None:
    if args.name is None:
        of = {name: method_name(recipe(name)) for name in RECIPES}
        for method in METHODS:
            if names := [name for name in RECIPES if of[name] == method]:
                show(f"{'' if method == 'simclr' else chr(10)}{named(method).title}, {named(method).cited}")
            for name in names:
                show(f"  {name:<28} {(inspect.getdoc(RECIPES[name]) or '').splitlines()[0]}")
        show("\n`simclr recipes NAME > run.yaml` writes one with every field, for --config run.yaml")
    elif args.name in ("finetune", "distill"):
        show(stage(args.name).rstrip())
    else:
        config = recipe(args.name)
        lines = {"recipe": args.name} | ({"method": config.METHOD} if config.METHOD else {})
        show(config_file.written(config, inspect.getdoc(RECIPES[args.name]) or "", lines).rstrip())


def stage(name: str) -> str:
    """The settings of `simclr finetune` or `simclr distill` as YAML, with their defaults; null = as the command decides."""
    from pipelines.commands import distill, finetune

    args: finetune.Args | distill.Args = finetune.Args(Path()) if name == "finetune" else distill.Args(Path())
    return config_file.written(args, f"The settings of `simclr {name}`, for --config. null = as the command decides.", only=args.SETTINGS)
