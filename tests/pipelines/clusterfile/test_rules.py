"""The cluster files: Ray's schema, the classic mistakes, safety; and what Ray's AWS provider makes of aws-gpu.yaml at a simulated EC2."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.clusterfile import rules
from pipelines.commands import cluster
from simclr.errors import UserError
from tests.support.account import policies
from tests.support.paths import ROOT

HERE = ROOT / "cluster"
FILES = sorted(path.name for path in HERE.glob("*.yaml") if path.name != "aws-account.yaml")
KUBERAY = sorted(HERE.glob("kuberay/*.yaml"))
EXAMPLES = [HERE / "kuberay" / name for name in ("raycluster.yaml", "job/rayjob.yaml", "queue/kueue.yaml")]
Change = Callable[[dict[str, Any]], object]


@functools.cache
def _content(name: str) -> dict[str, Any]:
    return cluster.read(HERE / name)[1]


def load(name: str) -> dict[str, Any]:
    return copy.deepcopy(_content(name))


def manifests() -> Iterator[dict[str, Any]]:
    for path in KUBERAY:
        yield from yaml.safe_load_all(path.read_text())


# ── As they are ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_sound(name: str) -> None:
    assert cluster.schema_mistakes(load(name)) == []
    assert list(rules.mistakes(load(name))) == []


@pytest.mark.parametrize("path", [HERE / name for name in FILES] + EXAMPLES, ids=lambda p: p.name)
def test_at_most_three_lines_are_to_be_edited(path: Path) -> None:
    marks = re.findall(r"# EDIT (\d) of (\d)", path.read_text())
    assert 1 <= len(marks) <= 3
    assert marks == [(str(i), str(len(marks))) for i in range(1, len(marks) + 1)]


def test_every_mounted_file_is_there() -> None:
    assert len(FILES) == 4
    for name in FILES:
        mounts = load(name)["file_mounts"].values()
        assert len(mounts) >= 3
        for here in mounts:
            assert here.startswith("~") or (HERE.parent / here).exists(), here


def test_ray_itself_accepts_the_files() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    for name in ("onprem.yaml", "gcp-gpu.yaml", "gcp-tpu-pod.yaml"):
        validate_config(prepare_config(load(name)))


def test_what_would_be_started() -> None:
    table = cluster.overview(load("aws-gpu.yaml"))
    assert re.search(r"g6 +g6\.12xlarge, spot +0 … 4 +4 × L4 24 GB, 16 in all$", table, re.MULTILINE)
    assert "USD" not in table  # no price: a guessed one is worse than none
    slices = cluster.overview(load("gcp-tpu-pod.yaml"))
    assert re.search(r"v5e +v5litepod-16, spot, 4 hosts +1 +16 × TPU v5e 16 GB$", slices, re.MULTILINE)


def test_a_batch_that_does_not_fit_is_told_before_a_node_is_paid_for() -> None:
    config = cluster.changed("imagenet_resnet50", ("train.batch_size=4096",))
    assert cluster.batch_over(load("aws-gpu.yaml"), config) == "N = 4096 over 16 workers, 256 images each"
    uneven = cluster.changed("imagenet_resnet50", ("train.batch_size=1000",))
    assert cluster.batch_over(load("aws-gpu.yaml"), uneven) == "N = 1000 over 16 workers, 62 or 63 images each"
    with pytest.raises(UserError, match=r"batch_size 1000 does not divide over the 16 chips of a TPU slice, .*; use 992 or 1008"):
        cluster.batch_over(load("gcp-tpu-pod.yaml"), uneven)
    with pytest.raises(UserError, match="batch_size 10 has no image for each of 16 workers"):
        cluster.batch_over(load("aws-gpu.yaml"), cluster.changed("imagenet_resnet50", ("train.batch_size=10",)))
    with pytest.raises(UserError, match="expected FIELD=VALUE"):
        cluster.changed("imagenet_resnet50", ("train.batchsize=1",))


# ── Broken, one rule at a time ─────────────────────────────────────────────────────────────────────────────────────


def edit(name: str, *path: str | int, to: Any) -> tuple[str, Change]:
    def change(cluster: dict[str, Any]) -> None:
        *parents, last = path
        inner: Any = cluster
        for key in parents:
            inner = inner[key]
        if to is None:
            del inner[last]
        else:
            inner[last] = to

    return name, change


def swap(name: str, old: str, new: str) -> tuple[str, Change]:
    def change(cluster: dict[str, Any]) -> None:
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            cluster[key] = [command.replace(old, new) for command in cluster[key]]

    return name, change


GCP_HEAD = "simclr-head@my-project.iam.gserviceaccount.com"
TYPES, G6, SAFE = "available_node_types", ("available_node_types", "g6"), "aws-gpu.yaml"
BROKEN = {
    "g6 has min_workers 5 and max_workers 4": edit(SAFE, *G6, "min_workers", to=5),
    "max_workers 17, but the cluster's max_workers is 16": edit(SAFE, *G6, "max_workers", to=17),
    "together, the cluster's max_workers is 0; raise max_workers to 1": edit("gcp-tpu-pod.yaml", "max_workers", to=0),
    "started without --port": swap(SAFE, "--port=6379", ""),
    "workers are not started with --address=$RAY_HEAD_IP:6380": swap(SAFE, "--port=6379", "--port=6380"),
    "start no head": swap(SAFE, "--head ", ""),
    "without --autoscaling-config": swap(SAFE, "--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
    "its resources do not say GPU; write {GPU: 4}": edit(SAFE, *G6, "resources", to={"CPU": 48}),
    "its resources say GPU: 8; write {GPU: 4}": edit(SAFE, *G6, "resources", "GPU", to=8),
    "its resources do not say TPU; write {TPU: 4}": edit("gcp-tpu-pod.yaml", TYPES, "v5e", "resources", to={}),
    "but a m7i.2xlarge has none": edit(SAFE, *G6, "node_config", "InstanceType", to="m7i.2xlarge"),
    "which has GPUs, but its resources do not say how many": edit(
        SAFE, *G6, to={"resources": {}, "node_config": {**load(SAFE)[TYPES]["g6"]["node_config"], "InstanceType": "g6e.48xlarge"}}
    ),
    "has 48; correct it": edit(SAFE, *G6, "resources", "CPU", to=96),
    "one idle GPU machine costs": edit(
        SAFE, TYPES, "head", to={"resources": {"GPU": 4}, "node_config": load(SAFE)[TYPES]["g6"]["node_config"]}
    ),
    "availability_zone us-east-1a is not in region us-west-2": edit(SAFE, "provider", "region", to="us-west-2"),
    "uses a network in region us-central1, the cluster is in europe-west4": edit("gcp-gpu.yaml", "provider", "region", to="europe-west4"),
    "is of one region and grows old": edit(SAFE, *G6, "node_config", "ImageId", to="ami-0123456789abcdef0"),
    "wants a disk of zone us-central1-a, the cluster is in us-central1-b": edit(
        "gcp-gpu.yaml", "provider", "availability_zone", to="us-central1-b"
    ),
    "g2 has a disk without diskType, so a magnetic one": edit(
        "gcp-gpu.yaml", TYPES, "g2", "node_config", "disks", 0, "initializeParams", to={"diskSizeGb": 200}
    ),
    "the cluster is named mine, and the role of template simclr-head": edit(SAFE, "cluster_name", to="mine"),
    "is in a placement group": edit(SAFE, "provider", "availability_zone", to="us-east-1a,us-east-1b"),
    "is the head and a worker too": edit("onprem.yaml", "provider", "worker_ips", 0, to="192.168.1.10"),
    "192.168.1.12 is listed 2 times": edit("onprem.yaml", "provider", "worker_ips", 0, to="192.168.1.12"),
    "max_workers is 1 and 2 workers are listed": edit("onprem.yaml", "max_workers", to=1),
    "auth.ssh_private_key is missing": edit("onprem.yaml", "auth", to={"ssh_user": "me"}),
    "head_ip is missing": edit("onprem.yaml", "provider", "head_ip", to=None),
    "head_start_ray_commands do not say RAY_AUTH_MODE=token": swap(SAFE, "RAY_AUTH_MODE=token", ""),
    "listens on 0.0.0.0; write --dashboard-host=127.0.0.1": swap("onprem.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    "Ray Client stays up on the head": swap("onprem.yaml", "pkill", "echo"),
    "do not bring ~/.ray/auth_token": edit("gcp-gpu.yaml", "file_mounts", "~/.ray/auth_token", to=None),
    "readable to every user": edit("onprem.yaml", "setup_commands", 0, to="true"),
    "an AWS access key is in the file": edit(SAFE, "setup_commands", 0, to="export AWS_ACCESS_KEY_ID=AKIAABCDEFGHIJKLMNOP"),
    "Ray's token is in the file": edit(SAFE, "setup_commands", 0, to="export RAY_AUTH_TOKEN=abc"),
    "a Google credential is in the file": edit(
        "gcp-gpu.yaml", "provider", "gcp_credentials", to={"type": "credentials_token", "credentials": "x"}
    ),
    "a private key is in the file": edit(SAFE, "setup_commands", 0, to="echo '-----BEGIN OPENSSH PRIVATE KEY-----' > k"),
    "a password is in the file": edit(SAFE, "setup_commands", 0, to="export MLFLOW_TRACKING_PASSWORD=x; password=hunter2"),
    "credentials in an address is in the file": edit(SAFE, "setup_commands", 0, to="pip install https://me:pw@host.example/x.whl"),
    "file_mounts copy ~/.aws to every node's disk": edit(SAFE, "file_mounts", "~/.aws", to="~/.aws"),
    "file_mounts copy ~/.ssh/id_ed25519": edit("onprem.yaml", "file_mounts", "~/k", to="~/.ssh/id_ed25519"),
    "opens port 22 to 0.0.0.0/0": edit(
        SAFE, "provider", "security_group", to={"IpPermissions": [{"FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
    ),
    "g6 has neither LaunchTemplate nor SecurityGroupIds": edit(SAFE, *G6, "node_config", "LaunchTemplate", to=None),
    "the head has no instance profile": edit(SAFE, TYPES, "head", "node_config", "LaunchTemplate", to=None),
    "g6 has a disk that is not encrypted": edit(SAFE, *G6, "node_config", "BlockDeviceMappings", 0, "Ebs", "Encrypted", to=False),
    "head has a disk that is not encrypted": edit(SAFE, TYPES, "head", "node_config", "BlockDeviceMappings", to=None),
    "(IMDSv1)": edit(SAFE, TYPES, "p5", "node_config", "MetadataOptions", to={"HttpTokens": "optional"}),
    "p5 gives its role to containers": edit(SAFE, TYPES, "p5", "node_config", "MetadataOptions", to={"HttpTokens": "required"}),
    "g6 uses the template simclr-head": edit(SAFE, *G6, "node_config", "LaunchTemplate", "LaunchTemplateName", to="simclr-head"),
    "g2 runs as the head's account": edit("gcp-gpu.yaml", TYPES, "g2", "node_config", "serviceAccounts", 0, "email", to=GCP_HEAD),
    "v4 runs as the head's account": edit("gcp-tpu-pod.yaml", TYPES, "v4", "node_config", "serviceAccounts", 0, "email", to=GCP_HEAD),
    "the cluster is named mine, and the account simclr-head": edit("gcp-gpu.yaml", "cluster_name", to="mine"),
    "the cluster is named simclrs, and the account simclr-head": edit("gcp-tpu-pod.yaml", "cluster_name", to="simclrs"),
    "worker_setup_commands install packages unchecked (pip install torch_tpu)": edit(
        "gcp-tpu-pod.yaml", "worker_setup_commands", 0, to="cd ~/simclr && .venv/bin/pip install torch_tpu && echo --require-hashes"
    ),
    "g2 runs as an account with wide rights": edit("gcp-gpu.yaml", TYPES, "g2", "node_config", "serviceAccounts", to=None),
    "v5e is in the default network": edit(
        "gcp-tpu-pod.yaml", TYPES, "v5e", "node_config", "networkConfig", to={"subnetwork": "regions/us-central1/subnetworks/default"}
    ),
    "g6.min_workers: 'two' is not of type 'integer'": edit(SAFE, *G6, "min_workers", to="two"),
    "Additional properties are not allowed ('worker_nodes' was unexpected)": edit(SAFE, "worker_nodes", to={}),
    "head_node_type is 'boss'": edit(SAFE, "head_node_type", to="boss"),
    "provider.type is 'azure'": edit(SAFE, "provider", "type", to="azure"),
    "leave available_node_types out": edit("onprem.yaml", TYPES, to={"x": {"resources": {}, "node_config": {}}}),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_each_mistake_has_its_sentence(sentence: str) -> None:
    name, change = BROKEN[sentence]
    broken = load(name)
    change(broken)
    found = cluster.schema_mistakes(broken) or list(rules.mistakes(broken))
    assert any(sentence in line for line in found), found


@pytest.mark.parametrize("command", ["uv pip install --require-hashes -r x.lock", "cd ~/simclr && .venv/bin/pip install --no-deps -e ."])
def test_packages_with_hashes_and_ones_own_code_are_installed_without_a_word(command: str) -> None:
    sound = load("onprem.yaml")
    sound["setup_commands"].append(command)
    assert list(rules.mistakes(sound)) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is no YAML, line 1"),
        ("apiVersion: ray.io/v1", "Kubernetes manifest"),
        ("x: 1", "is no cluster file of Ray's"),
        (None, "is no file"),
    ],
)
def test_what_is_no_cluster_file_is_said_so(text: str | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        cluster.read(path)


# ── Outside the rules: the account's template, Kubernetes ──────────────────────────────────────────────────────────


def test_the_account_opens_ssh_to_one_address_and_encrypts() -> None:
    account = yaml.safe_load((HERE / "aws-account.yaml").read_text())
    one = re.compile(account["Parameters"]["SshFrom"]["AllowedPattern"])
    assert one.match("203.0.113.7/32") and not one.match("0.0.0.0/0") and not one.match("203.0.113.0/24")
    made = account["Resources"]
    assert made["Nodes"]["Properties"]["SecurityGroupIngress"] == [
        {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": {"Ref": "SshFrom"}}
    ]
    inward = [r["Properties"] for r in made.values() if r["Type"] == "AWS::EC2::SecurityGroupIngress"]
    assert inward and all("CidrIp" not in rule for rule in inward)
    assert made["Data"]["Properties"]["VersioningConfiguration"]["Status"] == "Enabled"
    assert made["Data"]["Properties"]["BucketEncryption"] and all(made["Data"]["Properties"]["PublicAccessBlockConfiguration"].values())


def test_the_roles_have_the_least_rights() -> None:
    made = yaml.safe_load((HERE / "aws-account.yaml").read_text())["Resources"]
    for role in ("WorkerRole", "HeadRole"):
        assert made[role]["Properties"]["ManagedPolicyArns"] == [{"Ref": "DataRights"}]  # of this file: Amazon's own are wider
        for rule in policies(role):
            actions = rule["Action"] if isinstance(rule["Action"], list) else [rule["Action"]]
            assert not any("*" in action for action in actions), actions
            assert rule["Resource"] != "*" or all(action.startswith("ec2:Describe") for action in actions)
    worker = json.dumps(policies("WorkerRole"))
    assert "ec2:" not in worker and "iam:" not in worker


def test_on_kubernetes_the_same_holds() -> None:
    cluster = next(m for m in manifests() if m["kind"] == "RayCluster")["spec"]
    head = cluster["headGroupSpec"]
    # The autoscaler's container has the token, else it could not ask the head for the wanted resources.
    assert {e["name"] for e in cluster["autoscalerOptions"]["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    assert "wget" in (HERE / "kuberay/Dockerfile").read_text()  # KubeRay's health checks use it
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    for group in [head, *cluster["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["serviceAccountName"] != "default"
        for container in spec["containers"]:
            env = {e["name"]: e for e in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token" and "secretKeyRef" in env["RAY_AUTH_TOKEN"]["valueFrom"]
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            limits = container["resources"].get("limits", {})
            if group is not head:
                assert limits["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
    assert {m["kind"] for m in manifests()} >= {"NetworkPolicy", "Role", "ServiceAccount"}
    assert not any("*" in rule["verbs"] + rule["resources"] for m in manifests() if m["kind"] == "Role" for rule in m["rules"])
    assert not any(m["kind"] == "Secret" for m in manifests())


def test_no_file_of_the_folder_has_a_secret() -> None:
    files = [p for p in HERE.rglob("*") if p.is_file()]
    assert len(files) > 10
    for path in files:
        for what, pattern in rules._SECRETS.items():
            if what != "a password":
                assert not re.search(pattern, path.read_text()), (path, what)


def test_a_dry_check_says_whether_a_worker_fits_the_files_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from simclr import footprint

    config = cluster.changed("imagenet_resnet50", ("train.precision=bfloat16",))
    asked = footprint.Footprint(1 << 27, 1 << 27, 0, 21 << 30, 0, 0, 1 << 30, 2 << 30)
    monkeypatch.setattr(footprint, "footprint", lambda *_: asked)  # tests/simclr/test_footprint.py is about its numbers
    monkeypatch.setattr(footprint, "fitting", lambda *_: 128)
    lines = list(cluster.dry(load("aws-gpu.yaml"), config, 1000))
    assert lines[0].split() == ["workers", "16,", "256", "images", "each"]
    assert "about 24.2 GiB a worker, on a GPU" in lines[1]
    assert "does NOT fit an accelerator of g6, L4 24 GB, 22.4 GiB: --train.micro-batch 128 takes about 24.2 GiB" in lines[2]
