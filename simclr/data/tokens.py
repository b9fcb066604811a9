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
    the last place. The words <start_of_text> and <end_of_text> within one are letters, other than CLIP's own tokenizer has them. Raises
    UserError without open_clip."""
    found = np.zeros((len(captions), context), np.int64)
    for row, caption in zip(found, captions, strict=True):
        begin, end = _tokenizer().sot_token_id, _tokenizer().eot_token_id
        some = [begin, *_pairs(caption)[: context - 2], end]
        row[: len(some)] = some
    return found


def prompted(prompt: str, name: str) -> str:
    """What a prompt says of a class. In names _ stands for a space, as in folders'."""
    return prompt.replace("{}", name.replace("_", " "))


def judged_prompts(classes: Sequence[str], prompts: Sequence[str], context: int) -> tuple[str, str]:
    """(why zero-shot classification by `prompts` cannot tell the classes apart, with what mends it after a semicolon; what is to be said of
    prompts that are cut and of names that differ in case alone), "" each where there is nothing. Raises UserError without open_clip."""
    longer = [tokens_of([prompted(prompt, name) for name in classes], context + 1) for prompt in prompts]  # whose last place tells a cut
    rows: dict[bytes, str] = {}
    same: list[str] = []
    for at, name in enumerate(classes):
        key = b"".join(found[at, : context - 1].tobytes() for found in longer)  # at the place behind these is an end, or nothing
        other = rows.setdefault(key, name)
        if other is not name and all(prompted(prompt, other).lower() == prompted(prompt, name).lower() for prompt in prompts):
            same.append(f"zero-shot classification cannot tell {other!r} from {name!r}, which differ in case or _ alone")
        elif other is not name:
            return (
                f"zero-shot classification cannot tell {other!r} from {name!r}: with a context of {context:,} tokens every prompt says the "
                f"same of both, as {prompted(prompts[0], name)!r}; give a shorter prompt, a longer context to train with, or other names",
                "",
            )
    cut = [(int(at), prompt) for prompt, found in zip(prompts, longer, strict=True) for at in found[:, context].nonzero()[0]]
    said = same[:1]
    if cut:
        at, prompt = cut[0]
        count = f"{len(cut):,} of {len(classes) * len(prompts):,} prompts with a class's name are"
        said.append(f"{count} cut at {context:,} tokens, the context, as {prompted(prompt, classes[at])!r}")
    return "", "; ".join(said)


def _pairs(caption: str) -> list[int]:
    """The byte pairs of a caption.

    The tokenizer takes a quarter of a millisecond for it, in the thread that trains. A pair never spans a space, so where the tokenizer
    would clean nothing up, the pairs are those of the words one by one, which are kept.
    """
    if caption.isascii() and caption.isprintable() and "&" not in caption:
        return [pair for word in caption.lower().split() for pair in _of_word(word)]
    return _encoded(caption)


@functools.lru_cache(_WORDS)
def _of_word(word: str) -> tuple[int, ...]:
    return tuple(_encoded(word))


def _encoded(text: str) -> list[int]:
    tokenizer = _tokenizer()
    # The tokenizer itself keeps every word that it ever saw, in an attribute that it has for itself.
    if len(tokenizer.cache) > _WORDS:
        tokenizer.cache.clear()
    pairs: list[int] = tokenizer.encode(text)
    return pairs


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
    tokenizer = module.SimpleTokenizer()
    # From the beginning this holds `<start_of_text>` and `<end_of_text>` as whole tokens. A caption is read up to its first end, so within
    # one they are letters like others.
    tokenizer.cache.clear()
    return tokenizer
