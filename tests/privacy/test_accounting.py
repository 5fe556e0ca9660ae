"""Epsilon is what open accountants say, never less; calibration errs to the safe side; nonsense is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from dp_accounting.pld import privacy_loss_distribution as distributions
from hypothesis import given, settings
from hypothesis import strategies as st

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.mechanism import DPStep

BASE = DPStep("record", "zero_out", 10_000, 0.1, 3.0, 0.1, 1, 512, None)

# sampling_rate, sigma, steps, delta, PLD, RDP, PLD under replace_one
GOLDENS = [
    (0.04, 1.5, 2250, 1e-5, 6.768787, 7.329335, 13.488479),
    (0.01, 1.0, 10000, 1e-5, 6.187745, 6.712757, 10.880807),
    (0.005, 0.8, 1000, 1e-6, 2.004112, 2.626538, 2.40241),
    (0.1, 3.0, 512, 1e-6, 3.769687, 4.05097, 7.82455),
    (1.0, 1.0, 1, 1e-5, 4.377178, 4.728507, 9.997256),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "pld", "rdp", "replace_one"), GOLDENS)
def test_epsilon_is_the_reference_figure_under_each_adjacency(
    q: float, sigma: float, steps: int, delta: float, pld: float, rdp: float, replace_one: float
) -> None:
    step = replace(BASE, sampling_rate=q, noise_multiplier=sigma, steps=steps)
    for adjacency in ("zero_out", "add_remove"):
        report = accounting.epsilon(replace(step, adjacency=adjacency), delta)
        assert report.pld == pytest.approx(pld, rel=1e-3)
        assert report.rdp == pytest.approx(rdp, rel=1e-3)
    report = accounting.epsilon(replace(step, adjacency="replace_one"), delta)
    assert report.pld == pytest.approx(replace_one, rel=1e-3)
    assert report.rdp is None


def test_updates_on_one_draw_are_one_subsampled_gaussian_with_less_noise() -> None:
    """Charging K updates on one draw as K independent draws (2.12) would understate them (9.87)."""
    step = replace(BASE, sampling_rate=0.01, noise_multiplier=1.0, updates_per_draw=4, steps=250)
    assert accounting.epsilon(step, 1e-6).pld == pytest.approx(9.87, rel=1e-3)
    wrong = replace(step, updates_per_draw=1, steps=1000)
    assert accounting.epsilon(wrong, 1e-6).pld == pytest.approx(2.12, abs=0.01)


def test_metrics_are_charged_once_per_draw() -> None:
    step = replace(BASE, noise_multiplier=2.0, updates_per_draw=4, metric_noise_multiplier=5.0)
    assert step.effective_noise_multiplier == pytest.approx((4 / 4 + 1 / 25) ** -0.5)
    assert step.expected_batch == pytest.approx(1000)
    assert (
        accounting.epsilon(step, 1e-6).pld > accounting.epsilon(replace(step, metric_noise_multiplier=None), 1e-6).pld
    )


@pytest.mark.parametrize("index", range(len(GOLDENS)))
def test_epsilon_is_not_below_an_optimistic_estimate(index: int) -> None:
    q, sigma, steps, delta, *_ = GOLDENS[index]
    optimistic = distributions.from_gaussian_mechanism(
        sigma, sampling_prob=q, pessimistic_estimate=False, value_discretization_interval=1e-3, use_connect_dots=False
    )
    if steps > 1:
        optimistic = optimistic.self_compose(steps)
    step = replace(BASE, sampling_rate=q, noise_multiplier=sigma, steps=steps)
    assert accounting.epsilon(step, delta).pld >= optimistic.get_epsilon_for_delta(delta)


@pytest.mark.parametrize(
    ("q", "steps", "target", "delta", "sigma"),
    [
        (1.0, 1, 1.0, 1e-5, 3.730632),
        (1.0, 1, 2.0, 1e-5, 1.993812),
        (1.0, 1, 4.0, 1e-5, 1.081162),
        (1.0, 1, 8.0, 1e-5, 0.600229),
        (0.1, 512, 1.0, 1e-6, 9.661829),
    ],
)
def test_calibration_finds_the_smallest_noise_and_never_less(
    q: float, steps: int, target: float, delta: float, sigma: float
) -> None:
    step = replace(BASE, sampling_rate=q, steps=steps)
    found = accounting.calibrate(step, target, delta)
    assert found == pytest.approx(sigma, rel=1e-3)
    assert accounting.epsilon(replace(step, noise_multiplier=found), delta).pld <= target
    assert accounting.epsilon(replace(step, noise_multiplier=found * 0.999), delta).pld > target


def test_calibration_keeps_room_for_the_metrics() -> None:
    step = replace(BASE, sampling_rate=0.04, steps=20, metric_noise_multiplier=8.0)
    found = replace(step, noise_multiplier=accounting.calibrate(step, 0.5, 1e-5))
    assert 0.499 < accounting.epsilon(found, 1e-5).pld <= 0.5
    assert accounting.epsilon(replace(found, metric_noise_multiplier=None), 1e-5).pld < 0.48
    with pytest.raises(ConfigError, match="metrics"):
        accounting.calibrate(replace(step, metric_noise_multiplier=0.5), 0.5, 1e-5)


def test_two_schedules_of_one_mechanism_compose_to_the_long_schedule() -> None:
    first, second = replace(BASE, steps=200), replace(BASE, steps=312)
    both = accounting.compose([first, second], 1e-6)
    assert both.pld == pytest.approx(3.769687, rel=1e-3)
    assert both.rdp == pytest.approx(4.05097, rel=1e-3)
    with pytest.raises(ConfigError, match="adjacency"):
        accounting.compose([first, replace(second, adjacency="add_remove")], 1e-6)
    with pytest.raises(ConfigError, match="at least one"):
        accounting.compose([], 1e-6)


def test_the_meter_grows_and_ends_at_the_planned_figure() -> None:
    meter = [accounting.spent(BASE, attempts, 1e-6) for attempts in (0, 1, 10, 100, 500, 512)]
    assert meter[0] == 0
    assert meter == sorted(meter)
    assert meter[-1] == accounting.epsilon(BASE, 1e-6).pld


NOT_POSITIVE = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, -1e-9])


@given(
    field=st.sampled_from(["sampling_rate", "noise_multiplier", "clip_norm", "metric_noise_multiplier"]),
    bad=NOT_POSITIVE,
)
def test_nonsense_is_refused_in_every_number(field: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(BASE, **{field: bad})


@given(
    field=st.sampled_from(["population", "updates_per_draw", "steps"]),
    bad=st.sampled_from([0, -1, 1.5, True, math.nan]),
)
def test_counts_are_whole_and_positive(field: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(BASE, **{field: bad})


@given(bad=NOT_POSITIVE | st.just(0.0))
def test_targets_and_deltas_are_finite_and_positive(bad: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        accounting.calibrate(BASE, bad, 1e-6)
    with pytest.raises(ConfigError, match="delta"):
        accounting.epsilon(BASE, bad)


def test_what_has_no_sound_figure_is_refused() -> None:
    with pytest.raises(ConfigError, match="clip only"):
        accounting.epsilon(replace(BASE, noise_multiplier=0.0), 1e-6)
    with pytest.raises(ConfigError, match="sampling_rate"):
        replace(BASE, sampling_rate=1.0001)
    with pytest.raises(ConfigError, match="sampling_rate"):
        replace(BASE, sampling_rate=0)
    with pytest.raises(ConfigError, match="replace_one"):
        replace(BASE, adjacency="replace_one", updates_per_draw=2)
    with pytest.raises(ConfigError, match="adjacency"):
        replace(BASE, adjacency="substitute")
    with pytest.raises(ConfigError, match="unit"):
        replace(BASE, unit="token")
    with pytest.raises(ConfigError, match="clip_norm"):  # in float32 the norm of such a vector is 0, and nothing clips
        replace(BASE, clip_norm=1e-20)


def test_delta_of_one_record_is_refused_without_an_override() -> None:
    with pytest.raises(ConfigError, match="1/N"):
        accounting.epsilon(BASE, 1e-4)
    assert accounting.epsilon(BASE, 1e-4, allow_large_delta=True).pld > 0
    for delta in (1.0, 1e-13):
        with pytest.raises(ConfigError, match="delta"):
            accounting.epsilon(BASE, delta, allow_large_delta=True)


@settings(max_examples=3, deadline=None)
@given(
    q=st.floats(0.01, 1.0),
    sigma=st.floats(1.5, 5.0),
    steps=st.integers(1, 200),
    updates=st.integers(1, 3),
)
def test_epsilon_falls_with_noise_and_grows_with_draws_and_updates(
    q: float, sigma: float, steps: int, updates: int
) -> None:
    step = DPStep("record", "zero_out", 10_000, q, sigma, 1.0, updates, steps, None)

    def figure(changed: DPStep) -> float:
        return accounting.epsilon(changed, 1e-5).pld

    base = figure(step)
    assert figure(replace(step, noise_multiplier=1.2 * sigma)) <= base
    assert figure(replace(step, steps=steps + 10)) >= base
    assert figure(replace(step, updates_per_draw=updates + 1)) >= base
    assert figure(replace(step, clip_norm=7.0)) == base
