"""Complete, named configs. A recipe is a function; its docstring says where the setting is from and what to expect.

Costs and scores marked *published* are the cited authors'; a figure without that mark was measured with this code on the
machine it names. A recipe with neither has not been measured yet.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from simclr.config import Config
from simclr.errors import UserError
from simclr.recipes_pairs import pairs_clip, patterns_clip
from simclr.recipes_predictive import (
    cifar10_dino,
    cifar10_swav,
    imagenet_dino_vit_small,
    imagenet_mae_vit_base,
    imagenet_swav,
    patterns_dino,
    patterns_mae,
    patterns_swav,
)
from simclr.recipes_siblings import (
    cifar10_byol,
    cifar10_moco,
    cifar10_mocov3,
    imagenet_byol,
    imagenet_mocov2,
    imagenet_mocov3_resnet50,
    imagenet_mocov3_vit_small,
    imagenette_byol,
    patterns_byol,
    patterns_moco,
    patterns_mocov3,
)
from simclr.recipes_simclr import (
    cifar10_resnet14,
    cifar10_resnet18,
    cifar10_speedrun,
    imagenet_resnet50,
    imagenet_resnet50_2x,
    imagenet_resnet50_4x,
    imagenet_resnet152_3x_sk,
    patterns_time,
    patterns_tiny,
)

__all__ = ["RECIPES", "changed_from", "patterns_tiny", "recipe"]

RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        patterns_tiny,
        patterns_time,
        cifar10_resnet14,
        cifar10_resnet18,
        cifar10_speedrun,
        imagenet_resnet50,
        imagenet_resnet50_2x,
        imagenet_resnet50_4x,
        imagenet_resnet152_3x_sk,
        patterns_moco,
        cifar10_moco,
        imagenet_mocov2,
        patterns_byol,
        cifar10_byol,
        imagenette_byol,
        imagenet_byol,
        patterns_mocov3,
        cifar10_mocov3,
        imagenet_mocov3_resnet50,
        imagenet_mocov3_vit_small,
        patterns_swav,
        cifar10_swav,
        imagenet_swav,
        patterns_dino,
        cifar10_dino,
        imagenet_dino_vit_small,
        patterns_mae,
        imagenet_mae_vit_base,
        patterns_clip,
        pairs_clip,
    )
}


def recipe(name: str) -> Config:
    """The config called `name`. Raises UserError with the nearest names."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3) or list(RECIPES)
        raise UserError(f"unknown recipe {name!r}; nearest: {', '.join(near)} (`simclr recipes` lists all)")
    return RECIPES[name]()


# The rest says how long and where a recipe runs, or how closely it is watched; a method's own fields are all of the first kind.
_HOW = ("seed", "train.", "watch.")
_WHAT = ("train.batch_size", "train.micro_batch", "train.epochs", "train.steps")
_SHOWN = 3


def changed_from(name: str, config: Config) -> str:
    """The recipe `name`, and in which fields `config` is another: "cifar10_resnet18, encoder.depth 50". Of a run of a later stage, whose
    name ends in the recipe's, the fields of the network alone. A name that is no recipe's stays alone."""
    base = name.removeprefix("distill-").removeprefix("finetune-")
    if base not in RECIPES:
        return name
    made = RECIPES[base]()
    if base != name:  # later stages train all of the network, also what the pretraining had fixed
        made = replace(made, encoder=made.encoder.trained)
    theirs, ours = made.flat(), config.flat()
    if base == name:
        counted = [field for field in ours if field in _WHAT or not field.startswith(_HOW)]
    else:
        counted = [field for field in ours if field.startswith(("encoder.", "head.")) and field in theirs]
    changed = [f"{field} {ours[field]}" for field in counted if theirs.get(field) != ours[field]]
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return ", ".join([name, *changed[:_SHOWN]]) + more
