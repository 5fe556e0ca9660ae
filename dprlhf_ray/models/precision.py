"""The dtype in which a model's weights are held and computed with on this machine."""

from __future__ import annotations

import os
from typing import Any

import torch


def computed_in(dtype: str, on_gpu: bool) -> str:
    """`dtype` ("bfloat16" or "float32"); on a CPU with AVX2 at most, where bfloat16 is emulated (a product of matrices
    takes about a hundred times as long), "float32", which holds the same weights."""
    slow = not on_gpu and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return "float32" if dtype == "bfloat16" and slow else dtype


def widened(model: Any, dtype: str, on_gpu: bool) -> Any:
    """A model that was loaded in `dtype`, held in what is computed in. Otherwise it stays as it is: transformers keeps
    some buffers (the rotary frequencies) in float32 on purpose, and `to` would round those too."""
    return model if computed_in(dtype, on_gpu) == dtype else model.float()


def learner_on_gpu() -> bool:
    """Whether a model that this process trains goes to a GPU: a learner on CPUs may well see some (its environment is
    set in `actors/cluster.py`)."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
