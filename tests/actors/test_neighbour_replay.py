"""Neighbour replay on the real learner (DeepSpeed, process groups, published weights), noise zero.

One step on D and on D' (one unit nulled): the released sums differ by exactly that unit's own clipped gradient, and
everybody else's part is the sum of their own. For every algorithm, one and two ranks, ZeRO 0 to 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dprlhf_ray.config import AlgorithmConfig
from tests.actors.replay import Found, replay
from tests.actors.setting import setting, units

ALGORITHMS = list(get_args(AlgorithmConfig.model_fields["kind"].annotation))
SUPERVISED = ["sft", "reward_model"]
COUNT, LONGEST = 5, 2
CLIPS = {"saturated": 0.02, "free": 1e4}
TOLERANCE = 2e-4  # of the unit's own gradient: float32 weights and sums, another order of additions
SCORED: dict[str, Any] = {"not-a-number": [float("nan"), 0.3]}
BROKEN: dict[str, Any] = {"scorer-failed": [None, 0.3], **SCORED}
BOTH = units(COUNT, 7, longest=40)  # 80 tokens: above micro_batch_tokens, a micro-batch of its own
LATER = units(3, 8)
USERS: list[Any] = [{"records": units(n, 9 + n, longest=40 if n == 3 else None)} for n in (2, 1, 3, 2, 2)]


def _without(rows: list[Any], i: int) -> list[Any]:
    return rows[:i] + rows[i + 1 :]


def _nulled(rows: list[Any], i: int) -> list[Any]:
    """A null record keeps its slot: the prompt, no completions."""
    records = rows[i]["records"] if isinstance(rows[i], dict) else [rows[i]]
    empty = [(prompt, [], []) for prompt, _, _ in records]
    return [*rows[:i], {"records": empty} if isinstance(rows[i], dict) else empty[0], *rows[i + 1 :]]


def _cases(rows: list[Any], broken: dict[str, Any]) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for label, clip in CLIPS.items():
        draws = {"all": rows} | {f"own{i}": [rows[i]] for i in range(COUNT)}
        draws |= {"left-out0": _without(rows, 0), f"nulled{LONGEST}": _nulled(rows, LONGEST)}
        draws |= {f"{k}1": [rows[0], (*rows[1][:2], rewards), *rows[2:]] for k, rewards in broken.items()}
        cases += [{"name": f"{label}/{k}", "clip_norm": clip, "draws": [d]} for k, d in draws.items()]
    # a second step whose draw lacks the unit, after a first one with and without it
    less = _without(rows, LONGEST)
    cases += [{"name": f"then-later/{k}", "draws": [d, LATER]} for k, d in (("all", rows), ("less", less))]
    return cases


def _deviation(found: Found, broken: dict[str, Any]) -> float:
    """Largest deviation from the unit's own clipped gradient, relative to it; everything exact is asserted."""
    worst = 0.0
    for label, clip in CLIPS.items():
        whole, metrics = found.sum(f"{label}/all"), found.metrics(f"{label}/all")
        own = [found.sum(f"{label}/own{i}") for i in range(COUNT)]
        own_metrics = [found.metrics(f"{label}/own{i}") for i in range(COUNT)]
        if label == "saturated":
            assert all(abs(g.norm() / clip - 1) < 1e-3 for g in own), "C saturates nobody: choose a smaller one"
        else:
            assert all(1e-3 < g.norm() < clip for g in own), "C bounds somebody: choose a larger one"
        nulled = {"left-out0": 0, f"nulled{LONGEST}": LONGEST} | {f"{k}1": 1 for k in broken}
        for name, i in nulled.items():
            others, others_metrics = found.sum(f"{label}/{name}"), found.metrics(f"{label}/{name}")
            assert torch.isfinite(others).all() and torch.isfinite(others_metrics).all(), f"{label} {name}"
            everybody_else = sum(own[:i] + own[i + 1 :])
            for difference in (whole - others - own[i], others - everybody_else):
                worst = max(worst, float(difference.norm() / own[i].norm()))
            assert torch.allclose(metrics - others_metrics, own_metrics[i], atol=1e-5), f"{label} {name}: metrics"
    first, second = "then-later/all", "then-later/less"
    assert not torch.equal(found.weights[f"{first}/0"], found.weights[f"{second}/0"])
    assert torch.equal(found.weights[f"{first}/1"], found.weights[f"{second}/1"]), "the first step is still felt"
    assert found.released[f"{first}/1"] == found.released[f"{second}/1"]
    assert all(torch.equal(other[k], v) for other in found.others for k, v in found.weights.items())
    return worst


def _check(
    out: Path, model: Path, world: int, kinds: list[str], stages: list[int], record: Any, rows: list[Any] = BOTH,
    broken: dict[str, Any] = BROKEN,
) -> None:  # fmt: skip
    settings = {f"{a}-zero{z}": setting(model, world, z, rank=2, algorithm=a) for a in kinds for z in stages}
    found = replay(out, world, settings, _cases(rows, broken))
    table = {f"{name}, {world} ranks": _deviation(f, broken) for name, f in found.items()}
    for row, value in table.items():
        record(row, f"{value:.2e}")
        print(f"{row}: {value:.2e}")
    assert max(table.values()) < TOLERANCE, table


def test_nulling_a_unit_changes_the_published_weights_by_its_own_clipped_gradient(
    tiny_model: Path, tmp_path: Path, record_property: Any
) -> None:
    """False: ranks, shards, micro-batches, an error or a running statistic couple records; clipping bounds nothing."""
    _check(tmp_path / "whole", tiny_model, 2, ["grpo"], [0], record_property)
    _check(tmp_path / "sharded", tiny_model, 2, ["ppo"], [3], record_property)


def test_supervised_stages_and_users_move_the_weights_by_their_own_clipped_gradient(
    tiny_model: Path, tmp_path: Path, record_property: Any
) -> None:
    """False: a pair's two responses, or a user's records, are clipped apart, or reach other units. Users of one to
    three records, one of them longer than a micro-batch; rewards do not matter without a scorer, a missing one does."""
    failed = {k: v for k, v in BROKEN.items() if k not in SCORED}
    _check(tmp_path / "records", tiny_model, 2, SUPERVISED, [0], record_property, broken=failed)
    _check(tmp_path / "users", tiny_model, 2, ["rloo"], [0], record_property, rows=USERS, broken={})


@pytest.mark.slow
def test_users_of_supervised_stages_as_well(tiny_model: Path, tmp_path: Path, record_property: Any) -> None:
    """As above."""
    _check(tmp_path, tiny_model, 2, SUPERVISED, [0], record_property, rows=USERS, broken={})


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stages"), [(1, [0, 1]), (1, [2, 3]), (2, [0, 1]), (2, [2, 3])])
def test_nulling_a_unit_at_every_stage(
    world: int, stages: list[int], tiny_model: Path, tmp_path: Path, record_property: Any
) -> None:
    """As above, for the rest of the grid."""
    _check(tmp_path, tiny_model, world, ALGORITHMS, stages, record_property)
