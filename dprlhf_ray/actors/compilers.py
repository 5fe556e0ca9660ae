"""What DeepSpeed and vLLM compile on first use: with which tools, and where to."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path


def compilers_of_this_environment() -> None:
    """Two environments with one folder would build the same operations again in turns, as would two versions of ninja:
    each environment has its own folder, and its own ninja goes first. For this process and those that it starts."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    own = os.path.join(sys.prefix, "bin")
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = own + os.pathsep + os.environ.get("PATH", "")


def unlock_builds(folder: str, older: float = 600.0) -> None:
    """Remove locks of compilers that were killed: torch waits for them for ever.

    Args:
        folder: of compiled operations. older: seconds; a build takes one minute.
    """
    for lock in Path(folder).glob("*/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > older:
                lock.unlink()
