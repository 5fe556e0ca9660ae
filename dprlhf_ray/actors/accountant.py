"""The accountant: the only role that spends budget. A thin shell over ledger, permit office and accounting."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dprlhf_ray.privacy import budget
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.composition import NO_IDS, OTHER_RUN, Composition, Part, compose
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.partitions import Units
from dprlhf_ray.privacy.permit import Permit, PermitOffice


class Reservation(NamedTuple):
    """A charged attempt: the token to redeem, the attempt (from 1), epsilon spent so far (None: there is none)."""

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

    def __init__(
        self, url: str, key_path: str | None = None, anchor: str | None = None, anchor_file: str | None = None
    ) -> None:
        self._ledger = Ledger.open(url, key_path, anchor=anchor, anchor_file=anchor_file)
        self._office = PermitOffice()

    def declare(self, declarations: Sequence[Declaration], public: Collection[str] = ()) -> None:
        """Record the schedules of all stages of a run, or none of them; see `Ledger.declare`."""
        self._ledger.declare(declarations, public)

    def set_budget(self, dataset: str, epsilon: float, delta: float) -> None:
        """Bound everything declared on a data set; see `Ledger.set_budget`. A raise is not made by a run."""
        self._ledger.set_budget(dataset, epsilon, delta)

    def reserve(self, stage: str, incarnation: str, step: DPStep | None = None) -> Reservation:
        """Charge one attempt durably, then issue its permit. Nothing private may be touched before this returns.

        Args:
            step: what this attempt does, under an adaptive schedule; None: as planned.

        Raises:
            ConfigError, BudgetExhausted, LedgerDamaged: see `Ledger.charge`.
            PermitRefused: a replaced learner; nothing is charged.
        """
        self._office.admit(incarnation)
        charge = self._ledger.charge(stage, step)
        token = self._office.issue(stage, charge.attempt, charge.step, incarnation)
        return Reservation(token, charge.attempt, self.epsilon_spent(stage))

    def spent(self, stage: str) -> int:
        """Attempts of the stage charged so far."""
        return self._ledger.spent(stage)

    def redeem(self, token: str, incarnation: str, message_id: str) -> Permit:
        """See `PermitOffice.redeem`."""
        return self._office.redeem(token, incarnation, message_id)

    def epsilon_spent(self, stage: str) -> float | None:
        """Epsilon of what is charged so far, never above the target; None where there is none. For the meter."""
        return budget.meter(self._ledger.schedule(stage))

    def unit_key(self) -> bytes:
        """Key of the hashes of unit ids (`partitions`), the same for all runs that share this ledger. A secret."""
        return self._ledger.unit_key()

    def composition(
        self, dataset: str, delta: float, units: Mapping[str, Units | None], this_run_only: bool = False
    ) -> Composition:
        """What the schedules of a data set cost together at one delta; which of them share a unit is checked here.

        Args:
            units: by stage of this run, the units that it reads (None: its rows have no ids). They stay in memory for
                this call. The units of all other stages are unknown, so that these count for every unit.
            this_run_only: leave the stages of other runs out.

        Raises:
            ConfigError: nothing private was declared on this data set.
        """
        parts = []
        for s in self._ledger.schedules().values():
            if s.dataset == dataset and not s.public and (s.stage in units or not this_run_only):
                found = units.get(s.stage)
                why = NO_IDS if s.stage in units else OTHER_RUN
                parts.append(Part(s.stage, s.step, found, why, s.alpha, s.rho_budget))
        return compose(parts, delta)

    def status(self) -> dict[str, Any]:
        """Public state: epoch, head, and for each stage what was declared and what is spent."""
        stages = {
            name: {
                "dataset": s.dataset,
                "attempts": s.spent,
                "steps": s.step.steps,
                "epsilon": s.epsilon,
                "epsilon_spent": budget.meter(s),
                "delta": s.delta,
                "guarantee": s.guarantee,
            }
            for name, s in self._ledger.schedules().items()
        }
        return {"epoch": self._ledger.epoch, "seq": self._ledger.seq, "head": self._ledger.head(), "stages": stages}

    def head(self) -> str:
        """Hash of the ledger's last entry."""
        return self._ledger.head()

    def verify(self) -> None:
        """Verify the whole ledger again; LedgerDamaged on any damage."""
        self._ledger.verify()

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()
