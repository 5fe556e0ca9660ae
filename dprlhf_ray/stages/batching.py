"""A draw as padded micro-batches. Everything here is PRIVATE and pure torch.

Ordering by length and cutting by a token budget happen after sampling and change speed only: sums over units do not
depend on how units are cut into micro-batches. A unit is padded to a shape that depends on its own records only: the
width changes the rounding of a forward pass (in bfloat16 by per cents of a gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dprlhf_ray.privacy.private import Private
from dprlhf_ray.records import Completion, Experience, Prompt, Unit


@dataclass(frozen=True, repr=False)
class MicroBatch(Private):
    """U units of R records with G completions each; rows go by unit, then record, then completion.

    tokens (U*R*G, L), prompt_lengths (U*R*G,), responses (U*R*G, T), mask (U*R, G, T), rewards (U*R, G), finished
    (U*R, G): 1 where a completion ended by itself, present (U, R) bool: False for a unit's padding records, behaviour
    (U*R, G, T): log-probabilities of the tokens as they were drawn, NaN where there are none; None: there are none.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    mask: Tensor
    rewards: Tensor
    finished: Tensor
    present: Tensor
    behaviour: Tensor | None = None

    @property
    def units(self) -> int:
        return self.present.shape[0]

    @property
    def rows_per_unit(self) -> int:
        return self.tokens.shape[0] // self.units

    @property
    def valid(self) -> Tensor:
        """(U,) bool: False for padding units."""
        return self.present.any(1)

    def unit_mean(self, x: Tensor) -> Tensor:
        """Mean over each unit's own present records: (U*R,) -> (U,). A padding unit gives 0."""
        own = torch.where(self.present, x.view_as(self.present), torch.zeros((), dtype=x.dtype, device=x.device))
        return own.sum(1) / self.present.sum(1).clamp_min(1)

    def to(self, device: torch.device | str) -> MicroBatch:
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in vars(self).items()}
        return MicroBatch(**moved)


def plan(units: Sequence[Unit], group: int, token_budget: int, max_units: int, pad_id: int) -> list[MicroBatch]:
    """Micro-batches of the non-null units, longest first, at most `token_budget` padded tokens and `max_units` units
    each (one unit at least). Null records are left out: they contribute exactly zero."""
    usable = [u for u in (usable_records(unit) for unit in units) if u]
    batches = []
    for shape, alike in groupby((usable[i] for i in order(usable)), key=_shape):
        records, width, _ = shape
        same, count = list(alike), max(1, min(max_units, token_budget // (width * group * records)))
        batches += [collate(same[start : start + count], group, pad_id) for start in range(0, len(same), count)]
    return batches


def order(units: Sequence[Unit]) -> list[int]:
    """Which unit comes when in `plan`, where none of them is null."""
    return sorted(range(len(units)), key=lambda i: _shape(units[i]), reverse=True)


def usable_records(unit: Unit) -> Unit:
    """A unit's records that are not null."""
    return tuple(e for e in unit if not e.is_null)


def empty(group: int, pad_id: int) -> MicroBatch:
    """A micro-batch of one padding unit: keeps ranks in step when they hold unequal numbers of micro-batches."""
    filler = Completion((pad_id,), "", False, None)
    batch = collate([(Experience(Prompt(-1, (pad_id,), ""), (filler,) * group, (0.0,) * group),)], group, pad_id)
    return MicroBatch(**{**vars(batch), "present": torch.zeros(1, 1, dtype=torch.bool)})


def collate(units: Sequence[Unit], group: int, pad_id: int) -> MicroBatch:
    records, length, width = (max(w) for w in zip(*map(_shape, units), strict=True))
    count = len(units) * records
    tokens = torch.full((count * group, length), pad_id, dtype=torch.long)
    responses = torch.full((count * group, width), pad_id, dtype=torch.long)
    prompt_lengths = torch.ones(count * group, dtype=torch.long)
    mask, rewards, finished = torch.zeros(count * group, width), torch.zeros(count, group), torch.zeros(count, group)
    present = torch.zeros(len(units), records, dtype=torch.bool)
    drawn = any(c.log_probs is not None for unit in units for e in unit for c in e.completions)
    behaviour = torch.full((count * group, width), float("nan")) if drawn else None
    for u, unit in enumerate(units):
        for r, e in enumerate(unit):
            record = u * records + r
            present[u, r] = True
            rewards[record] = torch.tensor([0.0 if x is None else x.reveal() for x in e.rewards])
            for g, completion in enumerate(e.completions):
                p, c, row = e.prompt.token_ids, completion.token_ids, record * group + g
                tokens[row, : len(p) + len(c)] = torch.tensor(p + c)
                responses[row, : len(c)] = torch.tensor(c, dtype=torch.long)
                prompt_lengths[row] = len(p)
                mask[row, : len(c)] = 1.0
                if behaviour is not None and completion.log_probs is not None:
                    behaviour[row, : len(c)] = torch.tensor(completion.log_probs)
                finished[record, g] = float(completion.finished)
    by_group = (count, group, width)
    return MicroBatch(
        tokens, prompt_lengths, responses, mask.view(by_group), rewards, finished, present,
        None if behaviour is None else behaviour.view(by_group),
    )  # fmt: skip


def deal(units: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """Share a draw among learner ranks, by length so that ranks get equal work.

    Sums do not depend on who holds a unit.
    """
    ordered = sorted(units, key=lambda u: sum(map(_longest, u)), reverse=True)
    return [list(ordered[r::ranks]) for r in range(ranks)]


def _shape(unit: Unit) -> tuple[int, int, int]:
    """Padded records of a unit, tokens of its rows, and tokens of its responses."""
    return (
        padded(len(unit)),
        padded(max(map(_longest, unit))),
        padded(max(len(c.token_ids) for e in unit for c in e.completions)),
    )


def padded(length: int) -> int:
    """Up to a multiple of 2 above 16, of 4 above 32, of 8 above 64, and so on: few widths, and little padding."""
    grain = 1 << max(0, (length - 1).bit_length() - 4)
    return -(-length // grain) * grain


def _longest(e: Experience) -> int:
    return len(e.prompt.token_ids) + max((len(c.token_ids) for c in e.completions), default=0)
