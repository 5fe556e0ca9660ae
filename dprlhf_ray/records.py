"""What travels between the rooms. Everything here is PRIVATE: it lives in memory of the cluster's processes only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One private record's prompt.

    slot: position in the data set (0 <= slot < N). token_ids: prompt tokens; empty for a null record, which keeps its
    slot and contributes exactly zero. text: the prompt as text, for scorers.
    """

    slot: int
    token_ids: tuple[int, ...]
    text: str

    def __repr__(self) -> str:  # never the content: reprs end up in tracebacks and logs
        return f"Prompt(slot=<private>, tokens={len(self.token_ids)})"


@dataclass(frozen=True)
class Completion:
    """One completion, drawn from weight version `version`.

    token_ids: generated tokens, the end-of-sequence token included when it was drawn. finished: it ended by EOS.
    """

    token_ids: tuple[int, ...]
    text: str
    finished: bool
    version: int

    def __repr__(self) -> str:
        return f"Completion(tokens={len(self.token_ids)}, version={self.version})"


@dataclass(frozen=True)
class Experience:
    """One unit's share of a draw: its prompt, its G completions and their rewards (None where the scorer failed)."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float | None, ...]

    def __repr__(self) -> str:
        return f"Experience(completions={len(self.completions)})"

    @property
    def is_null(self) -> bool:
        """A record that caused a failure of its own contributes exactly zero."""
        return not self.prompt.token_ids or not self.completions or any(r is None for r in self.rewards)
