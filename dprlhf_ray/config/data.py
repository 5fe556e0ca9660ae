"""Sources of records, and the budget of a declared data set."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dprlhf_ray.config.section import Section


class BudgetConfig(Section):
    """What everything on one data set may cost together, over all runs that share the ledger."""

    epsilon: float = Field(gt=0, description="bound on all declared stages, composed; lowered freely, raised by hand")
    delta: float = Field(gt=0, lt=1, description="delta of that bound")


Column = Literal["prompt", "completion", "chosen", "rejected", "text", "messages"]


def _plain(split: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", split) or split.lower() == "all":
        raise ValueError(f"{split!r} is not the plain name of a split: slices and sums could overlap unseen")
    return split


Split = Annotated[str, AfterValidator(_plain)]


class DataConfig(Section):
    """One source. The privacy budget belongs to the declared data set that it is part of: `dataset`."""

    public: bool = Field(
        False, description="declared public: nothing in it is protected, stages on it cost nothing, and it may be shown"
    )
    dataset: str | None = Field(
        None,
        description="declared name of the data set that pays; sources with one name share one budget and compose "
        "(null: this source's own key)",
    )
    budget: BudgetConfig | None = Field(None, description="null: only the targets of the stages bound it")

    source: str = Field(
        "embedded:movie-reviews",
        description='"embedded:movie-reviews", a .jsonl(.gz)/.parquet/.csv path, or a hub name',
    )
    split: Split = Field("train", description="split of a hub data set, by its plain name: no slices")
    columns: dict[Column, str] = Field(
        default_factory=dict, description="remap, e.g. {prompt: question}: our name -> column name in the source"
    )
    rejected: Literal["column", "truncated", "public"] = Field(
        "column",
        description="pairs: the rejected response is a column's; or, where nobody compared any, the first third of the "
        "chosen one (truncated), or a completion of `rejected_source` (public)",
    )
    rejected_source: str | None = Field(None, description="rejected public: a public source with column completion")
    prompt_tokens: int | None = Field(
        None, ge=1, description="keep only the first n tokens of each prompt (a record-local public rule); null: whole"
    )
    max_prompt_tokens: int = Field(256, ge=1, description="a longer prompt becomes a null record")
    max_completion_tokens: int = Field(
        256, ge=1, description="a longer demonstration or response is cut there (a record-local public rule)"
    )
    chat_template: bool = Field(False, description="wrap the prompt with the tokenizer's chat template")
    unit_column: str | None = Field(
        None,
        description="column with the real id of each row's unit; null: rows have no id (the embedded data have theirs)",
    )
    partitions: dict[str, float] = Field(
        default_factory=dict,
        description="disjoint shares of the units, e.g. {first: 0.5, second: 0.5}, by a keyed hash of the unit's id",
    )

    @model_validator(mode="after")
    def _partitioned(self) -> DataConfig:
        for name, fraction in self.partitions.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"partition {name!r}: use letters, digits, - and _")
            if fraction <= 0:
                raise ValueError(f"partitions.{name} is {fraction:g}: a fraction is above 0")
        if sum(self.partitions.values()) > 1 + 1e-9:
            raise ValueError(f"partitions add up to {sum(self.partitions.values()):g}: at most 1")
        if self.source.startswith("embedded:"):
            if self.unit_column is not None:
                raise ValueError(f"unit_column: {self.source} has ids of its own: leave it out")
        elif self.partitions and self.unit_column is None:
            raise ValueError("partitions go by a unit's real id: set unit_column to the column that holds it")
        if self.public and (self.budget is not None or self.dataset is not None):
            raise ValueError("public: data declared public has no budget and belongs to no private data set: remove it")
        if (self.rejected == "public") != (self.rejected_source is not None):
            raise ValueError("rejected_source goes with rejected: public, and the other way round")
        return self
