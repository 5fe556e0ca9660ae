"""Weight transports, one file per kind, and the chooser."""

from __future__ import annotations

from dprlhf_ray.transport.objects import ObjectStoreTransport

__all__ = ["ObjectStoreTransport", "build_transport"]


def build_transport() -> ObjectStoreTransport:
    """The one kind there is: Ray's object store."""
    return ObjectStoreTransport()
