"""aws-account.yaml and aws-gpu.yaml at a simulated EC2 (moto), through Ray's own AWS provider: the resources that it would create.

The test covers Ray's checks and defaults, its lookups of templates, subnets, groups and roles, its launches. moto knows no placement
groups (their name is passed on) and does not resolve the image. No node starts, so no ssh, no set-up commands and no autoscaler: these
run for real in test_ray_up.py, with the provider for your own machines.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.account import ACCOUNT, GIVEN, REGION, allows, ordered, policies
from tests.support.paths import ROOT

HERE = ROOT / "cluster"
ADDRESS = GIVEN["SshFrom"]


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


def deploy(ec2: Any) -> dict[str, str]:
    """The resources of aws-account.yaml that EC2 and IAM have, made with the template's own properties. What their names refer to."""
    import boto3

    iam = boto3.client("iam")
    subnet = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [f"{REGION}a"]}])["Subnets"][0]
    private = ec2.create_subnet(VpcId=subnet["VpcId"], AvailabilityZone=f"{REGION}a", CidrBlock="172.31.240.0/24")["Subnet"]
    # Ray passes over subnets without this; EC2 gives no address all the same to a node of several interfaces.
    ec2.modify_subnet_attribute(SubnetId=private["SubnetId"], MapPublicIpOnLaunch={"Value": True})
    known = GIVEN | {"Vpc": subnet["VpcId"], "Subnet": subnet["SubnetId"], "PrivateSubnet": private["SubnetId"], "Data": "photos"}
    for name, resource in ordered(known):
        p = resource["Properties"]
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
                for arn in p["ManagedPolicyArns"]:
                    iam.attach_role_policy(RoleName=p["RoleName"], PolicyArn=arn)
                for policy in p.get("Policies", []):
                    iam.put_role_policy(
                        RoleName=p["RoleName"], PolicyName=policy["PolicyName"], PolicyDocument=json.dumps(policy["PolicyDocument"])
                    )
            case "IAM::ManagedPolicy":
                made = iam.create_policy(PolicyName=name, PolicyDocument=json.dumps(p["PolicyDocument"]))
                known[name] = made["Policy"]["Arn"]
            case "IAM::InstanceProfile":
                made = iam.create_instance_profile(InstanceProfileName=p["InstanceProfileName"])
                known[f"{name}.Arn"] = made["InstanceProfile"]["Arn"]
                iam.add_role_to_instance_profile(InstanceProfileName=p["InstanceProfileName"], RoleName=p["Roles"][0])
                known[name] = p["InstanceProfileName"]
            case "EC2::LaunchTemplate":
                made = ec2.create_launch_template(LaunchTemplateName=p["LaunchTemplateName"], LaunchTemplateData=p["LaunchTemplateData"])
                known[name] = made["LaunchTemplate"]["LaunchTemplateId"]
            case _:  # the bucket, what EC2 makes no use of here
                known.setdefault(name, name)
    return known


def touched(ec2: Any, request: dict[str, Any]) -> dict[str, dict[str, str]]:
    """ARN → condition keys of what a RunInstances of Ray's touches."""
    here = f"arn:aws:ec2:{REGION}:{ACCOUNT}:"
    (template,) = ec2.describe_launch_templates(LaunchTemplateNames=[request["LaunchTemplate"]["LaunchTemplateName"]])["LaunchTemplates"]
    (tags,) = (spec["Tags"] for spec in request["TagSpecifications"] if spec["ResourceType"] == "instance")
    found = {
        f"{here}launch-template/{template['LaunchTemplateId']}": {},
        # EC2 looks the name up; what lies under /aws/service is Amazon's.
        f"arn:aws:ec2:{REGION}::image/ami-1": {"ec2:Owner": "amazon" if request["ImageId"].startswith("resolve:ssm:/aws/service/") else ""},
        f"{here}instance/*": {
            "ec2:InstanceType": request["InstanceType"],
            "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/{request['IamInstanceProfile']['Name']}",
            "ec2:LaunchTemplate": f"{here}launch-template/{template['LaunchTemplateId']}",
            "ec2:MetadataHttpTokens": request["MetadataOptions"]["HttpTokens"],
            "ec2:MetadataHttpPutResponseHopLimit": str(request["MetadataOptions"]["HttpPutResponseHopLimit"]),
            **{f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in tags},
        },
        f"{here}key-pair/{request['KeyName']}": {},
    }
    for disk in request["BlockDeviceMappings"]:
        found[f"{here}volume/{disk['DeviceName']}"] = {"ec2:Encrypted": str(disk["Ebs"]["Encrypted"]).lower()}
    for interface in request["NetworkInterfaces"]:
        found[f"{here}network-interface/{interface['DeviceIndex']}"] = {"ec2:Subnet": f"{here}subnet/{interface['SubnetId']}"}
        found |= {f"{here}subnet/{interface['SubnetId']}": {}} | {f"{here}security-group/{group}": {} for group in interface["Groups"]}
    if "Placement" in request:
        found[f"{here}placement-group/{request['Placement']['GroupName']}"] = {}
    if "InstanceMarketOptions" in request:
        found[f"{here}spot-instances-request/*"] = {}
    return found


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


def test_the_heads_role_starts_each_worker_and_no_second_head(ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.client

    asked, call = list[dict[str, Any]](), botocore.client.BaseClient._make_api_call

    def recorded(client: Any, operation: str, words: dict[str, Any]) -> Any:
        if operation == "RunInstances":
            asked.append(copy.deepcopy(words))
        return call(client, operation, words)

    known = deploy(ec2)
    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
    start(ec2, yaml.safe_load((HERE / "aws-gpu.yaml").read_text()))
    may = {words["InstanceType"]: allows(policies("HeadRole", known), "ec2:RunInstances", touched(ec2, words)) for words in asked}
    assert may == {"m7i.2xlarge": False, "g6.12xlarge": True, "p4d.24xlarge": True, "p5.48xlarge": True}


def test_a_template_alone_is_safe(ec2: Any) -> None:
    """A node that is started by hand from a template, without aws-gpu.yaml."""
    deploy(ec2)
    for name in ("simclr-head", "simclr-worker", "simclr-efa"):
        (version,) = ec2.describe_launch_template_versions(LaunchTemplateName=name)["LaunchTemplateVersions"]
        data = version["LaunchTemplateData"]
        assert data["MetadataOptions"] == {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        assert [disk["Ebs"]["Encrypted"] for disk in data["BlockDeviceMappings"]] == [True]


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


def test_a_p5_may_have_efa_on_all_of_its_cards(ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the template simclr-efa-p5 Ray asks for 32 interfaces, in a form that EC2's own description accepts (botocore checks each
    request against it), and the head's role allows them. Whether EC2 then starts it needs an account with a quota for p5."""
    import botocore.client

    asked, call = list[dict[str, Any]](), botocore.client.BaseClient._make_api_call

    def recorded(client: Any, operation: str, words: dict[str, Any]) -> Any:
        if operation == "RunInstances" and words["InstanceType"] == "p5.48xlarge":
            asked.append(copy.deepcopy(words))
        return call(client, operation, words)

    known = deploy(ec2)
    cluster = yaml.safe_load((HERE / "aws-gpu.yaml").read_text())
    types = cluster["available_node_types"]
    types["p5"]["node_config"]["LaunchTemplate"]["LaunchTemplateName"] = "simclr-efa-p5"
    cluster["available_node_types"] = {name: types[name] for name in ("head", "p5")}
    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
    start(ec2, cluster)
    (words,) = asked
    interfaces = words["NetworkInterfaces"]
    assert [(i["NetworkCardIndex"], i["DeviceIndex"], i["InterfaceType"]) for i in interfaces] == [
        (0, 0, "efa"),
        *((card, 1, "efa-only") for card in range(1, 32)),
    ]
    # EC2 gives no public address to a node of several interfaces, and refuses to be asked for one.
    assert {i["SubnetId"] for i in interfaces} == {known["PrivateSubnet"]} and not any("AssociatePublicIpAddress" in i for i in interfaces)
    assert allows(policies("HeadRole", known), "ec2:RunInstances", touched(ec2, words))
