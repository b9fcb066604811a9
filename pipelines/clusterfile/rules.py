"""The rules for a cluster file, checked before it costs money: a dict in, sentences out. Knows no Ray and no cloud.

Each rule yields one sentence per violation: what was found, what was expected, what to do.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.clusterfile.catalogue import MACHINES, TPU_CHIPS_PER_HOST, TPU_COUNTS_PER_CHIP, Machine

Cluster = dict[str, Any]
# Patterns of secrets. These belong to roles, the cloud's secret store, or a file of mode 600.
_SECRETS = {
    "an AWS access key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)aws_secret_access_key|aws_credentials",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a Google credential": r"\bgcp_credentials\b|\bya29\.|\"private_key_id\"|GOOGLE_APPLICATION_CREDENTIALS",
    "Ray's token": r"\bRAY_AUTH_TOKEN\s*=",
    "a password": r"(?i)\b(password|passwd|secret|api_?key)\b\s*[=:]\s*[^\s\"'$]",
    "credentials in an address": r"://[^/\s:@\"]+:[^/\s@\"]+@",
}
_KEY_FILES = r"(^|/)(\.aws|\.config/gcloud|\.netrc|\.kube)(/|$)|\.pem$|(^|/)id_(rsa|ed25519|ecdsa)$|credentials?(\.json)?$"
_TOKEN = "~/.ray/auth_token"


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes of one type, with the least and the greatest number that are started."""

    name: str
    machine: str
    """The vendor's name; "" for your own machine."""
    least: int
    most: int
    spot: bool
    hosts: int
    """Machines of one node: 1, or the hosts of a TPU slice."""
    accelerators: int
    """GPUs or TPU chips of one node."""
    what: str
    """Their type and memory; "" if the catalogue does not have the machine."""


def groups(cluster: Cluster) -> list[Group]:
    """The nodes that `ray up` and the autoscaler may start, the head first."""
    if cluster["provider"]["type"] == "local":
        workers = len(cluster["provider"].get("worker_ips", []))
        return [Group("head", "", 1, 1, False, 1, 0, ""), Group("workers", "", workers, workers, False, 1, 0, "")]
    types, head = cluster["available_node_types"], cluster["head_node_type"]
    cap = cluster.get("max_workers", 0)
    found = []
    for name in sorted(types, key=lambda name: name != head):
        node = types[name]
        machine, per_node, hosts = _machine(node["node_config"])
        least, most = node.get("min_workers", 0), min(node.get("max_workers", cap), cap)
        known = MACHINES.get(machine.rsplit("-", 1)[0] if _is_tpu(node) else machine)
        found.append(
            Group(
                name,
                machine,
                1 if name == head else least,
                1 if name == head else most,
                _spot(node["node_config"]),
                hosts,
                per_node,
                known.accelerator if known else "",
            )
        )
    return found


def mistakes(cluster: Cluster) -> Iterator[str]:
    """Every violation of the rules below. The file has passed Ray's schema."""
    yield from _counts(cluster)
    yield from _ports(cluster)
    yield from _safe_start(cluster)
    yield from _secrets(cluster)
    yield from _unchecked(cluster)
    kind = cluster["provider"]["type"]
    if kind == "local":
        yield from _addresses(cluster)
        return
    yield from _accelerators(cluster)
    yield from _regions(cluster)
    if kind == "aws":
        yield from _aws(cluster)
    elif kind == "gcp":
        yield from _gcp(cluster)


# ── Classic mistakes ───────────────────────────────────────────────────────────────────────────────────────────────


def _counts(cluster: Cluster) -> Iterator[str]:
    types = cluster.get("available_node_types")
    if types is None:
        return
    head = cluster.get("head_node_type")
    cap = cluster.get("max_workers", 0)
    least = 0
    for name, node in types.items():
        low, high = node.get("min_workers", 0), node.get("max_workers", cap)
        if name == head:
            continue
        least += low
        if low > high:
            yield f"{name} has min_workers {low} and max_workers {high}; expected min ≤ max: raise max_workers or lower min_workers"
        elif high > cap:
            yield f"{name} has max_workers {high}, but the cluster's max_workers is {cap}, so it never gets there; raise the cluster's"
    if least > cap:
        yield f"the types' min_workers are {least} together, the cluster's max_workers is {cap}; raise max_workers to {least}"


def _ports(cluster: Cluster) -> Iterator[str]:
    start, join = _start(cluster, "head"), _start(cluster, "worker")
    if "--head" not in start:
        yield "head_start_ray_commands start no head; expected `ray start --head --port=6379 …`"
        return
    port = re.search(r"--port[= ](\d+)", start)
    if port is None:
        yield "the head is started without --port, so its workers cannot know where it listens; add --port=6379"
    elif f"--address=$RAY_HEAD_IP:{port[1]}" not in join:
        yield f"the head listens on port {port[1]}, but workers are not started with --address=$RAY_HEAD_IP:{port[1]}; make both the same"
    if "--autoscaling-config" not in start:
        yield "the head is started without --autoscaling-config, so no workers; add --autoscaling-config=~/ray_bootstrap_config.yaml"


def _addresses(cluster: Cluster) -> Iterator[str]:
    provider = cluster["provider"]
    head, workers = provider.get("head_ip"), provider.get("worker_ips", [])
    if not head:
        yield "provider.head_ip is missing; name the machine that becomes the head"
    if head in workers:
        yield f"{head} is the head and a worker too; a machine is one of them, and the head works as well"
    for twice in sorted({address for address in workers if workers.count(address) > 1}):
        yield f"worker {twice} is listed {workers.count(twice)} times; list each machine once"
    if cluster.get("max_workers", len(workers)) < len(workers):
        yield f"max_workers is {cluster['max_workers']} and {len(workers)} workers are listed; leave max_workers out, or list fewer"
    if not cluster.get("auth", {}).get("ssh_private_key"):
        yield "auth.ssh_private_key is missing; name the key that opens the machines, as ~/.ssh/id_ed25519"


def _accelerators(cluster: Cluster) -> Iterator[str]:
    for name, node in cluster["available_node_types"].items():
        machine, _, _ = _machine(node["node_config"])
        known = MACHINES.get(machine)
        resource, there = ("TPU", TPU_CHIPS_PER_HOST) if _is_tpu(node) else ("GPU", known.accelerators if known else _gpus_by_name(machine))
        said = node["resources"].get(resource, 0)
        if name == cluster["head_node_type"]:
            if there and said:
                yield f"the head is a {machine}; one idle {resource} machine costs as much as a busy one: take one without"
            continue
        if there > 0 and said != there:
            says = f"resources say {resource}: {said}" if said else f"resources do not say {resource}"
            yield f"{name} is a {machine} with {there} {resource}s, but its {says}; write {{{resource}: {there}}}, or no job finds them"
        elif there < 0 and not said:
            yield f"{name} is a {machine}, which has GPUs, but its resources do not say how many; write {{GPU: …}}, or no job finds them"
        if said and not there:
            yield f"{name} says {resource}: {said}, but a {machine} has none; correct one of them"
        if known and node["resources"].get("CPU", 0) > known.cpus:
            yield f"{name} says CPU: {node['resources']['CPU']}, but a {machine} has {known.cpus}; correct it"


def _regions(cluster: Cluster) -> Iterator[str]:
    provider = cluster["provider"]
    region, zones = provider.get("region", ""), [z.strip() for z in provider.get("availability_zone", "").split(",") if z.strip()]
    for zone in zones:
        if not zone.startswith(region):
            yield f"availability_zone {zone} is not in region {region}; correct one of them"
    for name, node in cluster["available_node_types"].items():
        config = node["node_config"]
        for elsewhere in set(re.findall(r"regions/([a-z0-9-]+)/", json.dumps(config))) - {region}:
            yield f"{name} uses a network in region {elsewhere}, the cluster is in {region}; correct one of them"
        for elsewhere in set(re.findall(r"zones/([a-z0-9-]+)/", json.dumps(config))) - set(zones):
            yield f"{name} wants a disk of zone {elsewhere}, the cluster is in {', '.join(zones)}; correct one of them"
        image = str(config.get("ImageId", ""))
        if image.startswith("ami-"):
            yield f"{name} names image {image}, which is of one region and grows old; use resolve:ssm:/aws/service/deeplearning/ami/…"
        if "Placement" in config and len(zones) > 1:
            yield f"{name} is in a placement group, which is in one zone, and availability_zone lists {len(zones)}; keep one"


# ── Safety ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _safe_start(cluster: Cluster) -> Iterator[str]:
    for role in ("head", "worker"):
        if not re.search(r"RAY_AUTH_MODE=token\b", _start(cluster, role)):
            yield (
                f"{role}_start_ray_commands do not say RAY_AUTH_MODE=token: anybody who reaches the node's ports could run code there; "
                "export it before `ray start`"
            )
    start = _start(cluster, "head")
    host = re.search(r"--dashboard-host[= ](\S+)", start)
    if host and host[1] not in ("127.0.0.1", "localhost"):
        yield f"the dashboard, and with it the job API, listens on {host[1]}; write --dashboard-host=127.0.0.1 and use `ray dashboard FILE`"
    if not any("pkill" in command and "ay.util.client.server" in command for command in cluster.get("head_start_ray_commands", [])):
        yield ("Ray Client stays up on the head's own address, port 10001; end it after `ray start`, as onprem.yaml does, and submit jobs")
    if cluster.get("file_mounts", {}).get(_TOKEN) is None:
        yield f"file_mounts do not bring {_TOKEN} to the nodes, so none of them could join; add {_TOKEN}: {_TOKEN}"
    elif not any("chmod 600 ~/.ray/auth_token" in command for command in cluster.get("setup_commands", [])):
        yield f"the token is readable to every user of a node; begin setup_commands with `chmod 600 {_TOKEN}`"


def _secrets(cluster: Cluster) -> Iterator[str]:
    text = json.dumps(cluster)
    for what, pattern in _SECRETS.items():
        if re.search(pattern, text):
            yield (
                f"{what} is in the file, which is copied to every node and shown in logs; "
                "give the nodes a role instead, and revoke the secret"
            )
    for there, here in cluster.get("file_mounts", {}).items():
        if re.search(_KEY_FILES, str(here)) or re.search(_KEY_FILES, there):
            yield f"file_mounts copy {here} to every node's disk; give the nodes a role instead"


def _unchecked(cluster: Cluster) -> Iterator[str]:
    """Packages that nobody has compared with what was once looked at."""
    for key in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        for command in cluster.get(key, []):
            for asked in re.findall(r"\bpip3? install\b[^;&|]*", command):
                own_code = re.search(r"--no-deps\b.* [.~/]", asked)
                if "--require-hashes" not in asked and not own_code:
                    yield f"{key} install packages unchecked ({asked.strip()}); write `uv pip install --require-hashes -r FILE.lock`"


def _aws(cluster: Cluster) -> Iterator[str]:
    for rule in cluster["provider"].get("security_group", {}).get("IpPermissions", []):
        for wide in (r["CidrIp"] for r in rule.get("IpRanges", []) if ipaddress.ip_network(r["CidrIp"], strict=False).num_addresses > 1):
            yield f"provider.security_group opens port {rule.get('FromPort', 'every')} to {wide}; name one address (…/32), or use ssh"
    for name, node in cluster["available_node_types"].items():
        config = node["node_config"]
        if not config.get("LaunchTemplate") and not config.get("SecurityGroupIds"):
            yield (
                f"{name} has neither LaunchTemplate nor SecurityGroupIds, and Ray would make a group with ssh open to the whole internet; "
                "use the templates of cluster/aws-account.yaml"
            )
        if name == cluster["head_node_type"] and not config.get("LaunchTemplate") and not config.get("IamInstanceProfile"):
            yield "the head has no instance profile, and Ray would give it every right on EC2 and S3; use the template simclr-head"
        template = config.get("LaunchTemplate", {}).get("LaunchTemplateName")
        if template == "simclr-head" and name != cluster["head_node_type"]:
            yield f"{name} uses the template simclr-head, and with it the head's rights; workers use simclr-worker or simclr-efa"
        if template == "simclr-head" and cluster["cluster_name"] != "simclr":
            yield (
                f"the cluster is named {cluster['cluster_name']}, and the role of template simclr-head may end nodes of `simclr` only, "
                "so idle nodes would stay and cost; keep the name, or change it in cluster/aws-account.yaml too"
            )
        disks = [disk.get("Ebs", {}) for disk in config.get("BlockDeviceMappings", [])]
        if not disks or not all(disk.get("Encrypted") for disk in disks):
            yield f"{name} has a disk that is not encrypted; write Encrypted: true for each of its BlockDeviceMappings"
        if config.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{name} gives its role to anybody who makes it fetch a page (IMDSv1); write MetadataOptions: {{HttpTokens: required}}"
        if config.get("MetadataOptions", {}).get("HttpPutResponseHopLimit") != 1:
            yield f"{name} gives its role to containers and proxies on it; write HttpPutResponseHopLimit: 1 beside HttpTokens"


def _gcp(cluster: Cluster) -> Iterator[str]:
    head = _accounts(cluster["available_node_types"][cluster["head_node_type"]])
    if any(account.startswith("simclr-head@") for account in head) and not re.match(r"simclr(-|$)", cluster["cluster_name"]):
        yield (
            f"the cluster is named {cluster['cluster_name']}, and the account simclr-head may make machines of `simclr` and `simclr-…` "
            "only, so no worker would start; name it so, or change the condition in cluster/gcp-project.sh too"
        )
    for name, node in cluster["available_node_types"].items():
        config = node["node_config"]
        accounts = _accounts(node)
        if name != cluster["head_node_type"] and set(accounts) & set(head):
            yield f"{name} runs as the head's account, and with its rights; workers use simclr-worker, which gcp-project.sh makes"
        if not accounts or any(re.search(r"compute@developer|ray-autoscaler|^default$", account) for account in accounts):
            yield f"{name} runs as an account with wide rights; write serviceAccounts with one that cluster/gcp-project.sh makes"
        if any("diskType" not in disk.get("initializeParams", {}) for disk in config.get("disks", [])):
            yield f"{name} has a disk without diskType, so a magnetic one, which GPUs refuse; write zones/…/diskTypes/pd-balanced"
        nets = [config["networkConfig"]] if "networkConfig" in config else config.get("networkInterfaces", [])
        if not nets or any(net.get("subnetwork", "default").endswith("/default") or "subnetwork" not in net for net in nets):
            yield f"{name} is in the default network, where ssh is open to all the world; use gcp-project.sh's subnetwork simclr"


# ── Properties of a node ─────────────────────────────────────────────────────────────────────────────────────────────────


def _start(cluster: Cluster, role: str) -> str:
    """The commands that start Ray on a head or a worker, without those that only stop it."""
    return "\n".join(command for command in cluster.get(f"{role}_start_ray_commands", []) if "ray start" in command)


def _accounts(node: dict[str, Any]) -> list[str]:
    """Of Google's service accounts, the addresses that a node runs as."""
    return [account.get("email", "") for account in node["node_config"].get("serviceAccounts", [])]


def _is_tpu(node: dict[str, Any]) -> bool:
    return "acceleratorType" in node["node_config"]


def _machine(config: dict[str, Any]) -> tuple[str, int, int]:
    """(name, accelerators, hosts) of one node."""
    if "acceleratorType" in config:
        name = str(config["acceleratorType"])
        kind, _, count = name.partition("-")
        chips = int(count) // TPU_COUNTS_PER_CHIP.get(kind, 1) if count.isdigit() else 0
        return name, chips, max(1, chips // TPU_CHIPS_PER_HOST)
    name = str(config.get("InstanceType") or config.get("machineType") or "")
    return name, MACHINES.get(name, Machine(0)).accelerators, 1


def _gpus_by_name(machine: str) -> int:
    """−1 (some GPUs) for a machine that the catalogue lacks and whose family has GPUs; else 0."""
    return -1 if re.match(r"(p\d|g\d\w*\.|g\d-|a[2-4]x?-)", machine) else 0


def _spot(config: dict[str, Any]) -> bool:
    return (
        config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or "SPOT" in json.dumps(config.get("scheduling", {}))
        or bool(config.get("schedulingConfig", {}).get("spot"))
    )
