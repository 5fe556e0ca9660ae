"""A sweep: the right runs, the right arithmetic, and nobody's failure is another's."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import cli, config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.evaluation.public import compare
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.sweep import runner, table
from dprlhf_ray.sweep.cells import CONTROLS, NO_CLIP, Cell, cells
from tests.end_to_end.conftest import scratch, world  # noqa: F401  (fixtures)
from tests.end_to_end.runs import Command, World, attempts, write_config


def _config(**changes: Any) -> RunConfig:
    """Public sft, then two private stages, the second of them adaptive and of users."""
    user = {"unit": "user", "accounting": "adaptive"}
    tree: dict[str, Any] = {
        "name": "study",
        "data": {
            "books": {"source": "books.jsonl", "public": True},
            "notes": {"source": "notes.jsonl", "unit_column": "who", "partitions": {"a": 0.5}},
        },
        "stages": [
            {"kind": "sft", "data": "books", "privacy": {"mode": "public"}},
            {"kind": "reward_model", "data": "notes", "privacy": {"epsilon": 3.0, "unit": "user"}},
            {"kind": "rl", "data": "notes", "partition": "a", "privacy": {"epsilon": 5.0, "clip_norm": 0.5} | user},
        ],
    }  # fmt: skip
    return config_file.parse(tree | changes)


def _by_name(found: Sequence[Cell]) -> dict[str, Cell]:
    return {c.name: c for c in found}


def test_each_cell_changes_the_private_stages_and_nothing_else() -> None:
    """False: a budget reaches a public stage, a control keeps noise or loses a stage, or another setting changes."""
    config = _config()
    found = _by_name(cells(config, [1.0, 0.25], CONTROLS, [0], "books"))
    assert list(found) == ["epsilon-1", "epsilon-0.25", *CONTROLS]
    modes = {name: [(s.privacy.mode, s.privacy.epsilon) for s in c.config.stages] for name, c in found.items()}
    assert modes["epsilon-0.25"] == [("public", None), ("dp", 0.25), ("dp", 0.25)]
    assert modes["clip_only"] == modes["non_private"] == [("public", None), ("clip_only", None), ("clip_only", None)]
    assert modes["public_only"] == [("public", None)] * 3
    clips = {name: [s.privacy.clip_norm for s in c.config.stages] for name, c in found.items()}
    assert clips["non_private"][1:] == [NO_CLIP] * 2 and clips["clip_only"] == clips["epsilon-1"] == [0.1, 0.1, 0.5]
    assert {s.data for s in found["public_only"].config.stages} == {"books"}
    for cell in found.values():
        for stage, was in zip(cell.config.stages, config.stages, strict=True):
            same = stage.model_dump(exclude={"privacy", "data", "partition"})
            assert same == was.model_dump(exclude={"privacy", "data", "partition"})
            assert (stage.privacy.steps, stage.privacy.delta) == (was.privacy.steps, was.privacy.delta)
        assert cell.config.data == config.data and cell.config.model == config.model


def test_public_only_leaves_private_stages_out_where_no_public_data_is_named() -> None:
    (cell,) = cells(_config(), [], ["public_only"], [0])
    assert [s.name for s in cell.config.stages] == ["sft"]


def test_seeds_are_set_and_no_two_runs_share_a_name_or_folder() -> None:
    """False: runs side by side on a cluster talk to each other's actors, or write into one folder."""
    found = cells(_config(), [1.0, 2.0], ["clip_only"], [3, 4])
    assert [(c.name, c.config.seed) for c in found[:4]] == [
        ("epsilon-1", 3), ("epsilon-2", 3), ("clip_only", 3), ("epsilon-1", 4),
    ]  # fmt: skip
    assert len({c.config.name for c in found}) == len({c.folder for c in found}) == 6


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"ledger": "/tmp/shared.db"}, ([1.0], [], [0]), ["ledger", "apart"]),
        ({"ledger_anchor": "/tmp/anchor"}, ([1.0], [], [0]), ["ledger_anchor"]),
        ({"data": {"notes": {"budget": {"epsilon": 9.0, "delta": 1e-5}}}}, ([1.0], [], [0]), ["data.notes.budget"]),
        ({}, ([], [], [0]), ["--epsilon", "--controls"]),
        ({}, ([1.0], [], []), ["--seeds"]),
        ({}, ([1.0, 1.0], [], [0]), ["--epsilon", "twice"]),
        ({}, ([-1.0], [], [0]), ["epsilon--1", "greater than 0"]),
        ({}, ([], ["no_noise"], [0]), ["no_noise", "non_private"]),
        ({}, ([1.0], [], [0], "books"), ["public_only"]),
        ({}, ([], ["public_only"], [0], "notes"), ["notes", "public"]),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(
    changes: dict[str, Any], arguments: tuple[Any, ...], words: list[str]
) -> None:
    if "data" in changes:
        changes = changes | {"stages": [{"kind": "rl", "data": "notes", "privacy": {"epsilon": 2.0}}]}
    with pytest.raises(ConfigError) as refused:
        cells(_config(**changes), *arguments)
    assert all(w in str(refused.value) for w in words) and "\n" not in str(refused.value)


def _run(cell: str, seed: int, gain: float, low: float, **more: Any) -> dict[str, Any]:
    row = {"cell": cell, "seed": seed, "status": "done", "certified": cell.startswith("eps"), "data_sets": {}}
    row |= {"stage": "rl", "measure": "reward", "before": 0.1, "after": 0.1 + gain}
    return row | {"difference": gain, "low": low, "high": 2 * gain - low} | more


def test_means_spread_interval_and_kept_share_are_those_worked_out_by_hand() -> None:
    bound = {"notes": {"epsilon": 1.9, "delta": 1e-5}}, {"notes": {"epsilon": 1.95, "delta": 1e-5}}
    runs = [
        _run("epsilon-2", 0, 0.1, 0.05, data_sets=bound[0]), _run("epsilon-2", 1, 0.3, 0.2, data_sets=bound[1]),
        _run("clip_only", 0, 0.5, -0.1), _run("clip_only", 1, 0.5, 0.05),
        _run("non_private", 0, 0.4, 0.3),
        {"cell": "non_private", "seed": 1, "status": "failed"},
        {"cell": "epsilon-1", "seed": 0, "status": "missing"},
    ]  # fmt: skip
    dp, clip, free, missing = table.cell_rows(runs)
    assert (dp["difference"], dp["lowest"], dp["highest"]) == (pytest.approx(0.2), 0.1, 0.3)
    half = 12.706 * 0.1  # t(0.975, 1) * sqrt(2) * 0.1 / sqrt(2)
    assert (dp["low"], dp["high"]) == (pytest.approx(0.2 - half, abs=1e-3), pytest.approx(0.2 + half, abs=1e-3))
    assert dp["kept_of_non_private"] == pytest.approx(0.5) and dp["data_sets"]["notes"]["epsilon"] == 1.95
    assert dp["kept_of_clip_only"] is None, "its interval over records, averaged over seeds, reaches below 0"
    assert (free["runs"], free["done"], free["failed"], free["low"]) == (2, 1, 1, None)
    assert clip["kept_of_non_private"] == pytest.approx(1.25)
    assert (missing["done"], missing["certified"]) == (0, None) and missing["kept_of_non_private"] is None
    text = table.formatted([dp, clip, free, missing])
    assert text[0][1] == "1.9500" and text[1][1] == "no guarantee" and text[2][-1] == "1 of 2, 1 failed"
    assert set(text[3][1:-1]) == {"–"}


def test_shares_compare_the_same_stage_and_measure_only() -> None:
    """False: a likelihood is divided by a reward."""
    rows = table.cell_rows(
        [_run("public_only", 0, 0.2, 0.1, measure="log_likelihood"), _run("non_private", 0, 0.4, 0.3)]
    )
    assert rows[0]["kept_of_non_private"] is None and rows[1]["kept_of_non_private"] == 1.0


STEP = DPStep("record", "zero_out", 1000, 0.04, 2.0, 0.5, 1, 3, 5.0)


def _ended(root: Path, cell: Cell, gain: float) -> None:
    """The released files of a run that is over."""
    root.mkdir(parents=True)
    epsilon = cell.epsilon
    bound = {"run": {"epsilon": epsilon, "delta": 1e-5 if epsilon else None}}
    certificate = {"certified": epsilon is not None, "data_sets": {"notes": bound}}
    (root / "certificate.json").write_text(json.dumps(certificate))
    (root / "report.html").write_text("")
    before, after = [0.0, 0.1, 0.2], [gain, gain + 0.15, gain + 0.2]
    tree = {"measure": "reward", "comparison": compare(before, after).as_dict(), "before": {}, "after": {}}
    (root / "evaluation-rl.json").write_text(json.dumps(tree))
    if epsilon is not None:
        ledger = Ledger.open(root / "ledger.db")
        ledger.declare([Declaration("notes", "rl", STEP, 8.0, 1e-5)])
        ledger.close()


@pytest.fixture
def swept(tmp_path: Path) -> tuple[Path, list[Cell], dict[str, Any]]:
    """A sweep's folder after three of its four runs, one of them failed; what sweep.json says."""
    one = {"stages": [{"data": "notes", "privacy": {"epsilon": 5.0}}], "data": {"notes": {"source": "notes.jsonl"}}}
    config = _config(**one)
    found = cells(config, [2.0, 4.0, 8.0], ["non_private"], [0])
    gains = {"epsilon-2": 0.1, "epsilon-4": 0.3, "non_private": 0.4}
    for cell in found:
        if cell.name in gains:
            _ended(tmp_path / "cells" / cell.folder, cell, gains[cell.name])
    return tmp_path, found, table.write(tmp_path, config, found, {"epsilon-8-seed0": 3})


def test_the_files_of_a_sweep_agree_and_say_what_all_of_it_costs(
    swept: tuple[Path, list[Cell], dict[str, Any]],
) -> None:
    """False: somebody takes the table for free, or reads a control as guaranteed."""
    folder, _, found = swept
    assert json.loads((folder / "sweep.json").read_text()) == found
    (cost,) = found["together"]
    assert cost["epsilon"] == pytest.approx(accounting.compose([STEP, STEP], 1e-5).pld) and cost["runs"] == 2
    assert [r["status"] for r in found["runs"]] == ["done", "done", "failed", "done"]
    assert found["runs"][2]["exit_code"] == 3
    page, text = (folder / "sweep.html").read_text(), (folder / "sweep.md").read_text()
    for written in (page, text):
        assert f"ε = {cost['epsilon']:.4f} at δ = 1e-05 on notes" in written and "noise and draws are fresh" in written
        assert "non_private: no noise was added" in written and "no guarantee" in written
        assert "28%" in written and "76%" in written  # 0.1167 and 0.3167 of 0.4167
        assert "minutes" not in written, "times are operational"
    assert page.count("<svg") == 1 and "<script" not in page and not re.search(r"(src|href)=\"(?!#|cells/)", page)


def test_runs_of_an_earlier_call_are_counted_too(swept: tuple[Path, list[Cell], dict[str, Any]]) -> None:
    """False: `--resume` with fewer cells makes what was spent and shown before look cheaper."""
    folder, found, before = swept
    config = found[1].config
    again = table.write(folder, config, [c for c in found if c.name == "epsilon-4"], {})
    assert again["together"] == before["together"] and again["statements"] == before["statements"]


def test_the_table_in_a_terminal_of_80_columns_loses_no_column(
    swept: tuple[Path, list[Cell], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli._print_sweep(swept[2], swept[1], {"epsilon-2-seed0": 7.25})
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("+0.117", "28%", "7.2", "kept", "guarantee", "0 of 1", "min/run"))


def test_a_finished_sweep_has_nothing_left_to_run_and_another_config_is_refused(
    tmp_path: Path, tiny_model: Path
) -> None:
    """False: --resume repeats (and charges) what is done, or mixes runs of two configs in one table."""
    config = _quick(tmp_path, tiny_model)
    found = cells(config, [2.0], [], [0])
    assert runner.prepare(tmp_path / "out", found, False) == found
    with pytest.raises(ConfigError, match="--resume"):
        runner.prepare(tmp_path / "out", found, False)
    root = tmp_path / "out" / "cells" / found[0].folder
    root.mkdir()
    (root / "config.yaml").write_text(config_file.dump(found[0].config))
    assert runner.prepare(tmp_path / "out", found, True) == found
    for name in ("certificate.json", "report.html"):
        (root / name).write_text("{}")
    more = cells(config, [2.0, 4.0], [], [0])
    assert runner.prepare(tmp_path / "out", more, True) == more[1:]
    other = cells(
        config.model_copy(update={"tracking": config.tracking.model_copy(update={"tensorboard": True})}), [2.0], [], [0]
    )
    with pytest.raises(ConfigError, match="tracking differs"):
        runner.prepare(tmp_path / "out", other, True)


def _quick(folder: Path, model: Path) -> RunConfig:
    for name in ("notes", "public"):
        rows = [json.dumps({"prompt": f"the {name} {i}"}) + "\n" for i in range(50)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return config_file.parse(
        {
            "model": {"name": str(model)},
            "data": {"notes": {"source": str(folder / "notes.jsonl"), "max_prompt_tokens": 32}},
            "stages": [{"data": "notes", "privacy": {"epsilon": 5.0, "delta": 1e-3, "expected_batch": 10}}],
            "rollout": {"max_model_len": 64, "kv_cache_gib": 0.1},
            "evaluation": {"source": str(folder / "public.jsonl"), "prompts": 4},
        }
    )


def test_a_run_that_fails_ends_no_other_and_its_reason_reaches_the_terminal(tmp_path: Path, tiny_model: Path) -> None:
    """False: the first bad cell ends the sweep. Here the data vanish after the check, so that each run fails alone."""
    found = cells(_quick(tmp_path, tiny_model), [2.0, 4.0], [], [0])
    runner.prepare(tmp_path / "out", found, False)
    (tmp_path / "notes.jsonl").unlink()
    lines: list[str] = []
    outcomes: list[runner.Outcome] = []
    runner.run_cells(tmp_path / "out", found, 1, lines.append, outcomes.append)
    assert [(o.cell.name, o.exit_code) for o in outcomes] == [("epsilon-2", 2), ("epsilon-4", 2)]
    assert len(lines) == 2 and all("dprlhf: " in line and "notes.jsonl" in line for line in lines)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_is_interrupted_goes_on_where_it_was(world: World, tmp_path: Path) -> None:  # noqa: F811
    """False: Ctrl-C leaves processes, a finished run is made again, an interrupted one starts anew and pays twice, or
    the runs do not end in one table with their guarantee."""
    tree = world.tree(3)
    path, out = write_config(tmp_path / "sweep.yaml", tree), tmp_path / "out"
    arguments = ["sweep", str(path), "--epsilon", "4", "--controls", "clip_only", "--output", str(out)]
    first, second = (out / "cells" / name for name in ("epsilon-4-seed0", "clip_only-seed0"))
    command = Command(*arguments)
    command.wait_until(lambda: len(attempts(second)) >= 1, 400)
    command.note_family()
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.end()
    assert code == 130 and "--resume" in err and "Traceback" not in err and command.survivors() == []
    head = json.loads((first / "certificate.json").read_text())["ledger"]["head"]
    spent = len(attempts(second))

    code, shown, err = Command(*arguments, "--resume").end(400)
    assert code == 0, (shown, err)
    found = json.loads((out / "sweep.json").read_text())
    dp, clip = found["cells"]
    assert (dp["done"], dp["certified"], clip["done"], clip["certified"]) == (1, True, 1, False)
    assert 3.5 < dp["data_sets"]["notes"]["epsilon"] <= 4.0 and dp["measure"] == "reward"
    assert json.loads((first / "certificate.json").read_text())["ledger"]["head"] == head, "it was made again"
    assert attempts(second) == [1, 2, 3] and spent >= 1 and "no guarantee" in shown
    (cost,) = found["together"]
    assert cost["runs"] == 1 and cost["epsilon"] == pytest.approx(dp["data_sets"]["notes"]["epsilon"])
