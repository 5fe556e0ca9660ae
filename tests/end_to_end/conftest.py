"""Whole runs on a tiny model: real Ray, DeepSpeed and engines."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")

from tests.end_to_end.runs import World, make_world


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """Where Ray's session folders go: a short path, for sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        root = Path(__file__).parents[2]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        yield folder
    tempfile.tempdir = None
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_model)
