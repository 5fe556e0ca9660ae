"""Weights over a process group: exact, checked, in bounded time, whatever the other engines do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist

from dprlhf_ray.errors import SyncFailed, WeightsLost
from dprlhf_ray.transport.group import GroupHandle, GroupPublisher, fingerprint

HOST = "127.0.0.1"


@pytest.fixture
def publisher() -> Iterator[GroupPublisher]:
    found = GroupPublisher("gloo", HOST, keep=2, patience=20.0)
    yield found
    found.close()


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a": torch.randn(33, 17),
        "b": torch.randn(5).to(torch.bfloat16),
        "one": torch.tensor(1.5),
        "view": torch.randn(6, 4).T,
    }


def _same(received: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    return list(received) == list(sent) and all(
        received[k].dtype == sent[k].dtype and torch.equal(received[k], sent[k]) for k in sent
    )


def test_every_engine_gets_the_exact_tensors_of_the_version_it_asks_for(publisher: GroupPublisher) -> None:
    """False: a number, a dtype or a shape changes on the way, a later version answers for an earlier one, or what the
    learner does after it has published reaches the engines."""
    first, second = weights(1), weights(2)
    handles = [publisher.publish(1, first), publisher.publish(2, second)]
    expected = [{k: v.clone() for k, v in w.items()} for w in (first, second)]
    for value in (*first.values(), *second.values()):
        value.zero_()
    with ThreadPoolExecutor(6) as pool:
        received = list(pool.map(GroupHandle.fetch, handles * 3))
    assert all(_same(got, expected[i % 2]) for i, got in enumerate(received))


def test_an_engine_that_asks_and_dies_holds_up_nobody(publisher: GroupPublisher) -> None:
    handle = publisher.publish(1, weights(1))
    store = dist.TCPStore(HOST, handle.port, is_master=False, wait_for_workers=False)
    for request in (json.dumps({"name": "dead", "version": 1}), "no request", json.dumps({"name": "x"}), "[]"):
        store.queue_push("asked", request)
    started = time.monotonic()
    assert _same(handle.fetch(), weights(1))
    assert time.monotonic() - started < 10, "it waited for the dead one"


def test_a_version_that_is_no_longer_held_and_a_publisher_that_is_gone_are_said_in_time() -> None:
    publisher = GroupPublisher("gloo", HOST, keep=2, patience=3.0)
    handles = [publisher.publish(v, weights(v)) for v in (1, 2, 3)]
    with pytest.raises(WeightsLost, match="no longer held"):
        handles[0].fetch()
    assert _same(handles[1].fetch(), weights(2))
    publisher.close()
    started = time.monotonic()
    with pytest.raises(WeightsLost):
        handles[2].fetch()
    assert time.monotonic() - started < 10


def test_a_publisher_that_died_is_noticed_at_once(publisher: GroupPublisher) -> None:
    handle = publisher.publish(1, weights(1))
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(WeightsLost):
        replace(handle, port=port).fetch()
    assert time.monotonic() - started < 5, "it waited for a dead learner"


def test_numbers_that_were_damaged_on_the_way_are_refused(publisher: GroupPublisher) -> None:
    handle = publisher.publish(1, weights(1))
    publisher._held[1]["b"][3] += 1
    with pytest.raises(SyncFailed, match="b arrived damaged"):
        handle.fetch()


def test_a_fingerprint_sees_a_changed_number_and_two_that_changed_places() -> None:
    value = torch.randn(1001).to(torch.bfloat16)
    changed, swapped = value.clone(), value.clone()
    changed[1000] += 1
    swapped[[0, 800]] = swapped[[800, 0]]
    assert len({fingerprint(v) for v in (value, changed, swapped)}) == 3 and fingerprint(value) == fingerprint(value)


def test_it_listens_where_it_was_told_and_nowhere_else(publisher: GroupPublisher) -> None:
    """False: its store, or a group's sockets on either side, can be reached by another address of the machine."""
    handle, seen, done = publisher.publish(1, {"a": torch.zeros(1 << 24)}), set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            connections = psutil.Process().net_connections("tcp")
            seen.update(c.laddr for c in connections if c.status == psutil.CONN_LISTEN)

    before = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    watching = threading.Thread(target=watch)
    watching.start()
    handle.fetch()
    done.set()
    watching.join()
    own = seen - before | {a for a in before if a.port == handle.port}
    assert len(own) > 1, "no group's socket was seen"
    assert {a.ip for a in own} == {HOST}
