"""The command line gives the figures that open accountants agreed on, for every kind of draw."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dprlhf_ray import cli
from tests.privacy.test_accounting import GOLDENS

CLOSE = 1e-3  # relative


def figures(command: str) -> dict[str, float]:
    done = CliRunner().invoke(cli.app, command.split())
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if command.startswith("epsilon") else json.loads(done.stdout)[0]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "pld", "rdp", "replace_one"), GOLDENS)
def test_poisson_sampling(
    q: float, sigma: float, steps: int, delta: float, pld: float, rdp: float, replace_one: float
) -> None:
    """False: the printed epsilon of a plain schedule is not the reference figure, under some adjacency."""
    line = f"epsilon --sampling-rate {q} --noise-multiplier {sigma} --steps {steps} --delta {delta}"
    expected = {"pld": pytest.approx(pld, rel=CLOSE), "rdp": pytest.approx(rdp, rel=CLOSE)}
    assert figures(line) == expected == figures(f"{line} --adjacency add_remove")
    assert figures(f"{line} --unit user") == expected
    assert figures(f"{line} --adjacency replace_one") == {"pld": pytest.approx(replace_one, rel=CLOSE), "rdp": None}


@pytest.mark.parametrize(("target", "sigma"), [(1, 3.730632), (2, 1.993812), (4, 1.081162), (8, 0.600229)])
def test_noise_of_one_gaussian(target: float, sigma: float) -> None:
    """False: calibration does not find the analytic Gaussian mechanism's noise (Balle and Wang 2018)."""
    found = figures(f"plan --epsilon {target} --delta 1e-5 --sampling-rate 1 --steps 1 --json")
    assert found["noise_multiplier"] == pytest.approx(sigma, rel=CLOSE)
    assert found["pld"] <= target


def test_noise_of_a_schedule() -> None:
    found = figures("plan --epsilon 1 --delta 1e-6 --sampling-rate .1 --steps 512 --json")
    assert found["noise_multiplier"] == pytest.approx(9.661829, rel=CLOSE)
    assert found["pld"] <= 1


def test_updates_on_one_draw() -> None:
    """False: four updates on each of 250 draws cost 2.12, as if each had a draw of its own, instead of 9.87."""
    line = "epsilon --sampling-rate .01 --noise-multiplier 1 --delta 1e-6"
    assert figures(f"{line} --steps 250 --updates-per-draw 4")["pld"] == pytest.approx(9.87, rel=CLOSE)
    assert figures(f"{line} --steps 1000")["pld"] == pytest.approx(2.12, abs=0.01)


def test_truncated_poisson_sampling() -> None:
    """False: a cap is free, or costs something else than the general bound of arXiv 2508.15089."""
    line = "epsilon --sampling-rate .01 --noise-multiplier 1 --steps 500 --delta 1e-6 --population 10000"
    capped = {cap: figures(f"{line} --max-batch {cap}") for cap in (130, 160)}
    assert capped[130] == {"pld": pytest.approx(4.43, rel=CLOSE), "rdp": None}
    assert capped[160]["pld"] == pytest.approx(1.5805, rel=CLOSE)
    assert figures(line)["pld"] == pytest.approx(1.5803, rel=CLOSE)


@pytest.mark.parametrize(("k", "epsilon"), [(4, 10.0153), (1, 2.1245)])
def test_users_whose_records_are_sampled(k: int, epsilon: float) -> None:
    """False: a user with k records is charged as one record, or as k runs."""
    line = f"epsilon --unit user --records-per-user {k} --sampling-rate .01 --noise-multiplier 1 --steps 1000"
    assert figures(f"{line} --delta 1e-6") == {"pld": pytest.approx(epsilon, rel=CLOSE), "rdp": None}


def test_a_search_over_hyper_parameters() -> None:
    """False: `--tries` shows the cost of one run. (Its figure is worked out by hand in test_accounting_kinds.py.)"""
    line = "epsilon --sampling-rate .01 --noise-multiplier 1 --steps 250 --delta 1e-6"
    one, best = figures(line), figures(f"{line} --tries 10")
    assert best["pld"] == one["pld"] < best["rdp"] == one["rdp"] < best["selected"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--max-batch 20", "--population"),
        ("--max-batch 20 --population 1000 --adjacency add_remove", "max_batch"),
        ("--max-batch 20 --population 1000 --updates-per-draw 2", "updates_per_draw"),
        ("--max-batch 0 --population 1000", "max_batch"),
        ("--max-batch 20 --population 1000 --unit user --records-per-user 2", "max_batch"),
        ("--records-per-user 2", "records_per_user"),
        ("--unit user --records-per-user 2 --adjacency replace_one", "records_per_user"),
        ("--unit user --records-per-user 2 --updates-per-draw 2", "updates_per_draw"),
        ("--unit user --records-per-user 2 --tries 5", "tries"),
        ("--tries .5", "tries"),
        ("--tries nan", "tries"),
    ],
)
def test_what_has_no_sound_figure_is_refused(options: str, says: str) -> None:
    """False: a number is printed for a combination that nobody has a proof for."""
    line = f"epsilon --sampling-rate .01 --noise-multiplier 1 --steps 3 --delta 1e-6 {options}"
    done = CliRunner().invoke(cli.app, line.split())
    assert done.exit_code != 0 and done.stdout == ""
    assert says in str(done.exception) and "\n" not in str(done.exception)
