"""What one stage sees of its data set: all of it or one partition, by unit, and which units these are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dprlhf_ray.config import AnyStage, RunConfig
from dprlhf_ray.data.sources import Records, at_most, load_records
from dprlhf_ray.privacy.partitions import WHOLE, Units, assign, spans, units
from dprlhf_ray.privacy.private import Private


@dataclass(frozen=True, repr=False)
class StageData(Private):
    """A stage's records. PRIVATE.

    units: slots of the records of each thing that is sampled. records_per_draw: how many of its records a drawn one
    brings. readers: the protected units by keyed digests (None: the rows have no ids).
    """

    records: Records
    units: tuple[tuple[int, ...], ...]
    records_per_draw: int
    readers: Units | None


def load_stage_data(config: RunConfig, stage: AnyStage, tokenizer: Any, key: bytes) -> StageData:
    """The records of a stage's partition, in new slots. A row without an id is in no partition.

    Users are what is sampled, unless `records_per_user` is set: then records are, at most that many of each user.

    Args:
        key: of the hashes of unit ids, from the ledger.

    Raises:
        ConfigError: as `load_records`.
    """
    data, dataset, privacy = config.data[stage.data], config.dataset_of(stage.data), stage.privacy
    records = load_records(data, stage.kind, tokenizer, privacy.unit)
    span = spans(data.partitions)[stage.partition] if stage.partition else WHOLE
    if stage.partition and records.ids is not None:
        records = records.only(assign(key, dataset, records.ids, span))
    if privacy.records_per_user is not None:
        records = at_most(records, privacy.records_per_user)
    users = privacy.unit == "user" and privacy.records_per_user is None
    return StageData(
        records,
        records.units("user" if users else "record"),
        privacy.records_per_draw if users else 1,
        None if records.ids is None else units(key, dataset, records.ids, span),
    )
