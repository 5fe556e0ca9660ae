"""What travels between the rooms. Everything here is PRIVATE: it lives in memory of the cluster's processes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dprlhf_ray.privacy.private import Private, PrivateNumber


@dataclass(frozen=True, repr=False)
class Prompt(Private):
    """One private record's prompt.

    slot: position in the data set (0 <= slot < N). token_ids: prompt tokens; empty for a null record, which keeps its
    slot and contributes exactly zero. text: the prompt as text, for scorers.
    """

    slot: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, repr=False)
class Completion(Private):
    """One completion, drawn from weight version `version`.

    token_ids: generated tokens, the end-of-sequence token included when it was drawn. finished: it ended by EOS.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    version: int


@dataclass(frozen=True, repr=False, init=False)
class Experience(Private):
    """One unit's share of a draw: its prompt, its G completions and their rewards (None where the scorer failed).

    Rewards given as plain numbers become private ones.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[PrivateNumber | None, ...]

    def __init__(
        self,
        prompt: Prompt,
        completions: tuple[Completion, ...],
        rewards: Sequence[PrivateNumber | float | None],
    ) -> None:
        hidden = tuple(r if r is None or isinstance(r, PrivateNumber) else PrivateNumber(float(r)) for r in rewards)
        for name, value in (("prompt", prompt), ("completions", completions), ("rewards", hidden)):
            object.__setattr__(self, name, value)

    @property
    def is_null(self) -> bool:
        """A record that caused a failure of its own contributes exactly zero."""
        scored = len(self.rewards) == len(self.completions) and not any(r is None for r in self.rewards)
        return not self.prompt.token_ids or not self.completions or not scored
