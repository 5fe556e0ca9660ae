"""Columns of embedded data, local files and hub data sets: the prompts, and the real ids of the rows' units.

Every row keeps its place: a row that is broken or lacks the column has the value None. Contents are never printed or
put in an error. Local files are read straight into memory, never through `datasets`, whose Arrow caches would leave
private text on disk. A hub data set is a public download and lies in the hub's own cache like any other.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dprlhf_ray.config import DataConfig
from dprlhf_ray.data.embedded import POPULATION, read_embedded
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy.partitions import unit_id

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_OTHER_FILES = (".gz", ".txt", ".tsv", ".zip", ".arrow", ".yaml", ".yml", ".xlsx")


def read_prompt_column(data: DataConfig) -> list[Any]:
    """The raw prompt of every row in order; None for a malformed row."""
    if data.source.startswith("embedded:"):
        check_embedded(data.source)
        return [row["text"] for row in read_embedded(data.source)]
    return _read_column(data, data.columns.get("prompt", "prompt"), "remap with columns: {prompt: NAME}")


def read_unit_ids(data: DataConfig) -> list[str | None] | None:
    """The real id of every row's unit, in order: None for a row without one; None where the source has no ids.

    Raises:
        ConfigError: as `load_prompts`. With unit `record`, two rows of one id would be one unit with twice the
            influence that is accounted for, so that they are refused; the lines are named, the id never.
    """
    if data.source.startswith("embedded:"):
        check_embedded(data.source)
        values: list[Any] = [row["id"] for row in read_embedded(data.source)]
    elif data.unit_column is None:
        return None
    else:
        values = _read_column(data, data.unit_column, "name the column of the ids with unit_column")
    ids = [unit_id(value) for value in values]
    first: dict[str, int] = {}
    for row, u in enumerate(ids, 1):
        if u is not None and first.setdefault(u, row) != row:
            raise ConfigError(
                f"data source {data.source}: records {first[u]} and {row} have one id in column {data.unit_column!r}: "
                "with unit record an id names one record; join them, or name the column that does"
            )
    if not first:
        raise ConfigError(
            f"data source {data.source}: not one id in column {data.unit_column!r}: an id is text or a whole number"
        )
    return ids


def _read_column(data: DataConfig, column: str, remedy: str) -> list[Any]:
    if not is_file_source(data.source):
        values: list[Any] = _read_hub(data, column, remedy)
    else:
        path = file_path(data.source)
        if path.suffix == ".parquet":
            values = _read_parquet(path, column, remedy)
        elif path.suffix == ".csv":
            values = _read_csv(path, column, remedy)
        else:
            rows = _read_json(path) if path.suffix == ".json" else _read_jsonl(path)
            values = _pick(rows, column, data.source, remedy)
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


def _pick(rows: Iterable[Any], column: str, source: str, remedy: str) -> list[Any]:
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
        raise _no_column(source, column, list(first), remedy)
    return values


def _no_column(source: str, column: str, names: list[str], remedy: str) -> ConfigError:
    shown = ", ".join(n[:40] for n in names[:12]) + (", ..." if len(names) > 12 else "")
    return ConfigError(f"data source {source}: no column {column!r}; its columns are: {shown} ({remedy})")


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


def _read_csv(path: Path, column: str, remedy: str) -> list[Any]:
    csv.field_size_limit(2**31 - 1)  # a long field is a null record later, not an error of the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            names = list(reader.fieldnames or [])
            if names and column not in names:
                raise _no_column(str(path), column, names, remedy)
            return [row.get(column) for row in reader]
        except csv.Error:
            raise ConfigError(f"data source {path}: is not valid CSV, line {reader.line_num}") from None


def _read_parquet(path: Path, column: str, remedy: str) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise _no_column(str(path), column, names, remedy)
        return file.read(columns=[column]).column(0).to_pylist()
    except pyarrow.ArrowException:
        raise ConfigError(f"data source {path}: is not a valid Parquet file") from None


def _read_hub(data: DataConfig, column: str, remedy: str) -> list[Any]:
    import datasets

    try:
        table = datasets.load_dataset(data.source, split=data.split)
    except Exception as e:  # the hub's client raises many kinds; all mean that the data set could not be had
        reason = " ".join(str(e).split())[:200]
        raise ConfigError(
            f"data source {data.source}: neither a file here nor readable from the hub, split {data.split!r} ({reason})"
        ) from None
    if column not in table.column_names:
        raise _no_column(data.source, column, table.column_names, remedy)
    return list(table[column])
