"""The mailbox between the driver and the learners' ranks."""

from __future__ import annotations

import asyncio
from typing import Any


class Mailbox:
    """Async actor between driver and workers. Commands are (method, one argument tuple per rank)."""

    def __init__(self) -> None:
        self._incarnation: str | None = None
        self._info: dict[str, Any] = {}
        self._seq = 0
        self._command: tuple[str, list[tuple[Any, ...]]] | None = None
        self._reply: tuple[int, Any] | None = None
        self._changed = asyncio.Condition()

    async def register(self, incarnation: str, info: dict[str, Any]) -> None:
        async with self._changed:
            self._incarnation, self._info, self._command, self._reply = incarnation, info, None, None
            self._changed.notify_all()

    async def ready(self, timeout: float) -> tuple[str, dict[str, Any]] | None:
        """(incarnation, info) of the present group, or None after `timeout` seconds without one."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._incarnation is not None), timeout)
            except TimeoutError:
                return None
            return str(self._incarnation), self._info

    async def submit(self, incarnation: str, method: str, arguments: list[tuple[Any, ...]]) -> int:
        async with self._changed:
            if incarnation != self._incarnation:
                return -1
            self._seq += 1
            self._command, self._reply = (method, arguments), None
            self._changed.notify_all()
            return self._seq

    async def next(self, incarnation: str, rank: int, after: int) -> tuple[int, str, tuple[Any, ...]] | None:
        """The command that follows number `after` for `rank`; None after a while without one, or when superseded."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._command is not None and self._seq > after), 5
                )
            except TimeoutError:
                return None
            if incarnation != self._incarnation or self._command is None:
                return None
            method, arguments = self._command
            return self._seq, method, arguments[rank]

    async def reply(self, incarnation: str, seq: int, value: Any) -> None:
        async with self._changed:
            if incarnation == self._incarnation and seq == self._seq:
                self._command, self._reply = None, (seq, value)
                self._changed.notify_all()

    async def result(self, incarnation: str, seq: int, timeout: float) -> tuple[str, Any]:
        """("done", value), ("restarted", None) or ("waiting", None)."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(
                        lambda: self._incarnation != incarnation or (self._reply is not None and self._reply[0] == seq)
                    ),
                    timeout,
                )
            except TimeoutError:
                return "waiting", None
            if self._incarnation != incarnation or self._reply is None:
                return "restarted", None
            return "done", self._reply[1]
