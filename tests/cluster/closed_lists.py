"""Closed lists, made by hand, of the fields that our manifests use: for formats whose schema no Python package carries.

A field that is not listed is refused, so that a misspelt one is noticed. A field that the format has and we do not use
is not listed either: add it here, from the source named beside it, when a manifest begins to use it.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "array", "items": TEXT, "minItems": 1}
MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
ELSEWHERE: Schema = {"type": "object"}  # a type of Kubernetes itself, checked against Kubernetes' own schema


def closed(required: str = "", /, **fields: Schema) -> Schema:
    """An object with these fields and no others; `required`: names, with spaces between them."""
    return {
        "type": "object",
        "properties": {name.rstrip("_"): schema for name, schema in fields.items()},
        "required": required.split(),
        "additionalProperties": False,
    }


def some(schema: Schema) -> Schema:
    return {"type": "array", "items": schema, "minItems": 1}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


# KubeRay: read in ray-operator/apis/ray/v1/raycluster_types.go and rayjob_types.go of the tag v1.7.0. The comments say
# which of the tags v1.1.0, v1.2.0, v1.3.0, v1.4.0, v1.5.0, v1.5.1, v1.6.0, v1.7.0 is the first with the field; where
# there is no comment, v1.1.0 has it.
GROUP = {"labels": MAP, "rayStartParams": MAP, "template": ELSEWHERE}  # labels: v1.5.0
HEAD_GROUP = closed("rayStartParams template", **GROUP)
WORKER_GROUP = closed(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    **GROUP,
)
RAY_CLUSTER_SPEC = closed(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=closed(mode=one_of("disabled", "token")),  # v1.5.1
    tlsOptions=closed(enabled=BOOLEAN),  # v1.7.0
    gcsFaultToleranceOptions=closed(  # v1.3.0
        redisAddress=TEXT,
        redisPassword=closed(valueFrom=closed(secretKeyRef=closed("name key", name=TEXT, key=TEXT))),
    ),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=closed(
        version=one_of("v1", "v2"),  # v1.4.0
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=COUNT,
        securityContext=ELSEWHERE,
    ),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=some(WORKER_GROUP),
)
METADATA = closed("name", name=TEXT)
RAY_CLUSTER = closed(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayCluster"),
    metadata=METADATA,
    spec=RAY_CLUSTER_SPEC,
)
RAY_JOB = closed(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=METADATA,
    spec=closed(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,  # v1.2.0
        shutdownAfterJobFinishes=BOOLEAN,
        ttlSecondsAfterFinished=COUNT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterConfig=closed(backoffLimit=COUNT),  # v1.2.0
        submitterPodTemplate=ELSEWHERE,
        rayClusterSpec=RAY_CLUSTER_SPEC,
    ),
)

# Prometheus 3, written from knowledge of it and not copied from its pages. Durations and expressions are parsed by the
# tests.
PROMETHEUS = closed(
    "scrape_configs",
    global_=closed(scrape_interval=TEXT, evaluation_interval=TEXT),
    rule_files=TEXTS,
    scrape_configs=some(
        closed(
            "job_name",
            job_name=TEXT,
            file_sd_configs=some(closed("files", files=TEXTS, refresh_interval=TEXT)),
            kubernetes_sd_configs=some(
                closed("role", role=one_of("node", "service", "pod", "endpoints", "endpointslice", "ingress"))
            ),
            relabel_configs=some(
                closed(
                    "source_labels",
                    source_labels=TEXTS,
                    action=one_of("replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep", "hashmod"),
                    regex=TEXT,
                    target_label=TEXT,
                )
            ),
        )
    ),
)
RULES = closed(
    "groups",
    groups=some(
        closed(
            "name rules",
            name=TEXT,
            rules=some(
                closed(
                    "alert expr",
                    alert=TEXT,
                    expr=TEXT,
                    for_=TEXT,
                    labels=closed("severity", severity=one_of("warning", "critical")),
                    annotations=closed("summary description", summary=TEXT, description=TEXT),
                )
            ),
        )
    ),
)
