"""A RayJob of ours and a queue of Kueue's: their schema, what both projects refuse besides, and that the pods are held as the RayCluster's.

No operator runs here: that KubeRay submits again after a lost head is KubeRay's word. What our command then does is tried for real by
`test_the_head_of_a_cluster_is_lost_and_another_begins` (tests/pipelines/train/test_faults.py).
"""

from __future__ import annotations

import copy
import functools
import shlex
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import yaml

from pipelines import cli
from pipelines.commands import pretrain
from tests.pipelines.clusterfile import test_kuberay as kuberay
from tests.support import crds
from tests.support.paths import ROOT

HERE = ROOT / "cluster/kuberay"


@functools.cache
def written(name: str) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all((HERE / name).read_text())]


def job() -> dict[str, Any]:
    return copy.deepcopy(written("job/rayjob.yaml")[0])


def templates(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    found = {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    return found | {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}


@pytest.mark.parametrize("name", ["raycluster.yaml", "job/rayjob.yaml", "queue/kueue.yaml"])
def test_each_object_has_the_fields_of_its_kind(name: str) -> None:
    own = [manifest for manifest in written(name) if manifest["kind"] != "NetworkPolicy"]
    assert own and [mistake for manifest in own for mistake in crds.mistakes(manifest)] == []


Change = Callable[[dict[str, Any]], object]
BROKEN: dict[str, Change] = {
    "a misspelt field": lambda spec: spec.update(backOffLimit=5),
    "a field in another place": lambda spec: spec["rayClusterSpec"].update(shutdownAfterJobFinishes=True),
    "a number for a text": lambda spec: spec["rayClusterSpec"]["headGroupSpec"].update(rayStartParams={"num-cpus": 0}),
    "a mode that is none": lambda spec: spec.update(submissionMode="K8SJobMode"),
    "a sidecar with a pod of its own": lambda spec: spec.update(submissionMode="SidecarMode"),
    "a quantity that is none": lambda spec: templates(spec)["head"]["spec"]["containers"][0]["resources"].update(limits={"memory": "1 GB"}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_schema_finds(what: str) -> None:
    broken = job()
    BROKEN[what](broken["spec"])
    assert crds.mistakes(broken)


def test_the_job_is_submitted_again_on_a_cluster_of_its_own_and_leaves_nothing() -> None:
    spec = job()["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and "clusterSelector" not in spec
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    # The command is one of ours, for as many workers as the cluster has GPUs.
    name, command, *words = shlex.split(spec["entrypoint"])
    assert (name, command) == ("simclr", "pretrain")
    asked = cli.parse(command, pretrain.Args, words)
    gpus = group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert asked.resources.workers == gpus and asked.resources.address == "auto" and str(asked.run).startswith("s3:")


def test_its_pods_are_held_as_those_of_the_cluster() -> None:
    spec, (cluster, _) = job()["spec"], kuberay.pods()["gpu"]
    worker = templates(spec)["gpu"]["spec"]
    assert worker["terminationGracePeriodSeconds"] == cluster["terminationGracePeriodSeconds"]
    drains = [[e["value"] for e in p["containers"][0]["env"] if "DRAIN" in e["name"]] for p in (worker, cluster)]
    assert drains[0] == drains[1] != []
    for template in templates(spec).values():
        pod = template["spec"]
        assert template["metadata"]["labels"] == {"app": "simclr"}
        assert pod["automountServiceAccountToken"] is False and not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {kind for volume in pod["volumes"] for kind in volume} == {"name", "emptyDir"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    # Its dashboard listens to the network, so it asks for a token, and only the operator and its own pods pass the policies.
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_operator_reaches_the_dashboard_and_nothing_else() -> None:
    head = {"app": "simclr", "ray.io/cluster": "r50-x7c", "ray.io/node-type": "head"}
    worker, submitter = head | {"ray.io/node-type": "worker"}, {"app": "simclr"}
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    passes = functools.partial(kuberay.passes, extra="job/rayjob.yaml")
    assert passes("Ingress", head, operator, 8265) and not passes("Ingress", head, kuberay.STRANGER, 8265)
    assert not passes("Ingress", head, operator, 6379) and not passes("Ingress", worker, operator, 8265)
    for one, other in ((submitter, head), (worker, head), (head, worker)):
        assert passes("Egress", one, other, 8265) and passes("Ingress", other, one, 8265)
    assert passes("Egress", worker, kuberay.WORLD, 443) and not passes("Egress", head, kuberay.INSIDE, 6443)  # no autoscaler: no API server


# ── Kueue ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def amount(quantity: str) -> Fraction:
    unit = next((u for u in ("m", "Mi", "Gi", "Ti") if quantity.endswith(u)), "")
    return Fraction(quantity.removesuffix(unit)) * {"": 1, "m": Fraction(1, 1000), "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def test_the_queue_admits_the_job_and_counts_all_that_its_pods_ask_for() -> None:
    flavors = {m["metadata"]["name"] for m in written("queue/kueue.yaml") if m["kind"] == "ResourceFlavor"}
    (queue,) = (m for m in written("queue/kueue.yaml") if m["kind"] == "ClusterQueue")
    (local,) = (m for m in written("queue/kueue.yaml") if m["kind"] == "LocalQueue")
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"] and local["metadata"]["namespace"] == job()["metadata"]["namespace"]
    assert queue["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "simclr"}
    quota: dict[str, Fraction] = {}
    for group in queue["spec"]["resourceGroups"]:
        assert {flavor["name"] for flavor in group["flavors"]} <= flavors
        for flavor in group["flavors"]:
            assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]  # Kueue wants them all, in this order
            quota |= {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
    spec, asked = job()["spec"], dict.fromkeys(quota, Fraction(0))
    counts = {"submitter": 1, "head": 1} | {g["groupName"]: g["replicas"] for g in spec["rayClusterSpec"]["workerGroupSpecs"]}
    for name, template in templates(spec).items():
        for container in template["spec"]["containers"]:
            for resource, quantity in container["resources"]["requests"].items():
                asked[resource] += counts[name] * amount(quantity)  # one that the queue does not cover would never be admitted
    assert all(asked[resource] <= quota[resource] for resource in quota) and asked["nvidia.com/gpu"] == 16
    # What Kueue's webhook refuses of a RayJob with a queue.
    assert not spec["rayClusterSpec"].get("enableInTreeAutoscaling") and len(spec["rayClusterSpec"]["workerGroupSpecs"]) <= 7
