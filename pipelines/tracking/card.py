"""The model card of a published encoder, for people who want to use it: README.md in its directory."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.runs.scores import score_text
from pipelines.tracking.record import Record
from simclr import files
from simclr.config import Encoder
from simclr.papers import Named, named, unscored
from simclr.text import printable_lines

UNKNOWN_LICENCE = "unknown: nobody stated one; ask whoever made the encoder, and mind the licence of its training images"


_WORTH = (
    "Pictures that show the same thing get vectors\n"
    "that point the same way, so a nearest-neighbour search or a linear classifier on them goes far."
)
_WORTH_OF_MAE = (
    "It learned to paint hidden parts of\n"
    "pictures, so its worth shows when it is fine-tuned; neighbours and a linear classifier on its vectors say little of it."
)


def write_card(directory: Path, name: str, record: Record, licence: str) -> str:
    """Write the card of the encoder published in `directory` under the title `name`, beside its weights; returns its text."""
    from simclr.encoder.directory import config_of, preprocessing_of, read_text

    config = read_text(directory)
    config |= {"published": config.get("published", {}), **config_of(config).to_dict()}  # with defaults for absent fields
    if not (directory / "head.safetensors").is_file():
        config.pop("head", None)
    config["preprocessing"] = asdict(preprocessing_of(config))  # an older directory does not state it
    text = printable_lines(card(config, _parameters(config), name, record, licence))  # it is read with `cat`, too
    files.write_text(directory / "README.md", text)
    return text


def card(config: dict[str, Any], parameters: int, name: str, record: Record, licence: str) -> str:
    """Markdown, from an encoder's config.json, its number of `parameters` and the `record` of its scores."""
    published, converted = config["published"], "converted" in config["published"]
    size, seen = config["preprocessing"]["size_px"], config["views"]
    method = str(published.get("pretrained") or config.get("method", "simclr"))
    called = named(method)
    rows = {
        "Network": network(config["encoder"]) + f", {parameters / 1e6:,.1f} M parameters",
        **({} if method == "simclr" else {"Method": f"{called.title}, {called.cited}" if called.papers else called.title}),
        "Takes": preprocessing(config["preprocessing"]),
        "Trained on": str(published.get("data", "unknown")),
        "Recipe": _recipe(config),
        "Steps": f"{published['step']:,}" if published.get("step") is not None else "unknown",
    }
    if (head := config.get("head")) and method == "simclr":
        rows["Projection head"] = f"{head['layers']} layers, z has {head['d_out']} numbers"
    if subset := published.get("subset"):
        rows["Images"] = f"{subset['images']:,} of the data's, listed in {subset['from']} (sha256 {subset['sha256'][:12]}…)"
    if start := published.get("start"):
        rows["Began with"] = f"{start['from']} (weights of sha256 {start['sha256'][:12]}…)"
    if "classifier" in config:
        found = config["classifier"]
        reads = "h" if found["tap"] == 0 else f"the head's layer {found['tap']}"
        rows["Classifier"] = f"{len(found['classes']):,} classes, from {reads}"
    rows["Licence"] = licence
    whose = "of the SimCLR family" if method == "simclr" else f"trained by {called.title}"
    paints = method == "mae" and "classifier" not in config  # fine-tuned, its vectors tell the classes apart
    if taught := published.get("teacher_pretrained"):
        whose = f"that learned from a classifier, whose own encoder was pretrained by {named(str(taught)).title}"
    parts = [
        f"# {name}\n\nAn image encoder {whose}: a picture in, a vector out. {_WORTH_OF_MAE if paints else _WORTH}",
        f'## Use it\n\n```python\nimport simclr\n\nencoder = simclr.load_encoder("DIR")       # DIR: the directory of this file\n'
        'features = encoder.embed(images)           # uint8 (n, H, W, 3), any size → (n, d)\nfeatures = encoder.embed_files(["a.jpg"])\n'
        "```\n\n"
        f"`simclr embed DIR photos/` does the same for files. Cropping, resizing and scaling to {size} px are part of `embed`.",
        f"## Serve it\n\n```\nmlflow models serve -m models:/{name}@champion --env-manager uv --port 5001\n"
        "(printf '{\"inputs\": [\"'; base64 < photo.jpg | tr -d '\\n'; printf '\"]}') |\n"
        "  curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' --data-binary @-\n```\n\n"
        "A picture is the base64 of its file. The version brings its code and its requirements; this package need not be installed.",
        "## What it is\n\n" + _table(("", ""), rows),
        "## Scores\n\n" + _scores(record) + _unscored(str(config.get("method", "simclr")), record),
    ]
    if not converted:
        parts.append("## Know before use\n\n" + _limits(seen, method in ("mae", "clip")))
    if config["encoder"].get("timm"):
        parts.append("## In timm\n\n" + _in_timm(config["encoder"]["timm"], size))
    beside = (
        "`head.safetensors` and `classifier.safetensors`, where\npresent, are the projection head, which SimCLR v2 fine-tunes from, and"
    )
    if method != "simclr":
        beside = "`classifier.safetensors`, where\npresent, is"
    if method == "clip":
        beside = (
            "`towers.safetensors` is the text tower, with\nthe maps into the common space of images and texts; `classifier.safetensors`, "
            "where present, is"
        )
    parts.append(f"## Files\n\n`encoder.safetensors` and `config.json` are the encoder; {beside} a linear classifier. Nothing is pickled.")
    if called.papers:
        parts[-1] += f"\n\n{_cited(called)}"
    return "\n\n".join(parts) + "\n"


def network(encoder: dict[str, Any]) -> str:
    """The architecture by the papers' names, from the `encoder` of a config."""
    shape = Encoder(**encoder)
    if shape.timm:
        return f"timm's {shape.timm}"
    if shape.vit:
        return f"{shape.title}, {'the mean of its patches' if shape.pool == 'mean' else 'its class token'}"
    extras = [
        f"{encoder['width']}× width" if encoder["width"] != 1 else "",
        "selective kernels" if encoder["sk_ratio"] else "",
        "squeeze-and-excitation" if encoder["se_ratio"] else "",
        "CIFAR stem" if encoder["cifar_stem"] else "",
    ]
    return ", ".join([f"ResNet-{encoder['depth']}", *filter(None, extras)])


def preprocessing(stated: dict[str, Any]) -> str:
    """The preprocessing of a picture in a sentence, from the `preprocessing` of a config."""
    crop = "the central square"
    if stated["centre_crop"] != 1:
        crop += f" of {100 * stated['centre_crop']:g} % of the shorter side"
    scaled = "in [0, 1], without subtracting a mean or dividing by a standard deviation"
    if any(stated["mean"]) or any(std != 1 for std in stated["std"]):
        scaled = f"in [0, 1], then minus {tuple(stated['mean'])}, over {tuple(stated['std'])}"
    return f"RGB, {crop}, {stated['size_px']} × {stated['size_px']} px ({stated['resize']}), {scaled}"


def _recipe(config: dict[str, Any]) -> str:
    published = config["published"]
    if "converted" in published:
        return f"unknown; converted from the TensorFlow checkpoint {published['converted']}"
    loss = config.get("loss") or config
    own = not published.get("recipe", "").startswith(("finetune-", "distill-"))  # those have a loss of labels
    tau = loss.get("temperature") if own and loss.get("name", "nt_xent") == "nt_xent" else None
    stated = [f"N = {config['train']['batch_size']:,}", {"adamw": "AdamW"}.get(optim := config["optim"]["name"], optim.upper())]
    stated += [f"τ = {tau:g}"] if tau is not None else []
    stated += [f"K = {config['prototypes']:,}"] if "prototypes" in config else [f"K = {config['queue']:,}"] if "queue" in config else []
    stated += [f"a moving average that keeps {config['ema']:g}"] if "ema" in config else []
    setting = ", ".join(stated)
    return f"`{published.get('recipe', 'unknown')}`: {setting}; `config.json` has every field"


def _cited(called: Named) -> str:
    """Authors, titles and addresses of a method's papers, in lines of one paragraph."""
    found = [f"{p.authors}, *{p.title}*, [arXiv:{p.arxiv}](https://arxiv.org/abs/{p.arxiv})" for p in called.papers]
    return "\n".join(textwrap.wrap(f"Method: {', and '.join(found)}.", 130, break_long_words=False, break_on_hyphens=False))


def _scores(record: Record) -> str:
    if not record.scores:
        return "None yet; `simclr evaluate DIR --data SHARDS` measures some."
    about, rows = record.measured, dict[str, str]()
    for name, value in record.scores.items():
        low, high = about.intervals.get(name, (0.0, 0.0))
        interval = f" ({100 * low:.1f} … {100 * high:.1f})" if name in about.intervals else ""
        how = f"; {about.protocols[name]}" if name in about.protocols else ""
        rows[f"`{name}`"] = f"{score_text(name, value)}{interval}{how}"
    first = next((name for name in ("knn_top1", "top1") if name in rows), next(iter(record.scores)))
    spread = "\n\nIn brackets: the 95 % interval over test sets (Wilson), not over training runs." if about.intervals else ""
    return _table(("score", f"on {about.told(first)}"), rows) + spread


def _unscored(method: str, record: Record) -> str:
    """Below scores that are none of the encoder's method: what finds one."""
    said, _, command = unscored(method, "DIR").partition(": ") if "knn_top1" in record.scores else ("", "", "")
    return f"\n\n{said[0].upper()}{said[1:]}:\n`{command}`." if said else ""


def _limits(views: dict[str, Any], one: bool = False) -> str:
    changed = ["cut and scaled"]
    if one:  # a view of each picture, which it completes or names: no two of them are compared
        return "It knows what its training pictures show; expect less of it on pictures unlike those."
    if views["flip_p"]:
        changed.append("mirrored")
    jitters = views["jitter_p"] and views["colour_strength"]
    if jitters or views["grey_p"] or _happens(views["solarise_p"]):
        changed.append("changed in colour")
    if _happens(views["blur_p"]):
        changed.append("blurred")
    return (
        f"It was taught that a picture stays the same when it is {', '.join(changed[:-1])} and {changed[-1]}. Expect little of it where\n"
        "just that matters (left or right, exact colours, fine position), and less on pictures unlike those it was trained on.\n"
        "What those pictures leave out or show one-sidedly, it does too."
        if len(changed) > 1
        else "It knows what its training pictures show; expect less of it on pictures unlike those."
    )


def _happens(p: float | list[float]) -> bool:
    """Whether a probability, or that of either view, is above 0."""
    return max(p) > 0 if isinstance(p, list) else p > 0


def _in_timm(name: str, size: int) -> str:
    """How timm itself takes the weights."""
    from simclr.networks.timm import call

    return (
        "`encoder.safetensors` has timm's names behind the prefix `model.`. On images that are cut, scaled and normalised as above, this\n"
        "computes the same features:\n\n"
        f"```python\nimport timm\nfrom safetensors.torch import load_file\n\nmodel = {call(name, size)}.eval()\n"
        'weights = load_file("DIR/encoder.safetensors")\n'
        'model.load_state_dict({key.removeprefix("model."): t for key, t in weights.items()})\n```'
    )


def _table(header: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|", *(f"| {key} | {value.replace('|', '/')} |" for key, value in rows.items())]
    return "\n".join(lines)


def _parameters(config: dict[str, Any]) -> int:
    """Weights of the encoder, BatchNorm's statistics apart."""
    import torch

    from simclr.networks.encoders import build_encoder

    with torch.device("meta"):  # names and shapes, without memory
        return sum(p.numel() for p in build_encoder(Encoder(**config["encoder"]), size_px=config["preprocessing"]["size_px"]).parameters())
