"""Captions as numbers of CLIP's byte pairs. The door to open_clip, whose wheel has the vocabulary."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.errors import UserError
from simclr.extras import command, has

_KEPT = 1 << 16  # captions whose tokens are kept: a caption takes 0.1 ms


def tokens_of(captions: Sequence[str], context: int) -> NDArray[np.int64]:
    """(n, context) tokens of each caption, in lower case: its begin, its byte pairs, its end, and zeros. A caption that is too long ends at
    the last place. Raises UserError without open_clip."""
    found = np.empty((len(captions), context), np.int64)
    for row, caption in zip(found, captions, strict=True):
        row[:] = _tokens(caption, context)
    return found


def require_tokenizer() -> None:
    """Raise UserError without open_clip."""
    if not has("open_clip"):
        raise UserError(f"{NEEDED}; add it with `{command('pairs')}`")


NEEDED = "open_clip_torch, whose tokenizer reads captions, is not installed"


@functools.lru_cache(_KEPT)
def _tokens(caption: str, context: int) -> NDArray[np.int32]:
    row: NDArray[np.int32] = _tokenizer(context)(caption)[0].numpy().astype(np.int32)
    return row


@functools.cache
def _tokenizer(context: int) -> Any:
    require_tokenizer()
    # The package imports timm and its own models first, for five seconds in every worker; the tokenizer's file stands alone.
    found = importlib.util.find_spec("open_clip")
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(context_length=context)
