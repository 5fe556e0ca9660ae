"""The losses once more, for one record, in plain Python: lists without padding, loops, no tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

Tokens = tuple[tuple[float, ...], ...]  # [completion][token]


@dataclass(frozen=True)
class Record:
    log_probs: Tokens
    old: Tokens
    ref: Tokens
    values: Tokens
    old_values: Tokens
    rewards: tuple[float, ...]
    behaviour: Tokens | None = None
    finished: tuple[float, ...] | None = None
    baseline: float = 0.0
    progress: float = 0.0


def loss(options: dict[str, Any], record: Record, max_new_tokens: int) -> float:
    """Of one record; `options`: the config's algorithm section."""
    kind = options["kind"]
    in_reward = options.get("kl_in", "reward" if kind == "ppo" else "loss") == "reward"
    estimator = options.get("kl_estimator", "k1" if in_reward else "k2" if kind == "reinforce_pp" else "k3")
    coef = options.get("kl_coef", 0.0)
    if options.get("kl_schedule") == "linear":
        coef *= 1 - record.progress

    def kl(log_prob: float, ref: float) -> float:
        d = log_prob - ref
        return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]

    def penalty(g: int) -> list[float]:
        return [coef * kl(a, b) for a, b in zip(record.old[g], record.ref[g], strict=True)]

    lengths = [len(row) for row in record.log_probs]
    rewards = [r - in_reward * sum(penalty(g)) for g, r in enumerate(record.rewards)]
    low = options.get("clip_range", 0.2)
    high = options.get("clip_range_high") or low
    total = []
    for g, length in enumerate(lengths):
        returns = [0.0] * length
        if kind == "ppo":
            per_step = [-x if in_reward else 0.0 for x in penalty(g)]
            per_step[-1] += record.rewards[g]
            advantages = _gae(
                per_step, record.old_values[g], options.get("gamma", 1.0), options.get("gae_lambda", 0.95)
            )
            returns = [a + v for a, v in zip(advantages, record.old_values[g], strict=True)]
        else:
            advantages = [_advantage(options, rewards, g, record.baseline)] * length
        losses = []
        for t in range(length):
            a = advantages[t] / options.get("advantage_scale", 1.0)
            ratio = math.exp(record.log_probs[g][t] - record.old[g][t])
            gain = ratio * a
            if kind in ("ppo", "grpo", "reinforce_pp"):
                gain = min(gain, max(1 - low, min(1 + high, ratio)) * a)
            if record.behaviour is not None:
                gain *= min(math.exp(record.old[g][t] - record.behaviour[g][t]), options.get("importance_cap", 2.0))
            if options.get("mask_truncated"):
                assert record.finished is not None
                gain *= record.finished[g]
            own = -gain
            if not in_reward:
                own += coef * kl(record.log_probs[g][t], record.ref[g][t])
            if kind == "ppo":
                v, v_old = record.values[g][t], record.old_values[g][t]
                near = v_old + max(-low, min(low, v - v_old))
                worst = max((v - returns[t]) ** 2, (near - returns[t]) ** 2)
                own += options.get("value_coef", 0.1) * worst / 2
            losses.append(own)
        total.append(sum(losses))
    match options.get("normalisation", "own_length"):
        case "own_length":
            return mean(x / n for x, n in zip(total, lengths, strict=True))
        case "group_tokens":
            return sum(total) / sum(lengths)
        case "max_length":
            return mean(total) / max_new_tokens
        case _:
            return mean(total)


def _advantage(options: dict[str, Any], rewards: list[float], g: int, baseline: float) -> float:
    match options["kind"]:
        case "reinforce":
            return rewards[g] - baseline
        case "rloo":
            return rewards[g] - mean(r for i, r in enumerate(rewards) if i != g)
        case "grpo" if "advantage_scale" not in options:
            return (rewards[g] - mean(rewards)) / (stdev(rewards) + 1e-4)
        case _:
            return rewards[g] - mean(rewards)


def _gae(rewards: list[float], values: tuple[float, ...], gamma: float, lam: float) -> list[float]:
    """The sum of eq. 16 of arXiv 1506.02438 itself, not its recursion."""
    after = (*values[1:], 0.0)
    delta = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


def slope(of: Callable[[Record], float], record: Record, field: str, step: float = 1e-6) -> list[list[float]]:
    """Central differences of `of` in every entry of a field, [completion][token]."""
    rows: Tokens = getattr(record, field)

    def moved(g: int, t: int, by: float) -> Record:
        changed = [list(row) for row in rows]
        changed[g][t] += by
        return replace(record, **{field: tuple(map(tuple, changed))})

    return [
        [(of(moved(g, t, step)) - of(moved(g, t, -step))) / (2 * step) for t in range(len(row))]
        for g, row in enumerate(rows)
    ]
