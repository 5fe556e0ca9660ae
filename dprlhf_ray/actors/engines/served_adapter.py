"""An adapter that vLLM serves as a LoRA on the untouched base model: each weight version is a new adapter to it.

vLLM opens adapters by path and caches them by name, number and path, so each version gets its own of all three. The
files hold released values; they lie in memory where there is a folder for it, readable by their owner only, and are
removed as soon as vLLM has read them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dprlhf_ray.config import AdapterConfig

SHARED_MEMORY = "/dev/shm"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM allocates


def settings(adapter: AdapterConfig) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for versions of an adapter.

    Only its own matrices are made ready for one: vLLM's head for adapters cannot score a prompt's tokens.
    """
    rank = 1 if adapter.kind == "steering" else adapter.rank
    return {
        "enable_lora": True,
        "max_lora_rank": next(r for r in RANKS if r >= rank),
        "max_loras": 1,
        "max_cpu_loras": 1,
        "lora_target_modules": list(adapter.target_modules),
    }


class ServedAdapter:
    """The one adapter that an engine serves. request: of the present version, None before the first.

    Args:
        llm: `vllm.LLM` with `settings`.
    """

    def __init__(self, llm: Any) -> None:
        self._llm, self._count = llm, 0
        self.request: Any = None

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Serve these factors (PEFT's names, scale 1) from now on, and forget those before.

        Raises:
            ValueError: vLLM took none of them.
        """
        from vllm.lora.request import LoRARequest

        self._count += 1
        shared = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None
        folder = Path(tempfile.mkdtemp(prefix="dprlhf-adapter-", dir=shared))
        try:
            write(folder, weights)
            request = LoRARequest(f"version-{self._count}", self._count, str(folder))
            if self.request is not None:
                self._llm.llm_engine.remove_lora(self.request.lora_int_id)
            if not self._llm.llm_engine.add_lora(request):
                raise ValueError("vLLM took none of the adapter: does it serve this model with LoRA?")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.request = request


def write(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """An ordinary PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`."""
    names = [n.removesuffix(".lora_A.weight") for n in weights if n.endswith(".lora_A.weight")]
    if not names:
        raise ValueError("an adapter without a factor")
    rank = len(weights[f"{names[0]}.lora_A.weight"])
    tree = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,  # a scale of 1: the true one is in B
        "target_modules": sorted({n.rpartition(".")[2] for n in names}),
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(tree))
    save_file({n: t.contiguous().clone() for n, t in weights.items()}, folder / "adapter_model.safetensors")
