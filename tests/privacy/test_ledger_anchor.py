"""An anchor elsewhere tells an older, cut or forked ledger from the newest one, and never refuses an honest crash."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dprlhf_ray.errors import ConfigError, LedgerDamaged
from dprlhf_ray.privacy import anchor as anchors
from dprlhf_ray.privacy.anchor import Mark
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from tests.privacy.ledger_place import LONG, Place


def charged(place: Place, charges: int) -> Ledger:
    """An open, anchored ledger with this many more charges."""
    ledger = place.open(anchor_file=place.anchor)
    ledger.declare([Declaration("reviews", "rl", LONG, 8.0, 1e-5)])
    for _ in range(charges):
        ledger.charge("rl")
    return ledger


def refused(place: Place, words: str) -> None:
    for attempt in (place.open, place.read):
        with pytest.raises(LedgerDamaged, match=words) as caught:
            attempt(anchor_file=place.anchor)
        assert "\n" not in str(caught.value)
    assert LedgerDamaged.exit_code == 4


def test_the_anchor_follows_every_entry(place: Place) -> None:
    ledger = charged(place, 3)
    for _ in range(3):
        assert anchors.look(place.anchor) == Mark(ledger.seq, ledger.head())
        ledger.charge("rl")
    ledger.close()
    view = place.read(anchor_file=place.anchor)
    assert view.anchored and Mark(view.seq, view.head) == anchors.look(place.anchor)


def test_an_older_copy_that_is_put_back_is_refused(place: Place) -> None:
    """Otherwise restoring a backup refunds every charge since."""
    charged(place, 2).close()
    copy = place.rows()
    charged(place, 1).close()
    place.put_back(copy)
    refused(place, "the anchor .* is not in it")


def test_a_fork_is_refused_at_once_while_both_live_and_later(place: Place, new_place: Callable[[], Place]) -> None:
    """Two copies of one ledger would each spend the whole budget."""
    ledger = charged(place, 2)
    copy = new_place()
    copy.open().close()  # tables
    copy.put_back(place.rows())
    copy.key.write_bytes(place.key.read_bytes())
    fork = replace(copy, anchor=place.anchor)
    other = fork.open(anchor_file=fork.anchor)
    other.charge("rl")
    with pytest.raises(LedgerDamaged, match="copy of this ledger"):
        ledger.charge("rl")
    assert len(place.rows()["entries"]) == 4  # nothing was charged by the one that was refused
    other.close()
    ledger.close()
    refused(place, "the anchor .* is not in it")


def test_a_deleted_or_new_ledger_is_refused(place: Place, new_place: Callable[[], Place]) -> None:
    charged(place, 1).close()
    refused_by = replace(new_place(), anchor=place.anchor)
    with pytest.raises(LedgerDamaged, match="is not in it"):
        refused_by.open(anchor_file=place.anchor)
    place.alter("DELETE FROM entries", "DELETE FROM state")
    refused(place, "is not in it|restore it")


def test_a_lagging_anchor_is_no_damage(place: Place) -> None:
    """A crash between commit and anchor leaves it behind: the ledger goes on."""
    charged(place, 1).close()
    behind = place.anchor.read_bytes()
    charged(place, 3).close()
    place.anchor.write_bytes(behind)
    ledger = charged(place, 1)
    assert anchors.look(place.anchor) == Mark(ledger.seq, ledger.head())


def test_a_crash_between_the_first_commit_and_its_anchor_is_no_damage(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first entry says that there is an anchor; were the file made after it, this crash would lock the ledger."""
    with monkeypatch.context() as patch:
        real, written = anchors.Anchor.write, []

        def write(self: anchors.Anchor, mark: Mark) -> None:
            written.append(mark)
            if mark.seq == 1:
                raise KeyboardInterrupt
            real(self, mark)

        patch.setattr(anchors.Anchor, "write", write)
        with pytest.raises(KeyboardInterrupt):
            place.open(anchor_file=place.anchor)
    assert written[-1].seq == 1 and len(place.rows()["entries"]) == 1
    assert charged(place, 1).spent("rl") == 1


def test_a_ledger_that_was_never_anchored_takes_a_new_anchor(place: Place) -> None:
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", LONG, 8.0, 1e-5)])
    ledger.charge("rl")
    ledger.close()
    assert not place.read(anchor_file=place.anchor).anchored
    assert charged(place, 1).spent("rl") == 2


@pytest.mark.parametrize("lost", ["deleted", "emptied", "spoiled"])
def test_a_lost_anchor_is_refused_until_somebody_accepts_the_ledger(place: Place, lost: str) -> None:
    charged(place, 2).close()
    if lost == "deleted":
        place.anchor.unlink()
    else:
        place.anchor.write_bytes(b"" if lost == "emptied" else bytes(len(place.anchor.read_bytes())))
    refused(place, "dprlhf ledger anchor")
    Ledger.accept(place.url, place.key, place.anchor)
    assert charged(place, 1).spent("rl") == 3
    with pytest.raises(ConfigError, match="nothing to accept"):
        Ledger.accept(place.url, place.key, place.anchor)


def test_any_flipped_byte_of_an_anchor_is_refused_or_means_the_entry_before(place: Place) -> None:
    """A torn write looks the same, so that the older of its two lines may stand in for the newest, and nothing else."""
    charged(place, 2).close()
    newest = anchors.look(place.anchor)
    content = place.anchor.read_bytes()
    seen = set()
    for i in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            place.anchor.write_bytes(content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :])
            seen.add(anchors.look(place.anchor))
    assert newest is not None
    assert {m.seq for m in seen if m} == {newest.seq, newest.seq - 1}
    assert {m.head for m in seen if m} <= {e.hash for e in place.entries()}


def test_an_anchor_cut_at_any_byte_still_has_a_line_or_is_refused(place: Place) -> None:
    charged(place, 2).close()
    content = place.anchor.read_bytes()
    hashes = {e.hash for e in place.entries()}
    for length in range(len(content)):
        place.anchor.write_bytes(content[:length])
        mark = anchors.look(place.anchor)
        assert (mark is None) == (length < len(content) // 2)
        assert mark is None or mark.head in hashes


def test_an_anchor_that_cannot_be_written_acknowledges_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The charge stays spent, and no draw follows from it."""
    ledger = charged(place, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(LedgerDamaged, match="No space left"):
            ledger.charge("rl")
    with pytest.raises(LedgerDamaged):
        ledger.charge("rl")
    assert charged(place, 0).spent("rl") == 2


def test_anchors_that_tell_nothing_are_refused(tmp_path: Path) -> None:
    """Inside the ledger's directory it would be rolled back and copied with it."""
    (tmp_path / "run" / "deep").mkdir(parents=True)
    ledger = tmp_path / "run" / "ledger.db"
    for path in (tmp_path / "run" / "anchor", tmp_path / "run" / "deep" / "anchor"):
        with pytest.raises(ConfigError, match="own directory"):
            Ledger.open(ledger, anchor_file=path)
    for path in (tmp_path / "none" / "anchor", tmp_path):
        with pytest.raises(ConfigError, match="ledger_anchor"):
            Ledger.open(ledger, anchor_file=path)


def test_a_directory_that_is_rolled_back_or_forked_as_a_whole_is_refused(tmp_path: Path) -> None:
    """As test_an_older_copy and test_a_fork, by copying the files, with the write-ahead log of an open ledger."""
    run, anchor = tmp_path / "run", tmp_path / "anchor"
    run.mkdir()
    place = Place(str(run / "ledger.db"), run / "ledger.key", anchor)
    ledger = charged(place, 2)
    shutil.copytree(run, tmp_path / "copy")
    ledger.charge("rl")
    ledger.close()
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "copy", run)
    assert place.read().schedules["rl"].spent == 2  # whole in itself
    refused(place, "the anchor .* is not in it")


def test_a_write_ahead_log_cut_at_any_frame_is_refused(tmp_path: Path) -> None:
    """SQLite takes a log that ends early for one that ended there: acknowledged charges would be gone unseen."""
    run, anchor = tmp_path / "run", tmp_path / "anchor"
    run.mkdir()
    place = Place(str(run / "ledger.db"), run / "ledger.key", anchor)
    ledger = charged(place, 3)
    files = {p.name: p.read_bytes() for p in run.iterdir()}
    ledger.close()
    log, marks = files["ledger.db-wal"], anchor.read_bytes()
    cuts = [*range(32, len(log), 4096 + 24), *(32 + i * (4096 + 24) + 2000 for i in range(len(log) // (4096 + 24)))]
    caught = 0
    for cut in [*cuts, len(log)]:
        shutil.rmtree(run)
        run.mkdir()
        for name, content in files.items():
            (run / name).write_bytes(log[:cut] if name.endswith("-wal") else content)
            (run / name).chmod(0o600)
        (run / "ledger.db-shm").unlink(missing_ok=True)
        anchor.write_bytes(marks)
        try:
            view = place.read(anchor_file=anchor)
        except LedgerDamaged:
            caught += 1
        else:
            assert view.schedules["rl"].spent == 3
    assert caught >= len(cuts) - 1


def test_an_anchored_ledger_is_not_written_without_its_anchor(place: Place) -> None:
    """Otherwise an older copy is accepted by an anchor that did not see what was charged meanwhile."""
    charged(place, 1).close()
    with pytest.raises(LedgerDamaged, match="set ledger_anchor"):
        place.open()
    with pytest.raises(LedgerDamaged, match="set ledger_anchor"):
        place.read(writing=True)
    assert place.read().anchored
