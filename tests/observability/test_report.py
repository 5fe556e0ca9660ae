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
    assert origins[0] == "private data, noised" and origins[3:] == ["accounting", "public prompts"]
    assert page.count("<svg") == 5


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


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
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
    page = _run(tmp_path)
    parsed.feed(page)
    assert not parsed.links
    assert not parsed.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_a_torn_metrics_line_does_not_stop_the_report(tmp_path: Path) -> None:
    _run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    assert "2 of 3" in write_report(tmp_path).read_text(encoding="utf-8")
