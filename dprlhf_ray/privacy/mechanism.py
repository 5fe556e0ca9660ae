"""The mechanism of one DP stage: T draws of a subsampled Gaussian, described by public parameters only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import dp_accounting
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from scipy.stats import binom

from dprlhf_ray.errors import ConfigError

UNITS = ("record", "user")
NOISES = ("gaussian", "secure")
ADJACENCIES = ("zero_out", "add_remove", "replace_one")
SMALLEST_CLIP_NORM = 1e-10  # squares of the numbers of a shorter vector vanish in float32, and its norm with them


@dataclass(frozen=True)
class DPStep:
    """The schedule of one stage: everything that its epsilon depends on, fixed before the first record is read.

    Guarantee: each draw includes every sampled thing (a unit; a record where `records_per_user` is set) independently
    with probability `sampling_rate`, and keeps a uniformly random `max_batch` of them where that is set; each of its
    `updates_per_draw` released sums is a sum of vectors clipped to L2 norm `clip_norm`, plus N(0, (noise_multiplier *
    clip_norm)^2) once per coordinate; the released metrics of a draw are one vector, clipped per unit to its own
    bound B, plus N(0, (metric_noise_multiplier * B)^2). Assumes that the sampler is Poisson and that noise and sampling
    are fresh at every attempt.

    Attributes:
        unit: "record" or "user". A user is sampled, clipped and accounted for as a record is unless
            `records_per_user` is set.
        adjacency: "zero_out", "add_remove" or "replace_one".
        population: N, number of sampled things: public, or a declared constant under add_remove.
        sampling_rate: q in (0, 1].
        noise_multiplier: sigma of one update, relative to `clip_norm`; 0 means clip only, which has no guarantee.
        clip_norm: C, L2 bound on one unit's gradient. Does not enter epsilon.
        updates_per_draw: K, updates on one draw, all reserved up front.
        steps: T, number of attempts (draws).
        metric_noise_multiplier: sigma_m, or None when a draw releases no private metric.
        noise: "gaussian", or "secure" (privacy/secure_noise.py), which is a rounding of it. Does not enter epsilon.
        max_batch: cap on a draw (truncated Poisson sampling), or None. Near the mean it costs much.
        records_per_user: k, where *records* are sampled and clipped and a user owns at most k of them; None where the
            sampled thing is the unit itself.

    Raises:
        ConfigError: NaN, infinite, negative or zero where that has no meaning; a combination without a sound figure:
            K > 1 with replace_one, max_batch or records_per_user (none of the three is one Gaussian under adaptive
            updates); max_batch with add_remove (its figure needs a public N) or with records_per_user; records_per_user
            with replace_one or with unit record.
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
    noise: str = "gaussian"
    max_batch: int | None = None
    records_per_user: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"unit: unknown unit {self.unit!r}; one of {', '.join(UNITS)}")
        if self.adjacency not in ADJACENCIES:
            raise ConfigError(f"adjacency: unknown adjacency {self.adjacency!r}; one of {', '.join(ADJACENCIES)}")
        if self.noise not in NOISES:
            raise ConfigError(f"noise: unknown noise {self.noise!r}; one of {', '.join(NOISES)}")
        for name in ("population", "updates_per_draw", "steps"):
            check_count(name, getattr(self, name))
        check_positive("sampling_rate", self.sampling_rate)
        if self.sampling_rate > 1:
            raise ConfigError(f"sampling_rate: {self.sampling_rate!r} is not a probability; a number in (0, 1]")
        check_positive("clip_norm", self.clip_norm)
        if self.clip_norm < SMALLEST_CLIP_NORM:
            raise ConfigError(f"clip_norm: {self.clip_norm!r} is refused; at least {SMALLEST_CLIP_NORM:g}")
        if self.noise_multiplier != 0:
            check_positive("noise_multiplier", self.noise_multiplier)
        if self.metric_noise_multiplier is not None:
            check_positive("metric_noise_multiplier", self.metric_noise_multiplier)
        for name in ("max_batch", "records_per_user"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        self._check_combination()

    def _check_combination(self) -> None:
        if self.adjacency == "replace_one" and self.updates_per_draw > 1:
            raise ConfigError(
                f"updates_per_draw: {self.updates_per_draw} is refused under adjacency replace_one; 1, or zero_out"
            )
        for name in ("max_batch", "records_per_user"):
            if getattr(self, name) is not None and self.updates_per_draw > 1:
                raise ConfigError(f"updates_per_draw: {self.updates_per_draw} is refused with {name}; 1")
        if self.max_batch is not None and self.adjacency == "add_remove":
            raise ConfigError("max_batch: refused under adjacency add_remove, where the size is private; zero_out")
        if self.records_per_user is not None:
            if self.unit != "user":
                raise ConfigError(f"records_per_user: {self.records_per_user} means nothing for unit record; unit user")
            if self.adjacency == "replace_one":
                raise ConfigError("records_per_user: no figure is known under adjacency replace_one; zero_out")
            if self.max_batch is not None:
                raise ConfigError("max_batch: no figure is known with records_per_user; one of the two")

    @property
    def expected_batch(self) -> float:
        """L = q N: expected units per draw, the public constant that a noised sum is divided by."""
        return self.sampling_rate * self.population

    @property
    def sampled(self) -> str:
        """What is drawn and clipped, and counted by `population`: "record" or "user"."""
        return self.unit if self.records_per_user is None else "record"

    @property
    def effective_noise_multiplier(self) -> float:
        """sigma_eff of one draw, from sigma_eff^-2 = K * sigma_g^-2 + sigma_m^-2 (0 when noise_multiplier is 0).

        K Gaussians with separate clips over one draw, adaptive or not, are one Gaussian on the concatenated vector:
        under zero_out and add_remove a unit moves it by at most sqrt(K) of the per-update bound (metrics: once per
        draw). With K = 1 the same holds for replace_one, whose factor two the accountant applies, for a capped draw,
        and for i sampled records of one user, which move it by i times the bound.
        """
        if self.noise_multiplier == 0:
            return 0.0
        precision = self.updates_per_draw * self.noise_multiplier**-2
        if self.metric_noise_multiplier is not None:
            precision += self.metric_noise_multiplier**-2
        return precision**-0.5

    def draw(self) -> dp_accounting.DpEvent:
        """One draw as an event of dp_accounting.

        Plain: the Poisson-subsampled Gaussian. With `max_batch`: its truncated form (arXiv 2508.15089), by the general
        bound: given whether the others fill the batch, the unit is drawn as without a cap, or displaces a random other
        one. The argument does not need the unit to be absent from the neighbour, a null record in its slot will do, so
        the figure is that of zero_out. With `records_per_user`: i ~ Binomial(k, q) records of a user are drawn and move
        the sum by at most i C, a mixture of Gaussians (Ganesh 2024, "Tight group-level DP guarantees for DP-SGD with
        sampling via mixture of Gaussians mechanisms").

        Raises:
            ConfigError: noise_multiplier is 0 (clip only): no event describes it, because it guarantees nothing.
        """
        sigma, q = self.effective_noise_multiplier, self.sampling_rate
        if sigma == 0:
            raise ConfigError("noise_multiplier: 0 (clip only) has no epsilon; a positive number")
        if self.max_batch is not None:
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(self.population, q, self.max_batch, sigma)
        if self.records_per_user is not None:
            drawn = range(self.records_per_user + 1)
            chances = binom.pmf(drawn, self.records_per_user, q)
            return MixtureOfGaussiansDpEvent(sigma, tuple(map(float, drawn)), tuple(map(float, chances)))
        return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))

    def event(self) -> dp_accounting.DpEvent:
        """The whole schedule as an event of dp_accounting; ConfigError as `draw`."""
        return dp_accounting.SelfComposedDpEvent(self.draw(), self.steps)

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
