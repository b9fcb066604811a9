"""Schemas of the kinds that KubeRay and Kueue add to Kubernetes, kept by hand: the fields that our files use and no others.

Their own, of some thousand lines each, are in no package of PyPI, npm or Debian, and this machine reaches nothing else. These were written
from the fields' Go types: `apis/ray/v1/rayjob_types.go` and `raycluster_types.go` of KubeRay (main, autumn 2026), with what
`validation.go` refuses, and `apis/kueue/v1beta2` of Kueue, with what the webhook of its RayJobs refuses. So they find a field that is
misspelt, in the wrong place or of another type, and not a field that a release drops.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT, WHOLE, YES_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", "maxLength": 253}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def of(required: str = "", **fields: Any) -> Schema:
    """An object with these fields alone."""
    return {"type": "object", "properties": fields, "additionalProperties": False, "required": required.split()}


def many(item: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": item, "minItems": 1, **more}


CONTAINER = of(
    "name image",
    name=NAME, image=TEXT, env=many({"type": "object", "required": ["name"]}), securityContext={"type": "object"},
    resources=of(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=many(of("name mountPath", name=NAME, mountPath=TEXT, readOnly=YES_NO)),
)  # fmt: skip
POD = of(
    "spec",
    metadata=of(labels=TEXTS, annotations=TEXTS),
    spec=of(
        "containers",
        containers=many(CONTAINER), volumes=many({"type": "object", "required": ["name"]}), serviceAccountName=NAME,
        automountServiceAccountToken=YES_NO, securityContext={"type": "object"}, terminationGracePeriodSeconds=WHOLE, nodeSelector=TEXTS,
        tolerations=many({"type": "object"}), restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    ),
)  # fmt: skip
RAY_CLUSTER = of(
    "headGroupSpec",
    rayVersion=TEXT, authOptions=of("mode", mode={"enum": ["token", "disabled"]}), enableInTreeAutoscaling=YES_NO,
    autoscalerOptions={"type": "object"},
    headGroupSpec=of("template", serviceType=TEXT, rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=many(
        of("groupName template", groupName=NAME, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, rayStartParams=TEXTS, template=POD)
    ),
)  # fmt: skip
RAY_JOB = of(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT, backoffLimit=WHOLE, shutdownAfterJobFinishes=YES_NO, ttlSecondsAfterFinished=WHOLE, activeDeadlineSeconds=WHOLE,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}, submitterPodTemplate=POD,
    submitterConfig=of(backoffLimit=WHOLE), runtimeEnvYAML=TEXT, suspend=YES_NO, rayClusterSpec=RAY_CLUSTER,
)  # fmt: skip
# As KubeRay's validation.go: a sidecar takes no template, retries need a cluster of their own.
RAY_JOB["not"] = {"required": ["submitterPodTemplate"], "properties": {"submissionMode": {"const": "SidecarMode"}}}

FLAVOR = of(nodeLabels=TEXTS, nodeTaints=many({"type": "object"}), tolerations=many({"type": "object"}))
QUOTA = of("name nominalQuota", name=TEXT, nominalQuota=QUANTITY)
CLUSTER_QUEUE = of(
    namespaceSelector=of(matchLabels=TEXTS), queueingStrategy={"enum": ["StrictFIFO", "BestEffortFIFO"]}, cohortName=NAME,
    resourceGroups=many(
        of("coveredResources flavors", coveredResources=many(TEXT), flavors=many(of("name resources", name=NAME, resources=many(QUOTA)))),
        maxItems=16,
    ),
)  # fmt: skip

SPECS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): RAY_JOB,
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): FLAVOR,
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): CLUSTER_QUEUE,
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): of("clusterQueue", clusterQueue=NAME),
}


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """What the schema of its kind says of an object, one sentence each."""
    import jsonschema

    spec = SPECS[manifest["apiVersion"], manifest["kind"]]
    metadata = of("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
    whole = of("metadata", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)
    errors = jsonschema.Draft7Validator(whole).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
