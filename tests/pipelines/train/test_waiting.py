"""The order of jobs that wait for workers: by tickets with numbers of our own, and on a small cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.train import messages, ray_train, waiting
from pipelines.train.messages import Said, Task
from simclr.recipes import patterns_tiny
from tests.support.nodes import Nodes

TWO = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}


def ticket(name: str, workers: int, cpus: float = 1, **more: Any) -> waiting.Ticket:
    return {
        "id": name,
        "who": name,
        "workers": workers,
        "each": {"CPU": cpus},
        "most": {},
        "silent_s": 30,
        "place": 0,
        "goes": False,
    } | more


def free(a: float, b: float) -> waiting.Look:
    """Two nodes of two cores, of which so many are free."""
    return lambda: (TWO, {"a": {"CPU": a}, "b": {"CPU": b}})


def test_who_asked_first_goes_first() -> None:
    line = waiting.Line()
    assert line.decide(ticket("one", 1), free(2, 2), 0)["goes"]
    big = line.decide(ticket("big", 4), free(1, 2), 1)
    assert not big["goes"] and big["holding"] == ["one (1 CPUs)"] and big["before"] == []
    small = line.decide(ticket("small", 1), free(1, 2), 2)  # three cores are free
    assert not small["goes"] and small["before"] == ["big (4 CPUs)"]
    line.leave("one")
    assert not line.decide(ticket("small", 1), free(2, 2), 3)["goes"]
    assert line.decide(ticket("big", 4), free(2, 2), 3)["goes"]
    assert not line.decide(ticket("small", 1), free(2, 2), 4)["goes"]  # the big one's workers are about to start
    line.leave("big")
    assert line.decide(ticket("small", 1), free(2, 2), 5)["goes"]


def test_a_group_that_starts_again_keeps_its_room() -> None:
    line = waiting.Line()
    assert line.decide(ticket("runs", 4), free(2, 2), 0)["goes"]
    assert not line.decide(ticket("next", 1), free(2, 2), 20)["goes"]  # its workers have failed, and all is free for a moment
    assert line.decide(ticket("next", 1), free(2, 2), 40)["goes"]  # it was killed, and its ticket is silent


def test_a_worker_is_on_one_node() -> None:
    line = waiting.Line()
    assert not line.decide(ticket("wide", 1, cpus=2), free(1, 1), 0)["goes"]  # others than our jobs hold the rest
    assert line.decide(ticket("wide", 1, cpus=2), free(2, 0), 1)["goes"]


def test_an_autoscaler_hears_of_workers_that_it_can_start_nodes_for() -> None:
    line = waiting.Line()
    assert line.decide(ticket("one", 4, most={"CPU": 8.0}), free(2, 2), 0)["goes"]
    assert line.decide(ticket("two", 4, most={"CPU": 8.0}), free(0, 0), 0)["goes"]
    assert not line.decide(ticket("three", 1, most={"CPU": 8.0}), free(0, 0), 0)["goes"]
    assert line.decide(ticket("four", 4, most={"CPU": float("inf")}), free(0, 0), 0)["before"] == ["three (1 CPUs)"]


def test_a_group_that_has_lost_a_node_for_good_holds_nobody_up() -> None:
    line = waiting.Line()
    assert line.decide(ticket("runs", 4), free(2, 2), 0)["goes"]
    one_node: waiting.Look = lambda: ({"a": {"CPU": 2.0}}, {"a": {"CPU": 2.0}})  # noqa: E731
    assert line.decide(ticket("next", 1), one_node, 1)["goes"]


def test_an_autoscaler_that_has_no_more_of_what_lacks_does_not_help() -> None:
    line, each = waiting.Line(), {"CPU": 1.0, "GPU": 1.0}
    nodes = {"a": {"CPU": 9.0, "GPU": 2.0}}
    full: waiting.Look = lambda: (nodes, {"a": {"CPU": 7.0, "GPU": 0.0}})  # noqa: E731
    mine = ticket("mine", 1) | {"each": each, "most": {"CPU": 99.0, "GPU": 2.0}}
    assert not line.decide(mine, full, 0)["goes"]  # others than our jobs hold the GPUs
    assert line.decide(mine | {"most": {"CPU": 99.0, "GPU": 8.0}}, full, 1)["goes"]


def test_a_new_actor_learns_the_order_from_the_tickets() -> None:
    line, after = waiting.Line(), waiting.Line()
    sent = {}
    for name, workers in (("runs", 3), ("first", 4), ("second", 1)):
        sent[name] = ticket(name, workers) | {k: line.decide(ticket(name, workers), free(2, 2), 0)[k] for k in ("place", "goes")}
    for name in ("second", "runs", "first"):
        answer = after.decide(sent[name], free(0, 0), 1)
        assert answer["place"] == sent[name]["place"] and answer["goes"] == sent[name]["goes"]
    assert after.decide(sent["second"], free(1, 0), 2)["before"] == ["first (4 CPUs)"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    found = Nodes(tmp_path_factory.mktemp("n"))
    try:
        found.add(2)
        found.add(2)
        ray_train.connect(ray_train.Resources(address=found.address))
        yield found
        ray_train.disconnect()
    finally:
        found.close()
        patch.undo()


def work(task: Task) -> None:
    """Note when it begins, and stay until it may go."""
    mine = Path(task.run)
    (mine / f"began-{time.time()}").touch()
    while not (mine / "go").exists():
        time.sleep(0.1)


def began(folder: Path) -> list[float]:
    return sorted(float(path.name.removeprefix("began-")) for path in folder.glob("began-*"))


def heard(running: ray_train.Running, within_s: float) -> str:
    """The next sentence of a job, "" if it says nothing."""
    message = messages.take(running.inbox, within_s)
    return message.text if isinstance(message, Said) else ""


@pytest.mark.cluster
def test_later_small_jobs_do_not_overtake_one_that_waits(nodes: Nodes, tmp_path: Path) -> None:
    def start(name: str, workers: int) -> ray_train.Running:
        (tmp_path / name).mkdir()
        task = Task(stage="pretrain", config=patterns_tiny(), data="", run=str(tmp_path / name))
        return ray_train.launch(work, task, ray_train.Resources(workers=workers, address=nodes.address), tmp_path / name / "ray")

    jobs = {"holds": start("holds", 1)}
    until = time.monotonic() + 120
    while not began(tmp_path / "holds"):
        assert time.monotonic() < until
        time.sleep(0.1)
    jobs["big"] = start("big", 4)
    sentence = heard(jobs["big"], 60)
    jobs |= {name: start(name, 1) for name in ("small-1", "small-2")}
    behind = heard(jobs["small-1"], 60)  # three cores are free
    assert not began(tmp_path / "small-1") and not began(tmp_path / "small-2") and not began(tmp_path / "big")
    assert sentence.startswith(f"waiting for 4 workers with 4 CPUs in all; held by pretrain {tmp_path}/holds (") and "(1 CPUs)" in sentence
    assert f"after pretrain {tmp_path}/big (" in behind and behind.endswith("(4 CPUs), which asked before")
    assert waiting.somebody()
    for name in jobs:
        (tmp_path / name / "go").touch()
    for running in jobs.values():
        running.thread.join(120)
        assert not running.thread.is_alive() and running.outcome == [None]
    assert len(began(tmp_path / "big")) == 4
    assert began(tmp_path / "big")[-1] < min(began(tmp_path / "small-1") + began(tmp_path / "small-2"))
    assert not waiting.somebody()
