"""The chain of a ledger: canonical entries, their keyed hashes, and what they add up to.

Guarantee: with the key, any change of an entry, any reordering, insertion or removal before the head, and a lost tail
that the state row still remembers are found. Assumes that the key stays secret. What cannot be told from the ledger
alone: a copy of ledger and key together, put back later; a head kept elsewhere (`anchor`) can tell that.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dprlhf_ray.errors import LedgerDamaged
from dprlhf_ray.privacy.mechanism import DPStep

GENESIS = "0" * 64

Guarantee = Literal["dp", "none", "public"]
"""Of a stage: its target; nothing (clip only); or nothing to guarantee, because its data are declared public."""


@dataclass(frozen=True)
class Entry:
    """One row: seq counts from 1; body is canonical JSON of public parameters; hashes are 64 hex digits."""

    seq: int
    epoch: int
    kind: str
    dataset: str
    stage: str
    body: str
    prev_hash: str
    hash: str


@dataclass
class Schedule:
    """What was declared for one stage, and how much of it is charged. epsilon is None for clip only and for public.

    A fixed schedule is spent by attempts: `spent` of `step.steps`. An adaptive one (alpha is set) is spent by Renyi
    divergence: `rho` of `rho_budget`, at the order alpha that was fixed when it was declared; `step` is then its plan.
    """

    dataset: str
    stage: str
    step: DPStep
    epsilon: float | None
    delta: float
    spent: int = 0
    alpha: float | None = None
    rho_budget: float = 0.0
    rho: float = 0.0
    public: bool = False

    @property
    def guarantee(self) -> Guarantee:
        return "public" if self.public else "none" if self.step.noise_multiplier == 0 else "dp"

    def rho_after(self, rho: float) -> float:
        """Divergence spent after one more draw that costs `rho`, rounded up."""
        return math.nextafter(self.rho + rho, math.inf)

    def admits(self, rho: float) -> bool:
        """Whether one more draw fits; `rho` is what it costs under an adaptive schedule, and unused otherwise."""
        if self.alpha is None:
            return self.spent < self.step.steps
        return math.isfinite(rho) and rho > 0 and self.rho_after(rho) <= self.rho_budget


@dataclass(frozen=True)
class Budget:
    """What everything declared on one data set may cost together, at one delta."""

    epsilon: float
    delta: float

    def allows(self, other: Budget) -> bool:
        """Whether `other` promises no less: going from this budget to it is not a raise."""
        return other.epsilon <= self.epsilon and other.delta <= self.delta


@dataclass
class ChainState:
    """Where a chain stands: last seq, writer epoch, head hash, schedules by stage, budgets by data set."""

    seq: int = 0
    epoch: int = 0
    head: str = GENESIS
    anchored: bool = False  # some writer kept its head in an anchor file
    schedules: dict[str, Schedule] = field(default_factory=dict)
    budgets: dict[str, Budget] = field(default_factory=dict)


def canonical(body: dict[str, Any]) -> str:
    """Canonical JSON: sorted keys, no spaces, NaN and infinity refused (ValueError)."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def scheduled(dataset: str, stage: str, body: Mapping[str, Any]) -> Schedule:
    """The schedule that an entry's body declares."""
    return Schedule(
        dataset,
        stage,
        DPStep(**body["step"]),
        body["epsilon"],
        body["delta"],
        alpha=body.get("alpha"),
        rho_budget=body.get("rho_budget", 0.0),
        public=body.get("guarantee") == "public",
    )


def seal(key: bytes, state: ChainState, epoch: int, kind: str, dataset: str, stage: str, body: str) -> Entry:
    """The next entry after `state`."""
    seq = state.seq + 1
    public = (seq, epoch, kind, dataset, stage, body, state.head)
    return Entry(*public, _mac(key, *public))


def state_mac(key: bytes, seq: int, epoch: int, head: str) -> str:
    """Keyed hash of the state row, so that it cannot be set back to an older head without the key."""
    return _mac(key, "state", seq, epoch, head)


def unit_key(key: bytes) -> bytes:
    """The key of the hashes of unit ids (partitions.py); nobody learns the ledger's own key from it."""
    return bytes.fromhex(_mac(key, "unit ids"))


def replay(key: bytes, entries: Iterable[Entry], recorded: Mapping[str, str]) -> ChainState:
    """Verify every entry and add them up, in one pass and bounded memory.

    Args:
        key: the ledger's key.
        entries: in order of seq.
        recorded: heads that were seen elsewhere (a checkpoint, a certificate, an anchor file), each with where; all
            of them must be part of this chain.

    Raises:
        LedgerDamaged: the first thing that is wrong.
    """
    state = ChainState()
    missing = {head: where for head, where in recorded.items() if head != GENESIS}
    for entry in entries:
        if entry.seq != state.seq + 1 or entry.prev_hash != state.head:
            raise LedgerDamaged(f"ledger entry {state.seq + 1}: missing, or not linked to the one before; restore it")
        public = (entry.seq, entry.epoch, entry.kind, entry.dataset, entry.stage, entry.body, entry.prev_hash)
        if not isinstance(entry.hash, str) or not hmac.compare_digest(_mac(key, *public).encode(), entry.hash.encode()):
            raise LedgerDamaged(f"ledger entry {entry.seq}: its keyed hash does not match; restore ledger and key")
        apply(state, entry)
        missing.pop(entry.hash, None)
    for where in missing.values():
        raise LedgerDamaged(f"ledger: the head recorded in {where} is not in it (older, cut or forked); restore it")
    return state


def apply(state: ChainState, entry: Entry) -> None:
    """Advance `state` by a verified entry; LedgerDamaged when it breaks the rules of a ledger."""
    body = json.loads(entry.body)
    opened = entry.kind == "open"
    if entry.epoch != state.epoch + opened:
        raise LedgerDamaged(f"ledger entry {entry.seq}: epoch {entry.epoch} after epoch {state.epoch}")
    if opened:
        state.anchored = state.anchored or bool(body.get("anchored"))
    elif entry.kind == "schedule":
        if entry.stage in state.schedules:
            raise LedgerDamaged(f"ledger entry {entry.seq}: stage {entry.stage!r} is declared twice")
        schedule = scheduled(entry.dataset, entry.stage, body)
        if any(s.public != schedule.public for s in state.schedules.values() if s.dataset == entry.dataset):
            raise LedgerDamaged(f"ledger entry {entry.seq}: data set {entry.dataset!r} is both private and public")
        state.schedules[entry.stage] = schedule
    elif entry.kind == "charge":
        known = state.schedules.get(entry.stage)
        rho = body.get("rho", 0.0)
        if known is None or body["attempt"] != known.spent + 1 or not known.admits(rho):
            raise LedgerDamaged(f"ledger entry {entry.seq}: a charge outside the schedule of stage {entry.stage!r}")
        known.spent += 1
        known.rho = known.rho if known.alpha is None else known.rho_after(rho)
    elif entry.kind == "budget":
        before, budget = state.budgets.get(entry.dataset), Budget(body["epsilon"], body["delta"])
        if before is not None and not before.allows(budget) and body["raised"] is not True:
            raise LedgerDamaged(
                f"ledger entry {entry.seq}: the budget of {entry.dataset!r} was raised without saying so"
            )
        state.budgets[entry.dataset] = budget
    else:
        raise LedgerDamaged(f"ledger entry {entry.seq}: unknown kind {entry.kind!r}; written by a newer version?")
    state.seq, state.epoch, state.head = entry.seq, entry.epoch, entry.hash


def _mac(key: bytes, *parts: Any) -> str:
    return hmac.new(key, json.dumps(parts, separators=(",", ":")).encode(), hashlib.sha256).hexdigest()
