"""`dprlhf run` where everything that may quote a record does: `python -m tests.end_to_end.leaky CONFIG OUT SEEN`.

An engine, a learner and at last the driver raise errors whose message holds prompts and token ids; the object store is
small and gets full. SEEN is a folder outside of everything that the run may write: what was private, and notes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dprlhf_ray import cli, collect, pipeline
from dprlhf_ray.actors import fleet, learner_group
from dprlhf_ray.actors.cluster import ray
from dprlhf_ray.actors.rollout import RolloutActor

SEEN = Path(sys.argv[3]) if len(sys.argv) > 3 else Path()
STORE = 80 << 20
PAGES = [
    "/api/v0/tasks?detail=1", "/api/v0/actors?detail=1", "/api/v0/objects?detail=1", "/api/v0/workers?detail=1",
    "/api/v0/runtime_envs?detail=1", "/api/v0/placement_groups?detail=1", "/api/v0/tasks/summarize",
    "/nodes?view=summary", "/api/jobs/", "/api/cluster_status", "/logical/actors", "/api/train/v2/runs/v1",
    "/api/v0/cluster_metadata",
]  # fmt: skip


def _armed(fault: str, seen: Path) -> bool:
    """Whether to fail now: once, after the driver has asked for it."""
    try:
        (seen / fault).rename(seen / f"{fault}.happened")
        return True
    except OSError:
        return False


def leaky_engine(seen: Path, tokenizer_path: str) -> type[RolloutActor]:
    class LeakyActor(RolloutActor):
        def generate(self, prompts, completions_per_prompt):  # type: ignore[no-untyped-def]
            if _armed("engine", seen):
                from transformers import AutoTokenizer

                texts = AutoTokenizer.from_pretrained(tokenizer_path).batch_decode([list(p) for p in prompts])
                raise ValueError(f"cannot continue {texts} {prompts}")
            return super().generate(prompts, completions_per_prompt)

    return LeakyActor


def leaky_worker(seen: Path) -> Callable[[dict[str, Any]], None]:
    def worker(config: dict[str, Any]) -> None:
        from dprlhf_ray.actors import learner, rank

        plain = learner.Learner.update

        def update(self, units, *rest):  # type: ignore[no-untyped-def]
            if _armed("learner", seen):
                texts = [(e.prompt.text, e.prompt.token_ids) for unit in units for e in unit]
                raise ValueError(f"cannot learn from {texts}")
            return plain(self, units, *rest)

        learner.Learner.update = update  # type: ignore[method-assign]
        rank.serve(config)

    return worker


def fill_the_store(texts: list[str]) -> None:
    """Private objects, twice as large as the store; then note the files on disk that a process holds them in."""
    import numpy as np

    block = np.frombuffer((" ".join(texts).encode() * (STORE // 3 // sum(map(len, texts)))), dtype=np.uint8)
    held = [ray.put(block + np.uint8(0)) for _ in range(6)]
    on_disk = set()
    for process in psutil.Process().children(recursive=True):
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            target = os.readlink(fd)
            if "plasma" in target and not target.startswith("/dev/shm/") and "/memfd" not in target:
                on_disk.add(f"{process.name()}: {target}")
    (SEEN / "on_disk.json").write_text(json.dumps([sum(len(block) for _ in held), sorted(on_disk)]))


def read_the_dashboard(folder: Path) -> None:
    """What an operator's browser and Prometheus would get, into files."""
    import requests
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    node = ray.nodes()[0]
    base = f"http://{ray._private.worker._global_node.webui_url}"
    pages = [base + p for p in [*PAGES, f"/nodes/{node['NodeID']}", f"/api/v0/logs?node_id={node['NodeID']}"]]
    pages.append(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")
    folder.mkdir()
    status = {}
    for n, url in enumerate(pages):
        answer = requests.get(url, headers=get_auth_headers_if_auth_enabled({}), timeout=30)
        status[url] = answer.status_code
        (folder / f"{n}.txt").write_bytes(answer.content)
    (SEEN / "dashboard.json").write_text(json.dumps(status))


def main() -> None:
    config, out = sys.argv[1], Path(sys.argv[2])
    import yaml

    tree = yaml.safe_load(Path(config).read_text())
    private = Path(next(iter(tree["data"].values()))["source"])
    texts = [json.loads(line)["prompt"] for line in private.read_text().splitlines()]
    run, start, generate, gather = pipeline.run, ray.init, fleet.Fleet.generate, collect.Rollouts.collect

    def keep(self: fleet.Fleet, prompts: Any, count: int) -> Any:
        rows = generate(self, prompts, count)
        with (SEEN / "completions.jsonl").open("a") as file:
            for prompt, row in zip(prompts, rows, strict=True):
                file.writelines(json.dumps([list(prompt), list(c.token_ids), c.text]) + "\n" for c in row)
        return rows

    def crash(self: collect.Rollouts, units: Any) -> Any:
        done = gather(self, units)
        if _armed("driver", SEEN):
            raise ValueError(f"cannot go on with {[(e.prompt.text, e.prompt.token_ids) for u in done for e in u]}")
        return done

    def on_step(attempt: int, roles: Any) -> None:
        if attempt == 1:
            fill_the_store(texts)
            (SEEN / "engine").touch()
        if attempt == 2:
            read_the_dashboard(out.parent / "dashboard")
            (SEEN / "learner").touch()
        if attempt == 4:
            (SEEN / "driver").touch()

    fleet.Fleet.generate = keep  # type: ignore[method-assign]
    fleet.Fleet.__init__.__kwdefaults__["actor_class"] = leaky_engine(SEEN, tree["model"]["name"])
    learner_group.serve = leaky_worker(SEEN)
    collect.Rollouts.collect = crash  # type: ignore[method-assign]
    pipeline.run = lambda *a: run(*a, on_step=on_step)  # type: ignore[assignment]
    ray.init = lambda **options: start(**options | {"object_store_memory": STORE})
    sys.argv = ["dprlhf", "run", config, "--output", str(out)]
    cli.main()


if __name__ == "__main__":
    main()
