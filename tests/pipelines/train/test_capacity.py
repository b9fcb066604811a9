"""A job may ask for nodes that the cluster's autoscaler would start, and for no more."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml

from pipelines.train import capacity, own_ray, ray_train
from simclr.errors import UserError
from tests.support.paths import ROOT

HERE = ROOT / "cluster"


@pytest.fixture
def only_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of which only the head runs; it offers no cores."""
    import ray

    monkeypatch.setattr(own_ray, "_own", [])  # the suite's Ray is private
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e10})
    monkeypatch.setattr(
        ray,
        "nodes",
        lambda: [{"Alive": True, "Resources": {"memory": 1e10}, "NodeManagerHostname": "head", "NodeManagerAddress": "10.0.0.5"}],
    )


def test_a_cluster_that_scales_to_zero_can_have_what_its_file_says(
    only_the_head: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = yaml.safe_load((HERE / "aws-gpu.yaml").read_text())
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(left))  # as `ray up` writes it
    monkeypatch.setenv("HOME", str(tmp_path))
    g6 = left["available_node_types"]["g6"]
    assert capacity.reachable(True)["GPU"] == 4 * g6["max_workers"] == 16
    assert capacity.reachable(True)["CPU"] == 48 * 4
    assert "GPU" not in capacity.reachable(False)
    assert [capacity.slots(True, *each) for each in ((12, True), (24, True), (13, True), (12, False))] == [16, 8, 12, 16]
    assert capacity.slots(False, 12, True) == 0
    sixteen = ray_train.Resources(workers=16, cpus_per_worker=12, address="auto")
    assert ray_train.require(sixteen) is True
    assert ray_train.require(dataclasses.replace(sixteen, address=None)) is True  # a notebook has joined it by itself
    assert "0 of 192 CPUs and 0 of 16 GPUs" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs as many GPUs; the cluster has 16"):
        ray_train.require(ray_train.Resources(workers=17, device="cuda", address="auto"))
    with pytest.raises(UserError, match=r"17 workers need as many GPUs, and the cluster has 16; use fewer --workers, or --device cpu"):
        ray_train.require(ray_train.Resources(workers=17, address="auto"))  # it does not fall back to CPUs
    with pytest.raises(UserError, match=r"13 workers with 13 CPUs and a GPU each do not fit: .* have room for 12"):
        ray_train.require(ray_train.Resources(workers=13, cpus_per_worker=13, address="auto"))
    with pytest.raises(UserError, match=r"16 workers with 16 CPUs and a GPU each do not fit: .* have room for 12"):
        ray_train.require(ray_train.Resources(workers=16, cpus_per_worker=16, address="auto"))


def test_on_kubernetes_the_manifest_says_that_nodes_come(only_the_head: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="have room for 0"):
        ray_train.require(ray_train.Resources(workers=16, address="auto"))
    spec = next(m for m in yaml.safe_load_all((HERE / "kuberay/raycluster.yaml").read_text()) if m["kind"] == "RayCluster")["spec"]
    env = {e["name"]: e.get("value") for e in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    monkeypatch.setenv(capacity.GROWS, env[capacity.GROWS])
    assert ray_train.require(ray_train.Resources(workers=16, address="auto")) is True
    assert math.isinf(capacity.slots(True, 12, True))
