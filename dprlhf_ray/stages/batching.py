"""A draw of experiences as padded micro-batches. Everything here is PRIVATE and pure torch.

Ordering by length and cutting by a token budget happen after sampling and change speed only: sums over units do not
depend on how units are cut into micro-batches. A unit is padded to a width that depends on its own length only: the
width changes the rounding of a forward pass (in bfloat16 by per cents of a gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dprlhf_ray.privacy.private import Private
from dprlhf_ray.records import Completion, Experience, Prompt


@dataclass(frozen=True, repr=False)
class MicroBatch(Private):
    """U units with G rows each, unit-major. tokens (U*G, L), prompt_lengths (U*G,), responses (U*G, T), mask (U, G, T),
    rewards (U, G), valid (U,): False for padding units."""

    tokens: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    mask: Tensor
    rewards: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> MicroBatch:
        return MicroBatch(**{k: v.to(device) for k, v in vars(self).items()})


def plan(
    experiences: Sequence[Experience], group: int, token_budget: int, max_units: int, pad_id: int
) -> list[MicroBatch]:
    """Micro-batches of the non-null units, longest first, at most `token_budget` padded tokens and `max_units` units
    each (one unit at least). Null records are left out: they contribute exactly zero."""
    units = sorted((e for e in experiences if not e.is_null), key=_widths, reverse=True)
    batches = []
    for (width, _), alike in groupby(units, key=_widths):
        same, count = list(alike), max(1, min(max_units, token_budget // (width * group)))
        batches += [collate(same[start : start + count], group, pad_id) for start in range(0, len(same), count)]
    return batches


def empty(group: int, pad_id: int) -> MicroBatch:
    """A micro-batch of one padding unit: keeps ranks in step when they hold unequal numbers of micro-batches."""
    filler = Completion((pad_id,), "", False, -1)
    unit = Experience(Prompt(-1, (pad_id,), ""), (filler,) * group, (0.0,) * group)
    batch = collate([unit], group, pad_id)
    return MicroBatch(**{**vars(batch), "valid": torch.zeros(1, dtype=torch.bool)})


def collate(units: Sequence[Experience], group: int, pad_id: int) -> MicroBatch:
    rows = [(e.prompt.token_ids, c.token_ids) for e in units for c in e.completions]
    longest, width = (max(w) for w in zip(*map(_widths, units), strict=True))
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    responses = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width)
    for i, (p, c) in enumerate(rows):
        tokens[i, : len(p) + len(c)] = torch.tensor(p + c)
        responses[i, : len(c)] = torch.tensor(c, dtype=torch.long)
        mask[i, : len(c)] = 1.0
    return MicroBatch(
        tokens=tokens,
        prompt_lengths=torch.tensor([len(p) for p, _ in rows]),
        responses=responses,
        mask=mask.view(len(units), group, width),
        rewards=torch.tensor([[0.0 if r is None else r.reveal() for r in e.rewards] for e in units]),
        valid=torch.ones(len(units), dtype=torch.bool),
    )


def deal(experiences: Sequence[Experience], ranks: int) -> list[list[Experience]]:
    """Share a draw among learner ranks, by length so that ranks get equal work.

    Sums do not depend on who holds a unit.
    """
    ordered = sorted(experiences, key=_longest, reverse=True)
    return [list(ordered[r::ranks]) for r in range(ranks)]


def _widths(e: Experience) -> tuple[int, int]:
    """Padded tokens of a unit's rows, and of its responses."""
    return _padded(_longest(e)), _padded(max(len(c.token_ids) for c in e.completions))


def _padded(length: int) -> int:
    """Up to a multiple of 2 above 16, of 4 above 32, of 8 above 64, and so on: few widths, and little padding."""
    grain = 1 << max(0, (length - 1).bit_length() - 4)
    return -(-length // grain) * grain


def _longest(e: Experience) -> int:
    return len(e.prompt.token_ids) + max((len(c.token_ids) for c in e.completions), default=0)
