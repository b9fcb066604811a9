"""Captions as numbers of CLIP's byte pairs. The door to open_clip, whose wheel has the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simclr.errors import UserError
from simclr.extras import command, has

VOCABULARY = 49_408
"""Numbers of tokens, the begin's and the end's included; the end has the highest."""
_KEPT = 1 << 17  # captions whose tokens are kept: a caption takes 0.1 ms


def tokens_of(captions: Sequence[str], context: int) -> NDArray[np.int64]:
    """(n, context) tokens of each caption, in lower case: its begin, its byte pairs, its end, and zeros. A caption that is too long ends at
    the last place. Raises UserError without open_clip."""
    return np.array([_tokens(caption, context) for caption in captions], np.int64).reshape(len(captions), context)


@functools.lru_cache(_KEPT)
def _tokens(caption: str, context: int) -> tuple[int, ...]:
    return tuple(_tokenizer(context)(caption)[0].tolist())


@functools.cache
def _tokenizer(context: int) -> Any:
    if not has("open_clip"):
        raise UserError(f"open_clip_torch, whose tokenizer reads captions, is not installed; add it with `{command('pairs')}`")
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context)
