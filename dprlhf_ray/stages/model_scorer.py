"""Rewards by a sequence classifier: a reward model's one number, or the log-odds of one label."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.stages.batching import padded
from dprlhf_ray.stages.classifier_files import check_labels
from dprlhf_ray.stages.http_scorer import ScorerGone

_BATCH_TOKENS = 4096  # padded; speed and memory only


class ModelScorer:
    """Float32, on the GPU where there is one. A record that is too long for the model gets None.

    A sequence is padded to a width that depends on its own length alone, and runs with others of that width.

    Args:
        path: folder or hub name of a sequence classifier (no remote code).
        label: one of its labels, whose log-odds log p / (1 - p) of prompt + completion as one text are the reward
            (of a model with one label, or one sigmoid per label: the logit). None: a reward model's one number, on the
            prompt's tokens and then the completion's, as it was trained.

    Raises:
        ConfigError: there is no such model, it has no trained head, or not this label.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = Path(path).expanduser()
        source = folder if folder.exists() else str(path)
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
            self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as e:
            raise ConfigError(f"scorer.model: cannot load {path}: {str(e).splitlines()[0]}") from None
        if info["missing_keys"]:
            raise ConfigError(f"scorer.model: {path} has no trained {min(info['missing_keys'])}: it is no classifier")
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        check_labels(str(path), labels, label)
        self._label, self._column = label, 0 if label is None else labels.index(label)
        self._sigmoid = len(labels) == 1 or model.config.problem_type == "multi_label_classification"
        self._pad = model.config.pad_token_id
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._longest = int(min(_positions(model), self._tokenizer.model_max_length))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        rows = {i: ids for i, pair in enumerate(pairs) if (ids := self._tokens(*pair)) is not None}
        widths = {i: self._width(ids) for i, ids in rows.items()}
        scores: list[float | None] = [None] * len(pairs)
        for width, alike in groupby(sorted(rows, key=widths.__getitem__), key=widths.__getitem__):
            same = list(alike)
            count = 1 if self._pad is None else max(1, _BATCH_TOKENS // width)
            for start in range(0, len(same), count):
                some = same[start : start + count]
                for i, score in zip(some, self._batch([rows[i] for i in some], width), strict=True):
                    scores[i] = score
        return scores

    def _tokens(self, prompt: str, completion: str) -> list[int] | None:
        """None: no tokens, or more than the model takes."""
        try:  # verbose=False: otherwise the length of a long record is logged
            if self._label is not None:
                ids = self._tokenizer(prompt + completion, verbose=False)["input_ids"]
            else:
                bos = self._tokenizer.bos_token  # of a rendered chat, which has its own already
                special = bool(prompt) and not (bos and prompt.startswith(bos))
                ids = self._tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"]
                ids = ids + self._tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception:  # whatever a record's content does
            return None
        fits = 0 < len(ids) <= self._longest and max(ids) < self._vocabulary
        return list(ids) if fits else None

    def _width(self, ids: list[int]) -> int:
        return len(ids) if self._pad is None else min(self._longest, padded(len(ids)))

    def _batch(self, rows: list[list[int]], width: int) -> list[float | None]:
        """One by one where the batch fails: whose fault it is cannot be told. On a GPU a failure other than too little
        memory is the device's (what a record can break was checked before), and the step is abandoned: a device that is
        gone would null everybody from there on."""
        try:
            return list(self._forward(rows, width).tolist())
        except Exception as e:  # its text may quote a record
            if self._device != "cpu" and not isinstance(e, torch.OutOfMemoryError):
                raise ScorerGone(f"scorer.model: the scorer's device failed ({type(e).__name__})") from None
            return [None] if len(rows) == 1 else [self._batch([row], width)[0] for row in rows]

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]], width: int) -> Tensor:
        """(rows,) float32."""
        tokens = torch.full((len(rows), width), self._pad or 0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        logits = self._model(input_ids=tokens.to(self._device), attention_mask=mask.to(self._device)).logits.float()
        own: Tensor = logits[:, self._column]
        if self._sigmoid:
            return own
        others = [c for c in range(logits.shape[1]) if c != self._column]
        return own - logits[:, others].logsumexp(1)


def _positions(model: Any) -> float:
    """How many tokens a model takes: those of RoBERTa's kind count positions from behind the padding's."""
    most = getattr(model.config, "max_position_embeddings", None) or float("inf")
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            most = min(most, module.num_embeddings - module.padding_idx - 1)
    return float(most)
