"""Users' reward functions, as `scorer.kind: python` imports them: stateless; one kind of record makes `score` fail."""

from __future__ import annotations

import hashlib
import os

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


CONSTANT = 0.25


def constant(prompt: str, completion: str) -> float:
    """The same for all, so that with it as baseline every gradient is zero; counts private prompts in a file."""
    if prompt.startswith("the movie"):
        count = os.open(os.environ["DPRLHF_TEST_COUNT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(count, b".")
        os.close(count)
    return CONSTANT
