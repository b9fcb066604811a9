"""cluster/aws-account.yaml as a test reads it: its references filled in, and IAM's answer to a request.

`allows` follows IAM's rules for identity policies: a request touches resources, each of which needs an Allow whose action, resource and
conditions match, and no Deny. A condition on a key that the request lacks does not match. It knows the operators that the file uses and
fails on any other one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.support.paths import ROOT

REGION, ACCOUNT = "us-east-1", "123456789012"
GIVEN = {"Vpc": "vpc-1", "Subnet": "subnet-1", "Bucket": "photos", "SshFrom": "203.0.113.7/32"}
GIVEN |= {"RouteTable": "rtb-1", "PrivateSubnet": "subnet-9"}
NO_VALUE = "AWS::NoValue"
GIVEN |= {NO_VALUE: NO_VALUE}
GIVEN |= {"AWS::Region": REGION, "AWS::AccountId": ACCOUNT}


@functools.cache
def resources() -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((ROOT / "cluster/aws-account.yaml").read_text())["Resources"]
    return made


def resolved(value: Any, known: dict[str, str]) -> Any:
    """`value` with its references replaced. KeyError if one is not known yet."""
    if isinstance(value, dict):
        if "Ref" in value:
            return known[value["Ref"]]
        if "Fn::GetAtt" in value:
            return known[".".join(value["Fn::GetAtt"])]
        if "Fn::Sub" in value:
            return re.sub(r"\$\{([^}]*)\}", lambda name: known[name[1]], value["Fn::Sub"])
        if "Fn::If" in value:  # each condition is that a parameter is given
            condition, yes, no = value["Fn::If"]
            return resolved(yes if known[condition.removeprefix("Has")] else no, known)
        return {key: resolved(inner, known) for key, inner in value.items()}
    return [inner for each in value if (inner := resolved(each, known)) != NO_VALUE] if isinstance(value, list) else value


def ordered(known: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, resource) of the file, each when `known`, which the caller adds to, has what it refers to."""
    waiting = dict(resources())
    while waiting:
        ready = {}
        for name, resource in waiting.items():
            with contextlib.suppress(KeyError):
                ready[name] = {**resource, "Properties": resolved(resource["Properties"], known)}
        assert ready, f"a circle, or a reference to nothing: {', '.join(waiting)}"
        for name in ready:
            del waiting[name]
        yield from ready.items()


KNOWN = GIVEN | {"Worker": "lt-worker", "Efa": "lt-efa", "EfaP5": "lt-efa-p5", "Nodes": "sg-1", "Nodes.GroupId": "sg-1"}
KNOWN |= {"WorkerRole.Arn": f"arn:aws:iam::{ACCOUNT}:role/simclr-worker"}
KNOWN |= {"WorkerProfile.Arn": f"arn:aws:iam::{ACCOUNT}:instance-profile/simclr-worker"}


def policies(role: str, known: dict[str, str] = KNOWN) -> list[dict[str, Any]]:
    """The statements of a role, for an account with `known` names of templates, groups and roles."""
    own = resources()[role]["Properties"]
    managed = [resources()[shared["Ref"]]["Properties"] for shared in own["ManagedPolicyArns"]]
    documents = resolved([policy["PolicyDocument"] for policy in (*managed, *own.get("Policies", []))], known)
    return [statement for document in documents for statement in document["Statement"]]


def allows(statements: list[dict[str, Any]], action: str, touched: dict[str, dict[str, str]]) -> bool:
    """Whether `action` passes on every resource of `touched`: ARN → the request's condition keys there."""

    def matching(resource: str, keys: dict[str, str]) -> list[str]:
        return [s["Effect"] for s in statements if _any(s["Action"], action) and _any(s["Resource"], resource) and _holds(s, keys)]

    effects = [matching(resource, keys) for resource, keys in touched.items()]
    return all("Allow" in found and "Deny" not in found for found in effects)


def _any(patterns: str | list[str], text: str) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _holds(statement: dict[str, Any], keys: dict[str, str]) -> bool:
    for operator, wanted in statement.get("Condition", {}).items():
        assert operator in ("StringEquals", "ArnEquals", "NumericEquals", "Bool"), operator
        for key, values in wanted.items():
            if keys.get(key) not in ([values] if isinstance(values, str) else values):
                return False
    return True
