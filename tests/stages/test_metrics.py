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


def _own(**values: list[float]) -> dict[str, torch.Tensor]:
    """Metrics per unit; what is not given is 0."""
    count = len(next(iter(values.values())))
    return {n: torch.tensor(values.get(n, [0.0] * count)) for n in ("reward", "length", "clip_fraction", "kl")}


@pytest.mark.parametrize(("kl_coef", "names"), [(0.0, ("reward", "length", "clip_fraction")), (0.1, None)])
def test_kl_is_released_where_the_loss_has_a_reference_and_the_bound_follows(kl_coef: float, names: object) -> None:
    """False: the joint bound is that of another number of entries, and the noise is relative to a wrong one."""
    metrics = _metrics(kl_coef)
    assert metrics.names == (names or ("reward", "length", "clip_fraction", "kl"))
    assert metrics.bound == math.sqrt(len(metrics.names))
    extreme = metrics.total(_own(reward=[1e9], length=[1e9], clip_fraction=[1.0], kl=[-1e9]), torch.tensor([True]))
    assert extreme.norm() <= metrics.bound
    assert extreme[0] == 1 and extreme[2] == 1 and (not kl_coef or extreme[3] == -1)


def test_each_entry_is_scaled_by_its_public_bound() -> None:
    """False: a metric is scaled wrongly."""
    own = _own(reward=[2.0, -2.0], length=[2.0, 4.0], clip_fraction=[1.0, 0.0], kl=[0.15, 0.1])
    expected = torch.tensor([0.0, 6 / 24, 1.0, 0.25 / KL_BOUND])
    assert torch.allclose(_metrics(0.1).total(own, torch.tensor([True, True])), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["sft", "reward_model"])
def test_supervised_stages_release_their_own(kind: str) -> None:
    """False: a stage without rewards has no metrics, or a unit moves them by more than the bound."""
    stage = config_file.parse({"stages": [{"kind": kind, "privacy": {"mode": "clip_only"}}]}).stages[0]
    metrics = Metrics.of(stage)
    assert "clip_fraction" in metrics.names and "reward" not in metrics.names
    extreme = metrics.total({n: torch.tensor([1e9]) for n in metrics.names}, torch.tensor([True]))
    assert extreme.norm() <= metrics.bound


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_null_or_poisoned_unit_gives_zero_and_touches_nobody(poison: float) -> None:
    """False: padding counts as a unit, or one unit's NaN makes the whole sum NaN."""
    metrics = _metrics(0.1)
    both = torch.tensor([True, True])
    whole = metrics.total(_own(reward=[1.0, 1.0], kl=[0.1, 0.1]), both)
    assert torch.allclose(metrics.total(_own(reward=[1.0, 1.0], kl=[0.1, poison]), both), whole / 2)
    assert metrics.total(_own(reward=[1.0, 1.0]), torch.tensor([False, False])).norm() == 0


def test_a_unit_s_figure_is_the_mean_of_its_own_records() -> None:
    """False: a user's padding records count, or another user's."""
    done = (Completion((5, 6, 7), "", False, 0),)
    one, two = (Experience(Prompt(i, (3,), ""), done, (r,)) for i, r in enumerate((0.5, -1.0)))
    batch = batching.collate([(one, two), (one,)], 1, 0)
    assert batch.unit_mean(batch.rewards.mean(1)).tolist() == [-0.25, 0.5]
    empty = batching.empty(1, 0)
    assert not empty.valid.any() and empty.unit_mean(torch.tensor([7.0])).tolist() == [0.0]


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
