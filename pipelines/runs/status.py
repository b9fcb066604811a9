"""What has become of the process that trains a run or runs a sweep: state.json in its directory.

A process that is interrupted or fails says so there before it ends. One that is killed cannot, so it leaves behind which process it was: on
the same machine it is looked up, of one in S3 the lease tells. A run of an earlier version has no such file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from simclr import fields, files
from simclr.errors import UserError
from simclr.processes import lives, this_process
from simclr.text import cut, redacted

FILE = "state.json"
State = Literal["running", "interrupted", "failed", "complete"]
_LATER_S = 60.0  # a report so long behind the end is of a process that leaves no note, or of another machine's clock


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The content of state.json."""

    state: State
    process: str = field(default_factory=this_process)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: float = field(default_factory=time.time)
    """Unix time of the note."""
    reason: str = ""
    """Why it failed."""

    def now(self, last_report: float, silent: bool | None = None) -> tuple[State | None, str]:
        """(state, a note on it) as far as it can be known. `last_report`: Unix time of the newest report; `silent`: whether the lease of a
        run in S3 says that nobody writes there. None = only the age of the last report can tell."""
        if self.state != "running":
            return (None, "") if last_report > self.time + _LATER_S else (self.state, self.reason)
        alive = lives(self.process)
        if alive is False or (alive is None and silent):
            return "interrupted", f"its process {self.pid} on {self.host} is gone"
        return ("running", "") if alive or silent is False else (None, "")


def note(folder: Path, state: State, reason: str = "") -> None:
    """Write state.json of this process into a run's or a sweep's directory. A full disk is no reason to fail: the age of the last report
    tells, too."""
    with contextlib.suppress(OSError):
        files.write_text(folder / FILE, json.dumps(asdict(Status(state=state, reason=redacted(cut(reason))))) + "\n")


def read(text: str | None) -> Status | None:
    """The status that a state.json states; None without one, and of what another version or hand has written."""
    with contextlib.suppress(UserError):
        return fields.build(Status, files.json_in(text or "", FILE, ""), FILE, "")
    return None
