"""The Rényi filter: what it admits never exceeds its target at its order, whatever sequence of steps is asked for."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.filter import Filter, calibrate, choose_order, epsilon_at, rho
from dprlhf_ray.privacy.mechanism import DPStep

STEP = DPStep("record", "zero_out", 10_000, 0.04, 2.0, 0.1, 1, 500, None)
KEPT = choose_order(STEP, 4.0, 1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.001, 1.0), st.floats(0.6, 8.0), st.integers(1, 3), st.integers(1, 2000)),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_no_adaptive_sequence_gets_more_than_the_target(asked: list[tuple[float, float, int, int]]) -> None:
    """False: steps of changing (q, sigma, K) are admitted whose Rényi epsilon at alpha is over the target."""
    spent, admitted = 0.0, rdp.RdpAccountant([KEPT.alpha])
    for q, sigma, updates, count in asked:
        step = replace(STEP, sampling_rate=q, noise_multiplier=sigma, updates_per_draw=updates)
        each = rho(step, KEPT.alpha)
        for _ in range(count):  # a plain sum, as a ledger makes it
            if spent + each > KEPT.rho_budget:
                break
            spent += each
            admitted.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma / updates**0.5)))
    assert admitted.get_epsilon(KEPT.delta) <= KEPT.epsilon
    assert epsilon_at(spent, KEPT.alpha, KEPT.delta) <= KEPT.epsilon


@pytest.mark.parametrize("q", [1e-4, 0.04, 0.9])
@pytest.mark.parametrize("alpha", [1.5, 4.0, 24.0])
def test_rho_is_the_divergence_by_quadrature_and_never_less(q: float, alpha: float) -> None:
    """False: rho is not the Rényi divergence of a subsampled Gaussian from its noise, or is rounded down."""
    sigma = 2.0
    x = np.linspace(-40, 60, 400_001)
    null = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    exact = math.log1p(integrate.trapezoid(np.expm1(alpha * ratio) * np.exp(null), x)) / (alpha - 1)
    found = rho(replace(STEP, sampling_rate=q), alpha)
    loose = 1e-6 if alpha.is_integer() else 0.2  # the library adds up magnitudes at other orders: an upper bound
    assert exact <= found <= exact * (1 + loose) + 1e-11


def test_rho_charges_all_updates_and_metrics_of_a_draw() -> None:
    together = replace(STEP, updates_per_draw=4, metric_noise_multiplier=3.0)
    alone = replace(STEP, noise_multiplier=together.effective_noise_multiplier)
    assert rho(together, 3.0) == rho(alone, 3.0) > rho(STEP, 3.0)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5])
def test_the_budget_is_worth_the_target_and_no_more(epsilon: float, delta: float) -> None:
    kept = choose_order(STEP, epsilon, delta)
    assert (kept.epsilon, kept.delta) == (epsilon, delta)
    assert epsilon * (1 - 1e-6) < epsilon_at(kept.rho_budget, kept.alpha, delta) <= epsilon
    assert rdp.compute_epsilon([kept.alpha], [kept.rho_budget], delta)[0] <= epsilon


def test_the_order_is_the_one_with_room_for_most_draws() -> None:
    def room(alpha: float) -> float:
        budgets = [b for b in np.geomspace(1e-4, 20, 4000) if epsilon_at(float(b), alpha, KEPT.delta) <= KEPT.epsilon]
        return max(budgets, default=0.0) / rho(STEP, alpha)

    best = KEPT.rho_budget / rho(STEP, KEPT.alpha)
    assert all(room(alpha) <= best for alpha in (1.5, 2.0, 3.0, 6.0, 12.0, 40.0))


def test_the_filter_costs_about_what_a_fixed_schedule_costs_by_rdp() -> None:
    """False: planned attempts do not all fit, or much more noise is asked for than the RDP accountant would."""
    sigma = calibrate(STEP, 4.0, 1e-5)
    noisy = replace(STEP, noise_multiplier=sigma)
    kept, spent = choose_order(noisy, 4.0, 1e-5), 0.0
    for _ in range(STEP.steps):
        spent = math.nextafter(spent + rho(noisy, kept.alpha), math.inf)
    assert spent <= kept.rho_budget
    assert spent + rho(noisy, kept.alpha) > kept.rho_budget * 0.999
    fixed = accounting.epsilon(noisy, 1e-5)
    assert fixed.rdp is not None and fixed.pld < fixed.rdp <= 4.0 < fixed.rdp * 1.001


NOT_POSITIVE = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0])


@given(bad=NOT_POSITIVE)
def test_nonsense_is_refused(bad: float) -> None:
    """False: NaN, infinity, zero or a negative number passes for a target, a delta, an order or a divergence."""
    with pytest.raises(ConfigError, match="epsilon"):
        choose_order(STEP, bad, 1e-5)
    with pytest.raises(ConfigError, match="delta"):
        choose_order(STEP, 1.0, bad)
    with pytest.raises(ConfigError, match="alpha"):
        rho(STEP, bad)
    with pytest.raises(ConfigError, match="alpha"):
        epsilon_at(1.0, bad, 1e-5)
    with pytest.raises(ConfigError, match="delta"):
        epsilon_at(1.0, 2.0, bad)
    if bad != 0:
        with pytest.raises(ConfigError, match="rho"):
            epsilon_at(bad, 2.0, 1e-5)


def test_nothing_spent_is_epsilon_zero() -> None:
    assert epsilon_at(0.0, 2.0, 1e-5) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"adjacency": "replace_one"},
        {"max_batch": 600},
        {"unit": "user", "records_per_user": 2},
        {"noise_multiplier": 0.0},
    ],
)
def test_steps_without_a_renyi_bound_are_refused(change: dict[str, object]) -> None:
    step = replace(STEP, **change)
    for refused in (lambda: rho(step, 2.0), lambda: choose_order(step, 1.0, 1e-5)):
        with pytest.raises(ConfigError):
            refused()


def test_targets_and_orders_that_cannot_be_computed_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        choose_order(STEP, 0.001, 1e-5)
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match="alpha"):
        rho(replace(STEP, noise_multiplier=0.3), 1.1)
    assert not caplog.records
    assert isinstance(KEPT, Filter)
