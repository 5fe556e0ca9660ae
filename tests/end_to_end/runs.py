"""What the end-to-end tests share: private prompts with marks, the command as a process, a search for leaks."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import secrets
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from dprlhf_ray import config as cfg
from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy.ledger import Ledger
from tests.end_to_end.rewards import FAILS_ON

RECORDS = 200


@dataclass(frozen=True)
class World:
    """A folder with private and public prompts. marks[i]: a string that only record i contains."""

    folder: Path
    model: Path
    marks: tuple[str, ...]

    def tree(self, steps: int = 3, **changes: Any) -> dict[str, Any]:
        """Config of a small run; changes: "section.key" with "__" for the dot."""
        tree: dict[str, Any] = {
            "name": "e2e",
            "model": {"name": str(self.model), "dtype": "float32",
                      "adapter": {"kind": "lora", "rank": 2, "target_modules": ["q_proj", "v_proj"]}},
            "data": {"notes": {"source": str(self.folder / "private.jsonl"), "max_prompt_tokens": 48}},
            "stages": [{
                "data": "notes",
                "privacy": {"epsilon": 6.0, "delta": 1e-3, "expected_batch": 24, "steps": steps, "clip_norm": 1.0},
                "generation": {"max_new_tokens": 12},
                "scorer": {"kind": "python", "function": "tests.end_to_end.rewards:score"},
                "optimizer": {"lr": 0.01},
            }],
            "learner": {"threads": 1},
            "rollout": {"engine": "transformers", "max_model_len": 64, "max_num_seqs": 32, "kv_cache_gib": 0.1,
                        "threads": 1, "sync_tolerance": 0.01},
            "evaluation": {"source": str(self.folder / "public.jsonl"), "prompts": 8, "samples": 2},
        }  # fmt: skip
        for key, value in changes.items():
            section, _, name = key.partition("__")
            tree[section][name] = value
        return tree

    def config(self, steps: int = 3, **changes: Any) -> RunConfig:
        return cfg.parse(self.tree(steps, **changes))

    def private_ids(self, tokenizer: Any) -> dict[tuple[int, ...], str]:
        """Token ids of every private prompt -> its text."""
        texts = [json.loads(line)["prompt"] for line in (self.folder / "private.jsonl").read_text().splitlines()]
        return {tuple(tokenizer(t)["input_ids"]): t for t in texts}


def make_world(folder: Path, model: Path) -> World:
    marks = tuple("zq" + "".join(secrets.choice("bcdfghjkmnpqrtvwxz") for _ in range(10)) for _ in range(RECORDS))
    rows = [f"the movie {m} was" + (f" {FAILS_ON}" if i % 20 == 0 else "") for i, m in enumerate(marks)]
    (folder / "private.jsonl").write_text("".join(json.dumps({"prompt": r}) + "\n" for r in rows))
    public = [f"the story {i} is one that you will like" for i in range(8)]
    (folder / "public.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in public))
    return World(folder, model, marks)


# --------------------------------------------------------------------------------------------------- the command


class Command:
    """`dprlhf ARGUMENTS` as a process group of its own, as a terminal starts it."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dprlhf_ray.cli", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            # a shell that started the tests in the background made them, and their children, ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        self.family: list[psutil.Process] = []

    def wait_until(self, true: Callable[[], bool], seconds: float = 150.0) -> None:
        """Until `true()`; AssertionError with the command's output when it ends before or takes too long."""
        deadline = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"the run ended or hangs: {self.process.communicate()}")
            time.sleep(0.05)

    def note_family(self) -> None:
        """Remember the processes that it has started."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def signal_group(self, number: int) -> None:
        """What a terminal does at Ctrl-C."""
        os.killpg(self.process.pid, number)

    def end(self, seconds: float = 200.0) -> tuple[int, str, str]:
        """(exit code, stdout, stderr). Whatever happens, nothing of it is left."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.note_family()
            for p in [*self.family, psutil.Process(self.process.pid)]:
                p.kill()
            raise AssertionError(f"the command did not end: {self.process.communicate()}") from None
        return self.process.returncode, out, err

    def survivors(self, seconds: float = 60.0) -> list[psutil.Process]:
        """Noted processes that are still there after a while; they are ended."""
        _, alive = psutil.wait_procs(self.family, timeout=seconds)
        for p in alive:
            p.send_signal(signal.SIGKILL)
        return alive


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def attempts(run_dir: Path) -> list[int]:
    """Attempts charged in the ledger, in order."""
    entries = Ledger.read(run_dir / "ledger.db").entries if (run_dir / "ledger.db").exists() else ()
    return [json.loads(e.body)["attempt"] for e in entries if e.kind == "charge"]


def final_version(run_dir: Path) -> int:
    """Updates that the newest checkpoint contains."""
    newest = sorted(run_dir.glob("checkpoints/rl/version-*/meta.json"))[-1]
    return int(json.loads(newest.read_text())["version"])


# ---------------------------------------------------------------------------------------------------- the search


def forms(text: str) -> list[bytes]:
    """How a string lies in files: UTF-8 (JSON and pickles too), UTF-16, UTF-32 (NumPy)."""
    return [text.encode(), text.encode("utf-16-le"), text.encode("utf-32-le")]


def token_forms(ids: Iterable[int]) -> list[bytes]:
    """How token ids lie in files: arrays of 32 and 64 bits (NumPy, Arrow, tensors), and as text."""
    row = list(ids)
    binary = [np.array(row, dtype=d).tobytes() for d in (np.int32, np.int64)]
    return binary + [sep.join(map(str, row)).encode() for sep in (", ", ",", " ")]


def leaks(folders: Iterable[Path], needles: Iterable[bytes]) -> list[str]:
    """Files below `folders`, unpacked where they are compressed, that contain a needle (8 bytes or more)."""
    by_start: dict[int, list[bytes]] = {}
    for needle in needles:
        by_start.setdefault(int.from_bytes(needle[:8], sys.byteorder), []).append(needle)
    starts = np.array(sorted(by_start), dtype=np.uint64)
    found = []
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            try:
                data = path.read_bytes()
            except OSError:  # gone meanwhile
                continue
            hit = next((h for content in _contents(data) if (h := _first_hit(content, by_start, starts))), None)
            if hit:
                found.append(f"{path}: {hit[:40]!r}")
    return found


def _first_hit(data: bytes, by_start: dict[int, list[bytes]], starts: np.ndarray) -> bytes | None:
    """A needle in `data`, or None: eight bytes at a time, at every offset."""
    for shift in range(min(8, len(data))):
        words = np.frombuffer(data, dtype=np.uint64, offset=shift, count=(len(data) - shift) // 8)
        for i in np.flatnonzero(np.isin(words, starts)):
            for needle in by_start[int(words[i])]:
                if data.startswith(needle, shift + 8 * int(i)):
                    return needle
    return None


def _contents(data: bytes) -> Iterator[bytes]:
    yield data
    for start, unpack in ((b"\x1f\x8b", gzip.decompress), (b"BZh", bz2.decompress), (b"\xfd7zXZ", lzma.decompress),
                          (b"x\x9c", zlib.decompress)):  # fmt: skip
        if data.startswith(start):
            try:
                yield unpack(data)
            except (OSError, EOFError, zlib.error, lzma.LZMAError):
                continue
    if data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield archive.read(name)
