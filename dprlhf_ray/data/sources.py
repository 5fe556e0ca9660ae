"""Prompts of private and public data sets, from the embedded data, local files or the hub.

Every rule here is record-local and public: what one record becomes depends on that record and the config only, and
every row keeps its slot. A record that cannot be used (broken JSON, null, wrong type, empty, too long) becomes a null
record, which contributes exactly zero. Contents are never printed or put in an error.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dprlhf_ray.config import DataConfig, EvaluationConfig
from dprlhf_ray.data.columns import read_prompt_column, read_unit_ids
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.records import Prompt


@dataclass(frozen=True)
class Prompts:
    """A source's prompts: `items[slot].slot == slot`; `null_count` of them are null records (for the operator).

    ids: the real id of each row's unit (None: that row has none, and is null); None where the source has no ids.
    """

    items: tuple[Prompt, ...]
    null_count: int
    ids: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Prompts({len(self.items)} records)"

    def only(self, rows: Sequence[int]) -> Prompts:
        """These rows, in new slots."""
        items = tuple(replace(self.items[row], slot=slot) for slot, row in enumerate(rows))
        ids = None if self.ids is None else tuple(self.ids[row] for row in rows)
        return Prompts(items, sum(not p.token_ids for p in items), ids)


def load_prompts(data: DataConfig, tokenizer: Any) -> Prompts:
    """Read a data set and tokenise its prompts (special tokens as the tokenizer adds them by default).

    A prompt is a string, or a list of {"role", "content"} messages that the tokenizer's chat template renders with a
    generation prompt. With `prompt_tokens: n` only the first n tokens are kept.

    Raises:
        ConfigError: no such file, unsupported suffix, missing column, empty data set, no usable record, no hub, two
            rows of one unit.
    """
    if data.chat_template and data.prompt_tokens is not None:
        raise ConfigError("data: prompt_tokens would cut the chat template: set one of prompt_tokens, chat_template")
    if data.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("data.chat_template: the model's tokenizer has no chat template: set it to false")
    values, ids = read_prompt_column(data), read_unit_ids(data)
    if ids is not None:
        values = [value if u is not None else None for value, u in zip(values, ids, strict=True)]
    items = tuple(_prompt(slot, value, data, tokenizer) for slot, value in enumerate(values))
    null_count = sum(not p.token_ids for p in items)
    if null_count == len(items):
        raise ConfigError(
            f"data source {data.source}: not one usable record of {len(items)}: prompts should be non-empty text of "
            f"at most {data.max_prompt_tokens} tokens"
        )
    return Prompts(items, null_count, None if ids is None else tuple(ids))


def load_public_prompts(
    evaluation: EvaluationConfig, tokenizer: Any, prompt_tokens: int | None, seed: int, like: DataConfig | None = None
) -> list[Prompt]:
    """`evaluation.prompts` public prompts in an order fixed by the public seed; unusable ones are left out.

    `like`: the data set whose columns, length limit and chat template are used (default: the defaults of a data set).

    Raises:
        ConfigError: as `load_prompts`, or fewer than two usable prompts.
    """
    data = (like or DataConfig.model_validate({})).model_copy(
        update={"source": evaluation.source, "prompt_tokens": prompt_tokens, "unit_column": None}
    )
    usable = [p for p in load_prompts(data, tokenizer).items if p.token_ids]
    if len(usable) < 2:
        raise ConfigError(f"evaluation.source {evaluation.source}: {len(usable)} usable prompt, at least 2 are needed")
    random.Random(seed).shuffle(usable)
    return usable[: evaluation.prompts]


def _prompt(slot: int, value: Any, data: DataConfig, tokenizer: Any) -> Prompt:
    try:
        text, token_ids = _tokenise(value, data, tokenizer)
    except Exception:  # whatever a record's content does to the template or tokenizer is that record's own failure
        return Prompt(slot, (), "")
    if not token_ids or len(token_ids) > data.max_prompt_tokens:
        return Prompt(slot, (), "")
    return Prompt(slot, token_ids, text)


def _tokenise(value: Any, data: DataConfig, tokenizer: Any) -> tuple[str, tuple[int, ...]]:
    """(text, token ids); an empty text gives no tokens, a value of another type raises."""
    if isinstance(value, str) and not data.chat_template:
        text, rendered, special = value, value, True
    else:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        text = "\n".join(_content(m) for m in messages)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        special = False  # a template writes its own
    if not text.strip():
        return "", ()
    # verbose=False: otherwise the length of a long record is logged.
    token_ids = tuple(tokenizer(rendered, add_special_tokens=special, verbose=False)["input_ids"])
    if data.prompt_tokens is not None and len(token_ids) > data.prompt_tokens:
        token_ids = token_ids[: data.prompt_tokens]
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text, token_ids


def _content(message: Any) -> str:
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError("a message has a role and a content, both text")
    return content
