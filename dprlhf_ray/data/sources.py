"""Records of private and public data sets, from the embedded data, local files or the hub.

Every rule here is record-local and public: what one record becomes depends on that record and the config only, and
every row keeps its slot. A record that cannot be used becomes a null record, which contributes exactly zero. Contents
are never printed or put in an error.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dprlhf_ray.config import DataConfig, EvaluationConfig
from dprlhf_ray.data.columns import (
    Kind,
    Table,
    evaluation_data,
    layouts,
    read_public_responses,
    read_table,
    unit_ids,
)
from dprlhf_ray.data.formats import Format, null_record
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.records import Experience, Prompt


@dataclass(frozen=True)
class Records:
    """A source's records: `items[slot].prompt.slot == slot`; `null_count` of them are null (for the operator).

    items: of kind rl without completions yet; a null record has no prompt tokens and no completions. ids: the real id
    of each row's unit (None: that row has none, and is null); None where the source has no ids.
    """

    items: tuple[Experience, ...]
    null_count: int
    ids: tuple[str | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Records({len(self.items)} records)"

    @classmethod
    def of(cls, items: Sequence[Experience], ids: Sequence[str | None] | None = None) -> Records:
        """These items, with their null records counted."""
        return cls(tuple(items), sum(_is_null(e) for e in items), None if ids is None else tuple(ids))

    def only(self, rows: Sequence[int]) -> Records:
        """These rows, in new slots."""
        found = [self.items[row] for row in rows]
        items = [replace(e, prompt=replace(e.prompt, slot=slot)) for slot, e in enumerate(found)]
        return Records.of(items, None if self.ids is None else [self.ids[row] for row in rows])

    def units(self, unit: Literal["record", "user"]) -> tuple[tuple[int, ...], ...]:
        """Slots by unit: each record's own; or each user's, users in the order of their first rows.

        A row without an id belongs to nobody.
        """
        if unit == "record":
            return tuple((slot,) for slot in range(len(self.items)))
        found: dict[str, list[int]] = {}
        for slot, user in enumerate(self.ids or ()):
            if user is not None:
                found.setdefault(user, []).append(slot)
        return tuple(map(tuple, found.values()))


def load_records(data: DataConfig, kind: Kind, tokenizer: Any, unit: Literal["record", "user"] = "record") -> Records:
    """Read a data set and tokenise its records for one kind of stage.

    - rl: a prompt.
    - sft: a demonstration: prompt and completion; or a text, whose first token is the prompt; or messages, of which the
      assistant's last one is the completion. It ends with an end-of-sequence token unless it is cut.
    - reward_model: (chosen, rejected) and their prompt, if there is one. Whole transcripts in the style of hh-rlhf are
      split after the last "Assistant:" that both share; of messages, the assistant's last one is the response.

    A prompt is a text (special tokens as the tokenizer adds them by default), or a list of {"role", "content"} messages
    that the tokenizer's chat template renders with a generation prompt. With `prompt_tokens: n` only its first n tokens
    are kept. Which columns a record is read from is decided for each row by itself: the first layout without a gap.

    Raises:
        ConfigError: no such file, unsupported suffix, missing column, empty data set, no usable record, no hub, no
            chat template; with unit record two rows of one id.
    """
    if data.chat_template and data.prompt_tokens is not None:
        raise ConfigError("data: prompt_tokens would cut the chat template: set one of prompt_tokens, chat_template")
    templated = bool(getattr(tokenizer, "chat_template", None))
    if data.chat_template and not templated:
        raise ConfigError("data.chat_template: the model's tokenizer has no chat template: set it to false")
    table = read_table(data, [kind])
    found = layouts(data, kind)
    if not templated and all("messages" in x for x in found if table.columns.keys() >= set(x.values())):
        raise ConfigError(f"data source {data.source}: messages need a chat template, and the model's has none")
    ids = unit_ids(data, table, unit)
    read = Format(data, kind, tokenizer, read_public_responses(data) if kind == "reward_model" else ())
    items = [
        read.record(slot, None if ids is not None and ids[slot] is None else _row(table, found, slot))
        for slot in range(table.rows)
    ]
    records = Records.of(items, ids)
    if records.null_count == len(items):
        raise ConfigError(
            f"data source {data.source}: not one usable record of {len(items)}: texts should not be empty, and prompts "
            f"have at most {data.max_prompt_tokens} tokens"
        )
    return records


def at_most(records: Records, records_per_user: int) -> Records:
    """The same records with those of a user beyond the first `records_per_user` rows made null."""
    extra = {slot for slots in records.units("user") for slot in slots[records_per_user:]}
    return Records.of([null_record(slot) if slot in extra else e for slot, e in enumerate(records.items)], records.ids)


def public_records(data: DataConfig, kind: Kind, tokenizer: Any, count: int, seed: int) -> list[Experience]:
    """At most `count` usable records of a public data set in an order fixed by the public seed.

    Raises:
        ConfigError: as `load_records`, or fewer than two usable records.
    """
    public = data.model_copy(update={"unit_column": None, "partitions": {}})
    usable = [e for e in load_records(public, kind, tokenizer).items if not _is_null(e)]
    if len(usable) < 2:
        raise ConfigError(f"data source {data.source}: {len(usable)} usable public record, at least 2 are needed")
    random.Random(seed).shuffle(usable)
    return usable[:count]


def load_public_prompts(
    evaluation: EvaluationConfig, tokenizer: Any, prompt_tokens: int | None, seed: int, like: DataConfig | None = None
) -> list[Prompt]:
    """`evaluation.prompts` public prompts in an order fixed by the public seed; unusable ones are left out.

    `like`: as `evaluation_data`.

    Raises:
        ConfigError: as `public_records`.
    """
    data = evaluation_data(evaluation, like).model_copy(update={"prompt_tokens": prompt_tokens})
    return [e.prompt for e in public_records(data, "rl", tokenizer, evaluation.prompts, seed)]


def _is_null(e: Experience) -> bool:
    return not e.prompt.token_ids and not e.completions


def _row(table: Table, found: list[dict[str, str]], row: int) -> dict[str, Any] | None:
    """The first layout of which this row has every column, whatever other rows have."""
    for layout in found:
        values = {name: table.columns[c][row] for name, c in layout.items() if c in table.columns}
        if len(values) == len(layout) and not any(v is None for v in values.values()):
            return values
    return None
