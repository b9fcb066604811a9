"""Checkpoints: the whole training state, written atomically, read strictly, never unpickled.

A checkpoint is a directory `step-000000120/` of state.safetensors (every tensor by name, and in its header the newest
reports) and checkpoint.json (schema, step, config, checksum). It is written under a temporary name, flushed to the disk and renamed, so a
checkpoint under its own name is whole. If a disk damages it later, the checksum shows it, and the checkpoint before it is used.

Where several machines could write one run, the name also has the writer's fencing token (`step-000000120.7`): see `order`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr import fields, files
from simclr.errors import UserError
from simclr.telemetry import progress

SCHEMA = 1
_FRESH_NS = 1_000_000_000
_digests: dict[tuple[int, ...], str] = {}  # a file as it was → its sha256


class Damaged(UserError):
    """A checkpoint that is incomplete or does not match its checksum."""


@dataclass(frozen=True, slots=True)
class State:
    """Everything that a run needs to resume as if it had not stopped: randomness is keyed, so `step` is the only clock."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """`model.*`, `state.*` and `optimizer.*`. They are the live tensors: write them before the next step."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """The newest reports, in order of steps: their receiver may be gone, and a resumed run does not repeat these steps."""


def capture(
    step: int, config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, beside: nn.Module | None = None
) -> State:
    """The state after `step` steps of `model`, of the module `beside` it that has no gradient (averages, queues), and of any optimizer.
    The optimizer's tensors are stored under the parameter's name, not its number."""
    tensors = _named(model, beside)
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            elif value is not None:
                raise TypeError(f"the optimizer keeps {key} = {value!r} of {name}; a checkpoint holds tensors")
    return State(step, config, tensors)


def check(state: State, model: nn.Module, beside: nn.Module | None = None) -> None:
    """Raise UserError naming each tensor that is missing, extra or misshapen. The modules may be on the meta device."""
    own, kept = _named(model, beside), _kept(state, model)
    # An optimizer has a tensor for every parameter or, before its first step, for none.
    wanted = dict(own)
    for key in {key for _, key in kept.values()}:
        wanted |= {f"optimizer.{name}.{key}": p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [f"{name} is missing" for name in wanted if name not in state.tensors]
    wrong += [f"{name} is unknown" for name in state.tensors if name not in wanted]
    both = [(name, t, wanted[name]) for name, t in state.tensors.items() if name in wanted]
    wrong += [
        f"{name} has shape {tuple(t.shape)}, expected {tuple(own.shape)}"
        for name, t, own in both
        if t.shape != own.shape and not (name in kept and not t.ndim)  # a step count is a scalar
    ]
    wrong += [
        f"{name} is of {t.dtype}, expected {own.dtype}"
        for name, t, own in both
        if t.is_floating_point() != own.is_floating_point() and not (name in kept and not t.ndim)
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"the checkpoint of step {state.step} does not fit this config: {shown}")


def restore(state: State, model: nn.Module, optimizer: torch.optim.Optimizer, beside: nn.Module | None = None) -> None:
    """Copy `state` into `model`, the module `beside` it and `optimizer`. Raises UserError as `check` does, before anything changes."""
    check(state, model, beside)
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        for name, t in _named(model, beside).items():
            t.copy_(state.tensors[name])
        for name, (p, key) in _kept(state, model).items():
            there = state.tensors[name]
            if there.shape == p.shape and key != "step":
                # In the parameter's own memory layout, which fused optimizers and bitwise resume need.
                optimizer.state[p][key] = torch.empty_like(p, dtype=there.dtype, requires_grad=False).copy_(there)
            else:  # a step count: torch keeps it on the parameter's device only for fused and captured optimizers
                beside_p = settings[p].get("fused") or settings[p].get("capturable")
                optimizer.state[p][key] = there.clone().to(p.device if beside_p else "cpu")


def part(state: State, model: nn.Module, module: nn.Module, beside: nn.Module | None = None) -> dict[str, Tensor]:
    """The tensors in `state` of `module`, which is `model`, what is `beside` it or a part of one, by their names in `module`."""
    for root, whole in (("model", model), ("state", beside)):
        for name, found in whole.named_modules() if whole is not None else ():
            if found is module:
                prefix = f"{root}.{name}." if name else f"{root}."
                return {key.removeprefix(prefix): t for key, t in state.tensors.items() if key.startswith(prefix)}
    raise ValueError(f"{type(module).__name__} is no part of the trained modules")


def _named(model: nn.Module, beside: nn.Module | None) -> dict[str, Tensor]:
    """The tensors of `model` as `model.*`, those of the module beside it as `state.*`."""
    named = {f"model.{name}": t for name, t in model.state_dict().items()}
    return named | ({f"state.{name}": t for name, t in beside.state_dict().items()} if beside is not None else {})


def _kept(state: State, model: nn.Module) -> dict[str, tuple[nn.Parameter, str]]:
    """Name of each optimizer tensor → its parameter in `model` and the optimizer's own key. Unknown names are left out."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for whole in (name for name in state.tensors if name.startswith("optimizer.")):
        name, _, key = whole.removeprefix("optimizer.").rpartition(".")
        if name in learning:
            found[whole] = (learning[name], key)
    return found


def write(folder: Path, state: State, keep: int, score: float | None = None, spare: str = "", token: int = 0) -> Path:
    """Write `state`, of an encoder with `score` (higher is better), as `folder`/step-…, atomically; then remove all but the `keep`
    newest, the one with the best score, and the one of name `spare`. Returns the checkpoint's path. `token` is the writer's, see `order`.

    Raises OSError (no space, for example); then nothing is left behind and the earlier checkpoints are untouched.
    """
    # Without a token of its own, as on a disk, it must not be older than what lies here: a copy of a run from S3 has tokens.
    token = token or max((order(path.name)[0] for path in list_checkpoints(folder)), default=0)
    target = folder / _name(state.step, token)
    scratch = folder / f".writing-{state.step:09d}-{os.getpid()}"
    aside = folder / f".old-{state.step:09d}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
        with progress.grows(scratch / "state.safetensors"):
            save_file(tensors, scratch / "state.safetensors", {"reports": json.dumps(state.reports)})
        files.usual_mode(scratch / "state.safetensors")
        about = {"schema": SCHEMA, "step": state.step, "sha256": _sha256(scratch / "state.safetensors"), "config": state.config}
        about["score"] = score
        (scratch / "checkpoint.json").write_text(json.dumps(about, indent=1) + "\n")
        for path in (*scratch.iterdir(), scratch):
            _flush(path)
        if target.exists():  # a resumed run reaches the same step again
            target.rename(aside)
        scratch.rename(target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    # Also `.writing-*` of a killed process: only one rank writes, so no other process uses it.
    stay = {*worth_keeping({path.name: score_of(path) for path in list_checkpoints(folder)}, keep), spare, target.name}
    stale = [path for path in list_checkpoints(folder) if path.name not in stay]
    for old in (*stale, *folder.glob(".old-*"), *folder.glob(".writing-*")):
        shutil.rmtree(old, ignore_errors=True)
    return target


def worth_keeping(scores: dict[str, float | None], keep: int) -> set[str]:
    """The `keep` newest of the checkpoints (name → score, None = not scored), and the one with the best score (of equals the newer)."""
    scored = [(score, order(name), name) for name, score in scores.items() if score is not None]
    return {*sorted(scores, key=order)[-keep:], *(name for *_, name in sorted(scored)[-1:])}


def score_of(path: Path) -> float | None:
    """The score of checkpoint `path`; None if it has none or is not whole."""
    try:
        score = files.read_json(path / "checkpoint.json", "").get("score")
    except (OSError, UserError):
        return None
    return float(score) if score is not None and fields.fits(score, float) else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first; unfinished ones are not listed."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=lambda p: order(p.name))


def order(name: str) -> tuple[int, int]:
    """(token, step) of a checkpoint's name, by which checkpoints are ordered: one that a writer left late, after another had taken its
    run over, is older than all of that one's, whatever its step. (0, -1) for a name that none has."""
    found = re.fullmatch(r"step-(\d+)(?:\.(\d+))?", name, re.ASCII)
    return (int(found[2] or 0), int(found[1])) if found else (0, -1)


def latest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. A damaged one is reported through `say`, and the one before it is tried."""
    for path in reversed(list_checkpoints(folder)):
        try:
            about(path)
        except Damaged as error:
            say(f"{error}; trying the checkpoint before it")
            continue
        return path
    return None


def about(path: Path) -> dict[str, Any]:
    """checkpoint.json of `path`, after its checksum was verified. Raises Damaged, or UserError for another schema."""
    text = _stated(path)
    try:
        digest = _digest(path / "state.safetensors")
    except OSError as error:
        raise Damaged(f"checkpoint {path} is not whole ({error})") from None
    if digest != text["sha256"]:
        raise Damaged(f"checkpoint {path} does not match its checksum")
    reports(path)  # somebody may have written a damaged file with its checksum
    return text


def vouch(path: Path) -> None:
    """From now on this process takes `path` to match its checksum: another one of the same training has compared it, or it was compared as
    it was fetched. It may have gigabytes, and a node may have eight processes that read it."""
    text, file = _stated(path), path / "state.safetensors"
    _digests[_stamp(file)] = text["sha256"]


def head(path: Path) -> State:
    """A checkpoint without its weights, which are not read: its tensors are on the meta device. Raises Damaged or UserError as `about`
    does, but for bytes that do not match their checksum."""
    text, said = _stated(path), reports(path)
    tensors = {name: t.to("meta") for name, t in load_file(path / "state.safetensors").items()}  # it maps the file, and reads its header
    return State(int(text["step"]), text["config"], {_renamed(name): t for name, t in tensors.items()}, said)


def newest_head(paths: list[Path], say: Callable[[str], None]) -> State | None:
    """The `head` of the newest whole one of these checkpoints, as far as sizes tell; `say` as in `latest`."""
    for path in sorted(paths, key=lambda p: order(p.name), reverse=True):
        try:
            return head(path)
        except Damaged as error:
            say(f"{error}; trying the checkpoint before it")
    return None


def _stated(path: Path) -> dict[str, Any]:
    """checkpoint.json of `path`, checked against its schema and the checkpoint's name."""
    instead = "remove this checkpoint, and the one before it is used"
    try:
        text = files.read_json(path / "checkpoint.json", instead)
    except (OSError, UserError) as error:
        raise Damaged(f"checkpoint {path} is not whole ({error})") from None
    if text.get("schema") != SCHEMA:
        raise UserError(
            f"checkpoint {path} has schema {text.get('schema')}, this version reads {SCHEMA}; go on with the version that wrote it"
        )
    try:
        fields.require(text, {"step": int, "sha256": str, "config": dict}, path / "checkpoint.json", instead)
    except UserError as error:
        raise Damaged(f"checkpoint {path} is not whole ({error})") from None
    if path.name != _name(text["step"], order(path.name)[0]):
        raise Damaged(f"checkpoint {path} says that it is of step {text['step']:,}")
    return text


def read(path: Path) -> State:
    """Read a checkpoint back onto the CPU. Raises Damaged or UserError as `about` does."""
    text = about(path)
    tensors = {_renamed(name): t for name, t in load_file(path / "state.safetensors").items()}
    return State(int(text["step"]), text["config"], tensors, reports(path))


def _renamed(name: str) -> str:
    """The queue of negatives was a part of the model, and called its memory, before 26 November 2026."""
    return f"state.{name.removeprefix('model.memory.')}" if name.startswith("model.memory.") else name


def reports(path: Path) -> list[dict[str, Any]]:
    """The reports in checkpoint `path`; none where an earlier version wrote it. Raises Damaged if its tensors or reports cannot be read."""
    try:
        with safe_open(path / "state.safetensors", "pt") as file:
            found = json.loads((file.metadata() or {}).get("reports", "[]"))
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise Damaged(f"checkpoint {path} is not whole ({error})") from None
    if not fields.fits(found, list[dict[str, Any]]) or not all(fields.fits(row.get("step"), int) for row in found):
        raise Damaged(f"checkpoint {path} is not whole (its reports are none)")
    return list(found)


def _name(step: int, token: int) -> str:
    return f"step-{step:09d}.{token}" if token else f"step-{step:09d}"


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(1 << 20):
            hashed.update(part)
            progress.moved()
    return hashed.hexdigest()


def _digest(path: Path) -> str:
    """sha256 of a file; of one that this process has hashed before, and that has not changed since, what it was."""
    stamp = _stamp(path)
    if stamp not in _digests:
        digest = _sha256(path)
        if time.time_ns() - stamp[-1] < _FRESH_NS:  # its times may stay the same if it changes again now
            return digest
        _digests[stamp] = digest
    return _digests[stamp]


def _stamp(path: Path) -> tuple[int, ...]:
    """Numbers that change when the file does."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
