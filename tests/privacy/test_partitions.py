"""Everybody is in exactly one partition, by a keyed hash of the real id, the same in every run of a ledger."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.partitions import Units, assign, digest, place, spans, unit_id, units

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
IDS = [f"person-{i}" for i in range(4000)]


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_fractions_that_add_up_to_one_leave_nobody_out_and_nobody_in_two(weights: list[float]) -> None:
    total = math.fsum(weights)
    found = spans({f"p{i}": w / total for i, w in enumerate(weights)})
    rows = [assign(KEY, "notes", IDS[:300], span) for span in found.values()]
    assert sorted(row for part in rows for row in part) == list(range(300))


def test_each_partition_gets_its_fraction() -> None:
    """Within five standard deviations; two partitions that were swapped, or cut at the wrong place, fall outside."""
    for name, span in spans({"large": 0.6, "small": 0.3}).items():
        fraction = {"large": 0.6, "small": 0.3}[name]
        count = len(assign(KEY, "notes", IDS, span))
        assert abs(count - 4000 * fraction) < 5 * math.sqrt(4000 * fraction * (1 - fraction)), name


def test_the_order_in_which_partitions_are_written_moves_nobody() -> None:
    assert spans({"b": 0.5, "a": 0.25}) == spans({"a": 0.25, "b": 0.5})


def test_a_place_is_the_same_in_every_version_and_depends_on_key_data_set_and_id() -> None:
    """Were it to change, a stage of an earlier run would overlap one that is believed to be disjoint."""
    assert place(KEY, "notes", "person-1") == 0.3487342520109351
    assert digest(KEY, "notes", "person-1").hex() == "7cb3c80bc7246538bad473a2be3307a7"
    others = [(OTHER_KEY, "notes", "person-1"), (KEY, "letters", "person-1"), (KEY, "notes", "person-2")]
    for other in others:
        assert place(*other) != place(KEY, "notes", "person-1")
        assert digest(*other) != digest(KEY, "notes", "person-1")
    assert place(KEY, "a", "bc") != place(KEY, "ab", "c")


def test_runs_that_share_a_ledger_share_the_key_and_others_do_not(tmp_path: Path) -> None:
    keys = []
    for name in ("a.db", "a.db", "b.db"):
        ledger = Ledger.open(tmp_path / name)
        keys.append(ledger.unit_key())
        ledger.close()
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] != (tmp_path / "a.key").read_bytes()


def test_rows_without_an_id_are_nobody() -> None:
    assert assign(KEY, "notes", ["a", None, "b"]) == [0, 2]
    assert len(units(KEY, "notes", ["a", None, "b"]).digests) == 2


@pytest.mark.parametrize(
    ("one", "other"), [(7, "7"), (7.0, 7), ("7.0", 7), (" 7 ", "7"), ("caf\u00e9", "cafe\u0301"), (2**60, str(2**60))]
)
def test_spellings_of_one_id_are_one_unit(one: object, other: object) -> None:
    """Read as two units they would be composed in parallel, and the epsilon would be too small."""
    assert unit_id(one) == unit_id(other) is not None


@pytest.mark.parametrize("nobody", [None, "", "  ", 1.5, 2.0**53, float("nan"), True, ["a"], {}])
def test_what_identifies_nobody_is_no_id(nobody: object) -> None:
    assert unit_id(nobody) is None


def test_units_cannot_be_shown() -> None:
    found = Units(frozenset([digest(KEY, "notes", "person-1")]))
    assert repr(found) == "<private>"
    with pytest.raises(TypeError):
        str(found)
