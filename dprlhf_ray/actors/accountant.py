"""The accountant: the only role that spends budget. A thin shell over ledger, permit office and accounting."""

from __future__ import annotations

from typing import Any, NamedTuple

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.accounting import EpsilonReport
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.permit import Permit, PermitOffice


class Reservation(NamedTuple):
    """A charged attempt: the token to redeem, the attempt (from 1), epsilon spent so far (None: clip only)."""

    token: str
    attempt: int
    epsilon_spent: float | None

    def __repr__(self) -> str:  # never the token: reprs end up in tracebacks and logs
        return f"Reservation(attempt={self.attempt}, epsilon_spent={self.epsilon_spent})"


class AccountantActor:
    """One named actor over a durable ledger; the pipeline wraps it with `ray.remote`.

    A restarted accountant opens the ledger anew: its epoch grows, an older one is fenced, and all permits are gone, so
    that attempts in flight stay spent and are made again as new attempts.
    """

    def __init__(self, url: str, key_path: str | None = None, anchor: str | None = None) -> None:
        self._ledger = Ledger.open(url, key_path, anchor=anchor)
        self._office = PermitOffice()

    def declare(
        self,
        dataset: str,
        stage: str,
        step: DPStep,
        epsilon: float | None,
        delta: float,
        allow_large_delta: bool = False,
    ) -> None:
        """Record a stage's fixed schedule; see `Ledger.declare`."""
        self._ledger.declare(dataset, stage, step, epsilon, delta, allow_large_delta=allow_large_delta)

    def reserve(self, stage: str, incarnation: str) -> Reservation:
        """Charge one attempt durably, then issue its permit. Nothing private may be touched before this returns.

        Raises:
            ConfigError, BudgetExhausted, LedgerDamaged: see `Ledger.charge`.
            PermitRefused: a replaced learner; nothing is charged.
        """
        self._office.admit(incarnation)
        charge = self._ledger.charge(stage)
        token = self._office.issue(stage, charge.attempt, self._ledger.schedules()[stage].step, incarnation)
        return Reservation(token, charge.attempt, self.epsilon_spent(stage, charge.attempt))

    def spent(self, stage: str) -> int:
        """Attempts of the stage charged so far."""
        return self._ledger.spent(stage)

    def redeem(self, token: str, incarnation: str, message_id: str) -> Permit:
        """See `PermitOffice.redeem`."""
        return self._office.redeem(token, incarnation, message_id)

    def epsilon_spent(self, stage: str, attempts: int) -> float | None:
        """PLD epsilon of the first `attempts` draws, never above the target; None for clip only. For the meter."""
        schedule = self._ledger.schedules().get(stage)
        if schedule is None:
            raise ConfigError(f"stage {stage!r}: not declared in this ledger; declare it first")
        if schedule.step.noise_multiplier == 0:
            return None
        meter = accounting.spent(schedule.step, attempts, schedule.delta)
        return meter if schedule.epsilon is None else min(meter, schedule.epsilon)

    def cumulative(self, dataset: str, delta: float) -> EpsilonReport | None:
        """Planned epsilon of all schedules that charge a data set, composed sequentially at one delta.

        None when one of them guarantees nothing (clip only) or when there is none.
        """
        steps = [s.step for s in self._ledger.schedules().values() if s.dataset == dataset]
        if not steps or any(step.noise_multiplier == 0 for step in steps):
            return None
        return accounting.compose(steps, delta, allow_large_delta=True)

    def status(self) -> dict[str, Any]:
        """Public state: epoch, head, and for each stage what was declared and what is spent."""
        stages = {
            name: {
                "dataset": s.dataset,
                "attempts": s.spent,
                "steps": s.step.steps,
                "epsilon": s.epsilon,
                "epsilon_spent": self.epsilon_spent(name, s.spent),
                "delta": s.delta,
            }
            for name, s in self._ledger.schedules().items()
        }
        return {"epoch": self._ledger.epoch, "head": self._ledger.head(), "stages": stages}

    def head(self) -> str:
        """Hash of the ledger's last entry."""
        return self._ledger.head()

    def verify(self) -> None:
        """Verify the whole ledger again; LedgerDamaged on any damage."""
        self._ledger.verify()

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()
