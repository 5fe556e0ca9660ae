"""A run that crashes in every way that quotes records, with a full object store and a dashboard: nothing private is in
any file, on the terminal, in shared memory or on a page. (The clean run is searched in test_run.py.)"""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from tests.end_to_end.rewards import FAILS_ON, score
from tests.end_to_end.runs import World, attempts, forms, search, token_forms, write_config

FAULTS = ("engine", "learner", "driver")


@pytest.fixture
def sandbox() -> Iterator[Path]:
    """Everything that the run's processes may write, also caches; a short path, for sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="leak-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _run(world: World, engine: str, sandbox: Path, seen: Path) -> subprocess.CompletedProcess[str]:
    tree = world.tree(6, rollout__engine=engine)
    tree["ray"] = {"dashboard": True}
    tree["tracking"] = {"tensorboard": True}
    config = write_config(seen / "config.yaml", tree)
    caches = (
        "HF_HOME",
        "HF_DATASETS_CACHE",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "VLLM_CACHE_ROOT",
        "VLLM_CONFIG_ROOT",
    )
    env = os.environ | {c: str(sandbox / "caches" / c.lower()) for c in caches} | {"TMPDIR": str(sandbox)}
    command = [sys.executable, "-m", "tests.end_to_end.leaky", str(config), str(sandbox / "out"), str(seen)]
    return subprocess.run(command, env=env, cwd=sandbox, capture_output=True, text=True, timeout=280)


def _needles(world: World, seen: Path) -> tuple[list[bytes], int]:
    """Every form of the marks, the prompts' token ids, completions and rewards; and how many strings these are."""
    from transformers import AutoTokenizer

    texts = world.private_ids(AutoTokenizer.from_pretrained(world.model))
    rows = [json.loads(line) for line in (seen / "completions.jsonl").read_text().splitlines()]
    private = [(tuple(p), ids, text) for p, ids, text in rows if tuple(p) in texts]
    assert len(private) > 60 and any(FAILS_ON in texts[p] for p, _, _ in private), "too little was drawn to leak"
    shared = len(os.path.commonprefix([list(p) for p in texts]))
    strings = [*world.marks, *(text for _, _, text in private if len(text) > 12)]
    tokens = [list(p)[shared : shared + 8] for p in texts] + [ids for _, ids, _ in private if len(ids) > 6]
    rewards = [score(texts[p], text) for p, _, text in private if FAILS_ON not in texts[p]]
    needles = [n for s in strings for n in forms(s)] + [n for ids in tokens for n in token_forms(ids)]
    needles += [n for r in rewards for n in (repr(r)[:13].encode(), np.float64(r).tobytes())]
    return needles, len(strings) + len(tokens) + len(rewards)


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_a_run_that_crashes_leaves_nothing_private_behind(
    engine: str, world: World, sandbox: Path, tmp_path: Path, record_property: Any
) -> None:
    """False: an error's text, a log, spilled objects, a cache, a page of the dashboard or shared memory holds a
    record's text, tokens, completion or reward."""
    done = _run(world, engine, sandbox, tmp_path)
    (sandbox / "stdout").write_text(done.stdout)
    (sandbox / "stderr").write_text(done.stderr)
    needles, strings = _needles(world, tmp_path)
    found = search([sandbox, Path("/dev/shm")], needles)
    for name, value in (("files", found.files), ("bytes", found.size), ("strings", strings), ("hits", len(found.hits))):
        record_property(name, value)
    print(f"leak test, {engine}: {found.files} files, {found.size} bytes, {strings} strings, {len(found.hits)} hits")
    assert found.hits == []

    # and the run did go through all of it
    assert done.returncode == 1 and "ValueError" in done.stderr.splitlines()[-1], done.stderr[-3000:]
    assert [f for f in FAULTS if not (tmp_path / f"{f}.happened").exists()] == []
    assert attempts(sandbox / "out") == [1, 2, 3, 4, 5]
    held, on_disk = json.loads((tmp_path / "on_disk.json").read_text())
    assert held > 120 << 20 and on_disk == [], "the object store went to disk when it was full"
    pages = json.loads((tmp_path / "dashboard.json").read_text())
    assert sum(code == 200 for code in pages.values()) >= 10, pages
    searched = {p.parent.name for p in sandbox.rglob("*") if p.is_file()}
    assert {"logs", "dashboard", "out", "tensorboard"} <= searched, "something was not there to be searched"


def _packed(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    """False: a leak in this form would not be seen."""
    mark, ids = "zqmarkedrecord", [5, 81, 17, 300, 44, 2]
    text = f"so {mark} it is"
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"prompt": text}))
    np.save(tmp_path / "c.npy", np.array([mark]))
    np.savez_compressed(tmp_path / "d.npz", x=np.array([mark]))
    (tmp_path / "e.txt").write_text(mark, encoding="utf-16")
    np.save(tmp_path / "f.npy", np.array(ids))
    (tmp_path / "g.json").write_text(json.dumps(ids))
    (tmp_path / "h.pkl").write_bytes(pickle.dumps({"ids": tuple(ids)}))
    for shift in range(3):
        (tmp_path / f"i{shift}.txt").write_bytes(base64.b64encode(b"." * shift + text.encode()))
    feather.write_feather(pa.table({"text": [text]}), tmp_path / "j.arrow", compression="lz4")
    pq.write_table(pa.table({"text": [text]}), tmp_path / "k.parquet", compression="zstd")
    (tmp_path / "l").write_bytes(_packed(text.encode(), "lz4"))
    (tmp_path / "m.gz").write_bytes(gzip.compress(_packed(text.encode(), "zstd")))
    (tmp_path / "n.hex").write_text(text.encode().hex())
    (tmp_path / "clean").write_text("nothing")
    found = search([tmp_path], forms(mark) + token_forms(ids))
    assert "".join(Path(f.split(": ")[0]).name[0] for f in found.hits) == "abcdefghiiijklmn"
    assert found.files == len(found.hits) + 1
