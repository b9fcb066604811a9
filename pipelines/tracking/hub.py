"""Publishing on the Hugging Face Hub: an encoder's directory, its card with what the Hub reads, and timm's form of it where there is one.

huggingface_hub's own settings say where ($HF_ENDPOINT) and as whom ($HF_TOKEN, or `hf auth login`). All files come in one commit, so a
publication that fails leaves what was there.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from pipelines.runs.scores import TEST
from pipelines.terminal import say
from pipelines.tracking.card import UNKNOWN_LICENCE
from pipelines.tracking.client import name_of
from pipelines.tracking.record import Record
from pipelines.tracking.registry import FILES, require_plain
from simclr.config import Encoder
from simclr.encoder import hub as reading
from simclr.errors import UserError
from simclr.text import redacted

_TIMM = "model.safetensors"
_LOGIN = "; log in with `hf auth login`, or set $HF_TOKEN to one that may write"
# What the Hub's pages can filter by. https://huggingface.co/docs/hub/repositories-licenses
_LICENCES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0")
_TOP1 = {"knn_top1": "kNN top-1", "probe_top1": "linear probe top-1", "linear_top1": "linear evaluation top-1", "top1": "top-1"}
_RESNET = (
    ", and timm's ResNetV2\nwithout pre-activation, with the stem `same`, is the official SimCLR's ResNet (its `resnet50` pads the "
    "max-pool otherwise)"
)


def fetched(address: Path) -> Path:
    """The directory of the encoder at hf://ORG/NAME[@REVISION], in the Hub's cache, for a command: without bars of another library's."""
    _quiet()
    return reading.fetched(address, whole=True)


def push(encoder: Path, repository: str, record: Record, licence: str) -> str:
    """Publish the encoder directory, whose README.md is the card, as `repository`, ORG/NAME. One that is not there is made: private, since
    what was seen once cannot be taken back. Returns the address of the commit. Raises UserError where the Hub refuses."""
    from simclr.encoder.directory import read_encoder

    reading.repository(repository)
    parts = require_plain(encoder)
    published = read_encoder(encoder)  # refuses damaged weights
    hub, operations = _quiet(), []
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        for name, path in {**parts, **_written(published, encoder, repository, record, licence, Path(scratch))}.items():
            operations.append(CommitOperationAdd(name, str(path)))
        at = f"{api.endpoint}/{repository}"
        try:
            there = _files(api, repository, hub)
            if there is None:
                api.create_repo(repository, private=True, exist_ok=True)
                say(f"{at} is new and private; its settings there make it public")
            stale = sorted({*FILES, _TIMM} & set(there or ()) - {operation.path_in_repo for operation in operations})
            gone = [CommitOperationDelete(name) for name in stale]
            return str(api.create_commit(repository, [*operations, *gone], commit_message="Publish an encoder").commit_url)
        except hub.RepositoryNotFoundError:
            raise UserError(
                f"{at} cannot be made or written to; log in with `hf auth login`, or set $HF_TOKEN to one that may write"
            ) from None
        except (hub.HTTPError, hub.LocalTokenNotFoundError, OSError, ValueError) as error:  # the last: the Hub refuses the card's head
            said = redacted((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
            raise UserError(f"{at} was not published: {said}{_LOGIN if re.search(r'40[13]', said) else ''}") from None


def _files(api: Any, repository: str, hub: Any) -> list[str] | None:
    """The files in the repository, None where there is none."""
    try:
        return [str(name) for name in api.list_repo_files(repository)]
    except hub.RepositoryNotFoundError:
        return None


def _written(published: Any, encoder: Path, repository: str, record: Record, licence: str, to: Path) -> dict[str, Path]:
    """The files that differ from the encoder's own, by name: card, config.json, timm's weights. They are written below `to`."""
    from safetensors.torch import save_file

    from simclr.encoder import timm
    from simclr.encoder.directory import read_text

    text = read_text(encoder)
    shape = Encoder(**published.config["encoder"])
    lacks = timm.lacks(shape)
    if not lacks:
        text |= timm.config(published)
        save_file(timm.weights(published), to / _TIMM)
    (to / "config.json").write_text(json.dumps(text, indent=1) + "\n")
    head = _head(published.config, repository, record, licence, not lacks)
    (to / "README.md").write_text(head + _card(encoder, repository, lacks, shape))
    return {path.name: path for path in to.iterdir()}


def _head(config: dict[str, Any], repository: str, record: Record, licence: str, in_timm: bool) -> str:
    """The YAML at the card's head, which the Hub's pages and searches read."""
    from huggingface_hub import EvalResult, ModelCardData

    from simclr.config import Encoder

    known = licence.lower() in _LICENCES
    data = name_of(record.measured.data) if record.measured.data else ""
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", data.lower()).strip("-") or "unknown",
            dataset_name=data or "unknown",
            dataset_split="test" if record.measured.split == TEST else "validation",
            metric_type="accuracy",
            metric_name=_TOP1[name],
            metric_value=round(value, 6),
        )
        for name, value in record.scores.items()
        if name in _TOP1 and record.measured.whole
    ]
    about = ModelCardData(
        license=licence.lower() if known else "unknown" if licence == UNKNOWN_LICENCE else "other",
        license_name=None if known or licence == UNKNOWN_LICENCE else licence,
        library_name="timm" if in_timm else "simclr",
        pipeline_tag="image-feature-extraction",
        tags=["simclr", "self-supervised-learning", _tag(Encoder(**config["encoder"]))],
        model_name=repository.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{about}\n---\n\n"


def _tag(encoder: Encoder) -> str:
    """The network as a tag: resnet-50, vit-s-16, convnext-tiny."""
    return f"resnet-{encoder.depth}" if not (encoder.vit or encoder.timm) else re.sub(r"[^a-z0-9]+", "-", encoder.title.lower())


def _card(encoder: Path, repository: str, lacks: str, shape: Encoder) -> str:
    """The card's text behind its head: the encoder's own, with the Hub's address and what timm does with it."""
    own = (encoder / "README.md").read_text().replace("# hf://", "# ", 1)
    own = re.sub(r"  +# DIR: the directory of this file", "", own).replace("DIR", f"hf://{repository}")
    own = re.sub(r"## In timm\n.*?(?=## )", "", own, flags=re.DOTALL)  # which the Hub has shorter
    own = re.sub(r"## Serve it\n.*?(?=## )", "", own, flags=re.DOTALL)  # of a version in a registry
    if lacks:
        return f"{own}\n## timm\n\ntimm has no network with {lacks}, so this one is read by simclr alone.\n"
    call = f'timm.create_model("hf-hub:{repository}", pretrained=True, num_classes=0)'
    return (
        f"{own}\n## timm\n\n```python\nimport timm\n\nmodel = {call}.eval()\n```\n\n"
        "It computes the same features of the same input: `model.safetensors` has the weights under timm's names"
        f"{'' if shape.vit or shape.timm else _RESNET}.\n"
        "timm's transforms resize with antialiasing, and so a little otherwise than `simclr.load_encoder(…).embed`.\n"
    )


def _quiet() -> Any:
    """huggingface_hub's errors, once it is imported, with its bars switched off. Raises UserError where it is not installed."""
    try:
        from huggingface_hub import errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ModuleNotFoundError:
        raise UserError(reading.EXTRA) from None
    disable_progress_bars()
    return errors
