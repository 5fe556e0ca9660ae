"""The mark of a private value: it cannot be shown by accident. Pure Python, so that every room may use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn


class Private:
    """Base of everything that holds a record's text, tokens, rewards, log-probabilities or gradients.

    `repr` says `<private>`; `str` and `format` raise, and so do `float`, `int` and `json.dumps`, because it is no
    number and no JSON: a log line, a metric or an error text that takes one fails where it is written. Pickling works:
    private values travel between the processes of the cluster. Dataclasses need `repr=False`.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<private>"

    def __str__(self) -> NoReturn:
        raise TypeError(f"a private {type(self).__name__} cannot be shown: release a noised value instead")

    def __format__(self, spec: str) -> NoReturn:
        str(self)
        raise AssertionError  # never reached


@dataclass(frozen=True, repr=False)
class PrivateNumber(Private):
    """One private number, such as a reward."""

    _value: float

    def reveal(self) -> float:
        """The number itself, for the DP step; whoever calls this keeps it inside the cluster's memory."""
        return self._value
