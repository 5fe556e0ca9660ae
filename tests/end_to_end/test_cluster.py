"""A run on a cluster of several nodes: submitted as a job, scaled, a node lost under it, stopped, submitted again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import local
from dprlhf_ray.actors import control
from dprlhf_ray.observability.metrics import read_metrics
from dprlhf_ray.privacy.ledger import Ledger
from tests.end_to_end.runs import Command, World, attempts, forms, leaks, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 50
ACTORS = """
import json, sys
from ray.util.state import list_actors
found = list_actors(address=sys.argv[1], filters=[("state", "=", "ALIVE")], limit=1000)
print(json.dumps({a.name: a.node_id for a in found if a.name}))
"""


@pytest.fixture(scope="module")
def nodes(scratch: Path) -> Iterator[local.LocalCluster]:
    with local.cluster(nodes=3, cpus=2) as found:
        yield found


def _submit(config: Path, root: Path, nodes: local.LocalCluster, *more: str) -> Command:
    return Command("submit", str(config), "--output", str(root), "--address", nodes.jobs, *more)


def _released(root: Path) -> list[int]:
    return [row["attempt"] for row in read_metrics(root)] if (root / "metrics.jsonl").exists() else []


def _actors(nodes: local.LocalCluster) -> dict[str, str]:
    environment = os.environ | local.ENVIRONMENT
    done = subprocess.run(
        [sys.executable, "-c", ACTORS, nodes.address], env=environment, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _kill(node: subprocess.Popen[bytes]) -> None:
    """As a machine that loses its power: all processes at once."""
    for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
        process.kill()


def test_the_nodes_listen_on_this_machine_only(nodes: local.LocalCluster) -> None:
    """False: whoever reaches the machine reaches Ray's ports."""
    family = [p for node in nodes.nodes for p in psutil.Process(node.pid).children(recursive=True)]
    listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert len(listening) > 12 and {ip.removeprefix("::ffff:") for ip in listening} == {local.HOST}


def test_a_job_s_bad_input_comes_back_as_one_line_and_exit_code_2(
    world: World, tmp_path: Path, nodes: local.LocalCluster
) -> None:
    tree = world.tree()
    tree["data"]["notes"]["source"] = str(tmp_path / "nowhere.jsonl")
    code, out, err = _submit(write_config(tmp_path / "c.yaml", tree), tmp_path / "run", nodes).end()
    assert (
        code == 2
        and "failed, exit code 2" in err
        and "dprlhf: data.notes: data source" in out
        and "Traceback" not in out
    )
    assert not (tmp_path / "run" / "ledger.db").exists()


def test_a_submitted_run_survives_a_node_is_scaled_stopped_and_continued(
    world: World, tmp_path: Path, nodes: local.LocalCluster
) -> None:
    """False: a role dies with its node for good, an attempt is refunded or made twice, a stopped job cannot be
    continued by its name, or private text is in the cluster's files."""
    root, config = tmp_path / "run", write_config(tmp_path / "c.yaml", world.tree(STEPS) | {"name": "clustered"})
    first = _submit(config, root, nodes)
    first.wait_until(lambda: len(_released(root)) >= 3)
    assert Command("scale", str(root), "--rollouts", "2", "--wait", "60").end()[0] == 0
    names = _actors(nodes)
    assert {"accountant", "scorer-rl", "learner-mailbox-rl"} <= set(names)
    assert any(name.startswith("rollout-") for name in names)
    _kill(nodes.nodes[1])
    before = max(_released(root))
    first.wait_until(lambda: max(_released(root)) >= before + 5)
    assert json.loads((root / control.ANSWER).read_text())["replicas"] == 2

    assert Command("stop", "clustered", "--address", nodes.jobs).end()[0] == 0
    code, _, err = first.end()
    assert code == 130 and "stopped, exit code 130" in err
    spent = len(attempts(root))
    assert before <= spent < STEPS

    again: tuple[int, str, str] = _submit(config, root, nodes).end(600)
    assert again[0] == 0 and "job dprlhf-clustered-2" in again[1] and "succeeded" in again[1], again
    assert Ledger.read(root / "ledger.db").schedules["rl"].spent == STEPS
    assert attempts(root) == list(range(1, STEPS + 1))
    released = _released(root)
    assert len(set(released)) == len(released) and set(released) <= set(range(1, STEPS + 1))
    assert (root / "certificate.json").exists() and (root / "models" / "rl" / "merged").exists()
    _no_private_text(nodes.folder, world)


def _no_private_text(folder: Path, world: World) -> None:
    assert leaks([folder], [form for mark in world.marks for form in forms(mark)]) == []
