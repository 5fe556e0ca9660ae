"""The run directory: its user's own, closed to others, and continued only as such."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.run_dir import check_run_dir, open_run_dir

CONFIG = config_file.parse({"stages": [{"privacy": {"epsilon": 1.0}}]})


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_a_new_run_directory_is_its_user_s_own_under_any_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        here = open_run_dir(tmp_path / "runs" / "a", CONFIG, False)
        (here.root / "checkpoints" / "rl").mkdir(parents=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(here.root.stat().st_mode) == 0o700
    check_run_dir(here.root, CONFIG, True)


def test_a_checkpoint_that_another_user_could_have_put_there_is_not_read(tmp_path: Path) -> None:
    """False: a pickle of somebody else's runs as this user at the next --resume."""
    here = open_run_dir(tmp_path / "a", CONFIG, False)
    version = here.root / "checkpoints" / "rl" / "version-000001"
    version.mkdir(parents=True)
    for mode in (0o777, 0o775, 0o1777):
        here.root.chmod(mode)
        if mode == 0o1777:
            version.chmod(0o757)
        with pytest.raises(ConfigError, match=r"mode \d{4} lets other users write it: chmod go-w /") as e:
            check_run_dir(here.root, CONFIG, True)
        assert e.value.exit_code == 2
    here.root.chmod(0o700)
    check_run_dir(here.root, CONFIG, True)
    (version / "state").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"^--resume: .*version-000001/state is a link"):
        check_run_dir(here.root, CONFIG, True)


def test_a_folder_that_others_can_write_is_no_place_for_a_new_run(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(ConfigError, match=r"^--output .*mode 0777 lets other users write it"):
        open_run_dir(root, CONFIG, False)
    assert os.listdir(root) == []
