"""The losses against their papers' equations, and their independence across units."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from dprlhf_ray.algorithms import Algorithm, Batch, build
from dprlhf_ray.algorithms.bradley_terry import bradley_terry
from dprlhf_ray.algorithms.grpo import group_normalised
from dprlhf_ray.algorithms.kl import kl_per_token
from dprlhf_ray.algorithms.ppo import PPO, gae
from dprlhf_ray.algorithms.rloo import leave_one_out
from dprlhf_ray.config import AlgorithmConfig

KINDS = get_args(AlgorithmConfig.model_fields["kind"].annotation)


def _build(**options: Any) -> Algorithm:
    return build(AlgorithmConfig.model_validate({"completions_per_prompt": 2, **options}), 20)


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
    _build(kind="reinforce").loss(batch).sum().backward()
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
    rewards = PPO(AlgorithmConfig(kind="ppo"), 20).token_rewards(batch)
    assert torch.allclose(rewards.sum(-1), batch.rewards)
    assert rewards[0, 0, 2] == batch.rewards[0, 0] and rewards[1, 0, 4] == batch.rewards[1, 0]


def test_kl_is_zero_at_the_reference_and_positive_elsewhere() -> None:
    """False: a penalty is left at the reference, or one is a reward away from it."""
    x = -torch.rand(50)
    for k in ("k1", "k2", "k3"):
        assert torch.equal(kl_per_token(k, x, x), torch.zeros(50))
    for k in ("k2", "k3"):
        assert (kl_per_token(k, x, -torch.rand(50)) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_units_loss_depends_on_that_unit_only(kind: str) -> None:
    """False: the loss whitens, averages or sorts across units."""
    loss = _build(kind=kind, kl_coef=0.1).loss
    rewards = torch.randn(3, 2)
    changed = rewards.clone()
    changed[2] += torch.tensor([5.0, -3.0])
    one, two = loss(_batch(rewards=rewards)), loss(_batch(rewards=changed))
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2], two[2])


@pytest.mark.parametrize("kind", ["rloo", "grpo", "reinforce_pp"])
def test_a_group_of_equal_rewards_has_no_gradient(kind: str) -> None:
    """False: a prompt whose completions are equally good moves the policy, or divides by a deviation of 0."""
    batch = _batch(rewards=torch.full((3, 2), 0.7))
    _build(kind=kind).loss(batch).sum().backward()
    assert batch.log_probs.grad is not None and not batch.log_probs.grad.any()


def test_a_public_constant_takes_the_place_of_the_batch_s_and_the_group_s_deviation() -> None:
    """False: REINFORCE++ and Dr. GRPO still divide by a statistic of rewards (arXiv 2501.03262, 2503.20783)."""
    batch = _batch()
    centred = batch.rewards - batch.rewards.mean(1, keepdim=True)
    for kind in ("reinforce_pp", "grpo"):
        batch.log_probs.grad = None
        _build(kind=kind, advantage_scale=0.5).loss(batch).sum().backward()
        expected = -(centred / 0.5).unsqueeze(-1) * batch.mask / batch.mask.sum(-1, keepdim=True) / 2
        assert torch.allclose(batch.log_probs.grad, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("normalisation", "weights"),
    [
        ("own_length", [[1 / 6, 1 / 6, 1 / 6, 0, 0], [1 / 10] * 5]),
        ("group_tokens", [[1 / 8, 1 / 8, 1 / 8, 0, 0], [1 / 8] * 5]),
        ("max_length", [[1 / 40, 1 / 40, 1 / 40, 0, 0], [1 / 40] * 5]),
        ("sum", [[1 / 2, 1 / 2, 1 / 2, 0, 0], [1 / 2] * 5]),
    ],
)
def test_a_token_weighs_what_the_normalisation_says(normalisation: str, weights: list[list[float]]) -> None:
    """False: the weight of a token of completions of 3 and 5 tokens, with 20 at most, is another."""
    batch = _batch(rewards=torch.full((3, 2), 1.2))  # advantage 1 over the baseline of 0.2
    _build(kind="reinforce", normalisation=normalisation).loss(batch).sum().backward()
    assert batch.log_probs.grad is not None
    assert torch.allclose(batch.log_probs.grad[0], -torch.tensor(weights), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_completion_moves_nothing_and_still_counts_in_its_group(kind: str) -> None:
    """False: overlong filtering misses a completion, or hides its reward from the others' baseline."""
    batch = _batch(finished=torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))
    _build(kind=kind, mask_truncated=True).loss(batch).sum().backward()
    masked, batch.log_probs.grad = batch.log_probs.grad, None
    _build(kind=kind).loss(batch).sum().backward()
    assert masked is not None and batch.log_probs.grad is not None
    assert not masked[0, 0].any() and batch.log_probs.grad[0, 0].any()
    assert torch.equal(masked[0, 1], batch.log_probs.grad[0, 1]) and torch.equal(masked[1:], batch.log_probs.grad[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_importance_weights_are_per_token_and_truncated(kind: str) -> None:
    """False: an old completion counts as a new one or more than the cap, or a fresh one does not count as one."""
    batch = _batch()
    shift = torch.full_like(batch.mask, math.log(0.5))
    shift[1] = math.log(4.0)
    stale = replace(batch, behaviour_log_probs=batch.old_log_probs - shift)
    fresh = replace(batch, behaviour_log_probs=batch.old_log_probs)
    grads = []
    for each in (batch, fresh, stale):
        batch.log_probs.grad = None
        _build(kind=kind, importance_cap=3.0).loss(each).sum().backward()
        assert batch.log_probs.grad is not None
        grads.append(batch.log_probs.grad.clone())
    assert torch.equal(grads[0], grads[1])
    assert torch.allclose(grads[2], grads[0] * torch.tensor([0.5, 3.0, 0.5]).view(3, 1, 1), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_linear_schedule_goes_by_public_progress_alone(kind: str, place: str) -> None:
    """False: the coefficient after three quarters of the attempts is not a quarter."""
    kl = {"kl_in": place, "kl_estimator": "k2"}
    scheduled = _build(kind=kind, kl_coef=0.4, kl_schedule="linear", **kl).loss(replace(_batch(), progress=0.75))
    assert torch.allclose(scheduled, _build(kind=kind, kl_coef=0.1, **kl).loss(_batch()), atol=1e-6)
    constant = _build(kind=kind, kl_coef=0.4, **kl).loss(replace(_batch(), progress=0.75))
    assert torch.equal(constant, _build(kind=kind, kl_coef=0.4, **kl).loss(_batch()))


def test_the_reward_s_penalty_is_that_of_the_whole_completion() -> None:
    """False: outside ppo the KL in the reward is not the log-ratio of the completion (arXiv 2402.14740, section 2)."""
    batch = _batch()
    assert batch.ref_log_probs is not None
    ratio = ((batch.old_log_probs - batch.ref_log_probs) * batch.mask).sum(-1)
    got = _build(kind="rloo", kl_coef=0.3, kl_in="reward").rewards(batch)
    assert torch.allclose(got, batch.rewards - 0.3 * ratio, atol=1e-6)
    assert torch.equal(_build(kind="rloo", kl_coef=0.3).rewards(batch), batch.rewards)


def test_gradients_of_k2_and_k3_are_those_of_the_two_kls_and_k1_has_none() -> None:
    """False: what `algorithms/kl.py` says of the estimators' gradients. Exact expectation over one token of 5."""
    torch.manual_seed(0)
    logits, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    q, p = logits.log_softmax(0), ref.log_softmax(0)
    found = {
        k: torch.autograd.grad((q.exp().detach() * kl_per_token(k, q, p)).sum(), logits, retain_graph=True)[0]
        for k in ("k1", "k2", "k3")
    }
    reverse = torch.autograd.grad((q.exp() * (q - p)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)[0]
    assert torch.allclose(found["k1"], torch.zeros_like(reverse), atol=1e-12)
    assert torch.allclose(found["k2"], reverse) and torch.allclose(found["k3"], forward)
    assert not torch.allclose(reverse, forward, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ({"kind": "ppo"}, {"values": None}),
        ({"kind": "rloo", "kl_coef": 0.1}, {"ref_log_probs": None}),
        ({"kind": "rloo", "mask_truncated": True}, {"finished": None}),
    ],
)
def test_what_the_config_asks_for_and_the_batch_lacks_is_not_left_out(
    options: dict[str, Any], lacks: dict[str, None]
) -> None:
    """False: a KL, a filter or a value loss that was asked for is silently not there."""
    with pytest.raises(ValueError, match="needs"):
        _build(**options).loss(_batch(**lacks))


def test_bradley_terry_is_minus_log_sigmoid_of_the_margin() -> None:
    """False: eq. 1 of arXiv 2203.02155, its sign, or a pair's loss depends on another pair; or a margin overflows."""
    scores = torch.tensor([[1.0, -0.5], [0.3, 0.3], [-200.0, 200.0], [200.0, -200.0]], requires_grad=True)
    loss = bradley_terry(scores)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(2), 400.0, 0.0], abs=1e-6)
    loss.sum().backward()
    wrong = 1 / (1 + math.exp(1.5))
    assert scores.grad is not None
    assert torch.allclose(scores.grad, torch.tensor([[-wrong, wrong], [-0.5, 0.5], [-1, 1], [0, 0]]), atol=1e-6)
    changed = scores.detach().clone()
    changed[1] += torch.tensor([3.0, -4.0])
    assert torch.equal(bradley_terry(changed)[[0, 2, 3]], loss.detach()[[0, 2, 3]])


def test_ppo_clips_the_pessimistic_side_only() -> None:
    """False: eq. 7 of arXiv 1707.06347: only a negative advantage has a gradient at a large ratio."""
    batch = _batch(
        units=2, group=1, length=1, mask=torch.ones(2, 1, 1), rewards=torch.tensor([[1.0], [-1.0]]),
        old_values=torch.zeros(2, 1, 1), values=torch.zeros(2, 1, 1), ref_log_probs=None,
        log_probs=torch.zeros(2, 1, 1, requires_grad=True), old_log_probs=torch.full((2, 1, 1), -1.0),
    )  # fmt: skip
    _build(kind="ppo", value_coef=0.0).loss(batch).sum().backward()
    assert batch.log_probs.grad is not None
    assert batch.log_probs.grad[0].item() == 0.0 and batch.log_probs.grad[1].item() > 0.0


@pytest.mark.parametrize("kind", AlgorithmConfig.CLIPPED)
def test_clip_higher_lets_a_good_token_rise_further_and_a_bad_one_fall_no_further(kind: str) -> None:
    """False: eq. 8 of arXiv 2503.14476: the two ranges are not those of the two sides."""
    for ratio, reward, high, moves in [
        (1.5, 1.0, None, False), (1.5, 1.0, 0.6, True), (1.7, 1.0, 0.6, False),
        (0.7, -1.0, None, False), (0.7, -1.0, 0.6, False), (0.9, -1.0, 0.6, True),
    ]:  # fmt: skip
        zero = torch.zeros(1, 2, 1)
        batch = _batch(
            log_probs=zero.clone().requires_grad_(), old_log_probs=torch.full((1, 2, 1), -math.log(ratio)),
            mask=torch.ones(1, 2, 1), rewards=torch.tensor([[reward, -reward]]), values=zero, old_values=zero,
            ref_log_probs=None,
        )  # fmt: skip
        _build(kind=kind, clip_range_high=high).loss(batch).sum().backward()
        assert batch.log_probs.grad is not None
        assert bool(batch.log_probs.grad[0, 0].any()) == moves, (ratio, reward, high)
