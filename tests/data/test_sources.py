"""Reading records: every row keeps its slot, one bad record is a null record, nothing private is printed."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dprlhf_ray.config import DataConfig, EvaluationConfig
from dprlhf_ray.data.embedded import (
    MOVIE_REVIEWS,
    POPULATION,
    PUBLIC_OPENINGS,
    PUBLIC_PAIRS,
    PUBLIC_TRAINING,
    REVIEW_PAIRS,
    ROWS,
    prepare_reviews,
    read_embedded,
)
from dprlhf_ray.data.sources import load_public_prompts, load_records, public_records
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.records import Prompt

SECRET = "zebra-7731"
TEXTS = ["a good film", f"the story {SECRET}", "one that you will like"]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def prompts_of(tokenizer: Any, source: Path, **settings: Any) -> list[Prompt]:
    return [e.prompt for e in load_records(DataConfig(source=str(source), **settings), "rl", tokenizer).items]


def write(folder: Path, kind: str) -> Path:
    rows = [{"prompt": t, "id": i} for i, t in enumerate(TEXTS)]
    path = folder / f"data.{kind}"
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["prompt", "id"])
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_every_file_kind_gives_the_same_prompts(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    prompts = prompts_of(tokenizer, write(tmp_path, kind))
    assert [p.text for p in prompts] == TEXTS
    assert [p.slot for p in prompts] == [0, 1, 2]
    assert all(p.token_ids == tuple(tokenizer(p.text).input_ids) for p in prompts)


def test_bad_records_become_null_in_their_own_slot_and_leave_the_others_alone(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"prompt": "a good film"}).encode()
    bad = [
        b'{"prompt": "' + SECRET.encode(),  # broken JSON
        b"",
        b'{"prompt": null}',
        b'{"prompt": 7}',
        b'{"prompt": "  "}',
        b'{"other": "x"}',
        b"[1, 2]",
        b'{"prompt": "\xff\xfe"}',  # not UTF-8
        b'{"prompt": "\\ud800"}',  # half a surrogate pair
        b'{"prompt": [{"role": "user"}]}',
        json.dumps({"prompt": SECRET * 100}).encode(),  # too long
        b"[" * 100_000,  # deeper than the parser goes
    ]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line for b in bad for line in (b, good)) + b"\n")
    records = load_records(DataConfig(source=str(path), max_prompt_tokens=64), "rl", tokenizer)
    assert [e.prompt.slot for e in records.items] == list(range(2 * len(bad)))
    assert [bool(e.prompt.token_ids) for e in records.items] == [False, True] * len(bad)
    assert all(e.prompt.text == "" for e in records.items[::2])
    assert records.null_count == len(bad)
    said = "".join(capfd.readouterr()) + caplog.text
    assert said == "" and SECRET not in repr(records) + repr(records.items)


def test_prompt_tokens_keeps_the_first_tokens_of_each_record(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, "jsonl")
    short, whole = prompts_of(tokenizer, path, prompt_tokens=2), prompts_of(tokenizer, path)
    for s, w in zip(short, whole, strict=True):
        assert s.token_ids == w.token_ids[:2] and w.text.startswith(s.text) and s.text


def test_columns_are_remapped(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "a good film"}\n')
    assert prompts_of(tokenizer, path, columns={"prompt": "body"})[0].text == "a good film"


def test_messages_and_chat_template_end_with_a_generation_prompt(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "like"}]}\n{"prompt": "like"}\n')
    listed, wrapped = prompts_of(tokenizer, path, chat_template=True)
    assert tokenizer.decode(listed.token_ids) == "user: like\nassistant:"
    assert wrapped.token_ids == listed.token_ids and listed.text == "user: like\nassistant:"


def refused(source: Path, tokenizer: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        prompts_of(tokenizer, source, **settings)
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message
    return message


def test_bad_data_sets_are_refused_in_one_line_without_content(tmp_path: Path, tokenizer: Any) -> None:
    assert "no such file" in refused(tmp_path / "missing.jsonl", tokenizer)
    (tmp_path / "d.txt").write_text(SECRET)
    assert "unsupported kind of file" in refused(tmp_path / "d.txt", tokenizer)
    for kind in ("jsonl", "json", "parquet", "csv"):
        message = refused(write(tmp_path, kind), tokenizer, columns={"prompt": "question"})
        assert "no column 'question'; its columns are: prompt, id" in message
    (tmp_path / "e.jsonl").write_text("")
    assert "is empty" in refused(tmp_path / "e.jsonl", tokenizer)
    (tmp_path / "n.jsonl").write_text('{"prompt": null}\n')
    assert "not one usable record of 1" in refused(tmp_path / "n.jsonl", tokenizer)
    for name in ("b.json", "b.parquet", "b.jsonl.gz"):
        (tmp_path / name).write_text('{"' + SECRET)
        refused(tmp_path / name, tokenizer)


def test_embedded_reviews_are_complete_and_the_public_part_shares_no_text_with_the_private() -> None:
    with prepare_reviews().open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == ROWS and [r["id"] for r in rows] == list(range(1, ROWS + 1))
    assert all(r["text"] and -4 <= r["rating"] <= 4 for r in rows)
    parts = {source: read_embedded(source) for source in (MOVIE_REVIEWS, PUBLIC_OPENINGS, PUBLIC_TRAINING)}
    assert [len(part) for part in parts.values()] == [POPULATION[s] for s in parts] == [8990, 800, 790]
    for a, b in itertools.combinations(parts.values(), 2):
        assert not {r["text"].lower() for r in a} & {r["text"].lower() for r in b}
        assert not {r["id"] for r in a} & {r["id"] for r in b}
    assert all(len({r["id"] for r in part}) == len(part) for part in parts.values())


@pytest.mark.parametrize(("pairs", "own", "other"), [
    (REVIEW_PAIRS, MOVIE_REVIEWS, PUBLIC_OPENINGS), (PUBLIC_PAIRS, PUBLIC_OPENINGS, MOVIE_REVIEWS),
])  # fmt: skip
def test_embedded_pairs_are_of_their_own_part_and_chosen_by_people(pairs: str, own: str, other: str) -> None:
    """False: a private snippet is in a public pair, one snippet in two pairs, or the worse one is chosen."""
    rows, ratings = read_embedded(pairs), {str(r["id"]): r for r in read_embedded(own)}
    assert len(rows) == POPULATION[pairs]
    members = [m for row in rows for m in row["id"].split("-")]
    assert len(set(members)) == 2 * len(rows) and set(members) <= set(ratings)
    assert not set(members) & {str(r["id"]) for r in read_embedded(other)}
    alike = 0
    for i, row in enumerate(rows):
        first, second = (ratings[m] for m in row["id"].split("-"))
        assert row["text"] == (second if i % 2 else first)["text"]  # by place, not by what people thought
        if first["rating"] == second["rating"]:
            alike += 1
            assert row["chosen"] is row["rejected"] is None
        else:
            better, worse = (first, second) if first["rating"] > second["rating"] else (second, first)
            assert (row["chosen"], row["rejected"]) == (better["text"], worse["text"])
    assert alike == (1 if pairs == REVIEW_PAIRS else 0)


def test_one_embedded_data_set_serves_every_kind_of_stage(tokenizer: Any) -> None:
    """False: partitions of the pairs could not be shared out between SFT, reward model and RL."""
    data = DataConfig(source=REVIEW_PAIRS, prompt_tokens=5)
    rl, sft, pairs = (load_records(data, kind, tokenizer) for kind in ("rl", "sft", "reward_model"))  # type: ignore[arg-type]
    assert rl.ids == sft.ids == pairs.ids and rl.ids is not None and rl.ids[0] == "1-5156"
    assert (rl.null_count, sft.null_count, pairs.null_count) == (0, 0, 1)
    assert rl.items[0].completions == () and len(rl.items[0].prompt.token_ids) == 5
    demonstration, pair = sft.items[0], pairs.items[0]
    whole = demonstration.prompt.token_ids + demonstration.completions[0].token_ids
    assert whole[:5] == rl.items[0].prompt.token_ids and whole[-1] == tokenizer.eos_token_id
    assert pair.prompt.text == "" and not pair.is_null and len(pair.completions) == 2
    with pytest.raises(ConfigError, match=r"no column 'chosen'; its columns are: id, text, rating \(kind reward_model"):
        load_records(DataConfig(), "reward_model", tokenizer)


def test_public_prompts_depend_on_the_public_seed_only(tokenizer: Any) -> None:
    evaluation = EvaluationConfig(prompts=20)
    first = load_public_prompts(evaluation, tokenizer, 5, seed=1)
    assert first == load_public_prompts(evaluation, tokenizer, 5, seed=1)
    assert first != load_public_prompts(evaluation, tokenizer, 5, seed=2)
    assert len(first) == 20 and all(0 < len(p.token_ids) <= 5 for p in first)


def test_public_records_are_usable_ones_in_an_order_of_the_public_seed(tokenizer: Any, tmp_path: Path) -> None:
    data = DataConfig(source=PUBLIC_PAIRS, public=True)
    first = public_records(data, "reward_model", tokenizer, 20, seed=1)
    assert len(first) == 20 and not any(e.is_null for e in first)
    assert first == public_records(data, "reward_model", tokenizer, 20, seed=1)
    assert first != public_records(data, "reward_model", tokenizer, 20, seed=2)
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a good film", "who": 1}\n{"text": "", "who": 1}\n')
    with pytest.raises(ConfigError, match="1 usable public record, at least 2"):
        public_records(DataConfig(source=str(path), public=True, unit_column="who"), "sft", tokenizer, 2, seed=0)
