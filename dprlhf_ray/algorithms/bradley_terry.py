"""The loss of a reward model on pairs (Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1, for one
pair: a pair is a record, and is not averaged with the other pairs of its prompt)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(scores: Tensor) -> Tensor:
    """-log sigmoid(s_chosen - s_rejected). (U, 2), chosen first, -> (U,), nats."""
    return -F.logsigmoid(scores[:, 0] - scores[:, 1])
