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

_WORDS = 1 << 18  # whose tokens are kept


def tokens_of(captions: Sequence[str], context: int) -> NDArray[np.int64]:
    """(n, context) tokens of each caption, in lower case: its begin, its byte pairs, its end, and zeros. A caption that is too long ends at
    the last place. Raises UserError without open_clip."""
    found = np.zeros((len(captions), context), np.int64)
    for row, caption in zip(found, captions, strict=True):
        begin, end = _tokenizer().sot_token_id, _tokenizer().eot_token_id
        some = [begin, *_pairs(caption)[: context - 2], end]
        row[: len(some)] = some
    return found


def _pairs(caption: str) -> list[int]:
    """The byte pairs of a caption.

    The tokenizer takes a quarter of a millisecond for it, in the thread that trains. A pair never spans a space, so where the tokenizer
    would clean nothing up, the pairs are those of the words one by one, which are kept.
    """
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return [pair for word in caption.lower().split() for pair in _of_word(word)]
    pairs: list[int] = _tokenizer().encode(caption)
    return pairs


@functools.lru_cache(_WORDS)
def _of_word(word: str) -> tuple[int, ...]:
    return tuple(_tokenizer().encode(word))


def require_tokenizer() -> None:
    """Raise UserError without open_clip."""
    if not has("open_clip"):
        raise UserError(f"{NEEDED}; add it with `{command('pairs')}`")


NEEDED = "open_clip_torch, whose tokenizer reads captions, is not installed"


@functools.cache
def _tokenizer() -> Any:
    require_tokenizer()
    # The package imports timm and its own models first, for five seconds in every worker; the tokenizer's file stands alone.
    found = importlib.util.find_spec("open_clip")
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
