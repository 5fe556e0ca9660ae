"""What both sides of a comparison do: the same model, prompts, completions and adapter."""

from __future__ import annotations

from typing import Any

from dprlhf_ray.config import DataConfig
from dprlhf_ray.data.sources import load_records

COMPLETIONS = 64
NEW_TOKENS = 24
PROMPT_TOKENS = 5
LORA_RANK = 4
LORA_ALPHA = 8
LORA_TARGETS = ("q_proj", "v_proj")


def openings(tokenizer: Any, count: int) -> list[str]:
    """The first `count` review openings of exactly 5 tokens, as text, from the embedded (public) data.

    Raises:
        ValueError: the data has fewer.
    """
    items = [e.prompt for e in load_records(DataConfig(prompt_tokens=PROMPT_TOKENS), "rl", tokenizer).items]
    texts = [p.text for p in items if len(p.token_ids) == PROMPT_TOKENS]
    if count > len(texts):
        raise ValueError(f"{count} openings asked, the embedded data has {len(texts)}")
    return texts[:count]
