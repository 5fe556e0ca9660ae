"""Demonstrations and pairs: which columns are read, what their tokens are, and which rows are null."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dprlhf_ray.config import DataConfig
from dprlhf_ray.data.columns import Kind
from dprlhf_ray.data.sources import Records, load_records
from dprlhf_ray.errors import ConfigError

SECRET = "zebra-7731"
LIKE = "one that you will like"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(folder: Path, kind: Kind, tokenizer: Any, *rows: Any, **settings: Any) -> Records:
    return load_records(DataConfig(source=write(folder / "d.jsonl", *rows), **settings), kind, tokenizer)


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def shown(tokenizer: Any, records: Records) -> list[tuple[str, ...] | None]:
    """(prompt, responses) of each record as the model sees them; None for a null record."""
    return [
        None if e.is_null else tuple(map(tokenizer.decode, (e.prompt.token_ids, *(c.token_ids for c in e.completions))))
        for e in records.items
    ]


def test_a_demonstration_is_read_from_any_of_three_layouts(tmp_path: Path, tokenizer: Any) -> None:
    """Each row for itself: another row's columns would couple two records."""
    chat = [{"role": r, "content": c} for r, c in (("user", "like"), ("assistant", "a film"), ("user", "story"))]
    rows = [
        {"prompt": "the movie", "completion": " was good"},
        {"text": "the movie was good"},
        {"messages": [*chat, {"role": "assistant", "content": "yes"}]},
        {"messages": chat},
        {"prompt": "the movie", "completion": None, "text": "the story"},
    ]
    records = load(tmp_path, "sft", tokenizer, *rows)
    first = tokenizer.decode(ids(tokenizer, "the movie was good")[:1])
    assert shown(tokenizer, records) == [
        ("the movie", " was good<eos>"),
        (first, "the movie was good"[len(first) :] + "<eos>"),
        ("user: like\nassistant: a film\nuser: story\nassistant:", "yes<eos>"),
        ("user: like\nassistant:", "a film<eos>"),
        (tokenizer.decode(ids(tokenizer, "the story")[:1]), "the story"[len(first) :] + "<eos>"),
    ]
    assert all(len(e.rewards) == 1 and e.completions[0].version is None for e in records.items)
    assert [e.completions[0].text for e in records.items][:2] == [" was good", "the movie was good"[len(first) :]]
    parquet = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema([
        ("prompt", pyarrow.string()), ("completion", pyarrow.string()), ("text", pyarrow.string()),
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
    ])), parquet)  # fmt: skip
    assert load_records(DataConfig(source=str(parquet)), "sft", tokenizer) == records


def test_a_completion_is_cut_with_its_end_of_sequence_token_counted(tmp_path: Path, tokenizer: Any) -> None:
    """False: a completion with EOS would be one token longer than was checked against the context."""
    length = len(ids(tokenizer, LIKE))
    row = {"prompt": "the movie", "completion": LIKE}
    for most, finished in ((length + 1, True), (length, False), (2, False)):
        (e,) = load(tmp_path, "sft", tokenizer, row, max_completion_tokens=most).items
        (done,) = e.completions
        whole = (*ids(tokenizer, LIKE), tokenizer.eos_token_id)
        assert done.token_ids == whole[:most] and done.finished is finished
        assert done.text == (LIKE if most >= length else tokenizer.decode(whole[:2]))
    pair = {"chosen": LIKE, "rejected": "a film"}
    for most, finished in ((length, True), (length - 1, False)):
        (e,) = load(tmp_path, "reward_model", tokenizer, pair, max_completion_tokens=most).items
        assert e.completions[0].token_ids == ids(tokenizer, LIKE)[:most] and e.completions[0].finished is finished


def test_explicit_columns_win(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "the movie", "completion": "was good", "body": "a film"}
    (e,) = load(tmp_path, "sft", tokenizer, row, columns={"text": "body"}).items
    assert tokenizer.decode(e.prompt.token_ids + e.completions[0].token_ids) == "a film<eos>"
    code = [{"text": "the movie", "code": "was good"}, {"text": SECRET, "code": None}]
    records = load(tmp_path, "sft", tokenizer, *code, columns={"prompt": "text", "completion": "code"})
    assert shown(tokenizer, records) == [("the movie", "was good<eos>"), None]  # a prompt is no demonstration
    with pytest.raises(ConfigError, match=r"no column 'answer'; its columns are: prompt, completion, body"):
        load(tmp_path, "sft", tokenizer, row, columns={"completion": "answer"})


def test_the_other_stages_read_the_prompts_and_preferred_answers_of_whole_dialogues(
    tmp_path: Path, tokenizer: Any
) -> None:
    """False: one data set of dialogues cannot serve all three stages, or a rejected answer is a demonstration."""
    start = "\n\nHuman: the story\n\nAssistant:"
    chat = [{"role": "user", "content": "like"}]
    rows = [
        {"chosen": start + " good", "rejected": start + " film"},
        {"chosen": [*chat, {"role": "assistant", "content": "yes"}],
         "rejected": [*chat, {"role": "assistant", "content": "no"}]},
    ]  # fmt: skip
    demonstrations = load(tmp_path, "sft", tokenizer, *rows)
    assert shown(tokenizer, demonstrations) == [(start, " good<eos>"), ("user: like\nassistant:", "yes<eos>")]
    talk = {"messages": [*chat, {"role": "assistant", "content": "yes"}]}
    spoken = load(tmp_path, "rl", tokenizer, talk, {"messages": chat})
    assert [tokenizer.decode(e.prompt.token_ids) for e in spoken.items] == ["user: like\nassistant:"] * 2
    prompts = load(tmp_path, "rl", tokenizer, *rows)
    assert [e.prompt.token_ids for e in prompts.items] == [e.prompt.token_ids for e in demonstrations.items]


def test_a_transcript_s_turns_go_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    """False: a whole dialogue is wrapped as one thing that the user said."""
    talk = "\n\nHuman: the story\n\nAssistant: good\n\nHuman: a film\n\nAssistant:"
    rows = [{"chosen": talk + " yes", "rejected": talk + " no"}, {"chosen": "like it", "rejected": "like no"}]
    expected = "user: the story\nassistant: good\nuser: a film\nassistant:"
    for kind in ("rl", "sft", "reward_model"):
        first = load(tmp_path, kind, tokenizer, *rows, chat_template=True).items[0]
        assert tokenizer.decode(first.prompt.token_ids) == expected


def test_a_pair_is_read_from_columns_transcripts_or_messages(tmp_path: Path, tokenizer: Any) -> None:
    human = "\n\nHuman: like?\n\nAssistant: a film\n\nHuman: story?\n\nAssistant:"
    ask, tell = {"role": "user", "content": "like"}, [{"role": "assistant", "content": c} for c in ("yes", "no")]
    records = load(
        tmp_path, "reward_model", tokenizer,
        {"prompt": "the movie", "chosen": " was good", "rejected": " was"},
        {"chosen": human + " good", "rejected": human + " the"},
        {"chosen": human + " good", "rejected": human + " good film"},
        {"chosen": [ask, tell[0]], "rejected": [ask, tell[1]]},
        {"prompt": [ask], "chosen": tell[:1], "rejected": tell[1:]},
        {"chosen": "good", "rejected": "film"},
        {"chosen": [ask, tell[0]], "rejected": [{**ask, "content": "film"}, tell[1]]},
        {"chosen": tell[:1], "rejected": tell[1:]},
    )  # fmt: skip
    assert shown(tokenizer, records) == [
        ("the movie", " was good", " was"),
        (human, " good", " the"),
        (human, " good", " good film"),
        ("user: like\nassistant:", "yes", "no"),
        ("user: like\nassistant:", "yes", "no"),
        ("", "good", "film"),
        None,  # answers to two questions
        ("", "yes", "no"),
    ]
    assert records.null_count == 1 and all(len(e.rewards) in (0, 2) for e in records.items)


def test_rows_that_are_no_demonstration_or_pair_are_null_in_their_own_slot(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "the movie", "completion": "was good", "chosen": "good", "rejected": "film"}
    bad: dict[Kind, list[Any]] = {
        "sft": [
            '{"prompt": "' + SECRET,
            {"prompt": SECRET},
            {"prompt": SECRET, "completion": ""},
            {"prompt": SECRET, "completion": " \n"},
            {"prompt": SECRET, "completion": 7},
            {"prompt": "", "completion": SECRET},
            {"prompt": SECRET * 100, "completion": SECRET},
            {"text": ""},
            {"text": "a"},
            {"text": [SECRET]},
            {"messages": [{"role": "user", "content": SECRET}]},
            {"messages": [{"role": "assistant", "content": SECRET}]},
            {"messages": SECRET},
        ],
        "reward_model": [
            {"prompt": SECRET, "chosen": SECRET},
            {"chosen": SECRET, "rejected": SECRET},
            {"chosen": SECRET, "rejected": ""},
            {"chosen": "", "rejected": SECRET},
            {"chosen": LIKE + "." + SECRET, "rejected": LIKE + "." + SECRET[:-1]},  # alike as far as they are kept
            {"prompt": 7, "chosen": SECRET, "rejected": "b"},
            {"chosen": [], "rejected": SECRET},
        ],
    }
    for kind, rows in bad.items():
        lines = [line for row in rows for line in (row, good)]
        records = load(tmp_path, kind, tokenizer, *lines, max_prompt_tokens=64, max_completion_tokens=8)
        assert [e.prompt.slot for e in records.items] == list(range(2 * len(rows)))
        assert [e.is_null for e in records.items] == [True, False] * len(rows), kind
        assert all(e.completions == () and e.prompt.token_ids == () for e in records.items[::2])
        assert records.null_count == len(rows)
        assert SECRET not in repr(records) + repr(records.items)
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_a_rejected_response_can_be_a_third_of_the_chosen_one_or_a_public_one(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "the movie", "chosen": LIKE}, {"prompt": "the movie", "chosen": "!"}]
    long, short = load(tmp_path, "reward_model", tokenizer, *rows, rejected="truncated").items
    chosen, rejected = (c.token_ids for c in long.completions)
    assert chosen == ids(tokenizer, LIKE) and rejected == chosen[: len(chosen) // 3]
    assert short.is_null  # its third is itself
    responses = [f" film number {i}" for i in range(5)]
    public = write(tmp_path / "public.jsonl", *({"completion": r} for r in responses), {"completion": ""}, "broken")
    rows = [{"prompt": "the movie", "chosen": f"{LIKE} {i}"} for i in range(20)]
    settings = {"rejected": "public", "rejected_source": public}
    records = load(tmp_path, "reward_model", tokenizer, *rows, **settings)
    expected = [
        responses[int.from_bytes(hashlib.sha256(str(slot).encode()).digest()[:8], "big") % 5] for slot in range(20)
    ]
    assert [e.completions[1].text for e in records.items] == expected and len(set(expected)) == 5
    rows[3]["chosen"] = ""
    again = load(tmp_path, "reward_model", tokenizer, *rows, **settings)
    assert [e.is_null for e in again.items] == [slot == 3 for slot in range(20)]
    assert all(b == a for slot, (a, b) in enumerate(zip(records.items, again.items, strict=True)) if slot != 3)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (
            "rl",
            {},
            r"no column 'prompt'.*needs prompt, or messages, or chosen and rejected; remap.*\{prompt: NAME\}",
        ),
        (
            "sft",
            {},
            r"no column 'text'.*needs prompt and completion, or text, or messages, or chosen.*\{text: NAME\}",
        ),
        ("reward_model", {}, r"no column 'chosen'.*prompt and chosen and rejected, or chosen and rejected"),
        ("reward_model", {"columns": {"chosen": "b"}}, "no column 'rejected'"),
        ("reward_model", {"rejected": "truncated"}, r"no column 'chosen'.*needs prompt and chosen, or chosen;"),
        (
            "reward_model",
            {"columns": {"chosen": "b"}, "rejected": "public", "rejected_source": "embedded:public-openings"},
            "no column 'completion'",
        ),
    ],
)
def test_missing_columns_are_one_line_that_says_which_are_possible(
    kind: Kind, settings: dict[str, Any], says: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        load(tmp_path, kind, tokenizer, {"a": SECRET, "b": SECRET}, **settings)
    assert "\n" not in str(refused.value) and SECRET not in str(refused.value)


def test_messages_need_a_chat_template(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    with pytest.raises(ConfigError, match="messages need a chat template"):
        load(tmp_path, "sft", plain, {"messages": [{"role": "user", "content": SECRET}]})
    assert load(tmp_path, "sft", plain, {"messages": None, "text": "a film"}).null_count == 0
