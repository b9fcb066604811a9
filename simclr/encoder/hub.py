"""Encoders on the Hugging Face Hub, by address: hf://ORG/NAME, hf://ORG/NAME@REVISION. For reading, the door to huggingface_hub.

It keeps what it has fetched below $HF_HOME, asks $HF_ENDPOINT, and nobody where $HF_HUB_OFFLINE is set: its own settings.
"""

from __future__ import annotations

import re
from pathlib import Path

from simclr.errors import UserError
from simclr.extras import command
from simclr.text import redacted

_ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")  # pathlib drops the second slash
_PARTS = ("encoder.safetensors", "config.json")
EXTRA = f"huggingface_hub, which hf:// needs, is not installed; add it with `{command('hub')}`"


def is_address(path: str | Path) -> bool:
    """Whether `path` is an address on the Hub and no path here."""
    return str(path).startswith("hf:/")


def repository(name: str) -> str:
    """`name`, which is ORG/NAME. Raises UserError for another form."""
    if not re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", name, re.ASCII) or ".." in name or "--" in name:
        raise UserError(f"{name[:200]!r} is no repository on the Hub; expected ORG/NAME, of letters, digits, - _ and .")
    return name


def fetched(address: str | Path, whole: bool = False) -> Path:
    """The directory in the Hub's cache with the encoder at `address`, also its head and classifier if `whole`. Nothing else of the
    repository is fetched: safetensors and config.json. Raises UserError where there is none, or it cannot be had."""
    found = _ADDRESS.fullmatch(str(address))
    if found is None:
        raise UserError(f"{str(address)[:200]!r} is no address on the Hub; expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    name, revision = repository(found["repository"]), found["revision"]
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub import errors as hub
    except ModuleNotFoundError:
        raise UserError(EXTRA) from None
    parts = [*_PARTS, "head.safetensors", "towers.safetensors", "classifier.safetensors"] if whole else list(_PARTS)
    at = f"{constants.ENDPOINT}/{name}"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=parts))
    except hub.GatedRepoError:
        raise UserError(f"{at} is gated: ask for access on its page, then log in with `hf auth login`, or set $HF_TOKEN") from None
    except hub.RepositoryNotFoundError:
        raise UserError(f"there is no {at}, or it is private: correct the name, or log in with `hf auth login`, or set $HF_TOKEN") from None
    except hub.RevisionNotFoundError:
        raise UserError(f"{at} has no revision {revision!r}; expected a branch, a tag or a commit of it") from None
    except hub.LocalEntryNotFoundError as error:
        why = "$HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"the Hub cannot be reached ({_cause(error)})"
        raise UserError(f"{why}, and {name} is not in the cache, {constants.HF_HUB_CACHE}; fetch it once with a connection") from None
    # httpx's, or in later versions httpx2's.
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined,unused-ignore]
        raise UserError(
            f"{at} cannot be fetched: {redacted((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]}"
        ) from None
    if missing := [part for part in _PARTS if not (folder / part).is_file()]:
        raise UserError(f"{at} holds no encoder of simclr's: it has no {' and no '.join(missing)}; `simclr publish RUN --hub` makes one")
    return folder


def _cause(error: BaseException) -> str:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return type(error).__name__
