"""Every value that could be logged is private, released or operational, and private ones cannot be logged."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dprlhf_ray.config import TrackingConfig
from dprlhf_ray.observability.gauges import Gauges
from dprlhf_ray.observability.metrics import MetricsLog
from dprlhf_ray.observability.progress import RunProgress
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.private import Private, PrivateNumber
from dprlhf_ray.privacy.release import Operational, Released
from dprlhf_ray.records import Completion, Experience, Prompt
from dprlhf_ray.stages import batching
from dprlhf_ray.stages.objective import Draw

SECRET = "xyzzy"
PROMPT = Prompt(424242, (1001, 1002), SECRET)
COMPLETION = Completion((1003, 1004), SECRET, True, 0)
EXPERIENCE = Experience(PROMPT, (COMPLETION,), (0.515625,))
BATCH = batching.collate([(EXPERIENCE,)], 1, 0)
PRIVATE = [PROMPT, COMPLETION, EXPERIENCE, EXPERIENCE.rewards[0], BATCH, Draw([BATCH], 1), ClippedSum([2], 1.0)]
SHOWN: list[Callable[[Any], Any]] = [
    str,
    float,
    int,
    json.dumps,
    "{}".format,
    lambda x: f"{x:.3f}",
    lambda x: f"{x}",
    lambda x: "%s" % x,  # noqa: UP031
    lambda x: "reward " + x,
]


@pytest.mark.parametrize("value", PRIVATE, ids=lambda v: type(v).__name__)
def test_a_private_value_cannot_be_shown(value: Private) -> None:
    """False: a log line or an error text would carry a record, a reward or the size of a draw."""
    for show in SHOWN:
        with pytest.raises(TypeError) as error:
            show(value)
        said = str(error.value)
        assert SECRET not in said and "100" not in said and "0.51" not in said and "\n" not in said
    assert repr(value) == repr([value])[1:-1] == "<private>"


def test_no_kind_of_private_value_has_a_repr_of_its_own() -> None:
    """False: a dataclass without `repr=False` shows its fields in the next traceback."""

    def kinds(cls: type) -> list[type]:
        return [cls] + [k for sub in cls.__subclasses__() for k in kinds(sub)]

    found = kinds(Private)
    assert len(found) >= 9
    for cls in found:
        assert (cls.__repr__, cls.__str__, cls.__format__) == (Private.__repr__, Private.__str__, Private.__format__), (
            f"{cls.__name__} shows itself"
        )


def test_logging_a_private_value_writes_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """False: `logging` finds a way to print it that str and repr do not."""
    with caplog.at_level(logging.INFO):
        logging.getLogger("operator").info("drawn: %r", [EXPERIENCE])
    assert caplog.messages == ["drawn: [<private>]"]


def test_private_values_travel_between_processes() -> None:
    """False: Ray cannot pass records, or a reward loses its mark on the way."""
    assert pickle.loads(pickle.dumps(EXPERIENCE)) == EXPERIENCE
    reward = pickle.loads(pickle.dumps(EXPERIENCE)).rewards[0]
    assert isinstance(reward, PrivateNumber) and reward.reveal() == 0.515625


@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25), EXPERIENCE.rewards[0], Operational("x", 1.0), PROMPT])
def test_only_released_values_reach_a_sink_of_released_values(value: Any, tmp_path: Path) -> None:
    """False: a bare number, whose origin nobody can tell, is written or shown."""
    with pytest.raises(TypeError, match="only released values"):
        MetricsLog(tmp_path, TrackingConfig(), "t").write("rl", 1, [value])
    with pytest.raises(TypeError, match="only released values"):
        Gauges("t", "p").step("rl", 1, [value])
    with pytest.raises(TypeError, match="only released values"):
        RunProgress().step("rl", 1, 2, None, [value], [], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0.25, EXPERIENCE.rewards[0], Released("private/reward", 0.1, "noised", 0.1)])
def test_only_operational_values_reach_the_operator(value: Any) -> None:
    """False: the operator's figures have a way in for anything else."""
    with pytest.raises(TypeError, match="only operational values"):
        Gauges("t", "p").operations("rl", [value], [], [])
    for fleet, laps in (([value], []), ([], [value])):
        with pytest.raises(TypeError, match="only operational values"):
            RunProgress().step("rl", 1, 2, None, [], fleet, laps)


@pytest.mark.parametrize("value", [PrivateNumber(0.5), torch.tensor(0.5), "0.5", None])
def test_a_private_number_cannot_be_wrapped_as_released_or_operational(value: Any) -> None:
    """False: a mark can be laundered without the visible `reveal`."""
    for wrap in (lambda v: Released("r", v, "noised"), lambda v: Operational("r", v)):
        with pytest.raises(TypeError, match="plain number"):
            wrap(value)
