"""What one stage sees of its data set: all of it or one partition, and which units these are."""

from __future__ import annotations

from typing import Any, NamedTuple

from dprlhf_ray.config import RLStage, RunConfig
from dprlhf_ray.data.sources import Prompts, load_prompts
from dprlhf_ray.privacy.partitions import WHOLE, Units, assign, spans, units


class StageData(NamedTuple):
    """A stage's prompts, and their units (None: the rows have no ids)."""

    prompts: Prompts
    units: Units | None


def load_stage_data(config: RunConfig, stage: RLStage, tokenizer: Any, key: bytes) -> StageData:
    """The prompts of a stage's partition, in new slots. A row without an id is in no partition.

    Args:
        key: of the hashes of unit ids, from the ledger.

    Raises:
        ConfigError: as `load_prompts`.
    """
    data, dataset = config.data[stage.data], config.dataset_of(stage.data)
    prompts = load_prompts(data, tokenizer)
    if prompts.ids is None:
        return StageData(prompts, None)
    span = spans(data.partitions)[stage.partition] if stage.partition else WHOLE
    if stage.partition:
        prompts = prompts.only(assign(key, dataset, prompts.ids, span))
    return StageData(prompts, units(key, dataset, prompts.ids or (), span))
