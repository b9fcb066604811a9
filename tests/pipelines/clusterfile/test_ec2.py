"""aws-account.yaml and aws-gpu.yaml at a simulated EC2 (moto), through Ray's own AWS provider: the resources that it would create.

The test covers Ray's checks and defaults, its lookups of templates, subnets, groups and roles, its launches. moto knows no placement
groups (their name is passed on) and does not resolve the image. No node starts, so no ssh, no set-up commands and no autoscaler: these
run for real in test_ray_up.py, with the provider for your own machines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

HERE = ROOT / "cluster"
REGION, ADDRESS = "us-east-1", "203.0.113.7/32"


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    import boto3
    from moto import mock_aws

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair that it makes to ~/.ssh
    with mock_aws():
        yield boto3.client("ec2")


def deploy(ec2: Any) -> None:
    """The resources of aws-account.yaml that EC2 and IAM have, made with the template's own properties."""
    import boto3

    iam = boto3.client("iam")
    subnet = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [f"{REGION}a"]}])["Subnets"][0]
    known = {"Vpc": subnet["VpcId"], "Subnet": subnet["SubnetId"], "Bucket": "photos", "SshFrom": ADDRESS}
    known |= {"Data": "photos", "AWS::Region": REGION, "AWS::AccountId": "123456789012"}

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            if "Ref" in value:
                return known[value["Ref"]]
            if "Fn::GetAtt" in value:
                return known[".".join(value["Fn::GetAtt"])]
            if "Fn::Sub" in value:
                text = value["Fn::Sub"]
                for name, said in known.items():
                    text = text.replace("${" + name + "}", said)
                return text
            return {key: resolved(inner) for key, inner in value.items()}
        return [resolved(inner) for inner in value] if isinstance(value, list) else value

    for name, resource in yaml.safe_load((HERE / "aws-account.yaml").read_text())["Resources"].items():
        p = resolved(resource["Properties"])
        match resource["Type"].removeprefix("AWS::"):
            case "EC2::SecurityGroup":
                made = ec2.create_security_group(GroupName=p["GroupName"], Description=p["GroupDescription"], VpcId=p["VpcId"])
                known[name] = known[f"{name}.GroupId"] = made["GroupId"]
                rules = [{**r, "IpRanges": [{"CidrIp": r["CidrIp"]}]} for r in p["SecurityGroupIngress"]]
                ec2.authorize_security_group_ingress(
                    GroupId=made["GroupId"], IpPermissions=[{k: v for k, v in r.items() if k != "CidrIp"} for r in rules]
                )
            case "EC2::SecurityGroupIngress":
                between = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": p["SourceSecurityGroupId"]}]}
                ec2.authorize_security_group_ingress(GroupId=p["GroupId"], IpPermissions=[between])
            case "IAM::Role":
                made = iam.create_role(RoleName=p["RoleName"], AssumeRolePolicyDocument=json.dumps(p["AssumeRolePolicyDocument"]))
                known[name], known[f"{name}.Arn"] = p["RoleName"], made["Role"]["Arn"]
                for policy in p["Policies"]:
                    iam.put_role_policy(
                        RoleName=p["RoleName"], PolicyName=policy["PolicyName"], PolicyDocument=json.dumps(policy["PolicyDocument"])
                    )
            case "IAM::InstanceProfile":
                iam.create_instance_profile(InstanceProfileName=p["InstanceProfileName"])
                iam.add_role_to_instance_profile(InstanceProfileName=p["InstanceProfileName"], RoleName=p["Roles"][0])
                known[name] = p["InstanceProfileName"]
            case "EC2::LaunchTemplate":
                ec2.create_launch_template(LaunchTemplateName=p["LaunchTemplateName"], LaunchTemplateData=p["LaunchTemplateData"])


def start(ec2: Any, cluster: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(the file as Ray completes it, node type → what EC2 has of it), one node of each type."""
    from ray.autoscaler._private.providers import _get_node_provider_cls
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = prepare_config(cluster)
    validate_config(cluster)
    provider_class = _get_node_provider_cls(cluster["provider"])
    cluster = provider_class.bootstrap_config(cluster)
    provider = provider_class(cluster["provider"], cluster["cluster_name"])
    found = {}
    for name, node in cluster["available_node_types"].items():
        kind = "head" if name == cluster["head_node_type"] else "worker"
        made = provider.create_node(node["node_config"], {"ray-node-kind": kind, "ray-user-node-type": name}, 1)
        found[name] = [r["Instances"][0] for r in ec2.describe_instances(InstanceIds=list(made))["Reservations"]]
    return cluster, found


def test_ray_creates_what_the_file_says(ec2: Any) -> None:
    deploy(ec2)
    groups = {g["GroupName"]: g for g in ec2.describe_security_groups()["SecurityGroups"]}
    cluster, found = start(ec2, yaml.safe_load((HERE / "aws-gpu.yaml").read_text()))
    nodes = {name: made[0] for name, made in found.items()}
    assert {name: node["InstanceType"] for name, node in nodes.items()} == {
        "head": "m7i.2xlarge",
        "g6": "g6.12xlarge",
        "p4d": "p4d.24xlarge",
        "p5": "p5.48xlarge",
    }
    assert {name for name, node in nodes.items() if node.get("InstanceLifecycle") == "spot"} == {"g6"}
    assert {name: node["IamInstanceProfile"]["Arn"].split("/")[-1] for name, node in nodes.items()} == {
        "head": "simclr-head",
        "g6": "simclr-worker",
        "p4d": "simclr-worker",
        "p5": "simclr-worker",
    }
    asked = {name: node["node_config"] for name, node in cluster["available_node_types"].items()}
    assert {name for name, config in asked.items() if config.get("Placement") == {"GroupName": "simclr"}} == {"p4d", "p5"}
    for name, node in nodes.items():
        assert [g["GroupId"] for g in node["NetworkInterfaces"][0]["Groups"]] == [groups["simclr"]["GroupId"]], name
        assert node["Placement"]["AvailabilityZone"] == f"{REGION}a"
        volumes = [mapping["Ebs"]["VolumeId"] for mapping in node["BlockDeviceMappings"]]
        assert volumes and all(v["Encrypted"] for v in ec2.describe_volumes(VolumeIds=volumes)["Volumes"])
    for name in ("p4d", "p5"):
        (interface,) = asked[name]["NetworkInterfaces"]
        assert interface["InterfaceType"] == "efa"
    # Ray has made no group and no role, and has not changed ours.
    assert {g["GroupName"] for g in ec2.describe_security_groups()["SecurityGroups"]} == set(groups)
    (ours,) = ec2.describe_security_groups(GroupIds=[groups["simclr"]["GroupId"]])["SecurityGroups"]
    assert [r["CidrIp"] for rule in ours["IpPermissions"] for r in rule["IpRanges"]] == [ADDRESS]
    import boto3

    assert {r["RoleName"] for r in boto3.client("iam").list_roles()["Roles"]} == {"simclr-head", "simclr-worker"}


def test_without_the_account_ray_stops_and_opens_nothing(ec2: Any) -> None:
    import botocore.exceptions

    before = len(ec2.describe_security_groups()["SecurityGroups"])
    with pytest.raises(botocore.exceptions.ClientError, match="LaunchTemplate"):
        start(ec2, yaml.safe_load((HERE / "aws-gpu.yaml").read_text()))
    assert len(ec2.describe_security_groups()["SecurityGroups"]) == before
    assert not ec2.describe_instances()["Reservations"]
