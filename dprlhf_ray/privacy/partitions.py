"""Who is in which partition, and whether two stages share a unit: keyed hashes of real unit ids.

A unit's place in [0, 1) is HMAC-SHA256 of (declared data set, id) under a key that comes from the ledger's. So it is
the same in all runs that share a ledger, depends on that unit alone, and nobody without the key can choose ids that
land in a certain partition.

Guarantee: partitions of one map are disjoint for every id that there is or could be. Assumes that an id is real (it
names one unit in every source of the data set, spelt alike up to spaces around it and Unicode form).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dprlhf_ray.privacy.private import Private

DIGEST_BYTES = 16
WHOLE = (0.0, 1.0)


@dataclass(frozen=True, repr=False)
class Units(Private):
    """The units of one stage. PRIVATE: lives in memory of the driver and the accountant only.

    digests: 16 keyed bytes for each. span: the half-open interval of [0, 1) that a unit's place is in, whoever it is.
    """

    digests: frozenset[bytes]
    span: tuple[float, float] = WHOLE


def unit_id(value: Any) -> str | None:
    """The one spelling of a unit's id: text or a whole number; None for anything else, which identifies nobody.

    Integers with gaps are often read or written as floats: 7, 7.0, "7" and "7.0" are one id. A float from 2^53 on may
    have been another integer, and identifies nobody.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return None
    text = unicodedata.normalize("NFC", value).strip()
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text) or None


def spans(partitions: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """The interval of each partition, laid side by side in the order of their names (not of the file)."""
    found, start = {}, 0.0
    for name in sorted(partitions):
        end = min(1.0, start + partitions[name])
        # The rounding of a sum such as 0.1 + 0.2 + 0.7 must leave nobody out.
        found[name] = (start, 1.0 if end > 1.0 - 1e-9 else end)
        start = end
    return found


def place(key: bytes, dataset: str, unit: str) -> float:
    """Where a unit of a declared data set lies, uniform in [0, 1)."""
    return int.from_bytes(_hash(key, "place", dataset, unit)[:6], "big") / 2**48


def digest(key: bytes, dataset: str, unit: str) -> bytes:
    """What tells two units apart without their ids."""
    return _hash(key, "digest", dataset, unit)[:DIGEST_BYTES]


def assign(key: bytes, dataset: str, ids: Sequence[str | None], span: tuple[float, float] = WHOLE) -> list[int]:
    """Rows whose unit lies in `span`, in order. A row without an id lies nowhere."""
    low, high = span
    return [i for i, u in enumerate(ids) if u is not None and low <= place(key, dataset, u) < high]


def units(key: bytes, dataset: str, ids: Sequence[str | None], span: tuple[float, float] = WHOLE) -> Units:
    """The units of these rows."""
    return Units(frozenset(digest(key, dataset, u) for u in ids if u is not None), span)


def _hash(key: bytes, purpose: str, dataset: str, unit: str) -> bytes:
    message = json.dumps([purpose, dataset, unit]).encode()  # unambiguous, whatever characters the names have
    return hmac.new(key, message, hashlib.sha256).digest()
