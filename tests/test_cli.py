"""The command line: right numbers, one line and an exit code for what a user gets wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dprlhf_ray import __version__, cli
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep

Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `dprlhf ARGUMENTS` in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dprlhf", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def small_ledger(tmp_path: Path) -> Path:
    """A run directory with a ledger of one stage, two of whose three attempts are spent."""
    ledger = Ledger.open(tmp_path / "ledger.db")
    step = DPStep("record", "zero_out", 10_000, 0.04, 2.0, 0.5, 1, 3, 5.0)
    ledger.declare([Declaration("reviews", "rl", step, 8.0, 1e-5)])
    ledger.charge("rl")
    ledger.charge("rl")
    ledger.close()
    return tmp_path


def _one_line(outcome: Outcome, code: int, *words: str) -> None:
    found, out, err = outcome
    assert (found, out) == (code, "")
    assert err.startswith("dprlhf: ") and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "pld", "rdp"),
    [("0.005", "0.8", "1000", "1e-6", 2.004112, 2.626538), ("0.1", "3.0", "512", "1e-6", 3.769687, 4.05097)],
)
def test_epsilon_prints_the_reference_figures(
    command: Command, q: str, sigma: str, steps: str, delta: str, pld: float, rdp: float
) -> None:
    arguments = ("--sampling-rate", q, "--noise-multiplier", sigma, "--steps", steps, "--delta", delta)
    code, out, err = command("epsilon", *arguments)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"pld": pytest.approx(pld, rel=1e-3), "rdp": pytest.approx(rdp, rel=1e-3)}


def test_epsilon_charges_updates_on_one_draw_together(command: Command) -> None:
    line = "epsilon --sampling-rate .01 --noise-multiplier 1 --steps 250 --delta 1e-6 --updates-per-draw 4"
    assert json.loads(command(*line.split())[1])["pld"] == pytest.approx(9.87, rel=1e-3)


def test_plan_gives_the_reference_noise_on_the_safe_side(command: Command) -> None:
    line = "plan --epsilon 1 --delta 1e-6 --sampling-rate .1 --steps 512 --json"
    code, out, _ = command(*line.split())
    (row,) = json.loads(out)
    assert code == 0
    assert row["noise_multiplier"] == pytest.approx(9.6618, rel=1e-3)
    assert row["pld"] <= 1.0


def test_plan_of_a_config_knows_users_public_data_and_each_stages_own_adapter(
    command: Command, tmp_path: Path, tiny_model: Path
) -> None:
    """False: the noise is planned for records instead of users, free data get a bound, or d is another adapter's."""
    rows = [{"who": f"u{i // 5}", "prompt": f"p {i}", "completion": f"c {i}"} for i in range(500)]
    for name in ("books", "notes"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("books", "notes")}
    user = {"epsilon": 3.0, "delta": 1e-4, "unit": "user", "records_per_draw": 2, "expected_batch": 20}
    adapters = [{"kind": "lora", "rank": r, "target_modules": ["q_proj"]} for r in (1, 4)]
    short = {"max_prompt_tokens": 64, "max_completion_tokens": 64}
    tree = {
        "model": {"name": str(tiny_model), "adapter": adapters[0]},
        "data": {"books": {"source": files["books"], "public": True} | short,
                 "notes": {"source": files["notes"], "unit_column": "who"} | short},
        "stages": [{"kind": "sft", "data": "books", "privacy": {"mode": "public", "expected_batch": 50}},
                   {"kind": "rl", "data": "notes", "privacy": user, "adapter": adapters[1]}],
        "rollout": {"max_model_len": 128, "kv_cache_gib": 0.1},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    code, out, err = command("plan", str(path), "--json")
    assert code == 0, err
    sft, rl, together = json.loads(out)
    assert sft["guarantee"].startswith("public data") and sft["pld"] is None and sft["delta"] is None
    assert (rl["guarantee"], rl["sampled"], rl["population"], rl["records_per_draw"]) == ("dp", "user", 100, 2)
    assert 0 < rl["certified"] <= 3.0 and rl["completions_per_step"] == pytest.approx(40)
    assert rl["trainable"] == 4 * sft["trainable"] > 0
    assert together["data_set"] == "notes" and together["epsilon_about"] == rl["certified"] and "budget" not in together


def test_plan_compares_a_budget_with_what_the_ledger_will_count(command: Command, tmp_path: Path) -> None:
    """False: a plan looks within its budget, composed in parallel, and the run is refused."""
    tree = yaml.safe_load(Path("configs/human-ratings.yaml").read_text())
    tree["data"]["pairs"]["budget"] = {"epsilon": 8.0, "delta": 1e-4}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    code, out, err = command("plan", str(path), "--json")
    assert code == 0, err
    together = json.loads(out)[-1]
    assert together["budget"] == 8.0 and 7.0 < together["epsilon_about"] < 8.0 < together["counted_against_budget"]


def test_plan_names_the_numbers_that_are_missing(command: Command) -> None:
    _one_line(command("plan", "--epsilon", "1"), 2, "--delta", "--sampling-rate", "--steps")


@pytest.mark.parametrize(
    "arguments",
    [
        "epsilon --sampling-rate 1.5 --noise-multiplier 1 --steps 10 --delta 1e-5",
        "epsilon --sampling-rate .1 --noise-multiplier nan --steps 10 --delta 1e-5",
        "epsilon --sampling-rate .1 --noise-multiplier 1 --steps 0 --delta 1e-5",
        "epsilon --sampling-rate .1 --noise-multiplier 1 --steps ten --delta 1e-5",
        "epsilon --sampling-rate .1",
        "plan --epsilon inf --delta 1e-6 --sampling-rate .1 --steps 512",
        "plan no-such-file.yaml",
        "plan configs/quickstart.yaml --epsilon 4",
        "sweep no-such-file.yaml --epsilon 1",
        "sweep configs/quickstart.yaml",
        "sweep configs/quickstart.yaml --epsilon 1,two",
        "sweep configs/quickstart.yaml --controls noiseless",
        "run no-such-file.yaml",
        "certificate no-such-folder",
        "report no-such-folder",
        "ledger show no-such-ledger",
        "ledger verify no-such-ledger",
        "data prepare something-else",
        "no-such-command",
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command: Command, arguments: str) -> None:
    _one_line(command(*arguments.split()), 2)


def test_a_bad_config_leaves_one_line_and_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("stages:\n  - privacy: {epsilon: 8.0, loudness: 3}\n")
    entry = [sys.executable, "-c", "from dprlhf_ray.cli import main; main()"]
    done = subprocess.run(
        [*entry, "run", str(config), "--output", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONWARNINGS": "ignore"}, check=False,
    )  # fmt: skip
    _one_line((done.returncode, done.stdout, done.stderr), 2, "loudness", "unknown key")
    assert not (tmp_path / "out").exists()


def test_ledger_show_tells_what_was_spent_of_what_was_planned(command: Command, small_ledger: Path) -> None:
    code, out, _ = command("ledger", "show", str(small_ledger), "--json")
    (row,) = json.loads(out)["stages"]
    assert code == 0
    assert (row["stage"], row["data_set"], row["attempts"], row["planned"]) == ("rl", "reviews", 2, 3)
    assert 0 < row["epsilon_spent"] < row["epsilon_target"] == 8.0
    text = command("ledger", "show", str(small_ledger))[1]
    assert "rl on reviews: 2 of 3 draws" in text and json.loads(out)["head"] in text


def test_ledger_commands_show_budgets_and_adaptive_stages_and_use_the_anchor(
    command: Command, small_ledger: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each step goes through the command line alone, as an operator takes it."""
    where, anchor = str(small_ledger), tmp_path_factory.mktemp("apart") / "anchor"
    budget = ("ledger", "budget", where, "reviews", "--delta", "1e-5", "--anchor", str(anchor), "--epsilon")
    _one_line(command("ledger", "budget", str(anchor), "x", "--epsilon", "8", "--delta", "1e-5"), 2, "no such ledger")
    assert command(*budget, "9")[0] == command(*budget, "8")[0] == 0
    _one_line(command(*budget, "10"), 2, "--raise")
    assert command(*budget, "10", "--raise")[0] == 0
    _one_line(command(*budget, "0.1"), 3, "reviews")
    ledger = Ledger.open(small_ledger / "ledger.db", anchor_file=anchor)
    plan = DPStep("record", "zero_out", 10_000, 0.04, 2.0, 0.5, 1, 3, 5.0)
    ledger.declare([Declaration("reviews", "second", plan, 2.0, 1e-5, adaptive=True)])
    ledger.charge("second")
    ledger.close()
    code, out, _ = command("ledger", "show", where, "--anchor", str(anchor), "--json")
    shown = json.loads(out)
    (total,) = shown["budgets"]
    assert code == 0 and shown["anchored"] is True
    assert (total["data_set"], total["epsilon"], total["delta"]) == ("reviews", 10.0, 1e-5)
    assert 2.0 < total["epsilon_declared"] <= 10.0
    row = shown["stages"][1]
    assert row["accounting"] == "adaptive" and 0 < row["rho_spent"] < row["rho_budget"]
    text = command("ledger", "show", where)[1]
    assert "second on reviews: 1 draws (3 planned)" in text and "budget of reviews: epsilon" in text
    assert "the anchor agrees" in command("ledger", "verify", where, "--anchor", str(anchor))[1]
    anchor.unlink()
    _one_line(command("ledger", "verify", where, "--anchor", str(anchor)), 4, "dprlhf ledger anchor")
    assert command("ledger", "anchor", where, str(anchor))[0] == 0
    assert command("ledger", "verify", where, "--anchor", str(anchor))[0] == 0
    anchor.write_bytes(anchor.read_bytes().replace(b"0" * 10, b"1" * 10))
    _one_line(command("ledger", "verify", where, "--anchor", str(anchor)), 4)


def test_ledger_verify_accepts_a_whole_ledger_and_refuses_a_changed_one(command: Command, small_ledger: Path) -> None:
    import sqlite3

    code, out, _ = command("ledger", "verify", str(small_ledger))
    assert code == 0 and out.startswith("whole: 4 entries")
    with sqlite3.connect(small_ledger / "ledger.db") as database:
        database.execute("""UPDATE entries SET body = '{"attempt":1}' WHERE seq = (SELECT max(seq) FROM entries)""")
    _one_line(command("ledger", "verify", str(small_ledger)), 4)
    _one_line(command("ledger", "show", str(small_ledger)), 4)


def test_version_and_doctor_answer(command: Command) -> None:
    assert command("version") == (0, f"{__version__}\n", "")
    code, out, _ = command("doctor")
    lines = out.splitlines()
    assert code == 0 and len(lines) > 10
    assert all(line.startswith("ok: ") or (line.startswith("lacks: ") and " -> " in line) for line in lines)
