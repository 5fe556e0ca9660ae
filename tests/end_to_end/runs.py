"""What the end-to-end tests share: private prompts with marks, the command as a process, a search for leaks."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import lzma
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyarrow import feather

from dprlhf_ray import config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy.chain import Entry
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
        return config_file.parse(self.tree(steps, **changes))

    def private_ids(self, tokenizer: Any) -> dict[tuple[int, ...], str]:
        """Token ids of every private prompt -> its text."""
        texts = [json.loads(line)["prompt"] for line in (self.folder / "private.jsonl").read_text().splitlines()]
        return {tuple(tokenizer(t)["input_ids"]): t for t in texts}


def make_world(folder: Path, model: Path, records: int = RECORDS) -> World:
    marks = tuple("zq" + "".join(secrets.choice("bcdfghjkmnpqrtvwxz") for _ in range(10)) for _ in range(records))
    rows = [f"the movie {m} was" + (f" {FAILS_ON}" if i % 4 == 0 else "") for i, m in enumerate(marks)]
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

    def wait_until(self, true: Callable[[], bool], seconds: float = 400.0) -> None:
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
    entries: list[Entry] = []
    if (run_dir / "ledger.db").exists():
        Ledger.read(run_dir / "ledger.db", visit=entries.append)
    return [json.loads(e.body)["attempt"] for e in entries if e.kind == "charge"]


def final_version(run_dir: Path) -> int:
    """Updates that the newest checkpoint contains."""
    newest = sorted(run_dir.glob("checkpoints/rl/version-*/meta.json"))[-1]
    return int(json.loads(newest.read_text())["version"])


# ---------------------------------------------------------------------------------------------------- the search


def forms(text: str) -> list[bytes]:
    """How a string of 12 characters or more lies in files: UTF-8 (JSON and pickles too), UTF-16, UTF-32 (NumPy), hex,
    and base64 at each of its three alignments (without the characters that neighbours change)."""
    plain = text.encode()
    coded = [base64.b64encode(b"\0" * n + plain)[-(-n * 4 // 3) :][: (len(plain) - 2) // 3 * 4] for n in range(3)]
    return [plain, text.encode("utf-16-le"), text.encode("utf-32-le"), plain.hex().encode(), *coded]


def token_forms(ids: Iterable[int]) -> list[bytes]:
    """How token ids lie in files: arrays of 16, 32 and 64 bits (NumPy, Arrow, tensors), pickled, and as text."""
    row = list(ids)
    binary = [np.array(row, dtype=d).tobytes() for d in (np.uint16, np.int32, np.int64)]
    pickled = b"".join(pickle.dumps(i, protocol=2)[2:-1] for i in row)
    return [*binary, pickled, *(sep.join(map(str, row)).encode() for sep in (", ", ",", " "))]


@dataclass
class Searched:
    """files and size: what was read (bytes on disk). hits: "path: needle"."""

    files: int = 0
    size: int = 0
    hits: list[str] = field(default_factory=list)


def leaks(folders: Iterable[Path], needles: Iterable[bytes]) -> list[str]:
    """Files below `folders` that contain a needle; see `search`."""
    return search(folders, needles).hits


def search(folders: Iterable[Path], needles: Iterable[bytes]) -> Searched:
    """Look for needles (8 bytes or more) in files below `folders`, unpacked where they are compressed."""
    by_start: dict[int, list[bytes]] = {}
    for needle in needles:
        by_start.setdefault(int.from_bytes(needle[:8], sys.byteorder), []).append(needle)
    starts = np.array(sorted(by_start), dtype=np.uint64)
    found = Searched()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            try:
                data = path.read_bytes()
            except OSError:  # gone meanwhile
                continue
            found.files, found.size = found.files + 1, found.size + len(data)
            hit = next((h for content in _contents(data) if (h := _first_hit(content, by_start, starts))), None)
            if hit:
                found.hits.append(f"{path}: {hit[:40]!r}")
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
    """The bytes, and what is inside them where they are an archive or an Arrow or Parquet file."""
    yield data
    for start, codec in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bz2"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ):
        if data.startswith(start):
            with contextlib.suppress(OSError):
                yield from _contents(pa.CompressedInputStream(pa.BufferReader(data), codec).read())
    for start, unpack in ((b"\xfd7zXZ", lzma.decompress), (b"x\x9c", zlib.decompress)):
        if data.startswith(start):
            with contextlib.suppress(EOFError, zlib.error, lzma.LZMAError):
                yield from _contents(unpack(data))
    if data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield from _contents(archive.read(name))
    if data.startswith((b"ARROW1", b"PAR1")):
        reader = pq.read_table if data.startswith(b"PAR1") else feather.read_table
        columns = reader(pa.BufferReader(data)).columns
        yield from (b.to_pybytes() for c in columns for chunk in c.chunks for b in chunk.buffers() if b is not None)
