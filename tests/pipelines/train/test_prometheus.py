"""Gauges: right values at Ray's metrics port, and a dashboard that names nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from pipelines.train.messages import Reported, Task
from pipelines.train.prometheus import OF_RANKS, OF_RUN, PREFIX
from simclr.recipes import recipe
from tests.support.paths import ROOT

DASHBOARD = ROOT / "cluster" / "grafana.json"
_OURS = {PREFIX + name for name, _ in (OF_RANKS | OF_RUN).values()}
_FUNCTIONS = {"label_values", "quantile", "on", "by", "group_left", "run", "rank"}


def expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return asked + [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]


def names(expression: str) -> set[str]:
    """Metrics in a PromQL expression: its words without labels, functions and numbers."""
    return set(re.findall(r"[a-z_]\w*", re.sub(r"\{[^}]*\}", "", expression))) - _FUNCTIONS


def test_the_dashboard_names_only_what_is_exported_and_all_that_we_export() -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations is not None
    agent = Path(spec.submodule_search_locations[0]) / "dashboard/modules/reporter/reporter_agent.py"
    rays = {PREFIX + name for name in re.findall(r'^    "(node_\w+)": Gauge\($', agent.read_text(), re.MULTILINE)}
    asked = {name for expression in expressions() for name in names(expression)}
    assert len(rays) > 20 and not asked - _OURS - rays
    assert not _OURS - asked
    assert all(re.fullmatch(r"ray_simclr_[a-z0-9_]+", name) for name in _OURS)


def test_the_dashboard_can_be_imported() -> None:
    """Grafana's requirements: no id of another Grafana, unique panels side by side, the data source a variable everywhere."""
    board = json.loads(DASHBOARD.read_text())
    assert board["id"] is None and board["schemaVersion"] >= 36 and board["title"] and board["uid"]
    variables = {v["name"]: v["type"] for v in board["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query", "rank": "query"}
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert set(re.findall(r"\$\{?(\w+)", "".join(expressions()))) <= set(variables)


@pytest.mark.cluster
def test_each_ranks_gauges_are_at_the_metrics_port(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two workers under Ray Train set them, one report each; a node of a cluster serves them."""
    from pipelines.train import ray_train
    from tests.support.nodes import Nodes

    def worker(task: Task) -> None:
        import time
        from pathlib import Path

        import torch.distributed as dist

        from pipelines.train import ray_start
        from pipelines.train.prometheus import Gauges
        from simclr.checkpoint import State
        from simclr.train import Report

        ray_start.meet()
        gauges, ranks = Gauges("s3://bucket/runs/r50/"), {"speed/step_p50_s": (0.25, 0.5), "speed/own_s": (0.125, 0.375)}
        metrics = {"train/loss": 3.5, "speed/images_per_s": 512.0, "speed/slowest_rank": 1.0}
        said = gauges.show(Report(70, 90, metrics, State(70, {}, {}), False, ranks, (1,)))
        if dist.get_rank() == 0:
            task.inbox.put(Reported(step=70, total_steps=90, metrics=metrics, stragglers=said))
        while not Path(task.run, "seen").exists():
            time.sleep(0.2)

    import ray

    nodes = Nodes(tmp_path_factory.mktemp("n"))
    nodes.add(cores=2)
    asked = ray_train.Resources(workers=2, max_failures=0, address=nodes.address)
    assert ray_train.connect(asked)
    try:
        (node,) = (node for node in ray.nodes() if node["Resources"].get("CPU"))
        task = Task(stage="pretrain", config=recipe("patterns_tiny"), data="", run=str(tmp_path))
        running = ray_train.launch(worker, task, asked, tmp_path / "ray")
        said = next(running.reports())
        assert isinstance(said, Reported) and re.fullmatch(r"rank 1 on \S+", said.stragglers)
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        until, found = time.monotonic() + 60, dict[tuple[str, str, str], float]()
        while time.monotonic() < until and not {rank for _, _, rank in found} >= {"0", "1"}:
            time.sleep(1)
            found = {}
            for line in urllib.request.urlopen(url, timeout=30).read().decode().splitlines():
                if read := re.fullmatch(rf"({PREFIX}simclr_\w+)\{{(.*)\}} (\S+)", line):
                    labels = dict(re.findall(r'(\w+)="([^"]*)"', read[2]))
                    found[read[1], labels["run"], labels["rank"]] = float(read[3])
        (tmp_path / "seen").touch()
        running.thread.join(60)
    finally:
        ray_train.disconnect()
        nodes.close()
    of_ranks = {(f"ray_simclr_step_{part}_seconds", "r50", str(r)): v for part, each in _SHOWN.items() for r, v in enumerate(each)}
    of_run = {"step": 70.0, "total_steps": 90.0, "loss": 3.5, "images_per_second": 512.0, "slowest_rank": 1.0}
    assert found == of_ranks | {(f"ray_simclr_{name}", "r50", "0"): value for name, value in of_run.items()}


_SHOWN = {"p50": (0.25, 0.5), "own": (0.125, 0.375)}
