"""Columns of embedded data, local files and hub data sets, read in one pass, and which of them a kind of stage needs.

Every row keeps its place: a row that is broken or lacks a column has the value None there. Contents are never printed
or put in an error. Local files are read straight into memory, never through `datasets`, whose Arrow caches would leave
private text on disk. A hub data set is a public download and lies in the hub's own cache like any other.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dprlhf_ray.config import DataConfig, EvaluationConfig
from dprlhf_ray.data.embedded import POPULATION, read_embedded
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy.partitions import unit_id
from dprlhf_ray.privacy.private import Private

Kind = Literal["rl", "sft", "reward_model"]
Layout = dict[str, str]
"""What a record is read from: our name of a column -> its name in the source."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_OTHER_FILES = (".gz", ".txt", ".tsv", ".zip", ".arrow", ".yaml", ".yml", ".xlsx")


_LAYOUTS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "rl": (("prompt",), ("messages",), ("chosen", "rejected")),
    "sft": (("prompt", "completion"), ("text",), ("messages",), ("chosen", "rejected")),
    "reward_model": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
}


@dataclass(frozen=True, repr=False)
class Table(Private):
    """Some columns of a source.

    names: of all its columns (JSON: of the first row that has any). columns: values by row, of those that were asked
    for and are there. rows: their number.
    """

    names: list[str]
    columns: dict[str, list[Any]]
    rows: int


def layouts(data: DataConfig, kind: Kind) -> list[Layout]:
    """From which columns a record of that kind can be read, best first. Those that `data.columns` names win.

    Embedded data have no columns to remap; reinforcement learning continues the beginnings of their texts.
    """
    found = _LAYOUTS[kind]
    if kind == "reward_model" and data.rejected != "column":
        found = tuple(tuple(name for name in layout if name != "rejected") for layout in found)
    if data.source.startswith("embedded:"):
        return [{name: "text" if kind == "rl" else name for name in layout} for layout in found]
    named = [sum(name in data.columns for name in layout) for layout in found]
    chosen = [layout for layout, count in zip(found, named, strict=True) if count == max(named)]
    return [{name: data.columns.get(name, name) for name in layout} for layout in chosen]  # type: ignore[call-overload]


def read_table(data: DataConfig, kinds: Iterable[Kind]) -> Table:
    """The columns that records of these kinds are read from, and that of the ids, in one pass.

    Raises:
        ConfigError: no such file, unsupported suffix, broken file, no hub, no row, a column missing.
    """
    needs = {kind: layouts(data, kind) for kind in kinds}
    id_column = _id_column(data)
    wanted = {column for found in needs.values() for layout in found for column in layout.values()}
    table = read_columns(data, sorted(wanted | ({id_column} if id_column else set())))
    for kind, found in needs.items():
        _check_layouts(data, kind, found, table)
    if id_column and id_column not in table.columns:
        raise _no_column(data.source, id_column, table.names, "name the column of the ids with unit_column")
    return table


def evaluation_data(evaluation: EvaluationConfig, like: DataConfig | None = None) -> DataConfig:
    """The public prompts of `evaluation.source` as a data set: with the length limit and chat template of `like`
    (default: those of a data set). Without `evaluation.columns`, with its column names too, if the source has all that
    a prompt is read from under these.

    Raises:
        ConfigError: as `read_columns`.
    """
    plain = DataConfig(source=evaluation.source, split=evaluation.split, columns=evaluation.columns, public=True)
    if like is None:
        return plain
    if not evaluation.columns and like.columns:
        named = plain.model_copy(update={"columns": like.columns})
        wanted = [set(layout.values()) for layout in layouts(named, "rl")]
        there = read_columns(plain, sorted(set().union(*wanted))).columns.keys()
        plain = named if any(columns <= there for columns in wanted) else plain
    update = {k: getattr(plain, k) for k in ("source", "split", "columns")} | {"unit_column": None, "partitions": {}}
    return like.model_copy(update=update)


def read_columns(data: DataConfig, names: Sequence[str]) -> Table:
    """Those of the columns `names` that the source has, row by row.

    Raises:
        ConfigError: as `read_table`, but for missing columns.
    """
    if data.source.startswith("embedded:"):
        check_embedded(data.source)
        table = _pick(read_embedded(data.source), names)
    elif not is_file_source(data.source):
        table = _read_hub(data, names)
    else:
        path = file_path(data.source)
        if path.suffix == ".parquet":
            table = _read_parquet(path, names)
        elif path.suffix == ".csv":
            table = _read_csv(path, names)
        else:
            table = _pick(_read_json(path) if path.suffix == ".json" else _read_jsonl(path), names)
    if not table.rows:
        raise ConfigError(f"data source {data.source}: the data set is empty: it needs at least one record")
    return table


def unit_ids(data: DataConfig, table: Table, unit: Literal["record", "user"]) -> list[str | None] | None:
    """The real id of every row's unit, in order: None for a row without one; None where the source has no ids.

    Raises:
        ConfigError: no row has an id. With unit `record`, two rows of one id would be one unit with twice the influence
            that is accounted for, so that they are refused; the rows are named, the id never.
    """
    column = _id_column(data)
    if column is None:
        return None
    ids = [unit_id(value) for value in table.columns[column]]
    first: dict[str, int] = {}
    for row, u in enumerate(ids, 1):
        if u is not None and first.setdefault(u, row) != row and unit == "record":
            raise ConfigError(
                f"data source {data.source}: records {first[u]} and {row} have one id in column {column!r}: "
                "with unit record an id names one record; join them, name the column that does, or use unit user"
            )
    if not first:
        raise ConfigError(
            f"data source {data.source}: not one id in column {column!r}: an id is text or a whole number"
        )
    return ids


def read_public_responses(data: DataConfig) -> list[str]:
    """Column completion of `data.rejected_source`, without rows that have none; empty where nothing asks for it.

    Raises:
        ConfigError: as `read_table`, or no row has one.
    """
    if data.rejected_source is None:
        return []
    source = DataConfig(source=data.rejected_source, split=data.split)
    table = read_columns(source, ["completion"])
    if "completion" not in table.columns:
        raise _no_column(source.source, "completion", table.names, "rejected: public needs it")
    found = [x for x in table.columns["completion"] if isinstance(x, str) and x.strip()]
    if not found:
        raise ConfigError(f"data source {source.source}: not one usable completion, which rejected: public needs")
    return found


def is_file_source(source: str) -> bool:
    """Whether a source can only be a file (a hub name is `name` or `org/name`)."""
    return not source.startswith("embedded:") and (
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


def _id_column(data: DataConfig) -> str | None:
    return "id" if data.source.startswith("embedded:") else data.unit_column


def _check_layouts(data: DataConfig, kind: Kind, found: list[Layout], table: Table) -> None:
    """Raise ConfigError where no layout is there as a whole, or a column that the config names is not."""
    missing = [{name: c for name, c in layout.items() if c not in table.columns} for layout in found]
    named = [{name: c for name, c in lacks.items() if name in data.columns} for lacks in missing]
    if all(missing) or any(named):
        name, column = next(iter((next(filter(None, named), None) or min(missing, key=len)).items()))
        ways = ", or ".join(" and ".join(layout) for layout in found)
        remedy = f"kind {kind} needs {ways}; remap with columns: {{{name}: NAME}}"
        if name in data.columns:
            remedy = f"columns.{name} names it"
        raise _no_column(data.source, column, table.names, remedy)


def _pick(rows: Iterable[Any], names: Sequence[str]) -> Table:
    """Columns of rows that are mappings; a column is there where one row has it."""
    columns: dict[str, list[Any]] = {name: [] for name in names}
    shown: list[str] = []
    found: set[str] = set()
    count = 0
    for row in rows:
        mapping = row if isinstance(row, dict) else {}
        shown = shown or list(mapping)
        found.update(name for name in names if name in mapping)
        for name in names:
            columns[name].append(mapping.get(name))
        count += 1
    return Table(shown, {name: columns[name] for name in names if name in found}, count)


def _no_column(source: str, column: str, names: list[str], remedy: str) -> ConfigError:
    if not names:
        return ConfigError(f"data source {source}: no row has columns: one JSON object per line, UTF-8, is needed")
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


def _read_csv(path: Path, names: Sequence[str]) -> Table:
    csv.field_size_limit(2**31 - 1)  # a long field is a null record later, not an error of the file
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            there = list(reader.fieldnames or [])
            table = _pick(reader, [name for name in names if name in there])
        except csv.Error:
            raise ConfigError(f"data source {path}: is not valid CSV, line {reader.line_num}") from None
    return Table(there, table.columns, table.rows)


def _read_parquet(path: Path, names: Sequence[str]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        wanted = [name for name in names if name in there]
        read = file.read(columns=wanted)
        return Table(there, {name: read.column(name).to_pylist() for name in wanted}, file.metadata.num_rows)
    except pyarrow.ArrowException:
        raise ConfigError(f"data source {path}: is not a valid Parquet file") from None


def _read_hub(data: DataConfig, names: Sequence[str]) -> Table:
    import datasets

    try:
        table = datasets.load_dataset(data.source, split=data.split)
    except Exception as e:  # the hub's client raises many kinds; all mean that the data set could not be had
        raise ConfigError(  # its type and not its text, which may quote a cell
            f"data source {data.source}: neither a file here nor readable from the hub, split {data.split!r} "
            f"({type(e).__name__}); `python -c \"import datasets; datasets.load_dataset('{data.source}')\"` tells why"
        ) from None
    there = list(table.column_names)
    return Table(there, {name: list(table[name]) for name in names if name in there}, len(table))
