"""The manifests of cluster/kuberay: what Ray's autoscaler asks the API server for, what pods may reach, what they may be.

No API server runs here. Ray's own providers are driven against recorded requests, and the policies are read as Kubernetes reads them.
"""

from __future__ import annotations

import copy
import functools
import ipaddress
import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

HERE = ROOT / "cluster/kuberay"
CLUSTER = {"app": "simclr", "ray.io/cluster": "simclr"}
HEAD, WORKER, STRANGER = CLUSTER | {"ray.io/node-type": "head"}, CLUSTER | {"ray.io/node-type": "worker"}, {"app": "other"}


@functools.cache
def applied() -> list[dict[str, Any]]:
    """What `kubectl apply -f cluster/kuberay/` applies, in its order: files by name, none of the folders inside."""
    return [m for path in sorted(HERE.glob("*.yaml")) for m in yaml.safe_load_all(path.read_text())]


def of(kind: str) -> list[dict[str, Any]]:
    return [m for m in applied() if m["kind"] == kind]


def pods() -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Pod → (its spec, its containers, with the autoscaler that KubeRay adds to the head)."""
    (cluster,) = of("RayCluster")
    spec = cluster["spec"]
    head = spec["headGroupSpec"]["template"]["spec"]
    found = {"head": (head, [*head["containers"], {"name": "autoscaler", **spec["autoscalerOptions"]}])}
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        found[group["groupName"]] = (pod, pod["containers"])
    return found


# ── The namespace and the API server ───────────────────────────────────────────────────────────────────────────────


def test_everything_lives_in_a_namespace_of_its_own_and_the_role_is_there_before_the_operator_looks() -> None:
    objects = applied()
    assert objects[0]["kind"] == "Namespace" and objects[0]["metadata"]["name"] == "simclr"
    assert objects[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    extras = [m for path in HERE.glob("identity/*.yaml") for m in yaml.safe_load_all(path.read_text())]
    assert {m["metadata"].get("namespace") for m in objects[1:] + extras} == {"simclr"}
    kinds = [m["kind"] for m in objects]
    assert kinds.index("RayCluster") == len(kinds) - 1
    # KubeRay makes a role of the cluster's name unless there is one (raycluster_controller.go), and its own may patch every pod.
    (cluster,) = of("RayCluster")
    (role,) = of("Role")
    (binding,) = of("RoleBinding")
    assert cluster["metadata"]["name"] == role["metadata"]["name"] == binding["metadata"]["name"]
    assert [s["name"] for s in binding["subjects"]] == [pods()["head"][0]["serviceAccountName"]]


class ApiServer:
    """Answers Ray's two kinds of questions, and keeps what was asked: (verb, group, resource, name)."""

    def __init__(self) -> None:
        self.asked = set[tuple[str, str, str, str]]()
        (self.cluster,) = copy.deepcopy(of("RayCluster"))
        self.cluster["metadata"] |= {"resourceVersion": "1"}

    def answer(self, verb: str, url: str) -> Any:
        path = r"/(?:api|apis/(?P<group>[^/]+))/v1/namespaces/simclr/(?P<resource>[^/?]+)(?:/(?P<name>[^?]+))?(?:\?.*)?$"
        found = re.search(path, url)
        assert found, url
        group, resource, name = found["group"] or "", found["resource"], found["name"] or ""
        self.asked.add(("list" if verb == "get" and not name else verb, group, resource, name))
        body = self.cluster if resource == "rayclusters" else {"metadata": {"resourceVersion": "1"}, "items": []}

        class Reply:
            status_code = 200

            def json(self) -> Any:
                return body

        return Reply()


def test_the_role_is_what_rays_autoscaler_asks_for_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider
    from ray.autoscaler.batching_node_provider import ScaleRequest
    from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider

    server = ApiServer()
    monkeypatch.setattr(node_provider, "load_k8s_secrets", lambda: ({}, "", None))
    monkeypatch.setattr(node_provider.requests, "get", lambda url, **_: server.answer("get", url))
    monkeypatch.setattr(node_provider.requests, "patch", lambda url, *_, **__: server.answer("patch", url))
    monkeypatch.setattr(node_provider, "RAY_HEAD_POD_NAME", "simclr-head-x")
    autoscaling_config.AutoscalingConfigProducer("simclr", "simclr")()
    old = node_provider.KubeRayNodeProvider({"namespace": "simclr", "disable_node_updaters": True, "foreground_node_launch": True,
                                             "disable_launch_config_check": True, "worker_liveness_check": False}, "simclr")  # fmt: skip
    old.get_node_data()
    old.submit_scale_request(ScaleRequest(desired_num_workers={"gpu": 1}, workers_to_delete=set()))
    new = KubeRayProvider("simclr", {"namespace": "simclr"}, gcs_client=None)
    new.get_non_terminated()
    new.launch({"gpu": 1}, "request")

    def allowing(rule: dict[str, Any]) -> set[tuple[str, str, str, str]]:
        return {
            ask
            for ask in server.asked
            if ask[0] in rule["verbs"] and ask[1] in rule["apiGroups"] and ask[2] in rule["resources"]
            and ("resourceNames" not in rule or ask[3] in rule["resourceNames"])
        }  # fmt: skip

    (role,) = of("Role")
    assert set().union(*map(allowing, role["rules"])) == server.asked
    for rule in role["rules"]:  # each verb is needed
        assert {ask[0] for ask in allowing(rule)} == set(rule["verbs"])
    assert [rule.get("resourceNames") for rule in role["rules"] if "rayclusters" in rule["resources"]] == [["simclr"]]


def test_the_api_servers_token_is_the_autoscalers_alone() -> None:
    assert all(account["automountServiceAccountToken"] is False for account in of("ServiceAccount"))
    for name, (pod, containers) in pods().items():
        assert pod["automountServiceAccountToken"] is False
        tokens = {v["name"] for v in pod["volumes"] if any("serviceAccountToken" in s for s in v.get("projected", {}).get("sources", []))}
        have = [c["name"] for c in containers if tokens & {mount["name"] for mount in c["volumeMounts"]}]
        assert have == (["autoscaler"] if name == "head" else [])
    (mount,) = (m for m in pods()["head"][1][-1]["volumeMounts"] if m["name"] == "api-token")
    from ray.autoscaler._private.kuberay import node_provider

    (volume,) = (v for v in pods()["head"][0]["volumes"] if v["name"] == "api-token")
    token, authority = volume["projected"]["sources"]
    assert f"{mount['mountPath']}/{token['serviceAccountToken']['path']}" == node_provider.IN_CLUSTER_TOKEN_PATH
    assert f"{mount['mountPath']}/{authority['configMap']['items'][0]['path']}" == node_provider.IN_CLUSTER_CA_CERT_PATH


# ── The pods ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pods_are_what_the_restricted_standard_allows_and_write_to_volumes_alone() -> None:
    for pod, containers in pods().values():
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(pod)
        kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "projected"}
        for container in containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    # What a job writes is not what the autoscaler, which holds the token, reads; but for Ray's logs, a volume that KubeRay adds to both.
    head, autoscaler = ({m["name"] for m in c["volumeMounts"]} for c in pods()["head"][1])
    assert not head & autoscaler


def test_the_image_begins_with_a_digest_that_somebody_looked_up() -> None:
    lines = (HERE / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith(("ARG", "FROM"))] == ["ARG SIMCLR", "FROM ${SIMCLR}"]
    (check,) = [line.removeprefix("RUN ") for line in lines if "SIMCLR_BASE" in line]
    for base, code in (("ubuntu:24.04@sha256:0123", 0), ("ubuntu:24.04", 1), ("", 1)):
        done = subprocess.run(["sh", "-c", check], env={"SIMCLR_BASE": base}, capture_output=True, text=True)
        assert done.returncode == code and ("build simclr with --build-arg BASE=" in done.stderr) == bool(code)


# ── The network ────────────────────────────────────────────────────────────────────────────────────────────────────


def passes(direction: str, pod: dict[str, str], other: dict[str, str] | str, port: int, protocol: str = "TCP", extra: str = "") -> bool:
    """Whether a connection between `pod` and another pod (labels) or an address passes the policies."""
    more = [*yaml.safe_load_all((HERE / extra).read_text())] if extra else []
    policies = of("NetworkPolicy") + [manifest for manifest in more if manifest["kind"] == "NetworkPolicy"]
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    mine = [p["spec"] for p in policies if direction in p["spec"]["policyTypes"] and _matches(p["spec"]["podSelector"], pod)]
    if not mine:  # what no policy selects is free
        return True
    for rule in (rule for spec in mine for rule in spec.get(key, [])):
        ports = rule.get("ports")
        if ports is not None and {"protocol": protocol, "port": port} not in ports:
            continue
        if peers not in rule or any(_is(peer, other) for peer in rule[peers]):
            return True
    return False


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def _is(peer: dict[str, Any], other: dict[str, str] | str) -> bool:
    if isinstance(other, dict):
        return "podSelector" in peer and _matches(peer["podSelector"], other)
    if "ipBlock" not in peer:
        return False
    address, block = ipaddress.ip_address(other), peer["ipBlock"]
    inside = address in ipaddress.ip_network(block["cidr"])
    return inside and not any(address in ipaddress.ip_network(part) for part in block.get("except", []))


METADATA, WORLD, INSIDE = "169.254.169.254", "52.216.1.1", "10.96.0.1"
REACH = [  # (who, whom, port, whether)
    (WORKER, HEAD, 6379, True),
    (HEAD, WORKER, 10002, True),
    (WORKER, WORLD, 443, True),  # S3
    (HEAD, WORLD, 443, True),
    (HEAD, INSIDE, 443, True),  # the API server
    (HEAD, "172.18.0.2", 6443, True),
    (WORKER, INSIDE, 443, False),
    (WORKER, INSIDE, 6443, False),
    (HEAD, METADATA, 80, False),
    (HEAD, METADATA, 443, False),
    (WORKER, METADATA, 80, False),
    (WORKER, METADATA, 443, False),
    (WORKER, "169.254.170.23", 80, False),
    (WORKER, WORLD, 22, False),
    (WORKER, WORLD, 80, False),
    (HEAD, WORLD, 22, False),
    (WORKER, STRANGER, 443, False),
    (HEAD, STRANGER, 8080, False),
    (STRANGER, WORLD, 443, False),  # a pod that somebody puts there
]


@pytest.mark.parametrize(("who", "whom", "port", "whether"), REACH)
def test_what_a_pod_reaches(who: dict[str, str], whom: dict[str, str] | str, port: int, whether: bool) -> None:
    assert passes("Egress", who, whom, port) is whether


def test_names_are_answered_and_strangers_are_not_let_in() -> None:
    for address in ("10.96.0.10", METADATA, "169.254.20.10"):  # a pod's; Cloud DNS; NodeLocal DNSCache
        assert passes("Egress", WORKER, address, 53, "UDP") and passes("Egress", WORKER, address, 53)
    assert not passes("Egress", STRANGER, "10.96.0.10", 53, "UDP")
    assert passes("Ingress", HEAD, WORKER, 6379) and not passes("Ingress", HEAD, STRANGER, 6379)
    assert not passes("Ingress", HEAD, WORLD, 8265) and not passes("Ingress", STRANGER, HEAD, 80)


def test_the_clouds_identity_opens_its_own_address_alone() -> None:
    assert passes("Egress", WORKER, "169.254.170.23", 80, extra="identity/eks-pod-identity.yaml")
    assert not passes("Egress", WORKER, METADATA, 80, extra="identity/eks-pod-identity.yaml")
    assert passes("Egress", WORKER, "169.254.169.252", 988, extra="identity/gke.yaml")
    assert passes("Egress", WORKER, METADATA, 80, extra="identity/gke.yaml")
    assert not passes("Egress", WORKER, METADATA, 443, extra="identity/gke.yaml")


# ── The end of a pod ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_has_time_to_leave_and_ray_less_than_the_pod() -> None:
    """The variable is Ray's own (`tests/cluster/test_drain.py` drains by it); the pod's time is longer than Ray's."""
    from ray._private import ray_constants

    pod, (worker,) = pods()["gpu"]
    (drain,) = (entry["value"] for entry in worker["env"] if entry["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert ray_constants.RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S < float(drain) <= pod["terminationGracePeriodSeconds"] - 30
    head = {entry["name"]: entry for entry in pods()["head"][1][0]["env"]}
    assert {name: entry for entry in worker["env"] if (name := entry["name"]) in head} == head
