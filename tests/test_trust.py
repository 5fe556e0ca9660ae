"""What a run takes in belongs to its user: folders and files that others could have changed are refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dprlhf_ray import trust
from dprlhf_ray.errors import ConfigError


def _tree(root: Path, folder: int, below: int) -> Path:
    inner = root / "checkpoints" / "rl"
    inner.mkdir(parents=True)
    (inner / "state.pt").write_bytes(b"x")
    for path, mode in ((root, folder), (root / "checkpoints", below), (inner, below), (inner / "state.pt", below)):
        path.chmod(mode)
    return root


def test_what_others_can_write_is_refused(tmp_path: Path) -> None:
    trust.check_own_tree(_tree(tmp_path / "a", 0o755, 0o755), "--resume", "checkpoints")
    for n, (folder, below) in enumerate([(0o777, 0o755), (0o775, 0o755), (0o755, 0o775), (0o750, 0o757)]):
        with pytest.raises(ConfigError, match=r"^--resume: .*mode 07\d\d lets other users write it: chmod go-w /"):
            trust.check_own_tree(_tree(tmp_path / str(n), folder, below), "--resume", "checkpoints")


def test_in_a_folder_that_only_its_owner_enters_the_umask_of_what_wrote_it_does_not_matter(tmp_path: Path) -> None:
    """False: a run under umask 002 cannot restart its learners."""
    trust.check_own_tree(_tree(tmp_path / "a", 0o700, 0o777), "--resume", "checkpoints")


def test_a_link_is_refused_wherever_it_points(tmp_path: Path) -> None:
    root = _tree(tmp_path / "a", 0o700, 0o700)
    (root / "checkpoints" / "rl" / "version-000001").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"version-000001 is a link: put what it points to in its place"):
        trust.check_own_tree(root, "--resume", "checkpoints")
    other = _tree(tmp_path / "b", 0o700, 0o700)
    os.rename(other / "checkpoints", tmp_path / "c")
    (other / "checkpoints").symlink_to(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"checkpoints is a link"):
        trust.check_own_tree(other, "--resume", "checkpoints")


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_what_another_user_owns_is_refused_and_root_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    root = _tree(tmp_path / "a", mode, 0o755)
    owners = {"state.pt": 4321}
    own = Path.stat

    def stat(path: Path, **options: Any) -> Any:
        found = own(path, **options)
        uid = owners.get(path.name, 0)
        return SimpleNamespace(st_mode=found.st_mode, st_uid=uid)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(ConfigError, match=r"state\.pt belongs to user 4321, and this is user \d+: use one of your own"):
        trust.check_own_tree(root, "--resume", "checkpoints")
    owners.clear()
    trust.check_own_tree(root, "--resume", "checkpoints")
