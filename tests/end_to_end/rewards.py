"""A user's reward function, as `scorer.kind: python` imports it: stateless, and one kind of record makes it fail."""

from __future__ import annotations

import hashlib

FAILS_ON = "unscorable"


def score(prompt: str, completion: str) -> float:
    """Share of vowels, plus a part that no other (prompt, completion) has, so that a leaked value can be recognised.

    Raises:
        ValueError: prompts that contain FAILS_ON; the message quotes the record, as careless functions do.
    """
    if FAILS_ON in prompt:
        raise ValueError(f"cannot score {prompt!r}")
    vowels = sum(c in "aeiou" for c in completion) / (len(completion) + 1)
    digest = hashlib.sha256(f"{prompt}\0{completion}".encode()).digest()
    return 0.5 * vowels + int.from_bytes(digest[:6], "big") / 2**50
