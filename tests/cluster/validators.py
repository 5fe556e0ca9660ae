"""One validator per format of the folder cluster; each raises for what its tool would refuse."""

from __future__ import annotations

import copy
import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from ray._private.label_utils import parse_node_labels_string
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.kuberay.utils import parse_quantity
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tests.cluster import closed_lists

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERNETES = "1.34"  # any from 1.29 (ReadWriteOncePod) has what the manifests use
Tree = dict[str, Any]

# Every metric that the program exports, as Prometheus sees it: its labels, and the values of those that are closed.
ROLLOUT = "replicas healthy starting restarts version tokens_per_second sync_seconds staleness"
METRICS: dict[str, dict[str, set[str] | None]] = {
    "ray_dprlhf_epsilon_spent": {"run": None, "stage": None, "partition": None},
    "ray_dprlhf_step": {"run": None, "stage": None},
    "ray_dprlhf_released": {"run": None, "stage": None, "metric": None},
    "ray_dprlhf_rollout": {"run": None, "figure": set(ROLLOUT.split())},
    "ray_dprlhf_learner": {"run": None, "figure": {"incarnations"}},
    "ray_dprlhf_phase_seconds": {
        "run": None,
        "stage": None,
        "phase": {"reserve", "collect", "learn", "sync", "checkpoint"},
    },
}


def documents(name: str) -> list[Tree]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def document(name: str) -> Tree:
    (only,) = documents(name)
    return only


# Ray


def launcher(tree: Tree) -> Tree:
    """What `ray up` makes of a config: Ray fills in its defaults, then checks it against its ray-schema.json."""
    prepared = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert sum(len(starts(command)) for command in prepared[key]) == 1, f"{key}: not one `ray start`"
    return prepared


def starts(command: str) -> list[dict[str, Any]]:
    """Options of each `ray start` in a shell command, by Ray's own parser (nothing is started)."""
    found: list[dict[str, Any]] = []
    words = shlex.split(command)
    for i, pair in enumerate(zip(words, words[1:], strict=False)):
        if pair == ("ray", "start"):
            rest = words[i + 2 :]
            end = next((j for j, word in enumerate(rest) if word in ("&&", "||", ";")), len(rest))
            found.append(start_options(rest[:end]))
    return found


def start_options(words: Sequence[str]) -> dict[str, Any]:
    options = start.make_context("ray start", list(words)).params
    parse_node_labels_string(options["labels"])
    return options


# Kubernetes and KubeRay


def kubernetes(tree: Tree) -> None:
    """Kubernetes' own OpenAPI schema, where a field that it does not have is an error."""
    _kubernetes(json.dumps(tree))


@functools.cache  # the schema is large, and most pods are the same in all tests
def _kubernetes(tree: str) -> None:
    kubernetes_validate.validate(json.loads(tree), KUBERNETES, strict=True)


def ray_cluster(tree: Tree) -> Tree:
    """A RayCluster: KubeRay's fields, the pods in it, and Ray's own reader. Returns what Ray's autoscaler sees."""
    jsonschema.validate(tree, closed_lists.RAY_CLUSTER)
    return _cluster_spec(tree["spec"])


def ray_job(tree: Tree) -> Tree:
    jsonschema.validate(tree, closed_lists.RAY_JOB)
    pod(tree["spec"]["submitterPodTemplate"])
    return _cluster_spec(tree["spec"]["rayClusterSpec"])


def _cluster_spec(spec: Tree) -> Tree:
    for group in groups(spec):
        pod(group["template"])
        words = shlex.split(" ".join(_flag(*item) for item in group["rayStartParams"].items()))
        start_options(words)
    kubernetes(
        _as_pod({"containers": [{"name": "a", "securityContext": spec["autoscalerOptions"]["securityContext"]}]})
    )
    # Reads the spec, and calls validate_config on the result.
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "a", "namespace": "b"}, "spec": spec})


def groups(spec: Tree) -> list[Tree]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def _flag(name: str, value: str) -> str:
    """How KubeRay writes a start parameter: "true" becomes a bare flag."""
    return f"--{name}" if value == "true" else f"--{name}={value}"


def pod(template: Tree) -> None:
    """A pod template; and beyond the schema, what Kubernetes checks too: mounts, and quantities (by Ray's parser)."""
    kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "template": template})
    spec = template["spec"]
    volumes = [v["name"] for v in spec.get("volumes", [])]
    assert len(set(volumes)) == len(volumes), "two volumes of one name"
    for volume in spec.get("volumes", []):
        parse_quantity(volume.get("emptyDir", {}).get("sizeLimit", "0"))
    for container in spec["containers"]:
        for quantities in container["resources"].values():
            for quantity in quantities.values():
                parse_quantity(quantity)
        mounts = container.get("volumeMounts", [])
        assert {m["name"] for m in mounts} <= set(volumes), "a mount without its volume"
        paths = [m["mountPath"] for m in mounts]
        assert len(set(paths)) == len(paths), "a path that is mounted twice"


def _as_pod(spec: Tree) -> Tree:
    return {"apiVersion": "v1", "kind": "PodTemplate", "template": {"spec": spec}}


# Prometheus and Grafana


def prometheus(tree: Tree) -> None:
    jsonschema.validate(tree, closed_lists.PROMETHEUS)
    for interval in tree["global"].values():
        promql_parser.parse_duration(interval)
    for job in tree["scrape_configs"]:
        for source in job.get("file_sd_configs", []):
            promql_parser.parse_duration(source["refresh_interval"])
        for rule in job.get("relabel_configs", []):
            re.compile(rule.get("regex", ""))


def rules(tree: Tree) -> None:
    jsonschema.validate(tree, closed_lists.RULES)
    for rule in (r for group in tree["groups"] for r in group["rules"]):
        grouped = expression(rule["expr"])
        if "for" in rule:
            promql_parser.parse_duration(rule["for"])
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert used <= grouped, f"{rule['alert']}: its result has no label {used - grouped}"


def expression(text: str) -> set[str]:
    """Parse an expression and hold it against the list of metrics. Returns the labels that all its aggregates keep.

    Raises:
        ValueError: not PromQL.
        AssertionError: a metric, a label or a value of a label that the program does not export.
    """
    kept: list[set[str]] = []
    seen: list[str] = []

    def look(node: Any) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            look(node.vector_selector)
        elif isinstance(node, promql_parser.VectorSelector):
            assert node.name in METRICS, f"no such metric: {node.name}"
            seen.append(node.name)
            for matcher in node.matchers.matchers:
                _label(node.name, matcher)
        elif isinstance(node, promql_parser.AggregateExpr):
            inside = {name for name in METRICS if re.search(rf"\b{name}\b", node.expr.prettify())}
            labels = set(node.modifier.labels) if node.modifier is not None else set()
            for name in inside:
                assert labels <= set(METRICS[name]), f"{name} has no label {labels - set(METRICS[name])}"
            kept.append(labels)

    promql_parser.walk(promql_parser.parse(text), pre_visit=look)
    assert seen, f"no metric was found in {text}"
    return set.intersection(*kept) if kept else set()


def _label(metric: str, matcher: promql_parser.Matcher) -> None:
    labels = METRICS[metric]
    assert matcher.name in labels, f"{metric} has no label {matcher.name}"
    values = labels[matcher.name]
    if values is not None:
        assert matcher.value in values, f"{metric}: no {matcher.name} {matcher.value}"


def dashboard(tree: Tree) -> None:
    """Grafana's own model of a dashboard takes every key of it, panels do not overlap, and each query is valid.

    The model leaves out a key that it does not know. So what it gives back is compared with what went in.
    """
    register_default_plugins()
    _kept(tree, json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(tree)))), "")
    ids = [p["id"] for p in tree["panels"]]
    assert len(set(ids)) == len(ids), "two panels of one id"
    taken: dict[tuple[int, int], str] = {}
    for panel in tree["panels"]:
        for cell in _cells(panel["gridPos"]):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]
    for text in queries(tree):
        expression(text)


def _kept(before: Any, after: Any, where: str) -> None:
    if isinstance(before, Mapping):
        for key, value in before.items():
            assert key in after, f"unknown to Grafana: {where}/{key}"
            _kept(value, after[key], f"{where}/{key}")
    elif isinstance(before, list):
        assert len(before) == len(after), where
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            _kept(one, other, f"{where}/{i}")
    else:
        assert before == after, where


def _cells(place: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    assert place["x"] >= 0 and place["x"] + place["w"] <= 24, "Grafana's grid has 24 columns"
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


def queries(tree: Tree) -> Iterator[str]:
    """The expressions of a dashboard: those of its panels, and the selectors of its variables."""
    for panel in tree["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in tree["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found, f"not label_values: {variable['query']}"
            yield f"max by ({found[2]}) ({found[1]})"
