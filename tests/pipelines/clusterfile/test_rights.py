"""Who may do what, by the policies of aws-account.yaml: a table of requests, each allowed or refused as IAM would."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.support.account import ACCOUNT, KNOWN, REGION, allows, policies
from tests.support.paths import ROOT

EC2 = f"arn:aws:ec2:{REGION}:{ACCOUNT}:"
BUCKET = "arn:aws:s3:::photos"
OURS = {"aws:ResourceAccount": ACCOUNT}
WORKER, HEAD = f"arn:aws:iam::{ACCOUNT}:role/simclr-worker", f"arn:aws:iam::{ACCOUNT}:role/simclr-head"


def launch(template: str = "lt-worker", **other: dict[str, str] | None) -> dict[str, dict[str, str]]:
    """What RunInstances touches when Ray starts a worker; `other` changes keys of a resource, or (None) leaves the resource out."""
    touched: dict[str, dict[str, str]] = {
        f"{EC2}instance/*": {
            "ec2:InstanceType": "p5.48xlarge",
            "ec2:MetadataHttpTokens": "required",
            "ec2:MetadataHttpPutResponseHopLimit": "1",
            "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/simclr-worker",
            "ec2:LaunchTemplate": f"{EC2}launch-template/{template}",
            "aws:RequestTag/ray-cluster-name": "simclr",
        },
        f"arn:aws:ec2:{REGION}::image/ami-1": {"ec2:Owner": "amazon"},
        f"{EC2}volume/*": {"ec2:Encrypted": "true"},
        f"{EC2}network-interface/*": {"ec2:Subnet": f"{EC2}subnet/subnet-1"},
        f"{EC2}launch-template/{template}": {},
        f"{EC2}subnet/subnet-1": {},
        f"{EC2}security-group/sg-1": {},
        f"{EC2}key-pair/ray-autoscaler_{REGION}": {},
        f"{EC2}placement-group/simclr": {},
        f"{EC2}spot-instances-request/*": {},
    }
    for kind, keys in other.items():
        (name,) = (arn for arn in touched if arn.split(":")[-1].startswith(kind.replace("_", "-") + "/"))
        if keys is None:
            del touched[name]
        else:
            touched[name] = {**touched[name], **keys}
    return touched


def without(key: str) -> dict[str, dict[str, str]]:
    touched = launch()
    del touched[f"{EC2}instance/*"][key]
    return touched


def instead(old: str, new: str) -> dict[str, dict[str, str]]:
    """A launch that touches `new` in place of `old`."""
    return {(f"{EC2}{new}" if arn == f"{EC2}{old}" else arn): keys for arn, keys in launch().items()}


SHARD, RUN, MODEL = f"{BUCKET}/imagenet/train-00000.beton", f"{BUCKET}/runs/r50/step_1/model.safetensors", f"{BUCKET}/mlflow/1/model"
ENVIRONMENT = f"{BUCKET}/environments/0123.json"
ELSEWHERE = {"aws:ResourceAccount": "999999999999"}
Request = tuple[str, str, dict[str, dict[str, str]]]
ALLOWED: dict[str, Request] = {
    "worker lists the bucket": ("WorkerRole", "s3:ListBucket", {BUCKET: OURS}),
    "worker reads a shard": ("WorkerRole", "s3:GetObject", {SHARD: OURS}),
    "worker reads a model": ("WorkerRole", "s3:GetObject", {MODEL: OURS}),
    "worker fetches an environment": ("WorkerRole", "s3:GetObject", {ENVIRONMENT: OURS}),
    "worker writes a checkpoint": ("WorkerRole", "s3:PutObject", {RUN: OURS}),
    "worker deletes an old checkpoint": ("WorkerRole", "s3:DeleteObject", {RUN: OURS}),
    "worker gives an upload up": ("WorkerRole", "s3:AbortMultipartUpload", {RUN: OURS}),
    "head writes a run": ("HeadRole", "s3:PutObject", {RUN: OURS}),
    "head writes a model": ("HeadRole", "s3:PutObject", {MODEL: OURS}),
    "head deletes a model": ("HeadRole", "s3:DeleteObject", {MODEL: OURS}),
    "head starts a worker": ("HeadRole", "ec2:RunInstances", launch(placement_group=None)),
    "head starts a worker with EFA": ("HeadRole", "ec2:RunInstances", launch("lt-efa", spot_instances_request=None)),
    "head tags what it starts": ("HeadRole", "ec2:CreateTags", {f"{EC2}instance/i-1": {"ec2:CreateAction": "RunInstances"}}),
    "head ends a worker": ("HeadRole", "ec2:TerminateInstances", {f"{EC2}instance/i-1": {"aws:ResourceTag/ray-cluster-name": "simclr"}}),
    "head tags a worker": ("HeadRole", "ec2:CreateTags", {f"{EC2}instance/i-1": {"aws:ResourceTag/ray-cluster-name": "simclr"}}),
    "head looks around": ("HeadRole", "ec2:DescribeInstances", {"*": {}}),
    "head passes the worker's role": ("HeadRole", "iam:PassRole", {WORKER: {"iam:PassedToService": "ec2.amazonaws.com"}}),
    "head looks the image up": (
        "HeadRole",
        "ssm:GetParameters",
        {f"arn:aws:ssm:{REGION}::parameter/aws/service/deeplearning/ami/x86_64/base/latest/ami-id": {}},
    ),
}
REFUSED: dict[str, Request] = {
    "worker overwrites a shard": ("WorkerRole", "s3:PutObject", {SHARD: OURS}),
    "worker deletes a shard": ("WorkerRole", "s3:DeleteObject", {SHARD: OURS}),
    "worker writes a model": ("WorkerRole", "s3:PutObject", {MODEL: OURS}),
    "worker deletes a model": ("WorkerRole", "s3:DeleteObject", {MODEL: OURS}),
    "worker reads another bucket of the account": ("WorkerRole", "s3:GetObject", {"arn:aws:s3:::payroll/x": OURS}),
    "worker lists another bucket of the account": ("WorkerRole", "s3:ListBucket", {"arn:aws:s3:::payroll": OURS}),
    "worker deletes a version of a checkpoint": ("WorkerRole", "s3:DeleteObjectVersion", {RUN: OURS}),
    "worker writes beside runs/": ("WorkerRole", "s3:PutObject", {f"{BUCKET}/runs-of-others/x": OURS}),
    "worker writes to somebody's bucket of that name": ("WorkerRole", "s3:PutObject", {RUN: ELSEWHERE}),
    "worker reads somebody's bucket of that name": ("WorkerRole", "s3:GetObject", {SHARD: ELSEWHERE}),
    "worker lists somebody's bucket of that name": ("WorkerRole", "s3:ListBucket", {BUCKET: ELSEWHERE}),
    "worker changes the bucket": ("WorkerRole", "s3:PutBucketPolicy", {BUCKET: OURS}),
    "worker starts a machine": ("WorkerRole", "ec2:RunInstances", launch()),
    "worker ends a machine": (
        "WorkerRole",
        "ec2:TerminateInstances",
        {f"{EC2}instance/i-1": {"aws:ResourceTag/ray-cluster-name": "simclr"}},
    ),
    "head overwrites a shard": ("HeadRole", "s3:PutObject", {SHARD: OURS}),
    "head deletes a version of a model": ("HeadRole", "s3:DeleteObjectVersion", {MODEL: OURS}),
    "head turns versions off": ("HeadRole", "s3:PutBucketVersioning", {BUCKET: OURS}),
    "head starts a dear machine": ("HeadRole", "ec2:RunInstances", launch(instance={"ec2:InstanceType": "u-24tb1.metal"})),
    "head starts one with IMDSv1": ("HeadRole", "ec2:RunInstances", launch(instance={"ec2:MetadataHttpTokens": "optional"})),
    "head starts one that says nothing of IMDS": ("HeadRole", "ec2:RunInstances", without("ec2:MetadataHttpTokens")),
    "head starts one with two hops": ("HeadRole", "ec2:RunInstances", launch(instance={"ec2:MetadataHttpPutResponseHopLimit": "2"})),
    "head starts one with its own role": (
        "HeadRole",
        "ec2:RunInstances",
        launch(instance={"ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/simclr-head"}),
    ),
    "head starts one without a template": ("HeadRole", "ec2:RunInstances", without("ec2:LaunchTemplate")),
    "head starts one of another template": ("HeadRole", "ec2:RunInstances", launch("lt-of-somebody")),
    "head starts one that it could not end": ("HeadRole", "ec2:RunInstances", without("aws:RequestTag/ray-cluster-name")),
    "head starts somebody's image": ("HeadRole", "ec2:RunInstances", launch(image={"ec2:Owner": "999999999999"})),
    "head starts one with a plain disk": ("HeadRole", "ec2:RunInstances", launch(volume={"ec2:Encrypted": "false"})),
    "head starts one elsewhere": ("HeadRole", "ec2:RunInstances", instead("subnet/subnet-1", "subnet/subnet-2")),
    "head starts one with a foot elsewhere": (
        "HeadRole",
        "ec2:RunInstances",
        launch(network_interface={"ec2:Subnet": f"{EC2}subnet/subnet-2"}),
    ),
    "head starts one in an open group": ("HeadRole", "ec2:RunInstances", instead("security-group/sg-1", "security-group/sg-2")),
    "head opens one to another key": (
        "HeadRole",
        "ec2:RunInstances",
        instead(f"key-pair/ray-autoscaler_{REGION}", "key-pair/mine"),
    ),
    "head ends somebody's machine": ("HeadRole", "ec2:TerminateInstances", {f"{EC2}instance/i-2": {}}),
    "head takes somebody's machine over by a tag": ("HeadRole", "ec2:CreateTags", {f"{EC2}instance/i-2": {}}),
    "head tags a disk": ("HeadRole", "ec2:CreateTags", {f"{EC2}volume/vol-1": {"ec2:CreateAction": "CreateVolume"}}),
    "head writes a template": ("HeadRole", "ec2:CreateLaunchTemplateVersion", {f"{EC2}launch-template/lt-worker": {}}),
    "head opens a port": ("HeadRole", "ec2:AuthorizeSecurityGroupIngress", {f"{EC2}security-group/sg-1": {}}),
    "head passes its own role": ("HeadRole", "iam:PassRole", {HEAD: {"iam:PassedToService": "ec2.amazonaws.com"}}),
    "head passes the worker's role to a function": ("HeadRole", "iam:PassRole", {WORKER: {"iam:PassedToService": "lambda.amazonaws.com"}}),
    "head reads a secret": ("HeadRole", "ssm:GetParameters", {f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/database": {}}),
}
# The head may what a worker may, and may not what a worker may not, but for models and machines.
ALLOWED |= {name.replace("worker", "head", 1): ("HeadRole", *rest) for name, (_, *rest) in ALLOWED.items() if name.startswith("worker")}
REFUSED |= {
    name.replace("worker", "head", 1): ("HeadRole", *rest)
    for name, (_, *rest) in REFUSED.items()
    if name.startswith("worker") and not name.endswith((" a model", " a machine"))
}
ALLOWED |= {"head gives an upload of a model up": ("HeadRole", "s3:AbortMultipartUpload", {MODEL: OURS})}
ALLOWED |= {"head keeps an environment": ("HeadRole", "s3:PutObject", {ENVIRONMENT: OURS})}
REFUSED |= {"worker keeps an environment": ("WorkerRole", "s3:PutObject", {ENVIRONMENT: OURS})}
REFUSED |= {"head deletes an environment": ("HeadRole", "s3:DeleteObject", {ENVIRONMENT: OURS})}
REFUSED |= {"head writes models to somebody's bucket of that name": ("HeadRole", "s3:PutObject", {MODEL: ELSEWHERE})}


@pytest.mark.parametrize("request_", ALLOWED)
def test_the_cluster_may(request_: str) -> None:
    role, action, touched = ALLOWED[request_]
    assert allows(policies(role), action, touched)


@pytest.mark.parametrize("request_", REFUSED)
def test_the_cluster_may_not(request_: str) -> None:
    role, action, touched = REFUSED[request_]
    assert not allows(policies(role), action, touched)


def test_each_refusal_is_one_step_from_what_is_allowed() -> None:
    """A refused launch differs from the allowed one in one resource or key: so it is that one which is refused."""
    sound: dict[str, Any] = launch()
    for name, (_, action, touched) in REFUSED.items():
        if action == "ec2:RunInstances" and name not in ("worker starts a machine", "head starts one of another template"):
            changed = {arn for arn in sound if touched.get(arn) != sound[arn]}
            assert len(changed) == 1, (name, changed)
    assert allows(policies("HeadRole"), "ec2:RunInstances", sound)


def test_cloudformation_takes_the_file() -> None:
    """It refuses any alias of YAML in a template. A role's inline policies may have 10,240 characters, a managed policy 6,144."""
    with (ROOT / "cluster/aws-account.yaml").open() as file:
        events = list(yaml.parse(file))
    assert [event for event in events if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None)] == []
    size = {name: len(json.dumps(policies(name), separators=(",", ":"))) for name in ("HeadRole", "WorkerRole")}
    assert size["HeadRole"] < 10_240 and size["WorkerRole"] < 6_144


def test_a_private_subnet_opens_itself_alone_and_only_where_there_is_one() -> None:
    nodes = launch("lt-efa-p5", network_interface={"ec2:Subnet": f"{EC2}subnet/subnet-9"})
    nodes[f"{EC2}subnet/subnet-9"] = {}
    assert allows(policies("HeadRole"), "ec2:RunInstances", nodes)
    assert not allows(policies("HeadRole", KNOWN | {"PrivateSubnet": ""}), "ec2:RunInstances", nodes)
