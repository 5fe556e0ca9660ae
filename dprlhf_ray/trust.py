"""Whom files belong to: what a run takes in, and another user could have put there, is refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from dprlhf_ray.errors import ConfigError

_GROUP_AND_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_GROUP_AND_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


def check_own(path: Path, key: str) -> os.stat_result:
    """Refuse what belongs to another user (root is nobody else), or what group or others may write.

    Args:
        key: what an error begins with, e.g. "--resume".

    Raises:
        ConfigError: in one line.
    """
    found = path.stat()
    _check_owner(path, found, key)
    mode = stat.S_IMODE(found.st_mode)
    if mode & _GROUP_AND_OTHERS_WRITE and not (path.is_dir() and mode & stat.S_ISVTX):
        raise ConfigError(f"{key}: {path}: mode {mode:04o} lets other users write it: chmod go-w {path}")
    return found


def check_own_tree(root: Path, key: str, inside: str = "") -> None:
    """`check_own` for a folder and all that is below it (or below its part `inside`), where links are refused too.

    What is below a folder that only its owner can enter is out of others' reach, whatever its own mode: there only
    owners and links are looked at.

    Raises:
        ConfigError: in one line.
    """
    closed = not check_own(root, key).st_mode & _GROUP_AND_OTHERS_ENTER
    for path in _below(root / inside):
        if path.is_symlink():
            raise ConfigError(f"{key}: {path} is a link: put what it points to in its place")
        if closed:
            _check_owner(path, path.stat(), key)
        else:
            check_own(path, key)


def _below(folder: Path) -> Iterator[Path]:
    if folder.is_symlink() or folder.exists():
        yield folder
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in sorted(folders + files))


def _check_owner(path: Path, found: os.stat_result, key: str) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{key}: {path} belongs to user {found.st_uid}, and this is user {os.geteuid()}: use one of your own"
        )
