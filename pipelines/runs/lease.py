"""One driver at a time trains a run in S3: the lease at its address, in lease.json (see `simclr.data.s3.lease`).

A driver on another machine would train the same run, and each would remove the other's checkpoints. Whatever a training writes there asks
first whether the lease is still its own. A writer that was stopped between that question and its write is told by its fencing token, which
is in the name of each checkpoint: see `simclr.checkpoint.order`. Runs on a disk have `Run.alone`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipelines.runs.home import Home, Ticket
from pipelines.terminal import say

_INSTEAD = "follow it (`ray job logs --follow ID`), end it (`ray job stop ID`, Ctrl-C), or use another --run"


@contextlib.contextmanager
def alone(home: Home) -> Iterator[None]:
    """Inside, no other command trains the run of `home` in S3; on disk this does nothing. Raises UserError, with who does, if another one
    does; if that one may be dead, this waits until it is known."""
    if home.at is None:
        yield
        return
    from simclr.data.s3.lease import Lease
    from simclr.data.s3.store import Store

    own = home.register()
    own.store = Store(attempts=3, answer_s=5.0, threads=1)  # a sign that comes late is none
    lease = Lease(own, str(home.at), least=home.highest_token)
    lease.take(_INSTEAD, say)
    home.ticket, home.check = Ticket(lease.mine.owner, lease.mine.token), lease.check
    try:
        yield
    finally:
        lease.release(keep=home.is_begun() or lease.mine.token > 1)  # a new run that was refused leaves nothing
