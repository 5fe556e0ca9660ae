"""The folder cluster: every file is what its tool reads, says what the program needs, and fits the other files."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import typer

from dprlhf_ray import cli, config_file
from dprlhf_ray.config import RunConfig
from tests.cluster import validators
from tests.cluster.validators import CLUSTER, Tree, document, documents

ROOT = CLUSTER.parent
PRIVATE_IN_MEMORY = {"/tmp", "/dev/shm"}


def _dashboard() -> Tree:
    tree: Tree = json.loads((CLUSTER / "grafana/dprlhf.json").read_text(encoding="utf-8"))
    return tree


def _specs() -> list[Tree]:
    return [document("kuberay/raycluster.yaml")["spec"], document("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]]


def _containers(spec: Tree) -> list[Tree]:
    return [c for group in validators.groups(spec) for c in group["template"]["spec"]["containers"]]


# each file is what its tool reads


def test_ray_takes_the_launcher_config() -> None:
    prepared = validators.launcher(document("launcher.yaml"))
    node_type = prepared["available_node_types"]["local.cluster.node"]
    assert node_type["min_workers"] == node_type["max_workers"] == len(prepared["provider"]["worker_ips"])


def test_ray_takes_the_cluster_and_the_job() -> None:
    """False: a field that KubeRay, Kubernetes or `ray start` does not have, or groups that Ray's reader misreads."""
    for seen in (
        validators.ray_cluster(document("kuberay/raycluster.yaml")),
        validators.ray_job(document("kuberay/rayjob.yaml")),
    ):
        nodes = seen["available_node_types"]
        assert nodes["headgroup"]["resources"]["CPU"] == 0 and not nodes["headgroup"]["resources"].get("GPU")
        assert nodes["learners"]["resources"]["GPU"] == 2 and nodes["rollouts"]["resources"]["GPU"] == 1
        assert nodes["rollouts"]["min_workers"] < nodes["rollouts"]["max_workers"]
        assert {name: n["labels"]["dprlhf-role"] for name, n in nodes.items()} == {
            "headgroup": "head",
            "learners": "learners",
            "rollouts": "rollouts",
        }


@pytest.mark.parametrize("name", ["storage", "secrets.example", "networkpolicy"])
def test_kubernetes_takes_the_other_manifests(name: str) -> None:
    for tree in documents(f"kuberay/{name}.yaml"):
        validators.kubernetes(tree)


@pytest.mark.parametrize("name", ["prometheus", "prometheus-kubernetes"])
def test_prometheus_config(name: str) -> None:
    tree = document(f"prometheus/{name}.yml")
    validators.prometheus(tree)
    assert all((CLUSTER / "prometheus" / file).is_file() for file in tree["rule_files"])


def test_alerts_use_metrics_that_are_exported() -> None:
    validators.rules(document("prometheus/alerts.yml"))


def test_the_dashboard_is_grafana_s_and_shows_every_metric() -> None:
    tree = _dashboard()
    validators.dashboard(tree)
    text = " ".join(validators.queries(tree))
    assert all(metric in text for metric in validators.METRICS)
    shown = set(re.findall(r'ray_dprlhf_rollout{figure="(\w+)"', text))
    assert shown == validators.METRICS["ray_dprlhf_rollout"]["figure"]
    assert [v["name"] for v in tree["templating"]["list"]] == ["datasource", "run", "stage"]


def test_the_metrics_are_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a gauge was renamed, or has another label, and alerts and dashboard wait for the old one."""
    from dprlhf_ray.observability import gauges

    found: dict[str, set[str]] = {}

    def record(name: str, description: str = "", tag_keys: tuple[str, ...] = ()) -> None:
        found[f"ray_{name}"] = set(tag_keys)

    monkeypatch.setattr(gauges, "Gauge", record)
    gauges.Gauges("run", "partition")
    assert found == {name: set(labels) for name, labels in validators.METRICS.items()}


# each says what the program needs


def _launcher_starts() -> tuple[Tree, Tree]:
    tree = document("launcher.yaml")
    (head,) = (o for c in tree["head_start_ray_commands"] for o in validators.starts(c))
    (worker,) = (o for c in tree["worker_start_ray_commands"] for o in validators.starts(c))
    return head, worker


def _kuberay_starts() -> Iterator[tuple[Tree, list[Tree]]]:
    for spec in _specs():
        head, *workers = [_flags(group["rayStartParams"]) for group in validators.groups(spec)]
        yield head, workers


def _flags(params: dict[str, str]) -> Tree:
    words = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in params.items()]
    return validators.start_options(shlex.split(" ".join(words)))


def test_no_private_text_is_spilled_to_disk() -> None:
    """False: spilling is on, or what the full object store maps to files goes to a disk."""
    head, worker = _launcher_starts()
    for h, others, memory in [(head, [worker], "/mnt/dprlhf/"), *((h, w, "/tmp/") for h, w in _kuberay_starts())]:
        assert h["system_config"] == {"automatic_object_spilling_enabled": False}
        assert all(node["object_spilling_directory"].startswith(memory) for node in [h, *others])
        assert all(node["disable_usage_stats"] for node in [h, *others])
    assert head["temp_dir"] == worker["temp_dir"] and head["temp_dir"].startswith("/mnt/dprlhf/")
    assert any(
        "mount -t tmpfs" in c and c.endswith(" /mnt/dprlhf)")
        for c in document("launcher.yaml")["initialization_commands"]
    )


def test_the_launcher_s_dashboard_listens_on_the_head_only() -> None:
    head, _ = _launcher_starts()
    assert head["dashboard_host"] == "127.0.0.1" and head["num_cpus"] == head["num_gpus"] == 0
    assert head["node_ip_address"] == document("launcher.yaml")["provider"]["head_ip"]


def test_every_node_of_the_launcher_has_tokens_and_tls() -> None:
    """False: a `ray start` without the environment file, or a variable that is missing in it."""
    tree = document("launcher.yaml")
    for command in [*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]]:
        assert command.startswith(". ~/dprlhf_ray/cluster/ray-env.sh && ")
    script = (CLUSTER / "ray-env.sh").read_text(encoding="utf-8")
    found = dict(re.findall(r"^export (\w+)=(\S+)", script, re.MULTILINE))
    expected = {
        "RAY_AUTH_MODE": "token",
        "RAY_USE_TLS": "1",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    assert expected.items() <= found.items()
    assert {"RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"} <= found.keys()
    assert found["RAY_AUTH_TOKEN_PATH"].strip('"').replace("$HOME", "~") in tree["file_mounts"]
    assert any("chmod 600 ~/.ray/auth_token" in c for c in tree["setup_commands"])


def test_the_launcher_copies_the_program_and_no_data() -> None:
    """False: a pattern leaves out a file of the program, or a ledger, its key or a data file travels to the workers."""
    patterns = document("launcher.yaml")["rsync_exclude"]

    def left_out(path: Path) -> bool:
        for pattern in patterns:
            name = pattern.strip("/")
            parts = path.parts[:1] if pattern.startswith("/") else path.parts
            if any(fnmatch.fnmatch(part, name) for part in (parts if pattern.endswith("/") else path.parts[-1:])):
                return True
        return False

    needed = [p for folder in ("dprlhf_ray", "cluster", "configs", "requirements") for p in (ROOT / folder).rglob("*")]
    kept = [p.relative_to(ROOT) for p in needed if p.is_file() and not {"__pycache__", "grafana"} & {*p.parts}]
    assert kept and not [p for p in kept if left_out(p)]
    private = ["runs/a/ledger.db", "x/ledger.db", "x/ledger.db-wal", "x/ledger.key", "tickets.jsonl", "data/t.parquet"]
    assert all(left_out(Path(p)) for p in private)


def test_pods_write_to_memory_and_to_their_volumes_only() -> None:
    for spec in _specs():
        for group in validators.groups(spec):
            template = group["template"]["spec"]
            memory = {v["name"] for v in template["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"}
            assert not [v for v in template["volumes"] if "emptyDir" in v and v["name"] not in memory]
            assert template["securityContext"]["runAsNonRoot"] is True
            # With any other policy the key of the ledger becomes readable for the group, and the program refuses it.
            assert template["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
            (container,) = template["containers"]
            mounted = {m["mountPath"] for m in container["volumeMounts"] if m["name"] in memory}
            assert mounted >= PRIVATE_IN_MEMORY
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert "ulimit -c 0" in container["command"][0]
            sizes = sum(_gib(v["emptyDir"]["sizeLimit"]) for v in template["volumes"] if v["name"] in memory)
            assert sizes < _gib(container["resources"]["limits"]["memory"])
        # KubeRay adds an autoscaler to the head, and for the two a volume ray-logs on disk, unless there is one.
        head = spec["headGroupSpec"]["template"]["spec"]
        assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in head["containers"][0]["volumeMounts"]


def _gib(size: str) -> int:
    assert size.endswith("Gi")
    return int(size[:-2])


def test_only_the_head_has_records_and_ledger() -> None:
    """False: a learner or an engine could read the data set, or the key of the ledger."""
    private = {"data": "dprlhf-data", "ledger": "dprlhf-ledger"}
    for spec in _specs():
        head, *workers = (group["template"]["spec"] for group in validators.groups(spec))
        claims = {v["name"]: v["persistentVolumeClaim"] for v in head["volumes"] if "persistentVolumeClaim" in v}
        assert {name: claims[name]["claimName"] for name in private} == private and claims["data"]["readOnly"] is True
        for worker in workers:
            used = {v["persistentVolumeClaim"]["claimName"] for v in worker["volumes"] if "persistentVolumeClaim" in v}
            assert not used & set(private.values())
    modes = {c["metadata"]["name"]: c["spec"]["accessModes"] for c in documents("kuberay/storage.yaml")}
    assert modes["dprlhf-ledger"] == ["ReadWriteOncePod"] and modes["dprlhf-runs"] == ["ReadWriteMany"]


def test_the_operator_alone_sets_token_and_certificates() -> None:
    """False: tokens or TLS are off, or a variable is set by hand, for which KubeRay refuses the cluster."""
    for spec in _specs():
        assert spec["authOptions"] == {"mode": "token"} and spec["tlsOptions"] == {"enabled": True}
        names = {e["name"] for c in _containers(spec) for e in c["env"]}
        assert not [n for n in names if n.startswith(("RAY_TLS_", "RAY_AUTH_")) or n == "RAY_USE_TLS"]
        assert all({"name": "RAY_TRAIN_V2_ENABLED", "value": "1"} in c["env"] for c in _containers(spec))


def test_the_job_s_command_is_one_the_program_takes() -> None:
    """False: a misspelt option or key; or the cluster has fewer GPUs than the config that it is sized for needs."""
    spec = document("kuberay/rayjob.yaml")["spec"]
    program, command, *words = shlex.split(spec["entrypoint"])
    assert (program, command) == ("dprlhf", "run")
    given = typer.main.get_command(cli.app).commands[command].make_context(command, words).params  # type: ignore[attr-defined]
    assert str(given["config"]) == "/config/config.yaml" and given["resume"] is True
    config = config_file.load(ROOT / "configs/llama-1b.yaml", given["overrides"])
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {m["mountPath"]: m["name"] for m in head["containers"][0]["volumeMounts"]}
    for path, volume in ((config.ledger, "ledger"), (config.ledger_anchor, "runs"), (given["output"], "runs")):
        assert mounts["/" + str(path).split("/")[1]] == volume
    assert _gpus(config) <= sum(
        group["maxReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
    )


def _gpus(config: RunConfig) -> float:
    return (
        config.learner.num_workers * config.learner.use_gpu
        + config.rollout.replicas * config.rollout.gpus_per_replica
        + config.rollout.scorer_gpus
    )


# the files fit each other


def test_cluster_and_job_have_one_spec() -> None:
    cluster, job = _specs()
    assert cluster.pop("gcsFaultToleranceOptions")
    assert cluster == job


def test_versions_and_image_are_one() -> None:
    job = document("kuberay/rayjob.yaml")["spec"]
    images = {c["image"] for spec in _specs() for c in _containers(spec)}
    images |= {c["image"] for c in job["submitterPodTemplate"]["spec"]["containers"]}
    assert len(images) == 1 and f"-t {images.pop()} " in (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert {spec["rayVersion"] for spec in _specs()} == {ray.__version__}
    assert f"ray=={ray.__version__}" in (ROOT / "requirements/gpu.txt").read_text(encoding="utf-8").splitlines()


def test_claims_secrets_and_selectors_name_what_there_is() -> None:
    claims = {c["metadata"]["name"] for c in documents("kuberay/storage.yaml")}
    secrets = {s["metadata"]["name"]: set(s["stringData"]) for s in documents("kuberay/secrets.example.yaml")}
    for spec in _specs():
        for volume in (v for g in validators.groups(spec) for v in g["template"]["spec"]["volumes"]):
            assert volume.get("persistentVolumeClaim", {"claimName": "dprlhf-runs"})["claimName"] in claims
        references = [e["valueFrom"]["secretKeyRef"] for c in _containers(spec) for e in c["env"] if "valueFrom" in e]
        if "gcsFaultToleranceOptions" in spec:
            references.append(spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"])
        assert references and all(r["key"] in secrets[r["name"]] for r in references)
    assert {value for s in documents("kuberay/secrets.example.yaml") for value in s["stringData"].values()} <= {
        "REPLACE-ME",
        "verify-full",
    }


def test_the_network_policy_selects_all_pods_and_opens_ports_that_exist() -> None:
    policy = document("kuberay/networkpolicy.yaml")["spec"]
    spec, submitter = _specs()[1], document("kuberay/rayjob.yaml")["spec"]["submitterPodTemplate"]
    (chosen,) = policy["podSelector"]["matchExpressions"]
    assert {g["labels"][chosen["key"]] for g in validators.groups(spec)} == set(chosen["values"])
    inside, dashboard, metrics = policy["ingress"]
    assert inside == {"from": [{"podSelector": policy["podSelector"]}]}
    assert dashboard["from"][0]["podSelector"]["matchLabels"].items() <= submitter["metadata"]["labels"].items()
    ports = {p["name"]: p["containerPort"] for p in _containers(spec)[0]["ports"]}
    assert [p["port"] for p in dashboard["ports"]] == [ports["dashboard"]]
    assert [p["port"] for p in metrics["ports"]] == [ports[n] for n in ("metrics", "as-metrics", "dash-metrics")]


def test_prometheus_finds_what_the_other_files_start() -> None:
    (job,) = document("prometheus/prometheus.yml")["scrape_configs"]
    head, _ = _launcher_starts()
    assert job["file_sd_configs"][0]["files"] == [
        f"{head['temp_dir']}/{ray._private.ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    ]
    (job,) = document("prometheus/prometheus-kubernetes.yml")["scrape_configs"]
    role, port = (re.compile(rule["regex"]) for rule in job["relabel_configs"] if rule.get("action") == "keep")
    for spec in _specs():
        assert all(role.fullmatch(g["labels"]["dprlhf-role"]) for g in validators.groups(spec))
        names = {p["name"] for p in _containers(spec)[0]["ports"]}
        assert {n for n in names if port.fullmatch(n)} == {"metrics", "as-metrics", "dash-metrics"}


def test_the_image_is_built_from_files_that_exist() -> None:
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    assert any("pip install" in line and "-r requirements/gpu.txt" in line for line in lines)


def test_the_readme_names_every_file() -> None:
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    files = [str(p.relative_to(CLUSTER)) for p in CLUSTER.rglob("*") if p.is_file() and p.name != "README.md"]
    assert files and not [f for f in files if f"`{f}`" not in readme]


# the validators refuse what is wrong


def _rename(old: str, new: str, *path: str | int) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        place = _at(tree, path)
        place[new] = place.pop(old)

    return change


def _put(value: Any, *path: str | int) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        _at(tree, path[:-1])[path[-1]] = value

    return change


def _at(tree: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


LAUNCHER = "launcher.yaml"
RAY_CLUSTER = "kuberay/raycluster.yaml"
RAY_JOB = "kuberay/rayjob.yaml"
POLICY = "kuberay/networkpolicy.yaml"
ON_MACHINES = "prometheus/prometheus.yml"
IN_KUBERNETES = "prometheus/prometheus-kubernetes.yml"
ALERTS = "prometheus/alerts.yml"
DASHBOARD = "grafana/dprlhf.json"
VALIDATORS: dict[str, Callable[[Tree], Any]] = {
    LAUNCHER: validators.launcher,
    RAY_CLUSTER: validators.ray_cluster,
    RAY_JOB: validators.ray_job,
    POLICY: validators.kubernetes,
    ON_MACHINES: validators.prometheus,
    IN_KUBERNETES: validators.prometheus,
    ALERTS: validators.rules,
    DASHBOARD: validators.dashboard,
}
HEAD = ("spec", "headGroupSpec", "template", "spec", "containers", 0)
LEARNERS = ("spec", "workerGroupSpecs", 0)
RULE = ("groups", 0, "rules", 0)
PANEL = ("panels", 1)
START = ("head_start_ray_commands", 1)
DROP = ("spec", "autoscalerOptions", "securityContext", "capabilities", "drop")
SUBMITTER = ("spec", "submitterPodTemplate", "spec")
POD_JOB = ("scrape_configs", 0)

# file, what is wrong in it, part of what the validator says
BROKEN: list[tuple[str, Callable[[Tree], None], str]] = [
    (LAUNCHER, _rename("max_workers", "max_worker"), "'max_worker' was unexpected"),
    (LAUNCHER, _rename("ssh_user", "user", "auth"), "'user' was unexpected"),
    (LAUNCHER, _put("hours", "idle_timeout_minutes"), "is not of type 'number'"),
    (LAUNCHER, _rename("head_ip", "headip", "provider"), "Please supply a `head_ip`"),
    (LAUNCHER, _put("ray start --head --dashboard-hots=127.0.0.1", *START), "No such option '--dashboard-hots'"),
    (LAUNCHER, _put("ray start --head --system-config='{spilling: no}'", *START), "Expecting property name"),
    (LAUNCHER, _put("ray start --head --labels=role=head=1", *START), "not a key-value pair"),
    (LAUNCHER, _put("ray startt --head", *START), "not one `ray start`"),
    (RAY_CLUSTER, _rename("authOptions", "authOption", "spec"), "'authOption' was unexpected"),
    (RAY_CLUSTER, _put("tokens", "spec", "authOptions", "mode"), "'tokens' is not one of"),
    (RAY_CLUSTER, _put("yes", "spec", "tlsOptions", "enabled"), "is not of type 'boolean'"),
    (RAY_CLUSTER, _rename("maxReplicas", "maxReplica", *LEARNERS), "'maxReplicas' is a required property"),
    (RAY_CLUSTER, _put("no", *LEARNERS, "rayStartParams", "num-cpu"), "No such option '--num-cpu'"),
    (RAY_CLUSTER, _put({"-role": "a"}, *LEARNERS, "labels"), "Invalid label key name"),
    (RAY_CLUSTER, _rename("volumeMounts", "volumeMount", *HEAD), "'volumeMount' was unexpected"),
    (RAY_CLUSTER, _put("6379", *HEAD, "ports", 0, "containerPort"), "'6379' is not of type 'integer'"),
    (RAY_CLUSTER, _put("runz", *HEAD, "volumeMounts", 0, "name"), "a mount without its volume"),
    (RAY_CLUSTER, _put("/tmp", *HEAD, "volumeMounts", 0, "mountPath"), "a path that is mounted twice"),
    (RAY_CLUSTER, _put("many", *HEAD, "resources", "limits", "cpu"), "Invalid number format"),
    (RAY_CLUSTER, _put("ALL", *DROP), "'ALL' is not of type 'array'"),
    (RAY_JOB, _put("K8sJob", "spec", "submissionMode"), "'K8sJob' is not one of"),
    (RAY_JOB, _rename("backoffLimit", "backOffLimit", "spec"), "'backOffLimit' was unexpected"),
    (RAY_JOB, _rename("entrypoint", "entryPoint", "spec"), "'entrypoint' is a required property"),
    (RAY_JOB, _rename("restartPolicy", "restart", *SUBMITTER), "'restart' was unexpected"),
    (POLICY, _rename("from", "form", "spec", "ingress", 0), "'form' was unexpected"),
    (POLICY, _rename("policyTypes", "policyType", "spec"), "'policyType' was unexpected"),
    (ON_MACHINES, _rename("scrape_configs", "scrape_config"), "'scrape_configs' is a required property"),
    (ON_MACHINES, _put("15 seconds", "global", "scrape_interval"), "not a valid duration string"),
    (IN_KUBERNETES, _put("pods", *POD_JOB, "kubernetes_sd_configs", 0, "role"), "'pods' is not one of"),
    (IN_KUBERNETES, _put("(a", *POD_JOB, "relabel_configs", 0, "regex"), "unterminated subpattern"),
    (ALERTS, _rename("for", "fore", *RULE), "'fore' was unexpected"),
    (ALERTS, _put("soon", *RULE, "for"), "not a valid duration string"),
    (ALERTS, _put("max by (run) ray_dprlhf_step ==", *RULE, "expr"), "invalid promql query"),
    (ALERTS, _put("max by (run) (ray_dprlhf_steps) > 0", *RULE, "expr"), "no such metric: ray_dprlhf_steps"),
    (ALERTS, _put("sum by (run) (changes(dprlhf_step[5m])) > 0", *RULE, "expr"), "no such metric: dprlhf_step"),
    (ALERTS, _put("max by (replica) (ray_dprlhf_step) > 0", *RULE, "expr"), "has no label {'replica'}"),
    (ALERTS, _put('max by (run) (ray_dprlhf_step{figure="a"}) > 0', *RULE, "expr"), "has no label figure"),
    (ALERTS, _put('max by (run) (ray_dprlhf_rollout{figure="health"}) > 0', *RULE, "expr"), "no figure health"),
    (ALERTS, _put("{{ $labels.stage }}", *RULE, "annotations", "summary"), "its result has no label {'stage'}"),
    (DASHBOARD, _rename("schemaVersion", "schema"), "unknown to Grafana: /schema"),
    (DASHBOARD, _rename("fieldConfig", "fieldconfig", *PANEL), "unknown to Grafana: /panels/1/fieldconfig"),
    (DASHBOARD, _rename("lineWidth", "linewidth", *PANEL, "fieldConfig", "defaults", "custom"), "custom/linewidth"),
    (DASHBOARD, _rename("expr", "expression", *PANEL, "targets", 0), "targets/0/expression"),
    (DASHBOARD, _put("max by (run", *PANEL, "targets", 0, "expr"), "unclosed left parenthesis"),
    (DASHBOARD, _put(1, *PANEL, "id"), "two panels of one id"),
    (DASHBOARD, _put(13, *PANEL, "gridPos", "w"), "Steps lies on Epsilon spent"),
    (
        DASHBOARD,
        _put("label_values(ray_dprlhf_steps, run)", "templating", "list", 1, "query"),
        "no such metric: ray_dprlhf_steps",
    ),
]


@pytest.mark.parametrize(("file", "change", "said"), BROKEN, ids=[f"{i}-{b[0]}" for i, b in enumerate(BROKEN)])
def test_a_broken_file_is_refused(file: str, change: Callable[[Tree], None], said: str) -> None:
    """False: the validator would take anything, and the tests above say nothing."""
    tree = _dashboard() if file == DASHBOARD else document(file)
    change(tree)
    with pytest.raises(Exception) as refused:  # noqa: B017  (each format's validator has its own)
        VALIDATORS[file](tree)
    assert said in (getattr(refused.value, "message", None) or str(refused.value))
