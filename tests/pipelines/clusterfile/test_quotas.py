"""What `simclr cluster check` says of an account's quotas. Service Quotas' answers come from botocore's Stubber, which checks each request
and answer against Amazon's own description of the service: moto knows no quotas of EC2."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import NoCredentialsError
from botocore.stub import Stubber

from pipelines.clusterfile import quotas, rules
from pipelines.commands import cluster
from tests.support.paths import ROOT

SPOT_G, SPOT_P5, ON_DEMAND_P, STANDARD = "L-3819A6DF", "L-C4BD4855", "L-417A185B", "L-1216C47A"


@pytest.fixture
def aws() -> dict[str, Any]:
    return copy.deepcopy(cluster.read(ROOT / "cluster/aws-gpu.yaml")[1])


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    client = boto3.client("service-quotas", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    monkeypatch.setattr(boto3.session.Session, "client", lambda session, name, config: client)
    with Stubber(client) as stubber:
        yield stubber


def has(service: Stubber, code: str, cpus: float, name: str = "All G and VT Spot Instance Requests") -> None:
    quota = {"QuotaCode": code, "QuotaName": name, "Value": cpus}
    service.add_response("get_service_quota", {"Quota": quota}, {"ServiceCode": "ec2", "QuotaCode": code})


def test_a_new_account_hears_that_it_may_start_no_gpu(aws: dict[str, Any], service: Stubber) -> None:
    has(service, STANDARD, 32.0)
    has(service, SPOT_G, 0.0)
    (line,) = quotas.lines(rules.groups(aws), "us-east-1")
    assert line.startswith("us-east-1 allows this account 0 vCPUs of “All G and VT Spot Instance Requests”, and 4 × g6.12xlarge need 192:")
    assert line.endswith("--region us-east-1 --service-code ec2 --quota-code L-3819A6DF --desired-value 192")
    service.assert_no_pending_responses()


def test_what_suffices_is_not_spoken_of(aws: dict[str, Any], service: Stubber) -> None:
    has(service, STANDARD, 8.0)
    has(service, SPOT_G, 192.0)
    assert quotas.lines(rules.groups(aws), "us-east-1") == []
    service.assert_no_pending_responses()


def test_each_family_and_each_way_to_pay_has_a_quota_of_its_own(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    types["g6"]["max_workers"], types["p4d"]["max_workers"], types["p5"]["max_workers"] = 0, 2, 8
    assert quotas.needed(rules.groups(aws)) == {
        STANDARD: (8, ["1 × m7i.2xlarge"]),
        ON_DEMAND_P: (2 * 96 + 8 * 192, ["2 × p4d.24xlarge", "8 × p5.48xlarge"]),
    }
    types["p5"]["node_config"]["InstanceMarketOptions"] = {"MarketType": "spot"}
    assert quotas.needed(rules.groups(aws))[SPOT_P5] == (1536, ["8 × p5.48xlarge"])


def test_without_an_answer_it_says_why_in_one_line(aws: dict[str, Any], service: Stubber, monkeypatch: pytest.MonkeyPatch) -> None:
    service.add_client_error("get_service_quota", "AccessDeniedException", "User is not authorized", 400)
    (line,) = quotas.lines(rules.groups(aws), "us-east-1")
    assert "answers AccessDeniedException; it wants servicequotas:GetServiceQuota" in line

    def none(session: Any, name: str, config: Any) -> Any:
        raise NoCredentialsError

    monkeypatch.setattr(boto3.session.Session, "client", none)
    assert quotas.lines(rules.groups(aws), "us-east-1") == [
        "the account's quotas are not known: NoCredentialsError (Unable to locate credentials)"
    ]


def test_the_command_prints_it_after_the_nodes(service: Stubber, capsys: pytest.CaptureFixture[str]) -> None:
    has(service, STANDARD, 32.0)
    has(service, SPOT_G, 0.0)
    cluster.main(cluster.Args("check", ROOT / "cluster/aws-gpu.yaml"))
    printed = capsys.readouterr().out
    assert printed.index("4 × L4 24 GB") < printed.index("allows this account 0 vCPUs")
