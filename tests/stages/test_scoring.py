"""Scorers: bounded, stateless, and one record's failure is its own."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dprlhf_ray.actors.scorer import ScorerActor
from dprlhf_ray.config import ModelConfig, ScorerConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models.reward import export_reward_model, load_reward_model
from dprlhf_ray.stages import http_scorer
from dprlhf_ray.stages.http_scorer import PROBE, HttpScorer, ScorerGone
from dprlhf_ray.stages.model_scorer import ModelScorer
from dprlhf_ray.stages.scoring import PythonFunction, Scorer, build_scorer, check_scorer, score_records

TEXTS = [("the movie", " was good"), ("a", " b"), ("the story is one that", " you will like"), ("xyz", " q" * 7)]


def config(kind: str = "sentiment_rule", **settings: Any) -> ScorerConfig:
    return ScorerConfig.model_validate({"kind": kind, **settings})


def rewards(scorer: Scorer, *records: tuple[str, str, float], bound: float = 1.0) -> list[float | None]:
    return [None if r is None else r.reveal() for r in score_records(scorer, records, bound)]


def test_sentiment_rule_orders_texts_and_reads_the_completion_only() -> None:
    good, praise = "a wonderful, brilliant film", "terrible"
    high, low, same, nothing = build_scorer(config()).score(
        [("x", good), ("x", "a boring mess"), (praise, good), ("", "")]
    )
    assert high is not None and low is not None
    assert -1 <= low < 0 < high <= 1
    assert (same, nothing) == (high, 0.0)


def test_one_failing_record_gives_none_and_leaves_the_others_and_the_log_alone(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def score(prompt: str, completion: str) -> float:
        return {"nan": math.nan, "inf": math.inf, "big": 9.0, "small": -9.0, "ok": 0.5}[completion]

    records = [("p", c, 0.0) for c in ("ok", "private-text", "nan", "inf", "big", "small", "ok")]
    assert rewards(PythonFunction(score), *records, bound=2.0) == [0.5, None, None, None, 2.0, -2.0, 0.5]
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_actor_scores_with_the_function_that_the_config_names() -> None:
    actor = ScorerActor(config("python", function="math:pow"))
    assert actor.ping()
    assert actor.score([("a", "b", 0.0)]) == [None]  # pow of texts fails: the record is null, the actor lives


def length(prompt: str, completion: str) -> float:
    return float(len(completion))


def test_a_reward_is_shifted_then_scaled_then_penalised_then_clipped() -> None:
    """False: the constants mean something else than the configuration says."""
    scorer = build_scorer(config("python", function=f"{__name__}:length", shift=-2.0, scale=0.5))
    assert rewards(scorer, ("", "abc", 0.0), ("", "abc", 0.25), ("", "a" * 9, 1.0), ("", "a" * 9, 9.0), bound=2.0) == [
        0.5, 0.25, 2.0, -2.0,
    ]  # fmt: skip


def test_an_ensemble_is_the_mean_of_its_members_each_with_its_own_constants() -> None:
    """False: one member's outlier moves the mean by more than its bound, or a failed member counts as zero."""
    members = [
        {"kind": "python", "function": f"{__name__}:length", "reward_bound": 3.0},
        {"kind": "python", "function": f"{__name__}:fails_on_x", "scale": 2.0, "reward_bound": 5.0},
    ]
    scorer = build_scorer(config("ensemble", members=members, shift=1.0))
    assert scorer.score([("", "ab"), ("", "abcdefgh"), ("", "x")]) == [3.0, 3.5, None]


def fails_on_x(prompt: str, completion: str) -> float:
    if completion == "x":
        raise ValueError(completion)
    return 1.0


# ------------------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported reward model of the tiny Llama, with a head that is not zero."""
    folder, settings = tmp_path_factory.mktemp("reward"), ModelConfig(dtype="float32")
    model = load_reward_model(tiny_model, settings, 0, [[5, 6, 7]], 32)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.causal_lm.score.weight.copy_(10 * torch.randn_like(model.causal_lm.score.weight))
    export_reward_model(model, tiny_model, "tiny", settings, AutoTokenizer.from_pretrained(tiny_model), folder)
    return folder / "merged"


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bidirectional classifier with three labels, as public ones are."""
    folder, tokenizer = tmp_path_factory.mktemp("classifier"), AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {0: "BAD", 1: "GOOD", 2: "ODD"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer), max_position_embeddings=48, id2label=labels, pad_token_id=0,
                label2id={v: k for k, v in labels.items()}, initializer_range=0.5, **sizes,
            )
        )  # fmt: skip
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_gives_the_score_that_it_learned(reward_model: Path, tiny_model: Path) -> None:
    """False: what RL maximises is not what the pairs taught: other tokens, padding, or a sigmoid."""
    trained = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = []
    for prompt, completion in TEXTS:
        ids = tokenizer(prompt)["input_ids"] + tokenizer(completion, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected.append(trained(input_ids=torch.tensor([ids])).logits.item())
    assert len(ids) == 17, "the last text has to be padded"
    scorer = build_scorer(config("reward_model", stage="rm"), {"rm": reward_model})
    assert scorer.score(TEXTS) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert build_scorer(config("reward_model", model=str(reward_model))).score(TEXTS) == scorer.score(TEXTS)


def test_a_classifiers_reward_is_the_log_odds_of_its_label(classifier: Path) -> None:
    """False: the reward is of another label, saturates, or depends on the padding."""
    model, tokenizer = (
        BertForSequenceClassification.from_pretrained(classifier).eval(),
        AutoTokenizer.from_pretrained(classifier),
    )
    found = build_scorer(config("classifier", model=str(classifier), label="GOOD")).score(TEXTS)
    for (prompt, completion), reward in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            p = model(**tokenizer(prompt + completion, return_tensors="pt")).logits.softmax(1)[0, 1].item()
        assert reward == pytest.approx(math.log(p / (1 - p)), abs=1e-4)


def test_a_record_that_a_model_cannot_take_is_its_own_failure(
    classifier: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """False: a long, empty or broken record takes others with it, or its length is logged."""
    scorer = ModelScorer(classifier, "GOOD")
    capfd.readouterr(), caplog.clear()
    alone = [scorer.score([pair])[0] for pair in TEXTS]
    records: list[tuple[str, Any]] = [TEXTS[0], ("", "word " * 400), TEXTS[1], ("", ""), TEXTS[2], ("", None), TEXTS[3]]
    found = scorer.score(records)
    assert [found[i] for i in (1, 3, 5)] == [None] * 3
    assert [found[i] for i in (0, 2, 4, 6)] == pytest.approx(alone, abs=1e-5)
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_where_a_batch_fails_its_records_are_scored_one_by_one(classifier: Path) -> None:
    """False: one record that makes the model raise nulls those that happen to have its width."""
    scorer, tokenizer = ModelScorer(classifier, "GOOD"), AutoTokenizer.from_pretrained(classifier)
    poison = tokenizer(" y")["input_ids"][-1]
    forward = scorer._model.forward

    def broken(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:  # the fault
        if (input_ids == poison).any():
            raise RuntimeError("private-text")
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    expected = scorer.score([("x", " a"), ("x", " b")])
    scorer._model.forward = broken
    assert scorer.score([("x", " a"), ("x", " y"), ("x", " b")]) == pytest.approx(
        [expected[0], None, expected[1]], abs=1e-5
    )


def test_what_would_break_the_device_is_null_before_it_gets_there(tmp_path: Path) -> None:
    """False: an id without an embedding, or one token more than RoBERTa has positions for, reaches the model, and on a
    GPU takes everybody after it along. A failure on a GPU stops the step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(tmp_path))
    settings = RobertaConfig(
        vocab_size=len(tokenizer) - 1, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=18, pad_token_id=1, num_labels=2,
    )  # fmt: skip
    RobertaForSequenceClassification(settings).save_pretrained(tmp_path)
    scorer, last = ModelScorer(tmp_path, "LABEL_1"), tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    found = scorer.score([("", "a"), ("", "a " * 16), ("", "a " * 17), ("", f"a {last}")])
    assert [x is None for x in found] == [False, False, True, True]

    def broken(**_: Any) -> Any:  # the fault
        raise RuntimeError("private-text")

    scorer._model.forward, scorer._device = broken, "cuda"
    scorer._forward = lambda rows, width: broken()  # type: ignore[method-assign]
    with pytest.raises(ScorerGone, match=r"^scorer\.model: the scorer's device failed \(RuntimeError\)$"):
        scorer.score([("", "a")])


def _tokenizer_folder(folder: Path) -> Path:
    words = WordLevel({"[UNK]": 0, "[PAD]": 1, "a": 2, "extra": 3}, unk_token="[UNK]")
    backend = Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


def test_a_model_without_a_trained_head_is_refused(tiny_model: Path) -> None:
    """False: random rewards, from a language model that was taken for a reward model."""
    with pytest.raises(ConfigError, match=r"^scorer\.model: .* has no trained score\.weight"):
        ModelScorer(tiny_model)


# ------------------------------------------------------------------------------------------------- an endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Starts a real server that answers by a function of the body: (status, body); gives its URL. It notes the
    Authorization of each request in a list, where there is one."""
    monkeypatch.setattr(http_scorer, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody is there: a request that goes by it fails
    monkeypatch.delenv("no_proxy", raising=False)
    servers = []

    def start(answer: Callable[[dict[str, str]], tuple[int, bytes]], seen: list[str | None] | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if seen is not None:
                    seen.append(self.headers["Authorization"])
                status, body = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_endpoint_gets_one_record_per_request_and_its_refusals_stay_that_records(endpoint: Any) -> None:
    """False: an endpoint sees records together, answers are mixed up, a proxy reads along, or one stops all."""
    bodies: list[dict[str, str]] = []

    def answer(body: dict[str, str]) -> tuple[int, bytes]:
        bodies.append(body)
        status = {"bad": 422, "raises": 500}.get(body["completion"], 200)
        text = {"odd": b"private-text", "none": b"{}", "huge": b'{"reward": 1' + b"0" * 400 + b"}"}
        return status, text.get(body["completion"], json.dumps({"reward": float(len(body["completion"]))}).encode())

    url = endpoint(answer)
    completions = ["ä", "bad", "bb", "raises", "odd", "none", "huge", *("c" * n for n in range(20))]
    found = HttpScorer(url).score([("the prompt", c) for c in completions])
    assert found == [1.0, None, 2.0, None, None, None, None, *map(float, range(20))]
    assert sorted(bodies[0]) == ["completion", "prompt"] and {b["prompt"] for b in bodies} == {"the prompt", PROBE[0]}
    assert sum(b["completion"] == "bad" for b in bodies) == 1 and sum(b["completion"] == "raises" for b in bodies) == 6


def test_an_endpoint_s_secret_comes_from_the_environment(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    url = endpoint(lambda body: (200, b'{"reward": 0.5}'), seen)
    for value, header in (("t0ken", "Bearer t0ken"), ("", None)):
        monkeypatch.setenv(http_scorer.TOKEN, value)
        assert HttpScorer(url).score([("p", "c")]) == [0.5]
        assert seen.pop() == header and seen == []


@pytest.mark.parametrize("status", [429, 503])
def test_what_passes_is_repeated(endpoint: Any, status: int) -> None:
    """False: a busy endpoint makes records null."""
    answers = iter([(status, b""), (200, b'{"reward": 0.5}')])
    assert HttpScorer(endpoint(lambda body: next(answers))).score([("p", "c")]) == [0.5]


@pytest.mark.parametrize("status", [401, 404, 307, 302, 503])
def test_an_endpoint_that_serves_nobody_stops_the_step_and_tells_no_text(endpoint: Any, status: int) -> None:
    """False: a whole draw is nulled in silence, the text follows a redirect, or the error quotes it."""
    seen = []

    def answer(body: dict[str, str]) -> tuple[int, bytes]:
        seen.append(body)
        return status, b"private-text"

    actor = ScorerActor(config("http", url=endpoint(answer), sends_private_text=True))
    with pytest.raises(ScorerGone) as e:
        actor.score([("private-text", "c", 0.0)])
    assert str(e.value) == f"scorer.url: 127.0.0.1 gives no reward (status {status})"
    assert e.value.__suppress_context__ and len(seen) == 6 and seen[-1]["completion"] == PROBE[1]


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_record_that_a_gateway_cannot_take_is_its_own_failure(endpoint: Any, status: int) -> None:
    """False: one record's presence decides whether a run ends."""

    def answer(body: dict[str, str]) -> tuple[int, bytes]:
        return (status, b"") if body["completion"] == "breaks" else (200, b'{"reward": 0.5}')

    assert HttpScorer(endpoint(answer)).score([("p", "c"), ("p", "breaks"), ("p", "d")]) == [0.5, None, 0.5]


def test_an_endpoint_that_comes_back_nulls_nobody(endpoint: Any) -> None:
    """False: a record that takes the endpoint down for a while zeroes those that were asked meanwhile."""
    down = 0

    def answer(body: dict[str, str]) -> tuple[int, bytes]:
        nonlocal down
        if body["completion"] == "crash" and not down:
            down = 1
        if down and down <= 4:  # three tries of the record, the probe's first one: it is back at the second
            down += 1
            return 503, b""
        return 200, b'{"reward": 0.5}'

    assert HttpScorer(endpoint(answer)).score([("p", "crash")]) == [0.5]


def test_a_server_that_is_gone_stops_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a dead endpoint makes every record null, and a step of noise is applied."""
    monkeypatch.setattr(http_scorer, "PAUSES", (0.01,))
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.server_close()  # nobody listens there now
    with pytest.raises(ScorerGone, match=r"gives no reward \(\w+\)$"):
        HttpScorer(f"http://127.0.0.1:{server.server_port}").score([("p", "c")] * 30)


# ------------------------------------------------------------------------------------------- before the run


def test_what_cannot_work_is_refused_before_the_run_in_one_line(
    tmp_path: Path, tiny_model: Path, reward_model: Path, classifier: Path
) -> None:
    """False: a stage that comes last fails after the ones before it were paid for."""
    function = {"kind": "python", "function": "no_such_module:f"}
    good = {"kind": "sentiment_rule"}
    for bad, message in [
        (function, "cannot be imported"),
        ({"kind": "ensemble", "members": [good, function]}, "cannot be imported"),
        ({"kind": "ensemble", "members": [good, {"length_penalty": 0.1}]}, "^scorer.members: penalties"),
        ({"kind": "reward_model", "model": str(tmp_path / "none")}, r"^scorer\.model: no readable"),
        ({"kind": "reward_model", "model": str(tiny_model)}, "LlamaForCausalLM: should be"),
        ({"kind": "reward_model", "model": str(classifier)}, "has 3 labels"),
        ({"kind": "classifier", "model": str(classifier), "label": "FINE"}, "BAD, GOOD, ODD"),
        ({"kind": "http", "url": "scores.example/secret", "sends_private_text": True}, "^scorer.url: no URL"),
        (
            {"kind": "http", "url": "http://scores.example/", "sends_private_text": True},
            "would travel to scores.example",
        ),
        ({"kind": "http", "url": "http://10.0.0.7:80/", "sends_private_text": True}, "unencrypted: use https"),
        ({"kind": "http", "url": "http://host:0x/secret", "sends_private_text": True}, "^scorer.url: no URL"),
    ]:
        with pytest.raises(ConfigError, match=message) as e:
            check_scorer(ScorerConfig.model_validate(bad))
        assert "\n" not in str(e.value) and "secret" not in str(e.value)


def test_what_works_is_not_refused(reward_model: Path, classifier: Path) -> None:
    for fine in [
        {"kind": "python", "function": "math:pow"},
        {"kind": "reward_model", "model": str(reward_model)},
        {"kind": "reward_model", "stage": "not-run-yet"},
        {"kind": "reward_model", "model": "org/on-the-hub"},
        {"kind": "classifier", "model": str(classifier), "label": "ODD"},
        {"kind": "http", "url": "https://scores.example:8080/score?x=1", "sends_private_text": True},
        {"kind": "http", "url": "http://[::1]:8080/score", "sends_private_text": True},
        {"kind": "http", "url": "http://localhost/", "sends_private_text": True},
    ]:
        check_scorer(ScorerConfig.model_validate(fine))
