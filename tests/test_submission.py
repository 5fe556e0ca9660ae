"""A run as a job, without a cluster: what travels, what is refused, and how a job is followed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from dprlhf_ray import cli, config_file, run_dir, submission
from dprlhf_ray.actors import control
from dprlhf_ray.errors import ConfigError, DprlhfError

SECRET = "the text of a private record"
SCORER = {"kind": "python", "function": "my_rewards:score"}


def _tree(**changes: Any) -> dict[str, Any]:
    stage = {"privacy": {"epsilon": 6.0}, "scorer": SCORER}
    return {"name": "notes", "data": {"reviews": {"source": "/data/private.jsonl"}}, "stages": [stage], **changes}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"data": {"reviews": {"source": "private.jsonl"}}}, r"data\.reviews\.source: private\.jsonl"),
        ({"data": {"reviews": {"source": "~/private.csv"}}}, r"data\.reviews\.source"),
        ({"evaluation": {"source": "./public.jsonl"}}, r"evaluation\.source"),
        ({"model": {"name": "./model"}}, r"model\.name"),
        ({"ledger": "ledger.db"}, "ledger: "),
        ({"stages": [{"scorer": {"kind": "reward_model", "model": "../rm"}}]}, r"stages\.0\.scorer\.model"),
        ({"stages": [{"scorer": {"members": [{}, {"model": "./rm"}]}}]}, r"stages\.0\.scorer\.members\.1\.model"),
    ],
)
def test_in_a_job_every_path_is_absolute(change: dict[str, Any], key: str) -> None:
    """False: private data would have to travel in the job's package, which Ray keeps on disks; or a ledger is lost with
    the working directory."""
    with pytest.raises(ConfigError, match=key):
        submission.check_paths(_tree(**change), Path("/runs/x"))


def test_what_is_no_path_or_an_absolute_one_is_left_alone() -> None:
    for change in (
        {"ledger": "postgresql+psycopg://me@host/name", "ledger_key": "/keys/k"},
        {"model": {"name": "meta-llama/Llama-3.2-1B"}, "evaluation": {"source": "stanfordnlp/imdb"}},
        {"model": {"name": "embedded"}, "data": {"r": {"source": "embedded:movie-reviews"}}},
    ):
        submission.check_paths(_tree(**change), Path("/runs/x"))


@pytest.mark.parametrize("output", [None, Path("runs/x")])
def test_a_job_s_run_directory_outlives_it(
    output: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: checkpoints and ledger lie in the job's working directory, and are gone with it."""
    with pytest.raises(ConfigError, match=r"^--output: .*absolute"):
        submission.check_paths(_tree(), output)
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(_tree()))
    monkeypatch.setenv(submission.IN_JOB, "{}")  # as Ray sets it for `ray job submit -- dprlhf run ...`
    words = ["run", str(path), *(["--output", str(output)] if output else [])]
    result = CliRunner().invoke(cli.app, words)
    assert isinstance(result.exception, ConfigError) and "--output" in str(result.exception)


def test_only_the_config_and_the_scorer_s_code_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """False: data that lie beside the code are uploaded with it, or the scorer cannot be imported on the cluster."""
    here = tmp_path / "work"
    (here / "my_rewards" / "parts").mkdir(parents=True)
    for name in ("__init__.py", "parts/__init__.py"):
        (here / "my_rewards" / name).write_text("def score(prompt, completion):\n    return 0.0\n")
    for name in ("private.jsonl", "my_rewards/private.csv", "my_rewards/parts/key.pem", "other.py"):
        (here / name).write_text(SECRET)
    monkeypatch.chdir(here)
    config = config_file.parse(_tree())
    target = tmp_path / "package"
    target.mkdir()
    submission.pack(config, target)
    files = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert files == {"config.yaml", "my_rewards/__init__.py", "my_rewards/parts/__init__.py"}
    assert config_file.load(target / "config.yaml") == config
    built_in = config_file.parse(_tree(stages=[{
        "privacy": {"epsilon": 6.0}, "scorer": {"kind": "python", "function": "dprlhf_ray.rewards:python_parses"},
    }]))  # fmt: skip
    assert submission.modules(built_in) == []
    missing = config_file.parse(_tree(stages=[{
        "privacy": {"epsilon": 6.0}, "scorer": {"kind": "python", "function": "nowhere_to_be_found:score"},
    }]))  # fmt: skip
    with pytest.raises(ConfigError, match=r"stages\.0\.scorer\.function: no module 'nowhere_to_be_found'"):
        submission.modules(missing)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "http://head.example:8265",
            "dprlhf: --address http://head.example:8265: the cluster's token travels unencrypted",
        ),
        ("https://head.example:8265", ""),
        ("http://127.0.0.1:8265", ""),
    ],
)
def test_a_token_that_travels_unencrypted_is_told(
    address: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: address)
    assert submission.client(address) == address
    err = capfd.readouterr().err
    assert err.startswith(said) and len(err.splitlines()) == bool(said)
    assert os.environ["no_proxy"].startswith("127.0.0.1")


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="^--address: a secret in the URL") as e:
        submission.client("http://me:s3c@head.example:8265")
    assert "s3c" not in str(e.value)


class Server:
    """A job server. parts: what its log has at each connection; then the connection breaks, or the job has ended."""

    def __init__(self, *connections: list[str], status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.connections, self.status, self.code = list(connections), status, code

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        parts = self.connections.pop(0)
        for part in parts:
            yield part
        if self.connections:
            raise RuntimeError("closed unexpectedly")

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=Status(self.status), driver_exit_code=self.code)


class Status(str):
    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


def test_a_job_is_followed_through_lost_connections_and_shown_once() -> None:
    """False: output is printed twice or lost where the connection was made again."""
    shown: list[str] = []
    server = Server(["one\ntw"], ["one\n", "two\nthree\n"], ["one\ntwo\n", "three\nfour\n"])
    ended = submission.follow(server, "j", shown.append)
    assert "".join(shown) == "one\ntwo\nthree\nfour\n" and ended == submission.Ended("SUCCEEDED", 0)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", None, 130), ("STOPPED", -15, 130)],
)
def test_the_exit_code_is_the_job_s(status: str, code: int | None, expected: int) -> None:
    assert submission.follow(Server([""], status=status, code=code), "j", print).exit_code == expected


def test_a_job_server_that_stays_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            raise ConnectionError("refused")
            yield ""

    monkeypatch.setattr(submission, "_PATIENCE", 0.0)
    with pytest.raises(DprlhfError, match="the job server is gone; the job may go on"):
        submission.follow(Gone(), "j", print)


class Fleet:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.start = self.resize = self.sizes.append

    def status(self) -> dict[str, int]:
        return {"replicas": self.sizes[-1], "healthy": 1, "starting": self.sizes[-1] - 1, "version": 3}


def test_a_running_fleet_is_scaled_from_outside_and_the_number_outlives_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: the request does not reach the fleet, comes again and again, or is forgotten by a resumed run."""
    monkeypatch.setattr(control, "PERIOD", 0.02)
    assert control.ask_for(tmp_path, 2, wait=0.1) is None  # nobody is there: kept
    fleet = Fleet()
    watch = control.Control(tmp_path, fleet)  # type: ignore[arg-type]
    watch.start(1)
    assert fleet.sizes == [2]
    answer = control.ask_for(tmp_path, 5, wait=10)
    assert answer is not None and (answer["replicas"], answer["starting"]) == (5, 4)
    for junk in ("{", '{"rollouts": "many"}', "[]"):
        run_dir.write_atomically(tmp_path / control.REQUEST, junk)
        threading.Event().wait(0.1)
    watch.stop()
    assert fleet.sizes == [2, 5]
    again = Fleet()
    (tmp_path / control.REQUEST).unlink()
    watch = control.Control(tmp_path, again)  # type: ignore[arg-type]
    watch.start(3)
    watch.stop()
    assert again.sizes == [3]


def test_scale_without_a_run_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["scale", str(tmp_path), "--rollouts", "2"])
    assert isinstance(result.exception, ConfigError) and "not a run directory" in str(result.exception)
