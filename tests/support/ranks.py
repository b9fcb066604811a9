"""A pool of gloo processes: started once, they run a function on W ranks as often as tests ask."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist

_MOST = 5
_PATIENCE_S = 120


class Ranks:
    """`ranks(W, function, *arguments)` runs `function(*arguments)` on W ranks and returns their results in order of ranks.

    The function must be importable (a module's, not a local one). A failure on any rank raises here, with its traceback. Ranks wait for
    each other half as long as the caller waits for them. After one that did not answer, the next call has processes of its own.
    """

    def __init__(self, patience_s: int = _PATIENCE_S) -> None:
        self.patience_s = patience_s
        self.pipes: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(_MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.patience_s // 2), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self.pipes[:world]):
                pipe.send((f"{folder}/store", rank, world, function, arguments))
            answers = []
            try:
                for rank, pipe in enumerate(self.pipes[:world]):
                    assert pipe.poll(self.patience_s), f"rank {rank} did not answer within {self.patience_s} s"
                    answers.append(pipe.recv())
            except BaseException:  # what comes late would be taken for the next call's answer
                self.close()
                self._start()
                raise
        failed = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes.clear()
        self.processes.clear()


def _serve(pipe: Connection, timeout_s: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if "lo" in (name for _, name in socket.if_nameindex()) else "")
    while True:
        store, rank, world, function, arguments = pipe.recv()
        try:
            if world > 1:
                timeout = timedelta(seconds=timeout_s)
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        # Not before: the caller removes the store when it has all answers, and a torch thread that still reads the store then ends the
        # process.
        pipe.send(answer)
