"""The report tells what a run released, says when nothing is guaranteed, and opens without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.evaluation.public import compare
from dprlhf_ray.observability import report
from dprlhf_ray.observability.metrics import MetricsLog
from dprlhf_ray.observability.report import write_report
from dprlhf_ray.privacy.certificate import DatasetCost, write_certificate
from dprlhf_ray.privacy.composition import Part, compose
from dprlhf_ray.privacy.planning import plan_stage
from dprlhf_ray.privacy.release import Released

HOSTILE = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"
BEFORE, AFTER = [0.0, 0.1, 0.2], [0.2, 0.4, 0.3]


def _run(folder: Path, clip_only: bool = False, ended: bool = True, evaluated: bool = True) -> str:
    """A run directory with released files of one stage of three steps; returns the report."""
    privacy = {"mode": "clip_only"} if clip_only else {"epsilon": 6.0}
    config = config_file.parse(
        {
            "name": "my run".replace(" ", "-"),
            "stages": [{"privacy": privacy | {"steps": 3, "expected_batch": 50}}],
            "evaluation": {"samples": 2},
        }  # fmt: skip
    )
    (folder / "config.yaml").write_text(config_file.dump(config))
    _metrics(folder, config, clip_only)
    tree: dict[str, object] = {"before": {"rewards": BEFORE, "texts": [HOSTILE, "b", "hidden"]}}
    if evaluated:
        tree["after"] = {"rewards": AFTER, "texts": ["c", HOSTILE, "hidden"]}
        tree["prompts"] = ["The film", HOSTILE, "hidden"]
        tree["comparison"] = compare(BEFORE, AFTER).as_dict()
    (folder / "evaluation-rl.json").write_text(json.dumps(tree))
    if ended:
        spent = {"dataset": "reviews", "attempts": 3}
        ledger = {"head": "ab" * 32, "seq": 9, "epoch": 2, "stages": {"rl": spent}}
        plan = plan_stage(config.stages[0], 1000)
        composed = compose([Part("rl", plan.step, None)], plan.delta)
        write_certificate(folder, config, [plan], ledger, {"reviews": DatasetCost(composed, composed)})
    return write_report(folder).read_text(encoding="utf-8")


def _metrics(folder: Path, config: RunConfig, clip_only: bool) -> None:
    log = MetricsLog(folder, config.tracking, "test")
    for attempt in (1, 2, 3):
        values = [
            Released("private/reward", 0.1 * attempt, "noised", 0.0217),
            Released("private/length", 22.0, "noised", 0.5),
            Released("private/clip_fraction", 0.8, "noised", 0.02),
            Released("epsilon_spent", 0.0 if clip_only else 1.2345 * attempt, "accounting"),
            Released("public/reward", 0.15, "public_prompts"),
        ]
        log.write("rl", attempt, values)


def _three_stages(folder: Path) -> str:
    """Public sft, then a reward model and rl on the same private users; returns the report of the ended run."""
    user = {"epsilon": 3.0, "unit": "user", "records_per_draw": 2, "steps": 2, "expected_batch": 50, "delta": 1e-4}
    free = {"mode": "public", "steps": 2, "expected_batch": 50}
    config = config_file.parse(
        {
            "data": {
                "books": {"source": "books.jsonl", "public": True},
                "ratings": {"source": "pairs.jsonl", "unit_column": "who", "dataset": "people"},
                "chats": {"source": "chats.jsonl", "unit_column": "who", "dataset": "people"},
                "shown": {"source": "shown.jsonl", "public": True},
            },
            "stages": [
                {"kind": "sft", "data": "books", "heldout": "books", "privacy": free},
                {"kind": "reward_model", "data": "ratings", "heldout": "shown", "privacy": user},
                {"kind": "rl", "data": "chats", "privacy": user, "adapter": {"kind": "full"},
                 "scorer": {"kind": "reward_model", "stage": "reward_model"}},
            ],
        }
    )  # fmt: skip
    (folder / "config.yaml").write_text(config_file.dump(config))
    log = MetricsLog(folder, config.tracking, "test")
    released = {"sft": ("nll", "log_likelihood"), "reward_model": ("accuracy", "accuracy"), "rl": ("reward", "reward")}
    for stage, (private, public) in released.items():
        for attempt in (1, 2):
            values = [
                Released(f"private/{private}", 0.5, "noised", 0.02),
                Released("private/margin", 0.25, "noised", 0.1),
            ]
            values += [Released(f"public/{public}", -0.5 if stage == "sft" else 0.5, "public_prompts")]
            values += [] if stage == "sft" else [Released("epsilon_spent", 1.4 * attempt, "accounting")]
            log.write(stage, attempt, values)
        before, after = ([-2.0, -3.0], [-1.5, -2.0]) if stage == "sft" else ([0.0, 1.0], [1.0, 1.0])
        halves = {"before": {"rewards": before, "texts": []}, "after": {"rewards": after, "texts": []}}
        tree = {"measure": public, "comparison": compare(before, after).as_dict(), "prompts": [], **halves}
        (folder / f"evaluation-{stage}.json").write_text(json.dumps(tree))
    plans = [plan_stage(s, 100 + 900 * (s.kind != "sft"), None, config.dataset_of(s.data)) for s in config.stages]
    private = [Part(p.stage, p.step, None) for p in plans if not p.public]
    composed = compose(private, 1e-4)
    stages = {p.ledger_stage: {"dataset": p.dataset, "attempts": 2} for p in plans}
    ledger = {"head": "ab" * 32, "seq": 9, "epoch": 2, "stages": stages}
    write_certificate(folder, config, plans, ledger, {"people": DatasetCost(composed, composed)})
    return write_report(folder).read_text(encoding="utf-8")


def test_three_stages_are_in_one_table_each_with_its_cost_its_start_and_its_own_measure(tmp_path: Path) -> None:
    """False: a public stage seems to cost something, a stage's figure is another's, or nobody says who is protected."""
    page = _three_stages(tmp_path)
    (table,) = re.findall(r"All stages.*?</table>", page, flags=re.DOTALL)
    sft, model, rl = (" ".join(re.sub("<.*?>", " ", row).split()) for row in table.split("<tr><td>")[1:])
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    alone = [f"{s['epsilon']['certified']:.4f}" for s in certificate["stages"][1:]]
    assert "public data: costs nothing" in sft and "log-likelihood" in sft and "-2.500 → -1.750" in sft
    assert "nothing is protected" in sft and "embedded" in sft
    assert "share of pairs in the right order" in model and "0.500 → 1.000" in model and alone[0] in model
    assert "user, with up to 2 records per draw" in model and "stage sft" in model
    assert "stage sft" in rl and "reward model of stage reward_model" in rl and alone[1] in rl and "mean reward" in rl
    assert "one user: all records of one id together" in page and "ratings = " not in page
    assert f"ε = {certificate['data_sets']['people']['run']['epsilon']:.4f}" in page


def test_each_kind_of_stage_has_plots_of_what_it_releases_and_public_data_is_not_called_private(tmp_path: Path) -> None:
    page = _three_stages(tmp_path)
    sft, model, rl = page.split('<h2 id="stage-')[1:]
    assert "Negative log-likelihood" in sft and "public data, noised" in sft and "private data, noised" not in sft
    assert "Epsilon spent" not in sft and "Epsilon spent" in model and "Epsilon spent" in rl.split("Mechanism")[0]
    assert "in the right order" in model and "above the rejected" in model and "private data, noised" in model
    assert "Public pairs, before and after" not in model, "a histogram of zeros and ones says nothing"
    assert "Continuations before and after" not in page and "rl, full" not in rl and "reinforce, full" in rl


def test_a_run_on_public_data_only_says_that_there_is_nothing_to_guarantee(tmp_path: Path) -> None:
    stage = {"data": "books", "privacy": {"mode": "public", "steps": 2, "expected_batch": 10}}
    config = config_file.parse({"data": {"books": {"source": "books.jsonl", "public": True}}, "stages": [stage]})
    (tmp_path / "config.yaml").write_text(config_file.dump(config))
    plan = plan_stage(config.stages[0], 100, None, "books")
    write_certificate(tmp_path, config, [plan], {"head": "ab", "seq": 1, "epoch": 1, "stages": {}}, {})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No private data set was read" in page and "there is nothing to guarantee" in page
    assert "NOT certified" not in page and "no guarantee" not in page and "ε = " not in page


def test_a_certified_run_shows_its_guarantee_its_gain_and_where_each_metric_comes_from(tmp_path: Path) -> None:
    page = _run(tmp_path)
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    run = certificate["data_sets"]["reviews"]["run"]
    assert f"ε = {run['epsilon_pld']:.4f} at δ = 1e-05" in page
    assert "NOT certified" not in page
    assert "zero_out" in page and certificate["ledger"]["head"] in page
    assert "+0.200" in page  # the mean difference on public prompts
    for text in certificate["excluded"]:
        assert text in page.replace("&#39;", "'")
    rows = re.findall(r"<tr><td>((?:private|public)/\w+|epsilon_spent)</td>.*?</tr>", page, flags=re.DOTALL)
    origins = re.findall(
        r"<tr><td>(?:[\w/]+)</td><td>[\d.]+</td><td>[\d.–]+</td>\s*<td><span class=\"origin\">(.+?)<", page
    )
    assert len(rows) == len(origins) == 5
    assert origins[0] == "private data, noised" and origins[3:] == ["accounting", "public records"]
    assert page.count("<svg") == 5


def test_noise_for_gradients_that_are_not_there_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a clip norm that nobody reaches, which drowns a stage in noise, looks like any other."""
    assert "A smaller clip_norm" not in _run(tmp_path)
    monkeypatch.setattr(report, "FEW_CLIPPED", 0.81)
    assert "About 80% of the gradients reached the clip norm 0.1" in _run(tmp_path)


def test_a_clip_only_run_is_shown_as_not_certified_and_shows_no_epsilon(tmp_path: Path) -> None:
    """A control without noise that looked certified, or whose meter said "epsilon 0", would be the worst of lies."""
    page = _run(tmp_path, clip_only=True)
    assert "NOT certified" in page and 'class="box bad"' in page
    assert "<strong>Certified.</strong>" not in page and "ε = " not in page
    assert "<td>epsilon_spent</td>" not in page and "Epsilon spent" not in page
    assert "no guarantee" in page


@pytest.mark.parametrize("clip_only", [False, True])
def test_a_run_in_progress_has_a_report_that_certifies_nothing(tmp_path: Path, clip_only: bool) -> None:
    page = _run(tmp_path, clip_only=clip_only, ended=False, evaluated=False)
    assert "Not certified yet" in page and "<strong>Certified.</strong>" not in page
    assert ("will NOT be certified" in page) is clip_only


def test_a_run_that_has_released_nothing_yet_has_a_report(tmp_path: Path) -> None:
    config = config_file.parse({"stages": [{"privacy": {"epsilon": 6.0}}]})
    (tmp_path / "config.yaml").write_text(config_file.dump(config))
    assert "Not certified yet" in write_report(tmp_path).read_text(encoding="utf-8")


def test_text_of_samples_is_escaped_and_only_the_configured_number_is_shown(tmp_path: Path) -> None:
    page = _run(tmp_path)
    assert HOSTILE not in page and page.count("&lt;script&gt;alert") == 3
    assert "hidden" not in page


@pytest.mark.parametrize("stages", [1, 3])
def test_the_page_needs_no_network_and_no_script(stages: int, tmp_path: Path) -> None:
    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: set[str] = set()
            self.links: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.links += [
                v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
            ]

    parsed = Page()
    page = _three_stages(tmp_path) if stages == 3 else _run(tmp_path)
    parsed.feed(page)
    assert not parsed.links
    assert not parsed.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_a_torn_metrics_line_does_not_stop_the_report(tmp_path: Path) -> None:
    _run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    assert "2 of 3" in write_report(tmp_path).read_text(encoding="utf-8")
