"""Neighbour replay: one step on D and on D' (one unit nulled), noise zero. The sums differ by exactly that unit's own
clipped gradient, whatever the algorithm, the adapter, the micro-batches, and wherever the unit sits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import pytest
import torch

from dprlhf_ray import config_file
from dprlhf_ray.config import AdapterConfig, AlgorithmConfig
from dprlhf_ray.models.policy import load_policy
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.records import Completion, Experience, Prompt
from dprlhf_ray.stages import batching
from dprlhf_ray.stages.rl import Draw, RLObjective

ALGORITHMS = list(get_args(AlgorithmConfig.model_fields["kind"].annotation))


def _objective(model: Path, algorithm: str, kind: str, clip_norm: float) -> RLObjective:
    config = config_file.parse(
        {
            "model": {"name": str(model), "dtype": "float32", "adapter": {"kind": kind, "rank": 2}},
            "stages": [
                {
                    "privacy": {"mode": "clip_only", "clip_norm": clip_norm, "expected_batch": 8},
                    "algorithm": {"kind": algorithm, "completions_per_prompt": 2, "kl_coef": 0.05},
                }
            ],
        }
    )
    policy = load_policy(model, config.model, 0, value_head=algorithm == "ppo")
    reference = load_policy(model, config.model, 0).requires_grad_(False) if kind == "full" else None
    torch.manual_seed(3)
    with torch.no_grad():  # away from the start, where B = 0 hides gradients of A, the KL and the value head
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return RLObjective(policy, config.stages[0], Recorder(policy), reference)


def _units(count: int) -> list[Experience]:
    rng = random.Random(7)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 250) for _ in range(n))

    units = []
    for slot in range(count):
        done = tuple(Completion(tokens(rng.randint(1, 9)), "", False, 0) for _ in range(2))
        rewards = (rng.uniform(-1, 1), rng.uniform(-1, 1))
        units.append(Experience(Prompt(slot, tokens(rng.randint(1, 6)), ""), done, rewards))
    return units


def _sum(objective: RLObjective, units: list[Experience], budget: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    total, metrics = objective.clipped_sum(Draw(batching.plan(units, 2, budget, 64, 0), baseline=0.1))
    return total.total, metrics


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
@pytest.mark.parametrize("kind", list(get_args(AdapterConfig.model_fields["kind"].annotation)))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nulling_a_unit_removes_its_own_clipped_gradient_and_nothing_else(
    algorithm: str, kind: str, clip_norm: float, tiny_model: Path
) -> None:
    """False: some statistic, shared loss term or micro-batch couples records, and clipping bounds nothing."""
    objective = _objective(tiny_model, algorithm, kind, clip_norm)
    units = _units(6)
    everybody, metrics = _sum(objective, units)
    longest = max(range(6), key=lambda i: len(units[i].prompt.token_ids) + len(units[i].completions[0].token_ids))
    for i in {0, longest, 5}:
        others, others_metrics = _sum(objective, units[:i] + units[i + 1 :])
        own, own_metrics = _sum(objective, [units[i]])
        deviation = (everybody - others - own).norm() / own.norm()
        assert deviation < 2e-4, f"unit {i}: {deviation:.2e} of its own gradient"
        assert own.norm() <= clip_norm * (1 + 1e-5)
        assert torch.allclose(metrics - others_metrics, own_metrics, atol=1e-5)
        assert own_metrics.norm() <= objective.metrics.bound + 1e-6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_record_that_fails_contributes_zero_and_touches_nobody(algorithm: str, tiny_model: Path) -> None:
    """False: a scorer's error, an empty prompt or a non-finite reward reaches other records or the metrics."""
    objective = _objective(tiny_model, algorithm, "lora", 1.0)
    units = _units(5)
    expected, expected_metrics = _sum(objective, units[1:])
    broken = [
        Experience(units[0].prompt, units[0].completions, (None, 0.3)),
        Experience(Prompt(0, (), ""), units[0].completions, units[0].rewards),
        Experience(units[0].prompt, (), ()),
    ]
    for unit in broken:
        got, metrics = _sum(objective, [unit, *units[1:]])
        assert torch.allclose(got, expected, atol=1e-6) and torch.allclose(metrics, expected_metrics, atol=1e-6)
    poisoned = Experience(units[0].prompt, units[0].completions, (float("nan"), 0.2))
    got, _ = _sum(objective, [poisoned, *units[1:]])
    assert torch.isfinite(got).all() and torch.allclose(got, expected, atol=1e-6)


def test_micro_batches_and_order_do_not_change_the_sum(tiny_model: Path) -> None:
    """False: how a draw is cut or ordered changes what is released."""
    objective = _objective(tiny_model, "rloo", "lora", 0.01)
    units = _units(6)
    one, _ = _sum(objective, units, budget=10_000)
    many, _ = _sum(objective, list(reversed(units)), budget=1)
    assert torch.allclose(one, many, atol=1e-7)
    padded = Draw([*batching.plan(units, 2, 10_000, 64, 0), batching.empty(2, 0)], 0.1)
    assert torch.allclose(objective.clipped_sum(padded)[0].total, one, atol=1e-7)


def test_brute_force_one_record_at_a_time(tiny_model: Path) -> None:
    """False: the recorded, clipped sum differs from a loop of ordinary one-record autograd over the same loss."""
    objective = _objective(tiny_model, "rloo", "lora", 0.02)
    units = _units(5)
    got, _ = _sum(objective, units)
    total = ClippedSum(objective.recorder.sizes, 0.02)
    instrumented = [m for m in objective.policy.modules() if "forward" in m.__dict__]
    saved = [m.__dict__.pop("forward") for m in instrumented]  # the plain model again
    for unit in units:
        batch = batching.collate([unit], 2, 0)
        loss = objective._loss(Draw([batch], 0.1), 0, batch).sum()
        grads = torch.autograd.grad(loss, objective.recorder.parameters)
        total.add([g.unsqueeze(0) for g in grads], torch.tensor([True]))
    for m, f in zip(instrumented, saved, strict=True):
        m.__dict__["forward"] = f
    assert (got - total.total).norm() / total.total.norm() < 1e-5


def test_a_second_step_with_equal_weights_remembers_nothing(tiny_model: Path) -> None:
    """False: a running statistic of the first draw (reward mean, norm, cache) enters the second."""
    objective = _objective(tiny_model, "ppo", "lora", 0.05)
    units = _units(6)
    fresh, _ = _sum(objective, units[3:])
    _sum(objective, units[:3])
    again, _ = _sum(objective, units[3:])
    assert torch.equal(fresh, again)


def test_a_unit_is_padded_to_a_width_that_depends_on_its_own_length_alone() -> None:
    """False: a longer neighbour changes the shape, and so the rounding, in which a unit's gradient is computed."""
    units = [
        Experience(Prompt(i, (5,) * p, ""), (Completion((7,) * c, "", False, 0),), (1.0,))
        for i, (p, c) in enumerate([(3, 4), (3, 5), (9, 2), (40, 30), (5, 16), (2, 1)])
    ]

    def shapes(these: list[Experience]) -> dict[int, tuple[int, int]]:
        found = {}
        for batch in batching.plan(these, 1, 10_000, 64, 0):
            for row, length in enumerate(batch.prompt_lengths.tolist()):
                found[length * 100 + int(batch.mask[row].sum())] = (batch.tokens.shape[1], batch.responses.shape[1])
        return found

    together = shapes(units)
    assert len(together) == 6
    for unit in units:
        assert shapes([unit]).items() <= together.items()
