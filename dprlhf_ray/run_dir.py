"""The run directory: what is in it, and whether a run may start or continue there."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dprlhf_ray import config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.trust import check_own, check_own_tree


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. What is in here is released, except ledger.key (a secret) and .ray-train (operational)."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.db"

    @property
    def run_id(self) -> str:
        """Random name of this run in a ledger that it shares with others."""
        return (self.root / "run_id").read_text(encoding="utf-8")

    def newest_head(self) -> str | None:
        """Ledger head recorded in the newest checkpoint: the ledger that a resumed run finds must contain it."""
        found = sorted(self.root.glob("checkpoints/*/version-*/meta.json"), key=lambda p: p.stat().st_mtime)
        return str(read_json(found[-1])["ledger_head"]) if found else None

    def model(self, stage: str) -> Path:
        return self.root / "models" / stage

    def evaluation(self, stage: str) -> Path:
        return self.root / f"evaluation-{stage}.json"

    def finish(self, stage: str, attempts: int, head: str) -> None:
        """Note that a stage's model is whole, and the ledger's head it was made under."""
        write_atomically(self.model(stage) / "stage.json", json.dumps({"attempts": attempts, "ledger_head": head}))

    def finished(self, stage: str) -> int | None:
        """Attempts of a stage that is done; None: it is not."""
        path = self.model(stage) / "stage.json"
        return int(read_json(path)["attempts"]) if path.exists() else None


def check_run_dir(root: Path, config: RunConfig, resume: bool) -> RunDir:
    """A run's folder, new or to be continued.

    Raises:
        ConfigError: a run is there already and resume was not asked for; its config differs; or another user could have
            put something there.
    """
    here = RunDir(root.resolve())
    if here.root.exists():
        check_own(here.root, f"--output {root}")
    if here.config.exists():
        if not resume:
            raise ConfigError(
                f"--output {root}: a run is there already; continue it with --resume or name another folder"
            )
        try:
            tree = yaml.safe_load(here.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"{here.config}: damaged, it holds no YAML any more: restore it") from None
        known = config_file.parse(tree, str(here.config))
        different = [
            k for k in RunConfig.model_fields if getattr(known, k) != getattr(config, k) and k not in ("ray", "rollout")
        ]
        if different:
            raise ConfigError(
                f"--resume: {different[0]} differs from {here.config}; resume with the config it started with"
            )
        check_checkpoints(here.root)
    return here


def check_checkpoints(root: Path) -> None:
    """DeepSpeed reads its checkpoints as pickles, which can run code: only the user's own are read.

    Args:
        root: the run directory.

    Raises:
        ConfigError: another user owns or can write one of them, or one is a link.
    """
    check_own_tree(root, "--resume", "checkpoints")


def open_run_dir(root: Path, config: RunConfig, resume: bool) -> RunDir:
    """Make a run's folder, or continue in the one that is there.

    Raises:
        ConfigError: as `check_run_dir`; or the folder cannot be made.
    """
    here = check_run_dir(root, config, resume)
    if here.config.exists():
        return here
    try:
        if not here.root.exists():
            here.root.mkdir(mode=0o700, parents=True)
            check_own(here.root, f"--output {root}")  # storage that maps owners or modes: now, not at --resume
        write_atomically(here.root / "run_id", secrets.token_hex(8))
        write_atomically(here.config, config_file.dump(config))
    except OSError as e:
        raise ConfigError(f"--output {root}: cannot write there ({e.strerror})") from None
    return here


def write_atomically(path: Path, text: str) -> None:
    """Write through a temporary file and a rename, so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """What a file holds; ConfigError, with its name, where that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{path}: damaged, it holds no JSON any more: restore it") from None
