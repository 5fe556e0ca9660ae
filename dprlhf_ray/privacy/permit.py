"""Permits: what a learner must hold to draw noise. Random, single-use, in memory, bound to one learner incarnation."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace

from dprlhf_ray.errors import DprlhfError
from dprlhf_ray.privacy.mechanism import DPStep


class PermitRefused(DprlhfError):
    """No permit for this token, incarnation or message, or all its uses are spent: charge a new attempt."""


@dataclass
class Permit:
    """Leave to release the noised sums of one attempt. Made only by `PermitOffice.redeem`.

    Attributes:
        token: random; never derived from a step number, never written anywhere.
        stage, attempt: what was charged.
        incarnation: the learner incarnation that may use it.
        sigma: noise multiplier of one update; the standard deviation on the sum is sigma * clip_norm.
        clip_norm: C.
        updates: K, sums that may be released.
        metric_sigma: noise multiplier of the metrics' joint release, or None.
        updates_left, metrics_left: uses left.
        noise: "gaussian" or "secure".
    """

    token: str = field(repr=False)
    stage: str
    attempt: int
    incarnation: str
    sigma: float
    clip_norm: float
    updates: int
    metric_sigma: float | None
    updates_left: int
    metrics_left: int
    noise: str = "gaussian"

    @classmethod
    def of(cls, token: str, stage: str, attempt: int, step: DPStep, incarnation: str) -> Permit:
        """The permit of one charged attempt of a schedule: K updates, and one metric release where one was charged."""
        metrics = int(step.metric_noise_multiplier is not None)
        sigma, k = step.noise_multiplier, step.updates_per_draw
        return cls(
            token, stage, attempt, incarnation, sigma, step.clip_norm, k, step.metric_noise_multiplier, k, metrics,
            step.noise,
        )  # fmt: skip

    @property
    def tag(self) -> str:
        """Names the charge in errors and released values; not the token."""
        return f"{self.stage}/{self.attempt}"

    def spend_update(self) -> float:
        """Take one update, before its noise is drawn; returns sigma C, the noise's standard deviation on the sum.

        Raises:
            PermitRefused: none is left.
        """
        if self.updates_left < 1:
            raise PermitRefused(f"stage {self.stage!r} attempt {self.attempt}: all {self.updates} updates were made")
        self.updates_left -= 1
        return self.sigma * self.clip_norm

    def spend_metrics(self) -> float:
        """Take the metric release; returns sigma_m, relative to the metrics' joint bound. Raises PermitRefused."""
        if self.metrics_left < 1 or self.metric_sigma is None:
            raise PermitRefused(f"stage {self.stage!r} attempt {self.attempt}: no metric release is left")
        self.metrics_left -= 1
        return self.metric_sigma


@dataclass
class _Issued:
    permit: Permit
    message_id: str | None = None  # of the redemption, once there was one


class PermitOffice:
    """Issues and redeems permits. Everything is lost with the process, as it must be: a lost permit is a spent attempt.

    One learner incarnation is current. The first use of a new incarnation retires the one before, with its permits; a
    retired one that comes back is refused.
    """

    def __init__(self) -> None:
        self._issued: dict[str, _Issued] = {}
        self._current: str | None = None
        self._retired: set[str] = set()

    def admit(self, incarnation: str) -> None:
        """Make `incarnation` the current one; PermitRefused when it is empty or was retired. Call before charging."""
        if not incarnation or incarnation in self._retired:
            raise PermitRefused("this learner was replaced by a newer one; it must stop")
        if incarnation != self._current:
            if self._current is not None:
                self._retired.add(self._current)
            self._issued.clear()
            self._current = incarnation

    def issue(self, stage: str, attempt: int, step: DPStep, incarnation: str) -> str:
        """A fresh token for a charged attempt of `step`'s schedule."""
        self.admit(incarnation)
        token = secrets.token_hex(16)
        permit = Permit.of(token, stage, attempt, step, incarnation)
        self._issued[token] = _Issued(permit)
        return token

    def redeem(self, token: str, incarnation: str, message_id: str) -> Permit:
        """Exchange a token for its permit, once.

        A repeat of the same message (same token, incarnation and message_id) gets the same answer: a message may arrive
        twice. Anything else is refused.

        Raises:
            PermitRefused: unknown token, other incarnation, already redeemed by another message, or no message_id.
        """
        issued = self._issued.get(token)
        if issued is None or incarnation != issued.permit.incarnation or incarnation != self._current:
            raise PermitRefused("no such permit for this learner; charge a new attempt")
        if not message_id:
            raise PermitRefused("a redemption needs a message_id")
        if issued.message_id is None:
            issued.message_id = message_id
        elif issued.message_id != message_id:
            raise PermitRefused("this permit was redeemed before; charge a new attempt")
        return replace(issued.permit)
