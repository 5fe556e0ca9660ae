"""Real ids of units: read from the source, one row each, and a stage sees its partition's units only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.config import DataConfig, RunConfig
from dprlhf_ray.data.columns import read_table, unit_ids
from dprlhf_ray.data.preflight import preflight
from dprlhf_ray.data.sources import at_most, load_records
from dprlhf_ray.data.units import load_stage_data
from dprlhf_ray.errors import ConfigError

KEY = bytes(range(32))
USER = {"epsilon": 4.0, "delta": 1e-4, "expected_batch": 10, "unit": "user"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def source(folder: Path, ids: list[Any], name: str = "notes.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"prompt": f"note {i}", "who": u}) + "\n" for i, u in enumerate(ids)))
    return path


def config(data: dict[str, Any], *stages: dict[str, Any], **more: Any) -> RunConfig:
    privacy = {"epsilon": 4.0, "delta": 1e-4, "expected_batch": 10}
    return config_file.parse(
        {"data": data, "stages": [{"name": f"s{i}", "privacy": privacy, **s} for i, s in enumerate(stages)], **more}
    )


def ids_of(data: DataConfig, unit: Literal["record", "user"] = "record") -> list[str | None] | None:
    return unit_ids(data, read_table(data, ["rl"]), unit)


def halves(path: Path, **more: Any) -> dict[str, Any]:
    return {"source": str(path), "unit_column": "who", "partitions": {"a": 0.5, "b": 0.5}, **more}


def test_partitions_split_the_rows_and_the_units_between_the_stages(tmp_path: Path, tokenizer: Any) -> None:
    path = source(tmp_path, [f"u{i}" for i in range(200)])
    stages = [{"data": "notes", "partition": p} for p in ("a", "b", None)]
    run = config({"notes": halves(path)}, *stages)
    a, b, everybody = (load_stage_data(run, s, tokenizer, KEY) for s in run.stages)
    assert 60 < len(a.records) < 140 and len(a.records) + len(b.records) == len(everybody.records) == 200
    assert a.readers is not None and b.readers is not None and everybody.readers is not None
    assert not a.readers.digests & b.readers.digests
    assert a.readers.digests | b.readers.digests == everybody.readers.digests
    texts = [{e.prompt.text for e in part.records.items} for part in (a, b, everybody)]
    assert not texts[0] & texts[1] and texts[0] | texts[1] == texts[2]
    assert [e.prompt.slot for e in a.records.items] == list(range(len(a.records)))
    assert a.units == tuple((slot,) for slot in range(len(a.records))) and a.records_per_draw == 1
    assert load_stage_data(run, run.stages[0], tokenizer, KEY) == a


def test_a_person_is_one_unit_in_all_sources_of_a_declared_data_set_and_in_no_other(
    tmp_path: Path, tokenizer: Any
) -> None:
    """Pairs and prompts of one person: two units would be composed in parallel."""
    first, second = source(tmp_path, list(range(50))), source(tmp_path, [str(i) for i in range(50)], "pairs.jsonl")
    for name, same in (("people", True), (None, False)):
        data = {"prompts": halves(first, dataset=name), "pairs": halves(second, dataset=name)}
        run = config(data, {"data": "prompts", "partition": "a"}, {"data": "pairs", "partition": "a"})
        one, other = (load_stage_data(run, s, tokenizer, KEY).readers for s in run.stages)
        assert (one == other) is same


def test_a_row_without_an_id_is_null_and_in_no_partition(tmp_path: Path, tokenizer: Any) -> None:
    path = source(tmp_path, ["u0", None, "u2", ["u3"], " ", *[f"u{i}" for i in range(5, 60)]])
    records = load_records(DataConfig(source=str(path), unit_column="who"), "rl", tokenizer)
    assert [e.prompt.slot for e in records.items if not e.prompt.token_ids] == [1, 3, 4] and records.null_count == 3
    run = config({"notes": halves(path)}, {"data": "notes", "partition": "a"}, {"data": "notes", "partition": "b"})
    assert sum(len(load_stage_data(run, s, tokenizer, KEY).records) for s in run.stages) == 57


def test_two_rows_of_one_unit_are_refused_without_its_id(tmp_path: Path) -> None:
    """Counted as two records, one person would move the sum by twice the clip norm."""
    path = source(tmp_path, ["alpha", "zebra-7731", "gamma", " zebra-7731"])
    with pytest.raises(ConfigError, match="records 2 and 4 have one id in column 'who'") as refused:
        ids_of(DataConfig(source=str(path), unit_column="who"))
    assert "zebra" not in str(refused.value) and "\n" not in str(refused.value)


def test_preflight_refuses_it_too_and_accepts_partitions_before_their_key_exists(
    tmp_path: Path, tiny_model: Path
) -> None:
    model = {"model": {"name": str(tiny_model)}, "rollout": {"engine": "transformers", "max_model_len": 256}}
    model["stages"] = []  # type: ignore[assignment]
    model.pop("stages")
    small = {"max_prompt_tokens": 64}
    twice = config({"notes": halves(source(tmp_path, [1, 1, 2]), **small)}, {"data": "notes"}, **model)
    with pytest.raises(ConfigError, match="records 1 and 2"):
        preflight(twice)
    data = {"notes": halves(source(tmp_path, list(range(100))), **small)}
    assert preflight(config(data, {"data": "notes", "partition": "a"}, **model)).populations == {"notes": 100}
    data["notes"]["partitions"] = {"a": 0.05}
    with pytest.raises(ConfigError, match="has 5 records"):
        preflight(config(data, {"data": "notes", "partition": "a"}, **model))


def test_a_column_that_is_not_there_or_names_nobody_is_one_line(tmp_path: Path) -> None:
    path = source(tmp_path, [None, [], 0.5])
    with pytest.raises(ConfigError, match=r"no column 'user'.*unit_column"):
        ids_of(DataConfig(source=str(path), unit_column="user"))
    with pytest.raises(ConfigError, match="not one id in column 'who'"):
        ids_of(DataConfig(source=str(path), unit_column="who"))
    assert ids_of(DataConfig(source=str(path))) is None


def test_users_are_all_rows_of_one_id_and_a_row_without_one_is_nobody_s(tmp_path: Path, tokenizer: Any) -> None:
    """False: a user's rows would be several units, or a row without an id a user of its own."""
    path = source(tmp_path, ["b", "a", None, "b", " a ", "c", "b"])
    data = DataConfig(source=str(path), unit_column="who")
    records = load_records(data, "rl", tokenizer, "user")
    assert records.units("user") == ((0, 3, 6), (1, 4), (5,))
    assert records.units("record") == tuple((slot,) for slot in range(7))
    assert records.only([1, 3, 4, 6]).units("user") == ((0, 2), (1, 3))
    with pytest.raises(ConfigError, match="records 1 and 4 have one id"):
        load_records(data, "rl", tokenizer)


def test_rows_of_a_user_beyond_the_first_k_are_null_and_touch_nobody_else(tmp_path: Path, tokenizer: Any) -> None:
    """False: a user would own more sampled records than are accounted for."""
    path = source(tmp_path, ["b", "a", "b", "b", "c", "a", "b"])
    records = load_records(DataConfig(source=str(path), unit_column="who"), "rl", tokenizer, "user")
    bounded = at_most(records, 2)
    assert [e.prompt.slot for e in bounded.items if not e.prompt.token_ids] == [3, 6] and bounded.null_count == 2
    assert bounded.ids == records.ids and [e.prompt.slot for e in bounded.items] == list(range(7))
    assert all(b is e for b, e in zip(bounded.items, records.items, strict=True) if b.prompt.token_ids)


def test_a_user_is_in_one_partition_with_all_records(tmp_path: Path, tokenizer: Any) -> None:
    path = source(tmp_path, [f"u{i % 50}" for i in range(150)])
    stages = [{"data": "notes", "partition": p, "privacy": {**USER, "records_per_draw": 2}} for p in ("a", "b")]
    run = config({"notes": halves(path)}, *stages)
    a, b = (load_stage_data(run, s, tokenizer, KEY) for s in run.stages)
    assert len(a.units) + len(b.units) == 50 and all(len(u) == 3 for u in a.units + b.units)
    assert a.records_per_draw == 2 and a.readers is not None and len(a.readers.digests) == len(a.units)
    sampled = config({"notes": halves(path)}, {"data": "notes", "privacy": {**USER, "records_per_user": 1}})
    whole = load_stage_data(sampled, sampled.stages[0], tokenizer, KEY)
    assert len(whole.units) == 150 and whole.records.null_count == 100 and whole.records_per_draw == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"source": "x.jsonl", "partitions": {"a": 0.5}}, "set unit_column"),
        ({"partitions": {"a": 0.7, "b": 0.5}}, "add up to 1.2"),
        ({"partitions": {"a": 0.0}}, "a fraction is above 0"),
        ({"partitions": {"a b": 0.5}}, "letters, digits"),
        ({"unit_column": "id"}, "has ids of its own"),
    ],
)
def test_partitions_that_cannot_be_are_one_line(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        config({"notes": data}, {"data": "notes"})
    assert "\n" not in str(refused.value)


def test_a_stage_names_a_partition_that_exists() -> None:
    with pytest.raises(ConfigError, match=r"partition 'c'.*\['a'\]"):
        config({"notes": {"partitions": {"a": 0.5}}}, {"data": "notes", "partition": "c"})
