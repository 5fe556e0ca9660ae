"""SFT, reward model and RL on one data set of users, two stages on disjoint partitions and one on everybody, killed in
each stage and resumed: one certificate."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from dprlhf_ray.errors import NoLedger
from dprlhf_ray.privacy import accounting, chain
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.ledger_key import read_key
from dprlhf_ray.privacy.partitions import digest
from tests.end_to_end.runs import RECORDS, Command, World, forms, leaks, write_config

STEPS = {"first": 9, "second": 8, "everybody": 7}
KINDS = {"first": "sft", "second": "reward_model", "everybody": "rl"}
USERS = RECORDS // 2


def three_stages(world: World, folder: Path) -> Path:
    """The config's path. Every user has two records, and an id that is found nowhere else."""
    prompts = (json.loads(line)["prompt"] for line in (world.folder / "private.jsonl").read_text().splitlines())
    rows = [
        {"prompt": p, "completion": " yes", "chosen": " good", "rejected": " film", "who": f"id-{world.marks[i // 2]}"}
        for i, p in enumerate(prompts)
    ]
    source = folder / "with_ids.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = world.tree()
    tree["data"]["notes"] |= {
        "source": str(source), "unit_column": "who", "partitions": {"first": 0.5, "second": 0.5}, "dataset": "people",
    }  # fmt: skip
    stage = tree["stages"][0]
    common = {key: stage[key] for key in ("data", "optimizer")}
    privacy = stage["privacy"] | {"expected_batch": 12, "unit": "user", "records_per_draw": 2}
    tree["data"]["notes"]["max_completion_tokens"] = 8
    tree["stages"] = [
        common | {"name": name, "kind": KINDS[name], "partition": None if name == "everybody" else name,
                  "privacy": privacy | {"steps": steps, "epsilon": 6.0 - i}}
        for i, (name, steps) in enumerate(STEPS.items())
    ]  # fmt: skip
    tree["stages"][2] |= {
        "generation": stage["generation"], "scorer": {"kind": "reward_model", "stage": "second"},
    }  # fmt: skip
    return write_config(folder / "three.yaml", tree)


def spent(root: Path) -> dict[str, int]:
    try:
        return {name: s.spent for name, s in Ledger.read(root / "ledger.db").schedules.items()}
    except NoLedger:  # the run is about to write it
        return {}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_three_stages_killed_in_each_and_resumed_have_one_certificate(
    world: World, tmp_path: Path, scratch: Path
) -> None:
    """False: a stage is run again or forgotten, or what users that two stages read lost is not the two together."""
    root, config = tmp_path / "out", three_stages(world, tmp_path)
    for i, name in enumerate(STEPS):
        killed = Command("run", str(config), "--output", str(root), *(["--resume"] if i else []))
        killed.wait_until(lambda name=name: spent(root).get(name, 0) >= 2, 600)  # type: ignore[misc]
        killed.note_family()
        killed.process.send_signal(signal.SIGKILL)
        killed.end()
        before = list(spent(root).values())
        assert before[:i] == list(STEPS.values())[:i] and 2 <= before[i] < STEPS[name] and not any(before[i + 1 :])
        assert not (root / "certificate.json").exists()
        assert killed.survivors(180.0) == []  # a busy machine takes its time
    assert "Not certified yet" in (root / "models/first/merged/README.md").read_text()

    code, out, err = Command("run", str(config), "--output", str(root), "--resume").end(800)
    assert code == 0, err
    assert "stage first is done" in out and "stage second is done" in out
    certificate = json.loads((root / "certificate.json").read_text())
    assert {s["stage"]: s["attempts_charged"] for s in certificate["stages"]} == STEPS and certificate["certified"]

    view = Ledger.read(root / "ledger.db")
    steps = {name: s.step for name, s in view.schedules.items()}
    assert steps["first"].population + steps["second"].population == steps["everybody"].population == USERS
    assert {s.unit for s in steps.values()} == {"user"}
    (people,) = certificate["data_sets"].values()
    pairs = {("first", "everybody"), ("second", "everybody")}
    assert {tuple(g["stages"]) for g in people["run"]["groups"]} == pairs
    by_hand = {
        a: accounting.compose([steps[a], steps[b]], 1e-3, allow_large_delta=True).pld for a, b in pairs
    }  # fmt: skip
    assert {p["partition"]: p["epsilon"] for p in people["partitions"]} == by_hand | {None: max(by_hand.values())}
    assert people["run"]["epsilon"] == people["cumulative"]["epsilon"] == max(by_hand.values())
    everything = accounting.compose(list(steps.values()), 1e-3, allow_large_delta=True).pld
    assert max(s["epsilon"]["pld"] for s in certificate["stages"]) < people["run"]["epsilon"] < everything
    assert certificate["ledger"]["head"] == view.head

    for name in STEPS:
        for kind in ("adapter", "merged"):
            text = (root / "models" / name / kind / "README.md").read_text()
            assert f"epsilon {people['run']['epsilon']:.4f}" in text and view.head in text, (name, kind)

    key = chain.unit_key(read_key(root / "ledger.key"))
    digests = [digest(key, "people", f"id-{mark}") for mark in world.marks[:USERS]]
    needles = [n for mark in world.marks for n in forms(mark)] + digests + [d.hex().encode() for d in digests]
    assert leaks([root, scratch], needles) == [], "an id, or a digest of one, is in a file"
