"""Takes over another trial's weights, for pbt. A trial that is killed meanwhile goes on with its own weights and values, or with the
other's weights and its new values: run.json, which has the values, is written last, and until then `settle` takes the exchange back.

.taking-…/      in the run's directory, while it lasts
    takes.json  the new config, and whose weights these are
    new/        a copy of the other trial's newest checkpoint; it becomes the run's checkpoints/
    old/        what checkpoints/ had before
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipelines.runs.directory import Run, load_run
from pipelines.terminal import say
from simclr import fields, files
from simclr.config import Config
from simclr.errors import UserError
from simclr.family import pretraining
from tune import sweep_dir


def take(run: Run, config: Config, donor: Path) -> None:
    """Make the newest checkpoint of the run `donor` the only one of `run`, with `config`. Raises UserError if `donor` has none.

    What this leaves behind says whose weights they are, until `settle` is called once more."""
    from simclr import checkpoint

    settle(run.path)
    newest = checkpoint.latest(donor / "checkpoints", say)
    if newest is None:
        raise UserError(f"the checkpoint it should go on from is gone: {donor}")
    sweep_dir.require_here(run.checkpoints)
    folder = Path(tempfile.mkdtemp(prefix=".taking-", dir=run.path))  # a new name: nobody can have made a link of it
    files.write_text(folder / "takes.json", json.dumps({"trial": donor.name, "config": config.to_dict()}))
    shutil.copytree(newest, folder / "new" / newest.name)
    run.checkpoints.mkdir(exist_ok=True)
    run.checkpoints.rename(folder / "old")
    (folder / "new").rename(run.checkpoints)
    dataclasses.replace(run, config=config).save()


def settle(directory: Path) -> str:
    """End what `take` has begun in a trial's directory: take it back if run.json has not the new config, else remove the old checkpoints.
    Returns the trial whose weights it has now; "" if they are its own, or if that is in its record already.

    It may be killed, too, at any point, and be called again."""
    taken, checkpoints = "", directory / "checkpoints"
    _settle_earlier(directory)
    for folder in sorted(directory.glob(".taking-*")):
        old = folder / "old"
        for part in (folder, old, checkpoints):
            sweep_dir.require_here(part)
        if old.is_dir():
            note = _note(folder / "takes.json")
            if checkpoints.is_dir() and load_run(directory).config == pretraining(note["config"]):
                taken = str(note["trial"])
                shutil.rmtree(old)
            else:
                if checkpoints.is_dir():
                    shutil.rmtree(checkpoints)
                old.rename(checkpoints)
        shutil.rmtree(folder)
    return taken


def _note(path: Path) -> dict[str, Any]:
    note = files.read_json(path, instead := f"remove {path.parents[1]}, and the trial is done again")
    fields.require(note, {"trial": str, "config": dict[str, Any]}, path, instead)
    if not sweep_dir.plain(note["trial"]):
        raise UserError(f"{path} names the trial {note['trial']!r}, which is no name; {instead}")
    return note


def _settle_earlier(directory: Path) -> None:
    """The same for an earlier version, which wrote run.json first and had two folders of fixed names."""
    copy, old, checkpoints = (directory / name for name in (".inherited", ".outlived", "checkpoints"))
    for folder in (copy, old):
        sweep_dir.require_here(folder)
    if old.is_dir() and copy.is_dir() and not checkpoints.exists():
        copy.rename(checkpoints)
    for folder in (copy, old):
        if folder.is_dir():
            shutil.rmtree(folder)
