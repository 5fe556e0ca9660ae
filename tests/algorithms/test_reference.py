"""Every kind with every option against the plain-Python loss of one record, in value and in gradient."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from dprlhf_ray.algorithms import Batch, build
from dprlhf_ray.config import AlgorithmConfig
from tests.algorithms.reference import Record, Tokens, loss, slope

KINDS = get_args(AlgorithmConfig.model_fields["kind"].annotation)
GROUP, MAX_NEW_TOKENS = 3, 7
STALE, ENDS = {"behaviour"}, {"finished"}  # what the record has to bring along
OPTIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"advantage_scale": 0.3}, set()),
    ({"clip_range": 0.1}, set()),
    ({"clip_range_high": 0.6}, set()),
    *(({"normalisation": n, "kl_coef": 0.2}, set()) for n in ("own_length", "group_tokens", "max_length", "sum")),
    *(({"kl_coef": 0.3, "kl_in": "loss", "kl_estimator": k}, set()) for k in ("k2", "k3")),
    *(({"kl_coef": 0.3, "kl_in": "reward", "kl_estimator": k}, set()) for k in ("k1", "k2", "k3")),
    ({"kl_coef": 0.3}, set()),
    ({"kl_coef": 0.3, "kl_schedule": "linear"}, set()),
    ({"importance_cap": 1.5, "kl_coef": 0.1}, STALE),
    ({"mask_truncated": True, "kl_coef": 0.1, "normalisation": "group_tokens"}, ENDS),
    ({"mask_truncated": True}, STALE | ENDS),
    ({"gamma": 0.9, "gae_lambda": 0.5, "value_coef": 0.7}, set()),
]
CASES = [
    ({"kind": kind, "completions_per_prompt": GROUP, **options}, brings)
    for kind in KINDS
    for options, brings in OPTIONS
    if all(kind in AlgorithmConfig.ONLY_FOR.get(key, KINDS) for key in options)
]


def _record(rng: random.Random, brings: set[str]) -> Record:
    lengths = [rng.randint(1, MAX_NEW_TOKENS) for _ in range(GROUP)]

    def tokens(low: float, high: float) -> Tokens:
        return tuple(tuple(rng.uniform(low, high) for _ in range(n)) for n in lengths)

    def near(rows: Tokens, by: float) -> Tokens:
        return tuple(tuple(x + rng.uniform(-by, by) for x in row) for row in rows)

    old = tokens(-3, 0)
    return Record(
        near(old, 0.9), old, near(old, 0.7), tokens(-1, 1), tokens(-1, 1), tuple(rng.uniform(-1, 1) for _ in lengths),
        behaviour=near(old, 0.8) if "behaviour" in brings else None,
        finished=tuple(float(g != 1) for g in range(GROUP)) if "finished" in brings else None,
        baseline=0.2, progress=0.4,
    )  # fmt: skip


def _batch(records: list[Record], width: int = MAX_NEW_TOKENS + 2) -> Batch:
    """In float64, padded with noise."""
    torch.manual_seed(1)

    def stack(field: str) -> torch.Tensor | None:
        if getattr(records[0], field) is None:
            return None
        out = -torch.rand(len(records), GROUP, width, dtype=torch.float64)
        for u, record in enumerate(records):
            for g, row in enumerate(getattr(record, field)):
                out[u, g, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return out

    mask = torch.zeros(len(records), GROUP, width, dtype=torch.float64)
    for u, record in enumerate(records):
        for g, row in enumerate(record.old):
            mask[u, g, : len(row)] = 1.0
    rest = {
        key: torch.tensor([getattr(r, key) for r in records], dtype=torch.float64)
        for key in ("rewards", "finished")
        if getattr(records[0], key) is not None
    }
    log_probs, values, old = stack("log_probs"), stack("values"), stack("old")
    assert log_probs is not None and values is not None and old is not None
    return Batch(
        log_probs.requires_grad_(), old, stack("ref"), values.requires_grad_(), stack("old_values"), mask=mask,
        baseline=records[0].baseline, progress=records[0].progress, behaviour_log_probs=stack("behaviour"), **rest,
    )  # fmt: skip


@pytest.mark.parametrize(("options", "brings"), CASES, ids=str)
def test_a_loss_is_the_one_record_reference(options: dict[str, Any], brings: set[str]) -> None:
    """False: an equation, an option or its gradient is not what the reference says, padding leaks in, or a record's
    loss depends on another record."""
    rng = random.Random(5)
    records = [_record(rng, brings) for _ in range(4)]
    batch = _batch(records)
    algorithm = build(AlgorithmConfig.model_validate(options), MAX_NEW_TOKENS)
    got = algorithm.loss(batch)
    got.sum().backward()
    assert got.shape == (4,)
    for u, record in enumerate(records):
        assert got[u].item() == pytest.approx(loss(options, record, MAX_NEW_TOKENS), abs=1e-10)
        for field in ("log_probs", "values"):
            grad = getattr(batch, field).grad
            grad = torch.zeros_like(batch.mask) if grad is None else grad
            assert not grad[u][batch.mask[u] == 0].any()
            for g, row in enumerate(slope(lambda r: loss(options, r, MAX_NEW_TOKENS), record, field)):
                assert torch.allclose(grad[u, g, : len(row)], torch.tensor(row, dtype=torch.float64), atol=1e-7)


@pytest.mark.parametrize(("options", "brings"), CASES, ids=str)
def test_changing_a_record_leaves_the_losses_of_the_others_bit_for_bit(
    options: dict[str, Any], brings: set[str]
) -> None:
    """False: something is averaged, whitened or sorted across records."""
    rng = random.Random(6)
    records = [_record(rng, brings) for _ in range(3)]
    algorithm = build(AlgorithmConfig.model_validate(options), MAX_NEW_TOKENS)
    one = algorithm.loss(_batch(records))
    other = replace(_record(rng, brings), rewards=(9.0, -9.0, 3.0))
    two = algorithm.loss(_batch([*records[:2], other]))
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2], two[2])


def test_the_cases_tell_the_options_apart() -> None:
    """False: an option does nothing on these records, so that the comparison above cannot see it."""
    rng = random.Random(5)
    record = _record(rng, STALE | ENDS)
    for kind in KINDS:
        base = {"kind": kind, "completions_per_prompt": GROUP, "kl_coef": 0.3}
        plain = loss(base, record, MAX_NEW_TOKENS)
        for key, value in [
            ("advantage_scale", 0.3), ("clip_range", 0.1), ("clip_range_high", 0.6), ("normalisation", "group_tokens"),
            ("normalisation", "max_length"), ("normalisation", "sum"), ("mask_truncated", True),
            ("importance_cap", 1.5), ("kl_in", "loss" if kind == "ppo" else "reward"), ("kl_schedule", "linear"),
            ("gamma", 0.9), ("gae_lambda", 0.5), ("value_coef", 0.7),
        ]:  # fmt: skip
            if kind in AlgorithmConfig.ONLY_FOR.get(key, KINDS):
                assert abs(loss(base | {key: value}, record, MAX_NEW_TOKENS) - plain) > 1e-4, (kind, key)
