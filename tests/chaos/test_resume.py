"""What an interrupted run left is damaged, gone or older than it was: it is refused in one line and stays as it is."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dprlhf_ray.actors.learner_group import LearnersFailed
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import ConfigError, DprlhfError, LedgerDamaged
from dprlhf_ray.stage_run import Roles
from tests.chaos import oracle
from tests.chaos.plan import Case, Chaos
from tests.chaos.runs import check, configured, run
from tests.end_to_end.runs import World

STEPS, INTERRUPTED = 4, 2


class Enough(Exception):
    """Ends the run that all cases start from."""


@dataclass(frozen=True)
class Left:
    """case: with the journal of the interrupted run. older: a copy of its ledger after the first attempt."""

    case: Case
    root: Path
    older: Path


@pytest.fixture(scope="module")
def left(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    """A run that was interrupted after its second attempt."""
    folder = tmp_path_factory.mktemp("resume")
    root, older, case = folder / "out", folder / "older.db", chaos.begin([])

    def stop(attempt: int, roles: Roles) -> None:
        if attempt == 1:
            with sqlite3.connect(f"file:{root}/ledger.db?mode=ro", uri=True) as live, sqlite3.connect(older) as copy:
                live.backup(copy)
        if attempt == INTERRUPTED:
            raise Enough

    ended = run(config_of(world), root, on_step=stop)
    assert isinstance(ended, Enough), ended
    with sqlite3.connect(root / "ledger.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    check(case, config_of(world), root, world, done=False)
    yield Left(case, root, older)
    chaos.end()


def config_of(world: World) -> RunConfig:
    return configured(world, "resume", STEPS, learner__max_failures=1)


def copied(left: Left, folder: Path) -> Path:
    return Path(shutil.copytree(left.root, folder / "out", ignore=shutil.ignore_patterns(".ray-train")))


# --------------------------------------------------------------------------------------------------------- damage


def truncated(root: Path, left: Left) -> None:
    data = (root / "ledger.db").read_bytes()
    (root / "ledger.db").write_bytes(data[: len(data) // 2])


def emptied(root: Path, left: Left) -> None:
    (root / "ledger.db").write_bytes(b"")


def flipped(root: Path, left: Left) -> None:
    data = bytearray((root / "ledger.db").read_bytes())
    data[data.index(b'"attempt":2') + len(b'"attempt":')] ^= 1
    (root / "ledger.db").write_bytes(data)


def removed(root: Path, left: Left) -> None:
    for file in root.glob("ledger*"):
        file.unlink()


def rolled_back(root: Path, left: Left) -> None:
    for file in root.glob("ledger.db*"):
        file.unlink()
    shutil.copy(left.older, root / "ledger.db")


def charge_deleted(root: Path, left: Left) -> None:
    with sqlite3.connect(root / "ledger.db") as connection:
        connection.execute("DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)")
    connection.close()


def key_removed(root: Path, left: Left) -> None:
    (root / "ledger.key").unlink()


def key_of_another(root: Path, left: Left) -> None:
    (root / "ledger.key").write_bytes(bytes(32))


def key_for_all_to_read(root: Path, left: Left) -> None:
    (root / "ledger.key").chmod(0o644)


def config_cut_short(root: Path, left: Left) -> None:
    text = (root / "config.yaml").read_text()
    (root / "config.yaml").write_text(text[: len(text) // 2] + "\n  : [")


def meta_cut_short(root: Path, left: Left) -> None:
    meta = sorted(root.glob("checkpoints/rl/version-*/meta.json"))[-1]
    meta.write_text(meta.read_text()[:20])


def metrics_ahead(root: Path, left: Left) -> None:
    with (root / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"stage": "rl", "attempt": INTERRUPTED + 5, "metrics": []}) + "\n")


def evaluation_gone(root: Path, left: Left) -> None:
    (root / "evaluation-rl.json").unlink()


def checkpoint_cut_short(root: Path, left: Left) -> None:
    for state in sorted(root.glob("checkpoints/rl/version-*"))[-1].rglob("*model_states.pt"):
        data = state.read_bytes()
        state.write_bytes(data[: len(data) // 2])


def checkpoint_gone(root: Path, left: Left) -> None:
    """Only the newest one: an older one is there, of fewer attempts than the ledger knows."""
    shutil.rmtree(sorted(root.glob("checkpoints/rl/version-*"))[-1])


DAMAGES: list[tuple[str, Callable[[Path, Left], None], type[Exception], str]] = [
    ("ledger-truncated", truncated, LedgerDamaged, ""),
    ("ledger-emptied", emptied, LedgerDamaged, ""),
    ("ledger-byte-flipped", flipped, LedgerDamaged, ""),
    ("ledger-removed", removed, LedgerDamaged, "restore"),
    ("ledger-rolled-back", rolled_back, LedgerDamaged, "checkpoint"),
    ("ledger-charge-deleted", charge_deleted, LedgerDamaged, ""),
    ("ledger-key-removed", key_removed, LedgerDamaged, "key"),
    ("ledger-key-of-another", key_of_another, LedgerDamaged, ""),
    ("ledger-key-for-all-to-read", key_for_all_to_read, ConfigError, "chmod"),
    ("config-of-the-run-cut-short", config_cut_short, ConfigError, "config.yaml"),
    ("checkpoint-meta-cut-short", meta_cut_short, ConfigError, "meta.json"),
    ("metrics-ahead-of-the-ledger", metrics_ahead, LedgerDamaged, "released"),
    ("evaluation-file-gone", evaluation_gone, ConfigError, "restore it"),
    ("checkpoint-state-cut-short", checkpoint_cut_short, LearnersFailed, ""),
]


@pytest.mark.parametrize(("damage", "error", "says"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damage_is_refused(
    damage: Callable[[Path, Left], None], error: type[DprlhfError], says: str, left: Left, world: World, tmp_path: Path
) -> None:
    """False: a run goes on from what is not what it left, or its ledger is changed by the look at it."""
    root = copied(left, tmp_path)
    damage(root, left)
    before = {p.name: p.read_bytes() for p in root.glob("ledger*") if p.suffix in (".db", ".key")}
    draws = len(left.case.passages("driver.draw", "before"))
    ended = run(config_of(world), root, resume=True)
    assert isinstance(ended, error), ended
    line = str(getattr(ended, "cause", ended))
    assert says in line and "\n" not in line and "without an error" not in line
    assert ended.exit_code == {LedgerDamaged: 4, ConfigError: 2}.get(error, ended.exit_code)
    assert len(left.case.passages("driver.draw", "before")) == draws, "something private was drawn"
    after = {p.name: p.read_bytes() for p in root.glob("ledger*") if p.suffix in (".db", ".key")}
    if error is LedgerDamaged and damage is not metrics_ahead:  # that one is found after the accountant has opened it
        assert after == before
    elif damage not in (key_for_all_to_read,):
        assert oracle.charges(root / "ledger.db") == list(range(1, INTERRUPTED + 1))


def test_what_a_crash_leaves_is_no_damage(left: Left, world: World, tmp_path: Path) -> None:
    """False: a torn last line of the metrics, half a checkpoint, a lost newest checkpoint, or files of the operator's
    that are garbage end a run that could go on, or make it forget an attempt."""
    root = copied(left, tmp_path)
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:25])
    checkpoint_gone(root, left)
    half = root / "checkpoints" / "rl" / f".partial-{INTERRUPTED:06d}" / "state"
    half.mkdir(parents=True)
    (half / "mp_rank_00_model_states.pt").write_bytes(b"half")
    (root / ".evaluation-rl.json.partial").write_text("{")
    (root / "scale.json").write_text("three")
    assert run(config_of(world), root, resume=True) is None
    seen = check(left.case, config_of(world), root, world)
    assert seen.released == [n for n in range(1, STEPS + 1) if n != INTERRUPTED]
