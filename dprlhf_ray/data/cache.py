"""Where fetched public things are kept, and how they get there in one piece.

Only public downloads (the embedded model and data) live here, never a user's records.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dprlhf_ray import __version__
from dprlhf_ray.errors import ConfigError


def cache_root() -> Path:
    """$DPRLHF_CACHE, or ~/.cache/dprlhf_ray; below it one folder per version of this package."""
    base = os.environ.get("DPRLHF_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "dprlhf_ray") / __version__


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, a folder, having let `build` fill it if it is not there.

    `build` fills a temporary folder beside the target that is renamed when complete, so a reader sees all or nothing;
    a file lock makes concurrent callers wait for one build instead of repeating it.

    Raises:
        ConfigError: the cache cannot be written.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.parent / f".{target.name}.lock", "w")  # noqa: SIM115 (closed by the with below)
    except OSError as e:
        raise ConfigError(f"cache {target.parent}: not writable ({e.strerror}); set DPRLHF_CACHE elsewhere") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            build(temporary)
            temporary.chmod(0o755)
            for file in temporary.iterdir():
                file.chmod(0o644)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target
