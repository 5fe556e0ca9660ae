"""The vLLM engine, in the process of its actor.

On CPUs, vLLM packs linear weights when it builds the model and keeps using the packed copy after a reload, without an
error. Packing is therefore switched off before the model is built; that, and every later sync, is checked against the
learner's log-probabilities by the fleet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dprlhf_ray.actors.engines import served_adapter
from dprlhf_ray.actors.engines.base import Engine, Sampled, key_generator
from dprlhf_ray.config import AdapterConfig, GenerationConfig, RolloutConfig
from dprlhf_ray.models.precision import computed_in

_EXTENSION = f"{__name__}.WorkerExtension"


def environment(rollout: RolloutConfig) -> dict[str, str]:
    """Environment variables that have to be set before the engine's process starts.

    The allocator keeps freed memory, because a decoding step allocates the same large tensors again and again.
    """
    threads = rollout.threads or len(os.sched_getaffinity(0))
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "TOKENIZERS_PARALLELISM": "false",
    }


class WorkerExtension:
    """Methods that vLLM adds to its worker (`worker_extension_cls`); called by name."""

    model_runner: Any

    def load_named_weights(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Copy complete Hugging Face tensors into the (fused) parameters; returns how many of those were written."""
        with torch.no_grad():
            return len(self.model_runner.model.load_weights(iter(weights.items())) or ())

    def key_sampler(self, randomness: bytes) -> None:
        """Key the generators that sampling draws from; equal on all ranks of an engine."""
        key_generator(torch.default_generator, randomness)
        if torch.cuda.is_available():
            key_generator(torch.cuda.default_generators[torch.cuda.current_device()], randomness)


class VllmEngine(Engine):
    """vLLM, without its own scheduler process, tokenizer, logs or usage reports."""

    def __init__(
        self, model_path: str, rollout: RolloutConfig, generation: GenerationConfig, dtype: str, adapter: AdapterConfig
    ) -> None:
        """adapter: what trains, for `rollout.weights`."""
        super().__init__(model_path, rollout, generation, dtype)
        for key, value in environment(rollout).items():
            os.environ.setdefault(key, value)
        on_gpu = torch.cuda.is_available()
        if on_gpu and torch.cuda.get_device_capability() >= (9, 0):
            os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
        from vllm import LLM, SamplingParams

        if not on_gpu:
            _disable_weight_packing()
        settings: dict[str, Any] = {"dtype": computed_in(dtype, on_gpu)}
        if rollout.staleness:  # of the distribution that is sampled from: after the temperature
            settings["logprobs_mode"] = "processed_logprobs"
        if not on_gpu:
            settings["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * 2**30)
        if rollout.tensor_parallel_size > 1:  # in a placement group vLLM would ask Ray for more of them
            settings["distributed_executor_backend"] = "mp"
        if rollout.weights == "adapter":
            settings |= served_adapter.settings(adapter)
        self._llm = LLM(
            model=model_path,
            trust_remote_code=False,
            load_format="safetensors",
            skip_tokenizer_init=True,
            tensor_parallel_size=rollout.tensor_parallel_size,
            max_model_len=rollout.max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            enforce_eager=not on_gpu,
            generation_config="vllm",  # sampling settings come from our config only
            worker_extension_cls=_EXTENSION,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **settings,
        )
        self._adapter = served_adapter.ServedAdapter(self._llm) if rollout.weights == "adapter" else None
        self._sampling = SamplingParams(
            temperature=generation.temperature,
            top_p=1.0,
            top_k=0,
            max_tokens=generation.max_new_tokens,
            ignore_eos=True,  # the engine has no tokenizer: the end-of-sequence tokens are stop tokens
            stop_token_ids=sorted(self.eos_token_ids) if generation.stop_at_eos else None,
            detokenize=False,
            logprobs=0 if rollout.staleness else None,  # 0: the drawn token's own
        )
        self._scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def _key_sampler(self, randomness: bytes) -> None:
        self._llm.collective_rpc("key_sampler", args=(randomness,))  # vLLM itself seeds with the constant 0

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        outputs: list[Any] = self._run(sequences, self._scoring)
        return [
            [entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
            for ids, out in zip(sequences, outputs, strict=True)
        ]

    def _sample(self, prompts: list[tuple[int, ...]]) -> list[Sampled]:
        outputs = self._run(prompts, self._sampling)
        return [(list(one.token_ids), _log_probs(one)) for out in outputs for one in out.outputs]

    def _run(self, sequences: Sequence[Sequence[int]], sampling: Any) -> list[Any]:
        served = None if self._adapter is None else self._adapter.request
        return self._llm.generate(_as_tokens(sequences), sampling, use_tqdm=False, lora_request=served)

    def _load(self, weights: Mapping[str, torch.Tensor]) -> None:
        if self._adapter is not None:
            self._adapter.load(weights)
        elif weights and not all(self._llm.collective_rpc("load_named_weights", args=(weights,))):
            raise ValueError("vLLM took none of the weights: are the names Hugging Face parameter names?")
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, which holds values of the old weights")


def _log_probs(output: Any) -> tuple[float, ...] | None:
    """Of the drawn tokens, where vLLM was asked for them."""
    if output.logprobs is None:
        return None
    return tuple(entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True))


def _as_tokens(sequences: Sequence[Sequence[int]]) -> list[Any]:
    return [{"prompt_token_ids": list(ids)} for ids in sequences]


def _disable_weight_packing() -> None:
    """Make vLLM's CPU linear layers read their parameters at every call (`dispatch_cpu_unquantized_gemm`)."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils as layers

    for module, name in ((_custom_ops, "_supports_onednn"), (layers, "check_cpu_sgl_kernel")):
        if not hasattr(module, name):
            raise RuntimeError(
                f"{module.__name__}.{name} is gone from this vLLM: its CPU build packs weights in another way, and a "
                "sync could silently keep old ones; use the locked vLLM version, or rollout.engine: transformers"
            )
    _custom_ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda n, k, dtype: False
