"""A run's reports as TensorBoard's scalars, beside MLflow: the same names, the same steps, by torch's own `SummaryWriter`.

The driver writes them, to which all reports come. scalars.json beside the event files says whose they are and up to which step. A run that
goes on writes what is missing up to its checkpoint, and tells TensorBoard to forget whatever an earlier process wrote beyond
(`purge_step`). So no step is shown twice, and none that the run has not.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from pipelines.runs.directory import Run
from pipelines.terminal import say
from pipelines.tracking.client import metrics_of
from simclr import fields, files
from simclr.data.s3.uri import address
from simclr.errors import UserError
from simclr.extras import command

FOLDER = "tensorboard"
_NOTE = "scalars.json"


def require() -> None:
    """Raise UserError if TensorBoard's package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"--tensorboard needs the package tensorboard, which is not installed: `{command('tensorboard')}`")


def asked(given: tuple[Path, ...] | None) -> Path | None:
    """The directory that the flag gives, absolute; Path() = each run's own; None without the flag. Raises UserError for two directories,
    for one in S3, and without the package."""
    if given is None:
        return None
    require()
    if len(given) > 1:
        raise UserError(f"--tensorboard has {len(given)} directories; give one, or none for a folder in the run's own")
    if given and (at := address(given[0])) is not None:
        raise UserError(f"--tensorboard {at} is in S3, where TensorBoard's files are not written; give a directory on a disk")
    return given[0].absolute() if given else Path()


def scalars(given: tuple[Path, ...] | None, run: Run, at: object) -> Scalars | None:
    """The scalars that a command's flag asks for; None without it. The run may be a copy of one `at` s3://…

    Raises UserError as `asked` does, and if there is no place for them."""
    place = asked(given)
    if place is None:
        return None
    if place == Path() and at:
        raise UserError(f"--tensorboard alone writes into the run's own directory, and {at} is in S3; give a DIR on a disk")
    return Scalars(run.path / FOLDER if place == Path() else place / run.path.name, run)


class Scalars:
    """The event files of one run, in `folder`. For one thread. Training goes on without them if the disk refuses."""

    def __init__(self, folder: Path, run: Run) -> None:
        """Writes nothing yet. Raises UserError if the folder is another run's, or cannot be written."""
        self.folder, self.run = folder, run
        self.writer: Any = None
        self.begun = self.refused = False
        files.require_writable(folder)
        self.last = self._written()

    def write(self, report: dict[str, Any]) -> None:
        """One report, as metrics.jsonl has it. Ahead of the first one comes what the folder lacks of those before."""
        try:
            step = int(report["step"])
            if not self.begun:
                self._begin(step - 1)
            if step <= self.last:  # workers that failed begin again at their checkpoint
                self._open(step)
            self._add(report)
        except OSError as error:
            self._refuse(error)

    def catch_up(self) -> None:
        """Write what the folder lacks of a run that is over."""
        try:
            if not self.begun:
                self._begin(max((int(row["step"]) for row in self.run.history()), default=0))
            self.close()
        except OSError as error:
            self._refuse(error)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _begin(self, done: int) -> None:
        """Open the files of a run that goes on after step `done`, with all its reports up to it."""
        self.begun = True
        missing = [row for row in self.run.history() if min(self.last, done) < row["step"] <= done]
        self._open(min(self.last, done) + 1)
        for row in missing:
            self._add(row)

    def _open(self, step: int) -> None:
        """A new event file: TensorBoard forgets what older ones have from `step` on."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.last = step - 1
        self._note()  # ahead of the file: what it purges no longer counts as written
        self.writer = SummaryWriter(str(self.folder), purge_step=step)

    def _add(self, report: dict[str, Any]) -> None:
        if self.refused:
            return
        for name, value in metrics_of(report).items():
            self.writer.add_scalar(name, value, int(report["step"]), walltime=report.get("time"))
        self.writer.flush()  # a process that is killed leaves whole reports
        self.last = int(report["step"])
        self._note()

    def _note(self) -> None:
        text = {"run": str(self.run.path.absolute()), "created": self.run.created, "step": self.last}
        files.write_text(self.folder / _NOTE, json.dumps(text) + "\n")

    def _refuse(self, error: OSError) -> None:
        if not self.refused:
            say(f"TensorBoard's files in {self.folder} cannot be written ({error.strerror or error}); the training goes on without them")
        self.refused = True

    def _written(self) -> int:
        """The last step of this run that the folder has; −1 if it has none. Raises UserError if it is another run's."""
        path, instead = self.folder / _NOTE, f"remove {self.folder}, or use another --tensorboard"
        if not path.is_file():
            if any(self.folder.glob("*tfevents*")):
                raise UserError(f"{self.folder} has event files, and nothing says of which run; {instead}")
            return -1
        there = files.read_json(path, instead)
        fields.require(there, {"run": str, "created": float, "step": int}, path, instead)
        if there["run"] != str(self.run.path.absolute()):
            raise UserError(f"{self.folder} has the scalars of {there['run']}; {instead}")
        return int(there["step"]) if there["created"] == self.run.created else -1
