"""The dtype in which a model's frozen weights are held and computed with on this machine."""

from __future__ import annotations

import torch


def computed_in(dtype: str) -> str:
    """`dtype` ("bfloat16" or "float32"); on a CPU with AVX2 at most, where bfloat16 is emulated (a product of matrices
    takes about a hundred times as long), "float32", which holds the same weights."""
    slow = not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return "float32" if dtype == "bfloat16" and slow else dtype
