"""Neighbour replay: one step on D and on D' (one unit nulled), noise zero. The sums differ by exactly that unit's own
clipped gradient, whatever the stage, the algorithm and its options, the adapter, the micro-batches, wherever the unit
sits, and however many records it brings."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dprlhf_ray import config_file
from dprlhf_ray.algorithms import Algorithm, Batch, build
from dprlhf_ray.config import AdapterConfig, AlgorithmConfig, RunConfig
from dprlhf_ray.models.policy import load_policy
from dprlhf_ray.models.reward import load_reward_model
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.records import Completion, Experience, Prompt, Unit
from dprlhf_ray.stages import batching
from dprlhf_ray.stages.objective import Draw, Objective
from dprlhf_ray.stages.rl import RLObjective
from dprlhf_ray.stages.supervised import PairObjective, SFTObjective

ALGORITHMS = list(get_args(AlgorithmConfig.model_fields["kind"].annotation))
SUPERVISED = ["sft", "reward_model"]
OPTIONS: list[dict[str, Any]] = [
    {"normalisation": "group_tokens", "clip_range_high": 0.4},
    {"normalisation": "max_length", "advantage_scale": 0.5},
    {"normalisation": "sum", "mask_truncated": True},
    {"kl_in": "loss", "kl_estimator": "k2", "kl_schedule": "linear"},
    {"kl_in": "reward", "kl_estimator": "k3", "kl_schedule": "linear"},
    {"importance_cap": 1.1},
]
MAX_NEW_TOKENS = 12


class Stale(Algorithm):
    """Fills in what this room does not draw: completions of an older policy, some of them cut."""

    def __init__(self, inner: Algorithm) -> None:
        super().__init__(inner.config, inner.max_new_tokens)
        self.inner = inner

    def loss(self, batch: Batch) -> Tensor:
        older = batch.old_log_probs - 0.3 * torch.sin(5.0 * batch.old_log_probs)
        ended = (batch.mask.sum(-1) % 2 == 0).float()
        return self.inner.loss(replace(batch, progress=0.5, behaviour_log_probs=older, finished=ended))


def _config(model: Path, adapter: str, clip_norm: float, stage: dict[str, Any]) -> RunConfig:
    privacy = {"mode": "clip_only", "clip_norm": clip_norm, "expected_batch": 8}
    return config_file.parse(
        {
            "model": {"name": str(model), "dtype": "float32", "adapter": {"kind": adapter, "rank": 2}},
            "stages": [{"privacy": privacy, **stage}],
        }
    )


def _moved(model: torch.nn.Module, seed: int = 3) -> None:
    """Away from the start, where B = 0 hides gradients of A, the KL and the heads."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))


def _objective(model: Path, algorithm: str, kind: str, clip_norm: float, **options: Any) -> RLObjective:
    section = {"kind": algorithm, "completions_per_prompt": 2, "kl_coef": 0.05, **options}
    generation = {"max_new_tokens": MAX_NEW_TOKENS}
    config = _config(model, kind, clip_norm, {"algorithm": section, "generation": generation})
    policy = load_policy(model, config.model, 0, value_head=algorithm == "ppo")
    reference = load_policy(model, config.model, 0).requires_grad_(False) if kind == "full" else None
    _moved(policy)
    stage = config.stages[0]
    assert stage.kind == "rl"
    return RLObjective(policy, stage, Recorder(policy), reference)


def _supervised(model: Path, stage: str, kind: str, clip_norm: float) -> Objective:
    config = _config(model, kind, clip_norm, {"kind": stage})
    only = config.stages[0]
    if only.kind == "reward_model":
        scorer = load_reward_model(model, config.model, 0, [[5, 6, 7], [9, 10]], 64)
        _moved(scorer)
        return PairObjective(scorer, only, Recorder(scorer))
    policy = load_policy(model, config.model, 0)
    _moved(policy)
    assert only.kind == "sft"
    return SFTObjective(policy, only, Recorder(policy))


def _any(model: Path, stage: str, kind: str, clip_norm: float) -> Objective:
    make = _supervised if stage in SUPERVISED else _objective
    return make(model, stage, kind, clip_norm)


def _units(count: int, most_records: int = 1, group: int = 2) -> list[Unit]:
    """Units of 1 to `most_records` records each, of uneven lengths, and of so few shapes that micro-batches hold
    several: a unit's first record has its longest prompt and completion."""
    rng = random.Random(7)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 250) for _ in range(n))

    def record(slot: int, prompt: int, longest: int, first: int) -> Experience:
        lengths = [first, *(rng.randint(1, longest) for _ in range(group - 1))]
        done = tuple(Completion(tokens(n), "", False, 0) for n in lengths)
        return Experience(Prompt(slot, tokens(prompt), ""), done, [rng.uniform(-1, 1) for _ in range(group)])

    units = []
    for slot in range(count):
        longest = 5 if slot % 3 == 2 else 9
        more = [record(slot, rng.randint(1, 6), longest, rng.randint(1, longest)) for _ in range(slot % most_records)]
        units.append((record(slot, 6, longest, longest), *more))
    return units


def _group(stage: str) -> int:
    return 1 if stage == "sft" else 2


def _nulled(units: Sequence[Unit], i: int) -> list[Unit]:
    null = tuple(Experience(Prompt(e.prompt.slot, (), ""), (), ()) for e in units[i])
    return [*units[:i], null, *units[i + 1 :]]


def _sum(objective: Objective, units: Sequence[Unit], budget: int = 200, group: int = 2) -> tuple[Tensor, Tensor]:
    total, metrics = objective.clipped_sum(Draw(batching.plan(units, group, budget, 64, 0), 1, baseline=0.1))
    return total.total, metrics


def _check(objective: Objective, units: Sequence[Unit], some: set[int], group: int = 2) -> None:
    """Nulling each of `some` takes away its own clipped gradient and metrics, and nothing else."""
    assert max(b.units for b in batching.plan(units, group, 200, 64, 0)) > 1  # else nothing could couple them
    everybody, metrics = _sum(objective, units, group=group)
    for i in some:
        others, others_metrics = _sum(objective, _nulled(units, i), group=group)
        own, own_metrics = _sum(objective, [units[i]], group=group)
        assert own.norm() > 0
        deviation = (everybody - others - own).norm() / own.norm()
        assert deviation < 2e-4, f"unit {i}: {deviation:.2e} of its own gradient"
        assert own.norm() <= objective.clip_norm * (1 + 1e-5)
        assert torch.allclose(metrics - others_metrics, own_metrics, atol=1e-5)
        assert own_metrics.norm() <= objective.metrics.bound + 1e-6


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
@pytest.mark.parametrize("kind", list(get_args(AdapterConfig.model_fields["kind"].annotation)))
@pytest.mark.parametrize("stage", ALGORITHMS + SUPERVISED)
def test_nulling_a_unit_removes_its_own_clipped_gradient_and_nothing_else(
    stage: str, kind: str, clip_norm: float, tiny_model: Path
) -> None:
    """False: some statistic, shared loss term or micro-batch couples records, and clipping bounds nothing."""
    units = _units(6, group=_group(stage))
    _check(_any(tiny_model, stage, kind, clip_norm), units, {0, 4, 5}, _group(stage))


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
@pytest.mark.parametrize("stage", ALGORITHMS + SUPERVISED)
def test_nulling_a_user_removes_the_gradient_of_all_its_records_and_nothing_else(
    stage: str, clip_norm: float, tiny_model: Path
) -> None:
    """False: a user's records are clipped one by one, or a user's padding or number of records reaches another."""
    units = _units(6, most_records=3, group=_group(stage))
    assert {len(u) for u in units} == {1, 2, 3}
    _check(_any(tiny_model, stage, "lora", clip_norm), units, {0, 1, 2, 5}, _group(stage))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_option_couples_units(algorithm: str, options: dict[str, Any], tiny_model: Path) -> None:
    """False: a normalisation, a filter, a KL or importance weights take something of another unit."""
    own = {k: v for k, v in options.items() if algorithm in AlgorithmConfig.ONLY_FOR.get(k, ALGORITHMS)}
    for clip_norm in (1e-3, 1e3):
        objective = _objective(tiny_model, algorithm, "lora", clip_norm, **own)
        objective.algorithm = Stale(build(objective.stage.algorithm, MAX_NEW_TOKENS))
        _check(objective, _units(5, most_records=2), {0, 3})


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (1.25, 1.25), (5.0, 1.5)])
def test_completions_of_older_weights_weigh_as_their_own_ratio_says(
    ratio: float, weight: float, tiny_model: Path
) -> None:
    """False: log-probabilities of the policy that drew a completion do not reach the loss, those of another completion
    do, or a weight is not capped."""
    objective = _objective(tiny_model, "reinforce", "lora", 1e3, kl_coef=0.0, importance_cap=1.5)
    units = _units(4)
    own: dict[tuple[int, ...], list[float]] = {}
    for batch in batching.plan(units, 2, 200, 64, 0):
        with torch.no_grad():
            scored = objective._score(objective.policy, batch).log_probs.view(-1, batch.mask.shape[-1])
        for row, log_probs, mask in zip(batch.responses, scored, batch.mask.flatten(0, 1), strict=True):
            own[tuple(row[mask > 0].tolist())] = log_probs[mask > 0].tolist()

    def drawn(c: Completion) -> Completion:  # by a policy under which it was less likely by `ratio`
        return replace(c, log_probs=tuple(x - math.log(ratio) for x in own[c.token_ids]))

    stale = [tuple(Experience(e.prompt, tuple(map(drawn, e.completions)), e.rewards) for e in u) for u in units]
    plain, weighted = _sum(objective, units)[0], _sum(objective, stale)[0]
    assert (weighted - weight * plain).norm() < 1e-4 * plain.norm()
    mixed = _sum(objective, [*stale[:2], *units[2:]])[0]  # one that has none takes nobody else's away
    expected = weight * _sum(objective, units[:2])[0] + _sum(objective, units[2:])[0]
    assert (mixed - expected).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_later_update_on_the_same_draw_couples_nobody_either(algorithm: str, tiny_model: Path) -> None:
    """False: what the second update keeps of the first (old policy, values, reference) is another unit's."""
    units = _units(5, most_records=2)
    second = []
    for these in (units, _nulled(units, 3), [units[3]]):
        objective = _objective(tiny_model, algorithm, "lora", 1e3)
        draw = Draw(batching.plan(these, 2, 200, 64, 0), 1, baseline=0.1)
        first = objective.clipped_sum(draw)[0].total
        _moved(objective.policy, seed=4)
        second.append(objective.clipped_sum(draw)[0].total)
        assert (second[-1] - first).norm() > 0.05 * first.norm()
    everybody, others, own = second
    assert (everybody - others - own).norm() < 2e-4 * own.norm()


@pytest.mark.parametrize("stage", ALGORITHMS + SUPERVISED)
def test_a_record_that_fails_contributes_zero_and_touches_nobody(stage: str, tiny_model: Path) -> None:
    """False: a scorer's error, an empty prompt or a non-finite reward reaches other records or the metrics."""
    group = _group(stage)
    objective, units = _any(tiny_model, stage, "lora", 1.0), _units(5, group=group)
    expected, expected_metrics = _sum(objective, units[1:], group=group)
    (record,) = units[0]
    broken = [
        Experience(record.prompt, record.completions, (None, 0.3)[:group]),
        Experience(Prompt(0, (), ""), record.completions, record.rewards),
        Experience(record.prompt, (), ()),
    ]
    for failed in broken:
        got, metrics = _sum(objective, [(failed,), *units[1:]], group=group)
        assert torch.allclose(got, expected, atol=1e-6) and torch.allclose(metrics, expected_metrics, atol=1e-6)
        beside, _ = _sum(objective, [(record, failed), *units[1:]], group=group)  # a user's other record still counts
        assert torch.allclose(beside, _sum(objective, units, group=group)[0], atol=1e-6)
    if stage in ALGORITHMS:
        poisoned = Experience(record.prompt, record.completions, (float("nan"), 0.2))
        got, _ = _sum(objective, [(poisoned,), *units[1:]])
        assert torch.isfinite(got).all() and torch.allclose(got, expected, atol=1e-6)


def test_micro_batches_and_order_do_not_change_the_sum(tiny_model: Path) -> None:
    """False: how a draw is cut or ordered changes what is released."""
    objective = _objective(tiny_model, "rloo", "lora", 0.01)
    units = _units(6, most_records=2)
    one, _ = _sum(objective, units, budget=10_000)
    many, _ = _sum(objective, list(reversed(units)), budget=1)
    assert torch.allclose(one, many, atol=1e-7)
    padded = Draw([*batching.plan(units, 2, 10_000, 64, 0), batching.empty(2, 0)], 1, 0.1)
    assert torch.allclose(objective.clipped_sum(padded)[0].total, one, atol=1e-7)


@pytest.mark.parametrize("stage", ["rloo", "ppo", *SUPERVISED])
def test_records_that_pad_a_user_count_for_nothing(stage: str, tiny_model: Path) -> None:
    """False: a user of one record beside one of three has a third of its gradient and metrics, or another one."""
    group = _group(stage)
    objective, units = _any(tiny_model, stage, "lora", 1e3), _units(5, most_records=3, group=group)
    expected, expected_metrics = _sum(objective, units, group=group)
    got, metrics = objective.clipped_sum(Draw([batching.collate(units, group, 0)], 1, 0.1))
    assert (got.total - expected).norm() < 1e-5 * expected.norm()
    assert torch.allclose(metrics, expected_metrics, atol=1e-5)


@pytest.mark.parametrize("stage", ["rloo", "ppo", *SUPERVISED])
def test_brute_force_one_unit_at_a_time(stage: str, tiny_model: Path) -> None:
    """False: the recorded, clipped sum differs from a loop of ordinary autograd over one record at a time, averaged
    over a unit's records and clipped once."""
    group = _group(stage)
    objective, units = _any(tiny_model, stage, "lora", 0.02), _units(5, most_records=3, group=group)
    got, _ = _sum(objective, units, group=group)
    total = ClippedSum(objective.recorder.sizes, 0.02)
    instrumented = [m for m in objective.model.modules() if "forward" in m.__dict__]
    saved = [m.__dict__.pop("forward") for m in instrumented]  # the plain model again
    parameters = objective.recorder.parameters
    for unit in units:
        mean = [torch.zeros_like(p) for p in parameters]
        for record in unit:
            batch = batching.collate([(record,)], group, 0)
            loss = objective.losses(Draw([batch], 1, 0.1), 0, batch)[0].sum()
            for m, g in zip(mean, torch.autograd.grad(loss, parameters), strict=True):
                m += g / len(unit)
        total.add([g.unsqueeze(0) for g in mean], torch.tensor([True]))
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
        (Experience(Prompt(i, (5,) * p, ""), (Completion((7,) * c, "", False, 0),), (1.0,)),)
        for i, (p, c) in enumerate([(3, 4), (3, 5), (9, 2), (40, 30), (5, 16), (2, 1)])
    ]

    def shapes(these: Sequence[Unit]) -> dict[int, tuple[int, int]]:
        found = {}
        for batch in batching.plan(these, 1, 10_000, 64, 0):
            for row, length in enumerate(batch.prompt_lengths.tolist()):
                found[length * 100 + int(batch.mask[row].sum())] = (batch.tokens.shape[1], batch.responses.shape[1])
        return found

    together = shapes(units)
    assert len(together) == 6
    for unit in units:
        assert shapes([unit]).items() <= together.items()
