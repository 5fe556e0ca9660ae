"""Weight transports, one file per kind, and the chooser."""

from __future__ import annotations

from dprlhf_ray.config import RolloutConfig
from dprlhf_ray.transport.base import Handle, Publisher

__all__ = ["Handle", "Publisher", "build_publisher"]


def build_publisher(rollout: RolloutConfig) -> Publisher:
    """The one named by `rollout.transport`, in the process of the learner's first rank."""
    if rollout.transport == "objects":
        from dprlhf_ray.transport.objects import ObjectPublisher

        return ObjectPublisher()
    import ray

    from dprlhf_ray.transport.group import GroupPublisher

    # What the fleet serves is up to 1 + staleness versions older than the learner's newest.
    return GroupPublisher(rollout.transport, ray.util.get_node_ip_address(), keep=2 + rollout.staleness)
