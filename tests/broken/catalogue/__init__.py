"""Faults that make the printed epsilon untrue, one line each, and the tests that must fail under them.

`rule` is the section of docs/guarantee.md that the fault breaks. `old` occurs exactly once in `file`.
"""

from __future__ import annotations

from tests.broken.catalogue.around import COUPLING, PUBLIC_STAGES, RELEASES, STAGES
from tests.broken.catalogue.fault import Fault
from tests.broken.catalogue.spending import ACCOUNTS, CHARGE, LEDGERS
from tests.broken.catalogue.step import CLIP, NOISE, SAMPLING, UNITS

__all__ = ["FAULTS", "Fault"]

FAULTS: tuple[Fault, ...] = tuple(
    CLIP + UNITS + NOISE + SAMPLING + CHARGE + ACCOUNTS + LEDGERS + COUPLING + RELEASES + PUBLIC_STAGES + STAGES
)
