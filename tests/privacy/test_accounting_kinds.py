"""Capped draws, users who own several records, and searches: never below what brute force or a hand finds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, stats

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.mechanism import DPStep

SIGMA = 4.0  # so much that the grid of the privacy loss is small and the tests are fast
BASE = DPStep("record", "zero_out", 1000, 0.05, SIGMA, 0.1, 1, 1, None)


def hockey_stick(upper: list[tuple[float, float]], lower: list[tuple[float, float]], epsilon: float) -> float:
    """integral of max(0, P - e^epsilon Q) of two mixtures of Gaussians of deviation SIGMA, lists of (weight, mean)."""
    x = np.linspace(-14 * SIGMA, 14 * SIGMA, 200_001)
    p, q = (sum(w * np.exp(-(((x - m) / SIGMA) ** 2) / 2) for w, m in mixture) for mixture in (upper, lower))
    density = np.maximum(0.0, p - math.exp(epsilon) * q) / (SIGMA * math.sqrt(2 * math.pi))
    return float(integrate.trapezoid(density, x))


@pytest.mark.parametrize(("k", "q", "delta"), [(2, 0.05, 1e-4), (3, 0.2, 1e-3)])
def test_a_users_epsilon_is_the_divergence_of_its_mixture(k: int, q: float, delta: float) -> None:
    """False: too low by quadrature in either direction, or more than 1 % too high."""
    step = replace(BASE, unit="user", records_per_user=k, sampling_rate=q)
    found = accounting.epsilon(step, delta, allow_large_delta=True).pld
    mixture = [(float(stats.binom.pmf(i, k, q)), float(i)) for i in range(k + 1)]
    none = [(1.0, 0.0)]
    exact = [lambda e: hockey_stick(mixture, none, e), lambda e: hockey_stick(none, mixture, e)]
    assert max(f(found) for f in exact) <= delta * (1 + 1e-6)
    assert max(f(found * 0.99) for f in exact) > delta


def test_one_record_per_user_costs_what_a_record_costs() -> None:
    user = replace(BASE, unit="user", steps=50)
    one = accounting.epsilon(replace(user, records_per_user=1), 1e-5).pld
    assert one == pytest.approx(accounting.epsilon(user, 1e-5).pld, rel=1e-5)


def test_epsilon_grows_with_the_records_of_a_user() -> None:
    user = replace(BASE, unit="user", steps=20)
    found = [accounting.epsilon(replace(user, records_per_user=k), 1e-5).pld for k in (1, 2, 3)]
    assert found[0] < found[1] < found[2]


def test_near_the_mean_a_cap_is_ruinous() -> None:
    """False: a cap is free. (The mean of a draw is 50, its deviation 7.)"""
    step = replace(BASE, steps=100)
    free = accounting.epsilon(step, 1e-5).pld
    found = [accounting.epsilon(replace(step, max_batch=cap), 1e-5).pld for cap in (1000, 70, 50)]
    assert found[0] == pytest.approx(free, rel=1e-9)
    assert found == sorted(found) and found[-1] > 2 * free


@pytest.mark.parametrize("cap", [1, 2])
def test_a_capped_draw_is_never_charged_less_than_the_worst_neighbours_found_by_brute_force(cap: int) -> None:
    """False: too low under zero_out for three units whose gradients are 1 or -1, enumerated slot by slot."""
    n, q, delta = 3, 0.4, 1e-3
    step = replace(BASE, population=n, sampling_rate=q, max_batch=cap)
    found = accounting.epsilon(step, delta, allow_large_delta=True).pld
    worst = 0.0
    for others in ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0)):
        real, null = (_capped_mixture((own, *others), q, cap) for own in (1.0, 0.0))
        worst = max(worst, hockey_stick(real, null, found), hockey_stick(null, real, found))
    assert worst <= delta


def _capped_mixture(values: tuple[float, ...], q: float, cap: int) -> list[tuple[float, float]]:
    from itertools import combinations, product

    found = []
    for drawn in product((0, 1), repeat=len(values)):
        chance = math.prod(q if d else 1 - q for d in drawn)
        slots = [i for i, d in enumerate(drawn) if d]
        kept = list(combinations(slots, min(cap, len(slots))))
        found += [(chance / len(kept), sum(values[i] for i in subset)) for subset in kept]
    return found


def test_metrics_beside_a_capped_draw_or_a_users_records_are_charged() -> None:
    for step in (replace(BASE, max_batch=60), replace(BASE, unit="user", records_per_user=2)):
        with_metrics = accounting.epsilon(replace(step, metric_noise_multiplier=2.0), 1e-5).pld
        assert with_metrics > accounting.epsilon(step, 1e-5).pld


def test_kinds_of_one_unit_and_adjacency_compose() -> None:
    plain, capped = replace(BASE, steps=5), replace(BASE, max_batch=60, steps=5)
    both = accounting.compose([plain, capped], 1e-5)
    parts = [accounting.epsilon(s, 1e-5).pld for s in (plain, capped)]
    assert max(parts) < both.pld < sum(parts) and both.rdp is None
    assert both == accounting.compose([capped, plain], 1e-5)


def test_a_step_survives_the_ledger_also_an_old_one_without_the_new_fields() -> None:
    for step in (replace(BASE, max_batch=7), replace(BASE, unit="user", records_per_user=3)):
        assert DPStep(**step.parameters()) == step
    old = {k: v for k, v in BASE.parameters().items() if k not in ("max_batch", "records_per_user", "noise")}
    assert DPStep(**old) == BASE


def test_the_best_of_a_poisson_number_of_tries_by_hand() -> None:
    """False: not theorem 6 of Papernot and Steinke 2022, worked out here for one Gaussian (q = 1)."""
    step, delta, mean = replace(BASE, sampling_rate=1.0), 1e-6, 5.0
    orders = np.array([1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024])
    rdp = orders / (2 * SIGMA**2)

    def delta_at(epsilon: float) -> float:  # Canonne, Kamath and Steinke 2020, proposition 12
        bounds = (orders - 1) * (rdp - epsilon + np.log1p(-1 / orders)) - np.log(orders)
        return float(min(math.exp(bounds.min()), np.sqrt(-np.expm1(-rdp)).min()))

    found = [
        r + mean * delta_at(math.log1p(1 / (a - 1))) + math.log(mean) / (a - 1)
        for a, r in zip(orders, rdp, strict=True)
    ]
    epsilon = min(r + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a, r in zip(orders, found, strict=True))
    assert accounting.selected_epsilon(step, delta, mean) == pytest.approx(epsilon, rel=1e-9)
    assert accounting.selected_epsilon(step, delta, 2 * mean) > epsilon > accounting.epsilon(step, delta).pld


@pytest.mark.parametrize("change", [{"adjacency": "replace_one"}, {"max_batch": 9}, {"noise_multiplier": 0.0}])
def test_a_search_without_a_bound_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        accounting.selected_epsilon(replace(BASE, **change), 1e-6, 3.0)
