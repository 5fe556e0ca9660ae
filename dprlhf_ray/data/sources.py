"""Prompts of private and public data sets, from the embedded data, local files or the hub.

Every rule here is record-local and public: what one record becomes depends on that record and the config only, and
every row keeps its slot. A record that cannot be used (broken JSON, null, wrong type, empty, too long) becomes a null
record, which contributes exactly zero. Contents are never printed or put in an error.

Local files are read straight into memory, never through `datasets`, whose Arrow caches would leave private text on
disk. A hub data set is a public download and lies in the hub's own cache like any other.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprlhf_ray.config import DataConfig, EvaluationConfig
from dprlhf_ray.data.embedded import POPULATION, read_embedded
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.records import Prompt

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_OTHER_FILES = (".gz", ".txt", ".tsv", ".zip", ".arrow", ".yaml", ".yml", ".xlsx")


@dataclass(frozen=True)
class Prompts:
    """A data set's prompts: `items[slot].slot == slot`; `null_count` of them are null records (for the operator)."""

    items: tuple[Prompt, ...]
    null_count: int

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Prompts({len(self.items)} records)"


def load_prompts(data: DataConfig, tokenizer: Any) -> Prompts:
    """Read a data set and tokenise its prompts (special tokens as the tokenizer adds them by default).

    A prompt is a string, or a list of {"role", "content"} messages that the tokenizer's chat template renders with a
    generation prompt. With `prompt_tokens: n` only the first n tokens are kept.

    Raises:
        ConfigError: no such file, unsupported suffix, missing column, empty data set, no usable record, no hub.
    """
    if data.chat_template and data.prompt_tokens is not None:
        raise ConfigError("data: prompt_tokens would cut the chat template: set one of prompt_tokens, chat_template")
    if data.chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("data.chat_template: the model's tokenizer has no chat template: set it to false")
    items = tuple(_prompt(slot, value, data, tokenizer) for slot, value in enumerate(read_prompt_column(data)))
    null_count = sum(not p.token_ids for p in items)
    if null_count == len(items):
        raise ConfigError(
            f"data source {data.source}: not one usable record of {len(items)}: prompts should be non-empty text of "
            f"at most {data.max_prompt_tokens} tokens"
        )
    return Prompts(items, null_count)


def load_public_prompts(
    evaluation: EvaluationConfig, tokenizer: Any, prompt_tokens: int | None, seed: int, like: DataConfig | None = None
) -> list[Prompt]:
    """`evaluation.prompts` public prompts in an order fixed by the public seed; unusable ones are left out.

    `like`: the data set whose columns, length limit and chat template are used (default: the defaults of a data set).

    Raises:
        ConfigError: as `load_prompts`, or fewer than two usable prompts.
    """
    data = (like or DataConfig.model_validate({})).model_copy(
        update={"source": evaluation.source, "prompt_tokens": prompt_tokens}
    )
    usable = [p for p in load_prompts(data, tokenizer).items if p.token_ids]
    if len(usable) < 2:
        raise ConfigError(f"evaluation.source {evaluation.source}: {len(usable)} usable prompt, at least 2 are needed")
    random.Random(seed).shuffle(usable)
    return usable[: evaluation.prompts]


def read_prompt_column(data: DataConfig) -> list[Any]:
    """The raw prompt of every row in order; None for a malformed row."""
    if data.source.startswith("embedded:"):
        check_embedded(data.source)
        return list(read_embedded(data.source))
    column = data.columns.get("prompt", "prompt")
    if not is_file_source(data.source):
        values: list[Any] = _read_hub(data, column)
    else:
        path = file_path(data.source)
        if path.suffix == ".parquet":
            values = _read_parquet(path, column)
        elif path.suffix == ".csv":
            values = _read_csv(path, column)
        else:
            values = _pick(_read_json(path) if path.suffix == ".json" else _read_jsonl(path), column, data.source)
    if not values:
        raise ConfigError(f"data source {data.source}: the data set is empty: it needs at least one record")
    return values


def is_file_source(source: str) -> bool:
    """Whether a source can only be a file (a hub name is `name` or `org/name`)."""
    return (
        source.endswith(SUFFIXES + _OTHER_FILES)
        or Path(source).expanduser().exists()
        or re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source) is None
    )


def check_embedded(source: str) -> None:
    """Raise ConfigError unless `source` is one of the embedded data sets."""
    if source not in POPULATION:
        raise ConfigError(f"data source {source}: no such embedded data set; there are: {', '.join(POPULATION)}")


def file_path(source: str) -> Path:
    """The file of a local source; ConfigError when it is not there or of an unsupported kind."""
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is a folder, give a file" if path.is_dir() else "no such file"
        raise ConfigError(f"data source {source}: {what} ({', '.join(SUFFIXES)})")
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"data source {source}: unsupported kind of file; supported are {', '.join(SUFFIXES)}")
    return path


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


def _pick(rows: Iterable[Any], column: str, source: str) -> list[Any]:
    """The column of rows that are mappings; ConfigError when no row has it."""
    values: list[Any] = []
    first: dict[str, Any] | None = None
    found = False
    for row in rows:
        mapping = row if isinstance(row, dict) else {}
        first = mapping if first is None and mapping else first
        found = found or column in mapping
        values.append(mapping.get(column))
    if first is not None and not found:
        raise _no_column(source, column, list(first))
    return values


def _no_column(source: str, column: str, names: list[str]) -> ConfigError:
    shown = ", ".join(n[:40] for n in names[:12]) + (", ..." if len(names) > 12 else "")
    return ConfigError(
        f"data source {source}: no column {column!r}; its columns are: {shown} (remap with columns: {{prompt: NAME}})"
    )


def _read_jsonl(path: Path) -> Iterable[Any]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):  # broken JSON or UTF-8: a null record that keeps its slot
                    yield None
    except (OSError, EOFError) as e:
        raise ConfigError(f"data source {path}: cannot be read ({type(e).__name__})") from None


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"data source {path}: is not valid JSON, line {getattr(e, 'lineno', '?')}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"data source {path}: should hold a list of objects, one per record")
    return rows


def _read_csv(path: Path, column: str) -> list[Any]:
    csv.field_size_limit(2**31 - 1)  # a long field is a null record later, not an error of the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            names = list(reader.fieldnames or [])
            if names and column not in names:
                raise _no_column(str(path), column, names)
            return [row.get(column) for row in reader]
        except csv.Error:
            raise ConfigError(f"data source {path}: is not valid CSV, line {reader.line_num}") from None


def _read_parquet(path: Path, column: str) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise _no_column(str(path), column, names)
        return file.read(columns=[column]).column(0).to_pylist()
    except pyarrow.ArrowException:
        raise ConfigError(f"data source {path}: is not a valid Parquet file") from None


def _read_hub(data: DataConfig, column: str) -> list[Any]:
    import datasets

    try:
        table = datasets.load_dataset(data.source, split=data.split)
    except Exception as e:  # the hub's client raises many kinds; all mean that the data set could not be had
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(
            f"data source {data.source}: neither a file here nor readable from the hub, split {data.split!r} ({reason})"
        ) from None
    if column not in table.column_names:
        raise _no_column(data.source, column, table.column_names)
    return list(table[column])
