"""Jobs that wait for workers, in the order in which they asked.

Ray gives no order: of placement groups that wait it takes whichever fits, so a job of four workers would wait for as long as jobs of one
worker keep coming. Here each training of a shared cluster asks an actor, and starts its workers when the actor says that it goes: when
nobody waits before it, and when there is room for it beside all that go already. Queues with quotas and priorities are Kueue's.

The actor only remembers. Every ticket is sent again and again while its job lives, so an actor that is lost with its node begins anew,
and a job that was killed is forgotten. Without the actor, a job goes on without order: it orders jobs, and never stops one.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.train import capacity, ray_private
from pipelines.train.messages import Said, Task, Tell

_NAME, _NAMESPACE = "simclr-waiting-1", "simclr"  # the number is that of a ticket's fields, which jobs of several versions share
_ASK_S, _TELL_S, _ALIVE_S, _SILENT_S = 1.0, 60.0, 5.0, 30.0
_PATIENCE_S = 3.0  # before the first sentence: what a job leaves is not free at once
_ANSWER_S = 60.0  # for the actor's first answer: its process has to start
Ticket = dict[str, Any]
"""`id`; `who` it is, for people; `workers`, at least; what `each` of them takes; the `most` of each resource that an
autoscaler may bring the cluster to; `silent_s` after which it is forgotten; `place` in the line, 0 = none yet; whether it `goes`."""
Look = Callable[[], tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]]
"""Gives node → its resources, and node → what is free of them."""


class Line:
    """The tickets, and which of them go."""

    def __init__(self) -> None:
        self.tickets: dict[str, Ticket] = {}

    def ask(self, ticket: Ticket) -> Ticket:
        """Remember the ticket; returns it with its `place`, whether it `goes`, and who it waits for: `holding` and `before`, as
        sentences' parts."""
        return self.decide(ticket, _look, time.monotonic())

    def stay(self, ticket: Ticket) -> None:
        """Remember a ticket that goes."""
        self._remember(ticket, time.monotonic())

    def decide(self, ticket: Ticket, look: Look, now: float) -> Ticket:
        """`ask` at time `now`; `look()` is asked only for the first in the line."""
        mine = self._remember(ticket, now)
        going = [other for other in self.tickets.values() if other["goes"] and other is not mine]
        before = [other for other in self.tickets.values() if not other["goes"] and other["place"] < mine["place"]]
        mine["goes"] = mine["goes"] or (not before and _has_room(mine, going, *look()))
        return mine | {"holding": [_needs(other) for other in going], "before": [_needs(other) for other in before]}

    def _remember(self, ticket: Ticket, now: float) -> Ticket:
        self.tickets = {name: other for name, other in self.tickets.items() if now - other["heard"] < other["silent_s"]}
        known = self.tickets.get(ticket["id"], ticket)
        place = known["place"] or 1 + max((other["place"] for other in self.tickets.values()), default=0)
        mine = ticket | {"place": place, "goes": known["goes"] or ticket["goes"], "heard": now}
        self.tickets[ticket["id"]] = mine
        return mine

    def leave(self, name: str) -> None:
        """Forget the ticket."""
        self.tickets.pop(name, None)

    def waiting(self) -> bool:
        """Whether somebody waits."""
        now = time.monotonic()
        return any(not ticket["goes"] and now - ticket["heard"] < ticket["silent_s"] for ticket in self.tickets.values())


def _look() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    import ray

    gone = ray_private.draining()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in gone}
    return nodes, ray_private.free()


def _has_room(mine: Ticket, going: list[Ticket], nodes: dict[str, dict[str, float]], free: dict[str, dict[str, float]]) -> bool:
    """Whether the workers of `mine` fit beside those `going`. These keep what they asked for also while it is free for a moment, as when a
    group starts again after a failure."""
    there = {name: sum(has.get(name, 0.0) for has in nodes.values()) for name in mine["each"]}
    most = {name: max(amount, mine["most"].get(name, 0.0)) for name, amount in there.items()}
    asks = {name: [t["workers"] * t["each"].get(name, 0.0) for t in going] for name in most}
    # A group that asks for more than there can be has lost a node, and holds nothing until that is back.
    runs = [all(amount <= most[name] for name, amount in zip(most, each, strict=True)) for each in zip(*asks.values(), strict=True)]
    needs = {name: mine["workers"] * mine["each"][name] for name in most}
    if any(sum(itertools.compress(asks[name], runs)) + needs[name] > most[name] for name in most):
        return False
    if sum(capacity.fit(mine["each"], has) for node, has in free.items() if node in nodes) >= mine["workers"]:
        return True
    # The autoscaler starts nodes for workers that Ray waits for, if it may have more of what lacks.
    lacking = [name for name in most if sum(has.get(name, 0.0) for node, has in free.items() if node in nodes) < needs[name]]
    return all(most[name] > there[name] for name in lacking or most)


def _needs(ticket: Ticket) -> str:
    total = {name: ticket["workers"] * amount for name, amount in ticket["each"].items() if amount}
    return f"{ticket['who']} ({', '.join(f'{amount:g} {name}s' for name, amount in total.items())})"


@contextlib.contextmanager
def turn(trainer: Any, task: Task, private: bool, tell: Tell, ended: threading.Event | None = None) -> Iterator[bool]:
    """Inside, it is the turn of the training `task` by Ray's `trainer`, which keeps its place until the end; on a `private` Ray at once.
    False if the job has `ended` before. `tell` gets sentences on who is waited for."""
    if private:
        yield True
        return
    ended = ended or threading.Event()
    scaling, job = trainer.scaling_config, ray_private.submission_id()
    ticket: Ticket = {
        "id": uuid.uuid4().hex,
        "who": f"{task.stage} {task.run} ({f'job {job}, ' if job else ''}{_user()}@{socket.gethostname()})",
        "workers": scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[0],
        "each": dict(scaling.resources_per_worker),
        "most": capacity.grown(),
        "silent_s": _SILENT_S,
        "place": 0,
        "goes": False,
    }
    every_s = math.inf if task.trial else _TELL_S  # a sweep has many trials: each says it once
    ticket = _waited(ticket, lambda text: tell(Said(text, task.trial)), ended, every_s)
    over = threading.Event()
    alive = threading.Thread(target=_stay, args=(ticket, over), name="turn", daemon=True)
    alive.start()
    try:
        yield not ended.is_set()
    finally:
        over.set()
        alive.join()
        with contextlib.suppress(Exception):  # Ray was shut down, and the actor forgets a silent ticket
            _line().leave.remote(ticket["id"])


def somebody() -> bool:
    """Whether a job waits for its turn. A training that could grow leaves the room to it."""
    import ray

    try:
        return bool(ray.get(ray.get_actor(_NAME, namespace=_NAMESPACE).waiting.remote(), timeout=_ALIVE_S))
    except (ValueError, ray.exceptions.RayError):  # no actor: no other job has asked
        return False


def _waited(ticket: Ticket, tell: Callable[[str], object], ended: threading.Event, every_s: float) -> Ticket:
    """The ticket once it goes, or without its turn, if nobody answers."""
    import ray

    said, say_at = "", time.monotonic() + _PATIENCE_S
    while not ended.is_set():
        try:
            answer = ray.get(_line().ask.remote(ticket), timeout=_ANSWER_S)
        except ray.exceptions.RayError as error:
            tell(f"jobs start in no order now: the process that orders them does not answer ({type(error).__name__})")
            return ticket | {"goes": True}
        ticket = ticket | {"place": answer["place"], "goes": answer["goes"]}
        if ticket["goes"]:
            if said:
                tell("it is this job's turn")
            break
        now, text = time.monotonic(), _sentence(ticket, answer)
        if text != said and now >= say_at:
            said, say_at = text, now + every_s
            tell(text)
        ended.wait(_ASK_S)
    return ticket


def _sentence(ticket: Ticket, answer: Ticket) -> str:
    """Who is waited for."""
    needs = _needs(ticket | {"who": ""}).strip(" ()")
    held = f"held by {_some(answer['holding'])}" if answer["holding"] else "the free resources of the cluster's nodes are too few"
    first = f", and after {_some(answer['before'])}, which asked before" if answer["before"] else ""
    return f"waiting for {ticket['workers']} workers with {needs} in all; {held}{first}"


def _some(parts: list[str]) -> str:
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"{', '.join(parts[:4])}{more}"


def _stay(ticket: Ticket, over: threading.Event) -> None:
    """Send the ticket until it is `over`."""
    while not over.wait(_ALIVE_S):
        with contextlib.suppress(Exception):
            _line().stay.remote(ticket)


def _line() -> Any:
    """The cluster's actor, on its head: on another node it would keep the autoscaler from ending that node."""
    import ray

    try:
        return ray.get_actor(_NAME, namespace=_NAMESPACE)
    except ValueError:  # the first job of this cluster
        actor: Any = ray.remote(num_cpus=0, max_restarts=-1, resources={"node:__internal_head__": 0.001})(Line)
        apart = {"scheduling_strategy": "DEFAULT"}  # a sweep's trial asks from a placement group, which would hold it
        return actor.options(name=_NAME, namespace=_NAMESPACE, lifetime="detached", get_if_exists=True, **apart).remote()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return "unknown"
