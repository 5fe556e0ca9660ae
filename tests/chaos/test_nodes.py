"""Whole nodes of a cluster are lost, as machines that lose their power, with the learner and with a replica on them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psutil
import pytest

from cluster import local
from dprlhf_ray.actors import cluster
from dprlhf_ray.stage_run import Roles
from tests.chaos import points
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

WORK = {"dprlhf-role": "work"}
STEPS = 4
LOST = {1: "learner", 3: "replica"}  # after which attempt the node of which role is lost
Done = tuple[Case, Seen, dict[str, list[int]]]


def lose(nodes: local.LocalCluster, case: Case, role: str) -> list[int]:
    """Kill every process of the node where a role lives; returns the role's."""
    pids = points.living(str(case.journal), role)
    for node in nodes.nodes[1:]:
        if node.poll() is None and pids[-1] in {p.pid for p in family(node)}:
            for process in [psutil.Process(node.pid), *family(node)]:
                process.kill()
            return pids
    raise AssertionError(f"{role} {pids} is on no node of its own")


def family(node: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(node.pid).children(recursive=True)


@pytest.fixture(scope="module")
def done(chaos: Chaos, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A run on a head and three workers, two of which are lost on the way."""
    case, root = chaos.begin([]), tmp_path_factory.mktemp("nodes") / "out"
    lost: dict[str, list[int]] = {}
    with local.cluster(nodes=4, cpus=2, labels=["dprlhf-role=work"] * 3) as nodes:
        config = configured(world, "nodes", STEPS, ray={"address": nodes.address}, rollout__replicas=2,
                            rollout__node_labels=WORK, learner__node_labels=WORK)  # fmt: skip

        def fault(attempt: int, roles: Roles) -> None:
            if attempt in LOST:
                lost[LOST[attempt]] = lose(nodes, case, LOST[attempt])

        with cluster._loopback_only(), cluster.session(config):  # as the nodes were started
            ended = run(config, root, on_step=fault)
        chaos.end()
        assert ended is None, (ended, case.lines()[-20:])
        yield case, check(case, config, root, world), lost
        assert leaks([nodes.folder], private(world)) == []


@pytest.mark.parametrize("role", LOST.values(), ids=lambda role: f"node-lost-with-the-{role}")
def test_a_node_is_lost(role: str, done: Done) -> None:
    """False: a role dies with its node for good, or its death makes the run forget or repeat an attempt."""
    case, seen, lost = done
    assert lost[role]
    after = [e for e in case.passages(f"{role}.start", "after") if e["pid"] not in lost[role]]
    assert after, "no other came up"
    assert set(seen.charged) - set(seen.released) <= {n + 1 for n in LOST}
