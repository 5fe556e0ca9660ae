"""Python imports this at the start of every process of a run under test, Ray's workers too: this folder is in
PYTHONPATH. It arms the points of `tests/chaos/points.py`."""

import os

if os.environ.get("DPRLHF_CHAOS"):
    from tests.chaos import points

    points.arm()
