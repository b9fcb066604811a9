"""Checkpoints: the whole training state, written atomically, read strictly, never unpickled.

A checkpoint is a directory `step-000000120/` of state.safetensors (every tensor by name, and in its header the newest
reports) and checkpoint.json (schema, step, config, checksum). It is written under a temporary name, flushed to the disk and
renamed, so under its own name it is whole; should a disk spoil it later, its checksum says so and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simclr.errors import UserError

SCHEMA = 1


class Damaged(UserError):
    """A checkpoint that is incomplete or does not match its checksum."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a run needs to go on as if it had not stopped: randomness is keyed, so `step` is the only clock."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """`model.*` and `optimizer.*`. They are the live tensors: write them before the next step."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    """The newest reports, in order of steps: who was to hear them may be gone, and the steps are not done again."""


def capture(step: int, config: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The state after `step` steps. Momentum is stored under the parameter's name, not its number."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    return State(step, config, tensors)


def check(state: State, model: nn.Module) -> None:
    """Raise UserError naming each tensor that is missing, extra or misshapen. The model may be on the meta device."""
    own, momentum = _names(model)
    wanted = own | (momentum if any(name.startswith("optimizer.") for name in state.tensors) else {})
    wrong = [f"{name} is missing" for name in wanted if name not in state.tensors]
    wrong += [f"{name} is unknown" for name in state.tensors if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(t.shape)}, expected {tuple(wanted[name].shape)}"
        for name, t in state.tensors.items()
        if name in wanted and t.shape != wanted[name].shape
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise UserError(f"the checkpoint of step {state.step} does not fit this config: {shown}")


def restore(state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put `state` into `model` and `optimizer`. Raises UserError as `check` does, with nothing changed."""
    check(state, model)
    own, momentum = _names(model)
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(state.tensors[name])
        for name, p in momentum.items():
            if name in state.tensors:
                # The parameter's own layout in memory: fused optimizers and bitwise resume want both alike.
                optimizer.state[p]["momentum_buffer"] = torch.empty_like(p, requires_grad=False).copy_(state.tensors[name])


def _names(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, nn.Parameter]]:
    own = {f"model.{name}": t for name, t in model.state_dict().items()}
    return own, {f"optimizer.{name}.momentum_buffer": p for name, p in model.named_parameters() if p.requires_grad}


def write(folder: Path, state: State, keep: int, score: float | None = None, spare: str = "") -> Path:
    """Write `state`, of an encoder with `score` (higher is better), as `folder`/step-…, atomically; then remove all but the `keep`
    newest, the one with the best score, and the one of name `spare`. Returns the checkpoint's path.

    Raises OSError (no space, say) with nothing left behind and the earlier checkpoints untouched.
    """
    target = folder / f"step-{state.step:09d}"
    scratch = folder / f".writing-{state.step:09d}-{os.getpid()}"
    aside = folder / f".old-{state.step:09d}-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
        save_file(tensors, scratch / "state.safetensors", {"reports": json.dumps(state.reports)})
        about = {"schema": SCHEMA, "step": state.step, "sha256": _sha256(scratch / "state.safetensors"), "config": state.config}
        about["score"] = score
        (scratch / "checkpoint.json").write_text(json.dumps(about, indent=1) + "\n")
        for path in (*scratch.iterdir(), scratch):
            _flush(path)
        if target.exists():  # a resumed run comes by the same step again
            target.rename(aside)
        scratch.rename(target)
        _flush(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    # `.writing-*` of a process that was killed: only one rank writes, so nobody else is at it.
    stay = {*worth_keeping({path.name: score_of(path) for path in list_checkpoints(folder)}, keep), spare}
    stale = [path for path in list_checkpoints(folder) if path.name not in stay]
    for old in (*stale, *folder.glob(".old-*"), *folder.glob(".writing-*")):
        shutil.rmtree(old, ignore_errors=True)
    return target


def worth_keeping(scores: dict[str, float | None], keep: int) -> set[str]:
    """Of checkpoints (name → score, None = not scored) the `keep` newest, and of the scored ones the best, the newer of equals."""
    scored = [(score, name) for name, score in scores.items() if score is not None]
    return {*sorted(scores)[-keep:], *(name for _, name in sorted(scored)[-1:])}


def score_of(path: Path) -> float | None:
    """The score of checkpoint `path`; None where it has none, or is not whole."""
    try:
        score: float | None = json.loads((path / "checkpoint.json").read_text()).get("score")
    except (OSError, ValueError):
        return None
    return score


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first; unfinished ones are not listed."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def latest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. A damaged one is named through `say`, and the one before it is used."""
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
    try:
        text: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
        digest = _sha256(path / "state.safetensors")
    except (OSError, ValueError) as error:
        raise Damaged(f"checkpoint {path} is not whole ({error})") from None
    if text.get("schema") != SCHEMA:
        raise UserError(
            f"checkpoint {path} has schema {text.get('schema')}, this version reads {SCHEMA}; go on with the version that wrote it"
        )
    if digest != text["sha256"]:
        raise Damaged(f"checkpoint {path} does not match its checksum")
    return text


def read(path: Path) -> State:
    """Read a checkpoint back onto the CPU. Raises Damaged or UserError as `about` does."""
    text = about(path)
    return State(int(text["step"]), text["config"], load_file(path / "state.safetensors"), reports(path))


def reports(path: Path) -> list[dict[str, Any]]:
    """The reports in checkpoint `path`; none where an earlier version wrote it."""
    with safe_open(path / "state.safetensors", "pt") as file:
        found: list[dict[str, Any]] = json.loads((file.metadata() or {}).get("reports", "[]"))
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
