"""The yardstick: one GRPO iteration of TRL 1.16, non-private, with Hugging Face generation, on this machine's CPU.

An iteration is 64 completions of exactly 24 new tokens, their rewards and one optimizer step: the work that
`benchmarks.rl_iteration` does privately. Settings are those that make TRL fast here: one optimizer step per generation,
no reference model (beta 0), all completions in one micro-batch, no gradient checkpointing, no logging, a bf16 base with
LoRA adapters that PEFT keeps in fp32, and no autocast around them unless `--autocast` asks for it.

    python -m benchmarks.trl_grpo --iterations 3
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from benchmarks.workload import COMPLETIONS, LORA_ALPHA, LORA_RANK, LORA_TARGETS, NEW_TOKENS, openings
from dprlhf_ray.models.embedded import embedded_model_path


class _Clock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: sampling, generation, rewards and update."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def _sentiment(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """VADER's compound score of each completion, in [-1, 1].

    Raises:
        RuntimeError: a completion is shorter or longer than the workload says, so the comparison would not be fair.
    """
    lengths = {len(ids) for ids in completion_ids}
    if lengths != {NEW_TOKENS} or len(completions) != COMPLETIONS:
        raise RuntimeError(f"{len(completions)} completions of {lengths} tokens, not {COMPLETIONS} of {NEW_TOKENS}")
    return [_ANALYZER.polarity_scores(text)["compound"] for text in completions]


_ANALYZER = SentimentIntensityAnalyzer()


def measure(iterations: int, group: int = 4, autocast: bool = False) -> dict[str, Any]:
    """Train for one warm-up and `iterations` timed iterations.

    Args:
        iterations: timed iterations, at least 1.
        group: completions per prompt; the prompts of an iteration are 64 / group.
        autocast: TRL's `bf16` switch, mixed precision around a model that is bf16 already.

    Returns:
        seconds_per_iteration (median), seconds (each iteration), warm_up_seconds, peak_rss_mib, and the settings.
    """
    import trl
    from trl import GRPOConfig, GRPOTrainer

    path = embedded_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    prompts = Dataset.from_dict({"prompt": openings(tokenizer, (iterations + 1) * COMPLETIONS // group)})
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=_sentiment,
            processing_class=tokenizer,
            train_dataset=prompts,
            callbacks=[clock],
            peft_config=LoraConfig(
                r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
            ),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=autocast,
                per_device_train_batch_size=COMPLETIONS,
                gradient_accumulation_steps=1,
                num_generations=group,
                num_iterations=1,
                max_completion_length=NEW_TOKENS,
                generation_kwargs={"min_new_tokens": NEW_TOKENS},
                temperature=1.0,
                beta=0.0,
                learning_rate=1e-4,
                max_steps=iterations + 1,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        trainer.train()
    seconds = [end - start for start, end in zip(clock.ends[:-1], clock.ends[1:], strict=True)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "benchmark": "trl_grpo",
        "seconds_per_iteration": statistics.median(seconds[1:]),
        "seconds": [round(s, 3) for s in seconds[1:]],
        "warm_up_seconds": round(seconds[0], 3),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "completions": COMPLETIONS,
        "new_tokens": NEW_TOKENS,
        "completions_per_prompt": group,
        "trainable_parameters": sum(p.numel() for p in trainable),
        "adapter_dtype": str(trainable[0].dtype).removeprefix("torch."),
        "base_dtype": str(model.dtype).removeprefix("torch."),
        "autocast": autocast,
        "threads": torch.get_num_threads(),
        "trl": trl.__version__,
    }


def main() -> None:
    """Print the measurement as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations after one warm-up (default 3)")
    parser.add_argument("--group", type=int, default=4, choices=(2, 4, 8, 16), help="completions per prompt")
    parser.add_argument("--autocast", action="store_true", help="mixed precision as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps(measure(args.iterations, args.group, args.autocast)), flush=True)


if __name__ == "__main__":
    main()
