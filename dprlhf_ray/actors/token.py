"""The token that every connection to Ray carries: a file that only its owner can read. Ray is not imported.

Ray makes `~/.ray/auth_token` with whatever mode the umask leaves (0644, as a rule), so it is made here first.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.trust import check_own

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def prepare(address: str | None) -> None:
    """Before a connection to Ray: the token is there, and in nobody else's hands. What is wrong but not fatal goes to
    standard error, in one line.

    Args:
        address: of a cluster, whose token it has to be; None: of a Ray that is started here, and gets a new one.

    Raises:
        ConfigError: there is no token of the cluster; or another user can write it, or put another in its place.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        what = "whoever has an account on this machine" if address is None else f"whoever reaches {address}"
        _warn(f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']}: {what} can run code in this Ray: unset it")
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    key = "RAY_AUTH_TOKEN_PATH" if named else "Ray's token"
    if not path.is_file():
        if named or address not in (None, "local"):
            raise ConfigError(f"{key}: no file {path}: copy the cluster's token there, with mode 600")
        try:
            _make(path)
        except OSError:  # a home that cannot be written: this run's own, handed to the processes that it starts
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            return
    check_own(path.parent, key)
    mode = stat.S_IMODE(check_own(path, key).st_mode)
    if mode & _OTHERS:
        try:
            path.chmod(mode & ~_OTHERS)
        except OSError:  # root's, or on storage that is only read
            _warn(f"{key}: {path}: mode {mode:04o} lets other users read it: chmod 600")


def _make(path: Path) -> None:
    """A new token. It appears whole, and the first one stays where two processes make one at once."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _warn(text: str) -> None:
    print(f"dprlhf: {text}", file=sys.stderr, flush=True)
