"""What an AWS account may start at once of the machines of a cluster file: its quotas, in vCPUs, asked of Service Quotas.

A new account may start no GPU at all: the quotas for spot machines with GPUs begin at 0. EC2 then answers each start with
MaxSpotInstanceCountExceeded or VcpuLimitExceeded, in the head's log alone, and a job waits for ever.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import boto3
import botocore.config
import botocore.exceptions

from pipelines.clusterfile.catalogue import MACHINES
from pipelines.clusterfile.rules import Group

_ANSWER_WITHIN_S = 5.0
# Families of machines → the code of the quota for (on demand, spot), as the console of Service Quotas has them.
_CODES = {
    r"(g|vt)\d": ("L-DB2E81BA", "L-3819A6DF"),
    r"p[234]": ("L-417A185B", "L-7212CCBC"),
    r"p5": ("L-417A185B", "L-C4BD4855"),
    r"[acdhimrtz]\d": ("L-1216C47A", "L-34B43A08"),
}


def needed(groups: Sequence[Group]) -> dict[str, tuple[int, list[str]]]:
    """Code of a quota → (vCPUs that the file asks of it at the most, `nodes × machine` of each group). Machines that the catalogue or the
    codes lack are left out."""
    found: dict[str, tuple[int, list[str]]] = defaultdict(lambda: (0, []))
    for group in groups:
        codes = next((codes for family, codes in _CODES.items() if re.match(family, group.machine)), None)
        if codes and group.most and group.machine in MACHINES:
            cpus, parts = found[codes[group.spot]]
            found[codes[group.spot]] = (cpus + group.most * MACHINES[group.machine].cpus, [*parts, f"{group.most} × {group.machine}"])
    return dict(found)


def lines(groups: Sequence[Group], region: str) -> list[str]:
    """A sentence for each quota that is smaller than what the file asks for, or one that says why there is no answer; [] if all suffice.
    It counts what the file may start, and not what the account runs already."""
    settings = botocore.config.Config(
        region_name=region, connect_timeout=_ANSWER_WITHIN_S, read_timeout=_ANSWER_WITHIN_S, retries={"total_max_attempts": 2}
    )
    said = []
    try:
        client = boto3.session.Session().client("service-quotas", config=settings)
        for code, (cpus, parts) in needed(groups).items():
            quota = client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]
            if quota["Value"] < cpus:
                said.append(
                    f"{region} allows this account {quota['Value']:.0f} vCPUs of “{quota['QuotaName']}”, and {' and '.join(parts)} need "
                    f"{cpus}: what exceeds it does not start; ask for more, which may take days:  aws service-quotas "
                    f"request-service-quota-increase --region {region} --service-code ec2 --quota-code {code} --desired-value {cpus}"
                )
    except botocore.exceptions.ClientError as error:
        what = error.response["Error"].get("Code", "an error")
        return [f"the account's quotas are not known: Service Quotas in {region} answers {what}; it wants servicequotas:GetServiceQuota"]
    except botocore.exceptions.BotoCoreError as error:
        return [f"the account's quotas are not known: {type(error).__name__} ({str(error).splitlines()[0][:200]})"]
    return said
