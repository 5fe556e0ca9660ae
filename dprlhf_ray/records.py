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
    """One completion, drawn from weight version `version` (None: a response of the data, that nobody generated).

    token_ids: its tokens, the end-of-sequence token included when it was drawn. finished: it ended by EOS.
    log_probs: of each token as it was drawn (nats, at the temperature of sampling); None where nobody needs them.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    version: int | None
    log_probs: tuple[float, ...] | None = None


@dataclass(frozen=True, repr=False, init=False)
class Experience(Private):
    """One record as a loss sees it: a prompt, G completions and their rewards (None where the scorer failed).

    rl: G sampled completions; data without any yet are a prompt only. sft: one demonstration. Pairs: (chosen,
    rejected). Without a scorer all rewards are 0. Rewards given as plain numbers become private ones.
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
        """A record that caused a failure of its own contributes exactly zero. Nothing is generated without a prompt;
        responses of the data may be a pair without one."""
        scored = len(self.rewards) == len(self.completions) and not any(r is None for r in self.rewards)
        unprompted = not self.prompt.token_ids and any(c.version is not None for c in self.completions)
        return unprompted or not self.completions or not scored


Unit = tuple[Experience, ...]
"""What one protected unit brings to a draw: a record, or some of a user's records."""
