"""The losses against their papers' equations, and their independence across units."""

from __future__ import annotations

import pytest
import torch

from dprlhf_ray.algorithms import Batch, build
from dprlhf_ray.algorithms.base import kl_k3
from dprlhf_ray.algorithms.grpo import group_normalised
from dprlhf_ray.algorithms.ppo import gae, token_rewards
from dprlhf_ray.algorithms.rloo import leave_one_out
from dprlhf_ray.config import AlgorithmConfig


def _batch(units: int = 3, group: int = 2, length: int = 5, **changed: object) -> Batch:
    torch.manual_seed(0)
    shape = (units, group, length)
    mask = torch.ones(shape)
    mask[0, 0, 3:] = 0
    log_probs = -torch.rand(shape)
    fields: dict[str, object] = {
        "log_probs": log_probs.requires_grad_(), "old_log_probs": log_probs.detach().clone(),
        "ref_log_probs": -torch.rand(shape), "values": torch.rand(shape).requires_grad_(),
        "old_values": torch.rand(shape), "rewards": torch.randn(units, group), "mask": mask, "baseline": 0.2,
    }  # fmt: skip
    return Batch(**(fields | changed))  # type: ignore[arg-type]


def test_reinforce_gradient_is_minus_advantage_over_length() -> None:
    """False: sign, baseline or the record's own length normalisation is off (Williams 1992)."""
    batch = _batch()
    build(AlgorithmConfig(kind="reinforce")).loss(batch).sum().backward()
    length = batch.mask.sum(-1, keepdim=True)
    expected = -(batch.rewards - 0.2).unsqueeze(-1) * batch.mask / length / 2
    assert torch.allclose(batch.log_probs.grad, expected, atol=1e-6)


def test_rloo_baseline_is_the_mean_of_the_others() -> None:
    """False: eq. 8 of arXiv 2402.14740 is not what is computed."""
    r = torch.tensor([[1.0, 2.0, 6.0]])
    assert torch.allclose(leave_one_out(r), torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]]))


def test_grpo_normalises_within_a_group_only() -> None:
    """False: mean or deviation crosses prompts (eq. 3 of arXiv 2402.03300 is per group)."""
    r = torch.tensor([[1.0, 3.0], [100.0, 300.0]])
    assert torch.allclose(group_normalised(r), torch.tensor([[-1, 1], [-1, 1]]) / 2**0.5, atol=1e-3)


def test_gae_by_hand() -> None:
    """False: eq. 16 of arXiv 1506.02438 is not what is computed, or padding leaks in."""
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    last = 1.0 - 0.25
    first = (0.0 + 0.9 * 0.25 - 0.5) + 0.9 * 0.5 * last
    assert torch.allclose(advantages, torch.tensor([[first, last, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[first + 0.5, last + 0.25, 0.0]]))


def test_the_reward_falls_on_each_completions_last_token() -> None:
    """False: the scored reward lands on padding or on the wrong token."""
    batch = _batch(ref_log_probs=None)
    rewards = token_rewards(batch, 0.0)
    assert torch.allclose(rewards.sum(-1), batch.rewards)
    assert rewards[0, 0, 2] == batch.rewards[0, 0] and rewards[1, 0, 4] == batch.rewards[1, 0]


def test_kl_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    """False: the KL estimate is biased or signed."""
    x = -torch.rand(50)
    assert torch.equal(kl_k3(x, x), torch.zeros(50))
    assert (kl_k3(x, -torch.rand(50)) >= 0).all()


@pytest.mark.parametrize("kind", ["ppo", "rloo", "grpo", "reinforce"])
def test_a_units_loss_depends_on_that_unit_only(kind: str) -> None:
    """False: the loss whitens, averages or sorts across units."""
    loss = build(AlgorithmConfig.model_validate({"kind": kind, "completions_per_prompt": 2, "kl_coef": 0.1})).loss
    rewards = torch.randn(3, 2)
    changed = rewards.clone()
    changed[2] += 5.0
    one, two = loss(_batch(rewards=rewards)), loss(_batch(rewards=changed))
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2], two[2])


def test_ppo_clips_the_pessimistic_side_only() -> None:
    """False: eq. 7 of arXiv 1707.06347: only a negative advantage has a gradient at a large ratio."""
    batch = _batch(
        units=2, group=1, length=1, mask=torch.ones(2, 1, 1), rewards=torch.tensor([[1.0], [-1.0]]),
        old_values=torch.zeros(2, 1, 1), values=torch.zeros(2, 1, 1), ref_log_probs=None,
        log_probs=torch.zeros(2, 1, 1, requires_grad=True), old_log_probs=torch.full((2, 1, 1), -1.0),
    )  # fmt: skip
    build(AlgorithmConfig(kind="ppo", value_coef=0.0)).loss(batch).sum().backward()
    assert batch.log_probs.grad is not None
    assert batch.log_probs.grad[0].item() == 0.0 and batch.log_probs.grad[1].item() > 0.0
