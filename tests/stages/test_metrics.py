"""The private metrics of a draw: which there are, their joint bound, and that one unit stays within it."""

from __future__ import annotations

import math

import pytest
import torch

from dprlhf_ray import config_file
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import noise_metrics
from dprlhf_ray.privacy.permit import Permit
from dprlhf_ray.privacy.release import release_means
from dprlhf_ray.records import Completion, Experience, Prompt
from dprlhf_ray.stages import batching
from dprlhf_ray.stages.metrics import KL_BOUND, Metrics


def _metrics(kl_coef: float) -> Metrics:
    algorithm = {"kind": "rloo", "completions_per_prompt": 2, "kl_coef": kl_coef}
    tree = {"stages": [{"privacy": {"mode": "clip_only"}, "algorithm": algorithm, "scorer": {"reward_bound": 4.0}}]}
    return Metrics.of(config_file.parse(tree).stages[0])


def _batch(*rewards: tuple[float, float]) -> batching.MicroBatch:
    done = (Completion((5, 6, 7), "", False, 0), Completion((5,), "", False, 0))
    return batching.collate([Experience(Prompt(i, (3,), ""), done, r) for i, r in enumerate(rewards)], 2, 0)


@pytest.mark.parametrize(("kl_coef", "names"), [(0.0, ("reward", "length", "clip_fraction")), (0.1, None)])
def test_kl_is_released_where_the_loss_has_a_reference_and_the_bound_follows(kl_coef: float, names: object) -> None:
    """False: the joint bound is that of another number of entries, and the noise is relative to a wrong one."""
    metrics = _metrics(kl_coef)
    assert metrics.names == (names or ("reward", "length", "clip_fraction", "kl"))
    assert metrics.bound == math.sqrt(len(metrics.names))
    batch = _batch((1e9, 1e9))
    extreme = metrics.total(batch, torch.tensor([True]), torch.full(batch.mask.shape, -1e9) if kl_coef else None)
    assert extreme.norm() <= metrics.bound
    assert extreme[0] == 1 and extreme[2] == 1 and (not kl_coef or extreme[3] == -1)


def test_each_entry_is_the_unit_s_own_mean() -> None:
    """False: a metric is scaled wrongly, averaged over padding, or over the batch."""
    metrics, batch = _metrics(0.1), _batch((1.0, 3.0), (-4.0, 0.0))
    ratio = torch.full(batch.mask.shape, 9.0)  # 9: padding
    ratio[..., :3] = torch.tensor([[[0.1, 0.2, 0.3], [0.1, 9.0, 9.0]], [[0.0, 0.0, 0.0], [0.2, 9.0, 9.0]]])
    got = metrics.total(batch, torch.tensor([True, False]), ratio)
    expected = torch.tensor([(2 - 2) / 4, 2 * 2 / 24, 1.0, ((0.2 + 0.1) / 2 + (0.0 + 0.2) / 2) / KL_BOUND])
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_null_or_poisoned_unit_gives_zero_and_touches_nobody(poison: float) -> None:
    """False: padding counts as a unit, or one unit's NaN makes the whole sum NaN."""
    metrics, batch = _metrics(0.1), _batch((1.0, 1.0), (1.0, 1.0))
    clipped, ratio = torch.tensor([True, True]), torch.full(batch.mask.shape, 0.1)
    whole = metrics.total(batch, clipped, ratio)
    ratio[1, 0, 0] = poison
    assert torch.allclose(metrics.total(batch, clipped, ratio), whole / 2)
    empty = batching.empty(2, 0)
    assert metrics.total(empty, torch.tensor([True]), torch.ones(empty.mask.shape)).norm() == 0


def test_released_means_carry_their_scale_and_their_noise() -> None:
    """False: a metric's printed deviation is not that of its noise."""
    metrics = _metrics(0.1)
    step = DPStep("record", "zero_out", 100, 0.1, 0.0, 1.0, 1, 1, 5.0)
    noised = noise_metrics(torch.zeros(4), Permit.of("t", "rl", 1, step, "i"), metrics.bound)
    released = release_means(noised, metrics.scales, step)
    assert [r.name for r in released] == [f"private/{n}" for n in metrics.names]
    for r, value in zip(released, noised.value.tolist(), strict=True):
        scale = metrics.scales[r.name.removeprefix("private/")]
        assert r.std == pytest.approx(5.0 * 2.0 / 10 * scale) and r.value == pytest.approx(value / 10 * scale)
