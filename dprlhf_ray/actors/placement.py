"""Where a replica runs: a placement group of its own, so that it comes and goes without touching any other role."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dprlhf_ray.config import RolloutConfig


class Place:
    """Room for one replica: its GPUs, all on one node. A replica without a GPU asks for none and runs anywhere.

    What is asked for is what an autoscaler sees: it adds a node for a group that cannot be placed.
    """

    def __init__(self, rollout: RolloutConfig) -> None:
        self._gpus, self._labels = rollout.gpus_per_replica, rollout.node_labels
        self._group: PlacementGroup | None = None
        self._ready: Any = None
        if self._gpus:
            labels = {"bundle_label_selector": [self._labels]} if self._labels else {}
            self._group = placement_group([{"GPU": self._gpus}], strategy="STRICT_PACK", **labels)
            self._ready = self._group.ready()

    def granted(self) -> bool:
        """Whether it is there already; never waits."""
        if self._ready is not None and ray.wait([self._ready], timeout=0)[0]:
            self._ready = None
        return self._ready is None

    def options(self) -> dict[str, Any]:
        """What an actor that runs there is started with."""
        if self._group is None:
            return {"num_cpus": 0, "num_gpus": 0, "label_selector": self._labels}
        there = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)
        return {"num_cpus": 0, "num_gpus": self._gpus, "scheduling_strategy": there}

    def release(self) -> None:
        """Give it back; what runs there ends."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
