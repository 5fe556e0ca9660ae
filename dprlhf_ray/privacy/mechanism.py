"""The mechanism of one DP stage: T draws of the Poisson-subsampled Gaussian, described by public parameters only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import dp_accounting

from dprlhf_ray.errors import ConfigError

UNITS = ("record", "user")
ADJACENCIES = ("zero_out", "add_remove", "replace_one")


@dataclass(frozen=True)
class DPStep:
    """The schedule of one stage: everything that its epsilon depends on, fixed before the first record is read.

    Guarantee: each draw includes every unit independently with probability `sampling_rate`; each of its
    `updates_per_draw` released sums is a sum of vectors clipped to L2 norm `clip_norm`, plus N(0, (noise_multiplier *
    clip_norm)^2) once per coordinate; the released metrics of a draw are one vector, clipped per unit to its own
    bound B, plus N(0, (metric_noise_multiplier * B)^2). Assumes that the sampler is Poisson and that noise and sampling
    are fresh at every attempt.

    Attributes:
        unit: "record" or "user".
        adjacency: "zero_out", "add_remove" or "replace_one".
        population: N, number of units: public, or a declared constant under add_remove.
        sampling_rate: q in (0, 1].
        noise_multiplier: sigma of one update, relative to `clip_norm`; 0 means clip only, which has no guarantee.
        clip_norm: C, L2 bound on one unit's gradient. Does not enter epsilon.
        updates_per_draw: K, updates on one draw, all reserved up front.
        steps: T, number of attempts (draws).
        metric_noise_multiplier: sigma_m, or None when a draw releases no private metric.

    Raises:
        ConfigError: NaN, infinite, negative or zero where that has no meaning; replace_one with K > 1.
    """

    unit: str
    adjacency: str
    population: int
    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    updates_per_draw: int
    steps: int
    metric_noise_multiplier: float | None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"unit: unknown unit {self.unit!r}; one of {', '.join(UNITS)}")
        if self.adjacency not in ADJACENCIES:
            raise ConfigError(f"adjacency: unknown adjacency {self.adjacency!r}; one of {', '.join(ADJACENCIES)}")
        for name in ("population", "updates_per_draw", "steps"):
            check_count(name, getattr(self, name))
        check_positive("sampling_rate", self.sampling_rate)
        if self.sampling_rate > 1:
            raise ConfigError(f"sampling_rate: {self.sampling_rate!r} is not a probability; a number in (0, 1]")
        check_positive("clip_norm", self.clip_norm)
        if self.noise_multiplier != 0:
            check_positive("noise_multiplier", self.noise_multiplier)
        if self.metric_noise_multiplier is not None:
            check_positive("metric_noise_multiplier", self.metric_noise_multiplier)
        if self.adjacency == "replace_one" and self.updates_per_draw > 1:
            raise ConfigError(
                f"updates_per_draw: {self.updates_per_draw} is refused under adjacency replace_one; 1, or zero_out"
            )

    @property
    def expected_batch(self) -> float:
        """L = q N: expected units per draw, the public constant that a noised sum is divided by."""
        return self.sampling_rate * self.population

    @property
    def effective_noise_multiplier(self) -> float:
        """sigma_eff of one draw, from sigma_eff^-2 = K * sigma_g^-2 + sigma_m^-2 (0 when noise_multiplier is 0).

        K Gaussians with separate clips over one draw, adaptive or not, are one Gaussian on the concatenated vector:
        under zero_out and add_remove a unit moves it by at most sqrt(K) of the per-update bound (metrics: once per
        draw). With K = 1 the same holds for replace_one, whose factor two the accountant applies.
        """
        if self.noise_multiplier == 0:
            return 0.0
        precision = self.updates_per_draw * self.noise_multiplier**-2
        if self.metric_noise_multiplier is not None:
            precision += self.metric_noise_multiplier**-2
        return precision**-0.5

    def event(self) -> dp_accounting.DpEvent:
        """The whole schedule as an event of dp_accounting.

        Raises:
            ConfigError: noise_multiplier is 0 (clip only): no event describes it, because it guarantees nothing.
        """
        sigma = self.effective_noise_multiplier
        if sigma == 0:
            raise ConfigError("noise_multiplier: 0 (clip only) has no epsilon; a positive number")
        draw = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, dp_accounting.GaussianDpEvent(sigma))
        return dp_accounting.SelfComposedDpEvent(draw, self.steps)

    def parameters(self) -> dict[str, Any]:
        """The public parameters as a JSON object, keys in field order; `DPStep(**parameters)` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_positive(name: str, value: float) -> None:
    """Raise ConfigError unless `value` is a finite number above zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{name}: {value!r} is refused; a finite number above 0")


def check_count(name: str, value: int) -> None:
    """Raise ConfigError unless `value` is an integer of at least one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: {value!r} is refused; a whole number of at least 1")
