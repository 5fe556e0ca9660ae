"""Starting Ray on a busy machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.actors import cluster
from dprlhf_ray.errors import ConfigError, DprlhfError


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_start_that_times_out_is_repeated_and_then_one_line(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """False: a machine that is busy for half a minute ends a run with a traceback."""
    tried: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        tried.append(settings)
        if len(tried) <= failures:
            raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    if failures < cluster.START_TRIES:
        cluster._start_local(num_cpus=2)
        assert tried == [{"address": "local", "num_cpus": 2}] * (failures + 1)
    else:
        with pytest.raises(DprlhfError, match=r"overloaded or full\? The current node timed out during startup\.$"):
            cluster._start_local(num_cpus=2)
        assert len(tried) == cluster.START_TRIES


@pytest.mark.parametrize(
    ("free", "expected"), [(1 << 30, int(0.95 * 2**30)), (64 << 20, None), (0, None), (1 << 50, 8 << 30)]
)
def test_the_object_store_is_in_memory_or_there_is_none(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: int | None
) -> None:
    """False: in a container with 64 MB of shared memory Ray lays the store, and private text, on a disk."""
    monkeypatch.setattr(cluster.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(cluster.os.path, "isdir", lambda path: free > 0)
    monkeypatch.setattr(cluster, "resolve_object_store_memory", lambda available: 8 << 30)
    if expected is not None:
        assert cluster.object_store_memory() == expected
    else:
        with pytest.raises(ConfigError, match=rf"^/dev/shm: {free >> 20} MiB are free, too little .*--shm-size=4g$"):
            cluster.object_store_memory()


PRIVATE_RAY = """
import json, os, stat, time
import psutil
from dprlhf_ray import config_file
from dprlhf_ray.actors import cluster
from dprlhf_ray.actors.cluster import ray

class Role:
    def ping(self):
        return True

def listening():
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    of = [(" ".join(p.cmdline()), c) for p in family for c in p.net_connections("inet")]
    return [(name, c.laddr.ip) for name, c in of if c.status == "LISTEN"]

os.umask(0)
config = config_file.parse({"stages": [{"privacy": {"epsilon": 1.0}}], "ray": {"dashboard": True}})
with cluster.session(config):
    role = ray.remote(Role).options(num_cpus=0).remote()
    assert ray.get(role.ping.remote())
    deadline = time.monotonic() + 60  # agents come up after the raylet
    wanted = ["gcs_server", "raylet/raylet", "monitor.py", "dashboard.py"]
    wanted += ["DashboardAgent", "RuntimeEnvAgent", "ray::Role"]
    while not all(any(w in name for name, _ in listening()) for w in wanted) and time.monotonic() < deadline:
        time.sleep(0.5)
    node, sockets = ray._private.worker._global_node, listening()
    folders = [os.path.dirname(node.get_temp_dir_path()), node._fallback_directory]
    modes = [stat.S_IMODE(os.stat(f).st_mode) for f in (*folders, os.path.expanduser("~/.ray/auth_token"))]
    with open(os.path.join(node.get_logs_dir_path(), "raylet.out")) as log:
        in_memory = "object store with directory /dev/shm" in log.read()
missing = [w for w in wanted if not any(w in name for name, _ in sockets)]
left = [f for f in folders if os.path.exists(f)]
print(json.dumps({"sockets": sockets, "missing": missing, "modes": modes, "in_memory": in_memory, "left": left}))
"""


def test_a_private_ray_is_for_this_machine_and_this_user_only(tmp_path: Path) -> None:
    """False: whoever reaches the machine reaches Ray's ports, or another user of it reads Ray's files or the token."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PRIVATE_RAY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [s for s in found["sockets"] if s[1].removeprefix("::ffff:") != "127.0.0.1"] == []
    assert found["missing"] == [] and len(found["sockets"]) > 8
    assert found["modes"] == [0o700, 0o700, 0o600]
    assert found["in_memory"] and found["left"] == []


def test_too_few_gpus_on_one_machine_are_one_line_and_none_are_asked_for_without_rl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """False: a replica waits for ever for a GPU that nobody will add."""
    tree = {"learner": {"use_gpu": True}, "rollout": {"gpus_per_replica": 1, "scorer_gpus": 1}}
    rl, sft = ({**tree, "stages": [{"kind": kind, "privacy": {"epsilon": 8.0}}]} for kind in ("rl", "sft"))
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"GPU": 1.0})
    cluster._check_gpus(config_file.parse(sft))
    with pytest.raises(ConfigError, match=r"3 GPUs are needed .* this machine has 1"):
        cluster._check_gpus(config_file.parse(rl))
