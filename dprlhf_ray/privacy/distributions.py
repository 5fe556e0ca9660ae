"""The privacy loss distribution of one draw, pessimistic on a grid, for each kind of draw that `DPStep.draw` makes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, MixtureGaussianPrivacyLoss
from scipy.optimize import elementwise
from scipy.special import logsumexp


def one_draw(relation: NeighboringRelation, event: dp_accounting.DpEvent, interval: float) -> PrivacyLossDistribution:
    """The distribution of `event` on a grid of width `interval`; TypeError for an event that no DPStep makes."""
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        return privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=event.event.noise_multiplier,
            value_discretization_interval=interval,
            sampling_prob=event.sampling_probability,
            neighboring_relation=relation,
        )
    if isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event.dataset_size,
            sampling_probability=event.sampling_probability,
            truncated_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
            value_discretization_interval=interval,
            neighboring_relation=relation,
        )
    if isinstance(event, MixtureOfGaussiansDpEvent) and relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
        return PrivacyLossDistribution(
            _mixture(event, AdjacencyType.REMOVE, interval), _mixture(event, AdjacencyType.ADD, interval)
        )
    raise TypeError(f"no privacy loss distribution for {event} under {relation}")


def largest_loss(relation: NeighboringRelation, event: dp_accounting.DpEvent) -> float:
    """About the largest privacy loss on the grid of one draw: a shift of m standard deviations gives m^2/2 + 9 m."""
    if isinstance(event, MixtureOfGaussiansDpEvent):
        shift = max(event.sensitivities) / event.standard_deviation
    elif isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        shift = 4 / event.noise_multiplier  # the unit displaces another one, in both neighbours
    else:
        shift = (2 if relation is NeighboringRelation.REPLACE_ONE else 1) / event.event.noise_multiplier
    return shift**2 / 2 + 9 * shift


class _Mixture(MixtureGaussianPrivacyLoss):
    """The library's mixture of Gaussians with all losses inverted at once; its own search takes minutes on our grid."""

    def _inverse_privacy_losses_with_range(
        self, privacy_losses: np.ndarray, bounds: tuple[float, float], precision: float = 1e-6
    ) -> Iterable[float]:
        low, high = (np.full_like(privacy_losses, b) for b in (bounds[0] - precision, bounds[1] + precision))
        found = elementwise.find_root(lambda x, loss: self._losses(x) - loss, (low, high), args=(privacy_losses,))
        if not found.success.all():
            raise ArithmeticError("the privacy loss of a mixture of Gaussians could not be inverted")
        return np.asarray(found.x)

    def _losses(self, x: np.ndarray) -> np.ndarray:
        sign = -1.0 if self.adjacency_type == AdjacencyType.ADD else 1.0
        c = self.sensitivities
        exponents = (-sign * x[..., None] * c - c**2 / 2) / self._variance
        return np.asarray(sign * logsumexp(exponents, b=self.sampling_probs, axis=-1))


def _mixture(event: MixtureOfGaussiansDpEvent, adjacency: AdjacencyType, interval: float) -> pld_pmf.PLDPmf:
    loss = _Mixture(event.standard_deviation, event.sensitivities, event.sampling_probs, adjacency_type=adjacency)
    bounds = loss.connect_dots_bounds()
    assert bounds.epsilon_lower is not None and bounds.epsilon_upper is not None
    low, high = math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval)
    deltas = loss.get_delta_for_epsilon(np.arange(low, high + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, low, high, deltas)
