"""Commits reach the disk and are sealed, null units are zero, and keys of noise and draws are fresh at every use."""

from __future__ import annotations

import secrets
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dprlhf_ray.errors import ConfigError, LedgerDamaged
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import noise_gradient
from dprlhf_ray.privacy.permit import Permit
from dprlhf_ray.privacy.sampling import poisson_draw

STEP = DPStep("record", "zero_out", 10_000, 0.04, 2.0, 0.5, 1, 3, 5.0)
FULL, EXTRA = 2, 3  # of PRAGMA synchronous: with less, a commit may be lost with the power
DRAW = """
from dprlhf_ray.privacy.sampling import poisson_draw
print([poisson_draw(1000, 0.1).tolist() for _ in range(3)])
"""


def test_a_charge_is_synchronised_before_it_is_acknowledged(tmp_path: Path) -> None:
    """False: a power cut takes charges back whose steps were published."""
    ledger = Ledger.open(tmp_path / "ledger.db")
    with ledger._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() >= EXTRA
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA fullfsync").scalar_one() == 1


def test_parameters_that_are_changed_in_place_are_refused(tmp_path: Path) -> None:
    """False: the keyed hash does not cover what was declared, and a schedule can be made to look cheaper."""
    path = tmp_path / "ledger.db"
    ledger = Ledger.open(path)
    ledger.declare([Declaration("reviews", "rl", STEP, 8.0, 1e-5)])
    ledger.close()
    with sqlite3.connect(path) as connection:
        old, new = '"clip_norm":0.5', '"clip_norm":0.6'
        changed = connection.execute(
            "UPDATE entries SET body = replace(body, ?, ?) WHERE instr(body, ?)", (old, new, old)
        )
        assert changed.rowcount == 1
    connection.close()
    with pytest.raises(LedgerDamaged, match="hash"):
        Ledger.read(path)


def test_a_target_is_kept_to_its_last_digits(tmp_path: Path) -> None:
    """False: a schedule that costs a little more than its target is declared."""
    cost = accounting.epsilon(STEP, 1e-5).pld
    ledger = Ledger.open(tmp_path / "ledger.db")
    with pytest.raises(ConfigError, match="costs"):
        ledger.declare([Declaration("reviews", "rl", STEP, cost * (1 - 1e-6), 1e-5)])
    ledger.declare([Declaration("reviews", "rl", STEP, cost, 1e-5)])


@pytest.mark.parametrize("what", ["noise", "draw"])
def test_keys_have_128_bits_of_the_operating_system_each_time(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """False: noise or draws come from a key that can be guessed, or from one key twice."""
    asked: list[int] = []

    def randbits(bits: int, drawn: Any = secrets.randbits) -> int:
        asked.append(bits)
        return int(drawn(bits))

    monkeypatch.setattr(secrets, "randbits", randbits)
    for attempt in range(1, 3):
        if what == "noise":
            noise_gradient(torch.zeros(2), Permit.of("t", "rl", attempt, STEP, "i"))
        else:
            poisson_draw(10, 0.5)
    assert len(asked) == 2 and min(asked) >= 128


def test_a_null_or_padding_unit_adds_exactly_zero() -> None:
    """False: what is not valid counts, so that null records and fillers are released with the others."""
    alone, padded = ClippedSum([4], 1.0), ClippedSum([4], 1.0)
    own, other = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    alone.add([own], torch.tensor([True]))
    clipped = padded.add([torch.cat([own, other])], torch.tensor([True, False]))
    assert torch.equal(padded.total, alone.total) and clipped.tolist() == [False, False]


def test_a_restart_draws_nobody_again(tmp_path: Path) -> None:
    """False: draws follow a counter or a seed, so that a restarted run repeats those that it made before."""
    runs = [
        subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    draws = [d for run in runs for d in eval(run)]
    assert len(draws) == 6 and all(draws)
    assert len({tuple(d) for d in draws}) == 6
