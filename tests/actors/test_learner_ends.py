"""Why a group of learners ended, in one line; and ranks that would not hold the same numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from ray.exceptions import RaySystemError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError

from dprlhf_ray.actors import learner
from dprlhf_ray.actors.learner_group import _cause
from dprlhf_ray.actors.rank import LearnerError
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import DprlhfError


def ended(*errors: Exception) -> WorkerGroupError:
    """As Ray Train says it, of ranks 0, 1, ..."""
    found = {rank: UserExceptionWithTraceback(e, f"Traceback\n ...\n{e}\nadvice") for rank, e in enumerate(errors)}
    return WorkerGroupError("a page\nof text\nwith advice at its end", found)  # type: ignore[arg-type]


LOST = RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (ended(OSError(28, "No space left on device"), LOST), "OSError: [Errno 28] No space left on device"),
        (ended(LOST, LearnerError("the update failed: a place")), "the update failed: a place"),
        (ended(RuntimeError("CUDA error: out of memory\nadvice\nmore")), "RuntimeError: CUDA error: out of memory"),
        (WorkerGroupError("died", {0: RaySystemError("gone\nadvice")}), "RaySystemError: System error: gone"),
        (ValueError("no such label"), "ValueError: no such label"),
        (ended(RuntimeError()), "RuntimeError: "),
        (None, "without an error"),
    ],
)
def test_it_is_the_cause_and_one_line(failure: BaseException | None, line: str) -> None:
    """False: the operator reads a page, or the advice at its end, or what another rank said of the death."""
    assert _cause(failure) == line


@pytest.mark.parametrize(("other", "refused"), [("bfloat16", True), ("float32", False)])
def test_ranks_that_compute_in_different_dtypes_are_refused(
    monkeypatch: pytest.MonkeyPatch, other: str, refused: bool
) -> None:
    """False: their first broadcast writes bfloat16 numbers over half of float32 ones."""

    def gather(found: list[str], own: str) -> None:
        found[:] = [own, other]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(learner, "computed_in", lambda dtype, on_gpu: "float32")
    rank: Any = SimpleNamespace(world=2, spec=SimpleNamespace(config=RunConfig.model_construct(model=MODEL)))
    if refused:
        with pytest.raises(DprlhfError, match=r"model\.dtype"):
            learner.Learner._agree_on_dtype(rank)
    else:
        learner.Learner._agree_on_dtype(rank)


MODEL: Any = SimpleNamespace(dtype="bfloat16")
