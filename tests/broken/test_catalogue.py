"""The tests are tested: faults that are put in on purpose must be noticed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.broken.catalogue import FAULTS
from tests.broken.run import MISTAKES, REPOSITORY, check_fault


def _search(*words: str) -> tuple[int, str]:
    """Exit code and output of the search in a process of its own, as `make faults` runs it."""
    command = [sys.executable, "-m", "tests.broken.run", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_every_fault_still_has_the_one_place_that_it_breaks() -> None:
    """False: the code moved on and a fault is put nowhere, or in two places."""
    wrong = []
    for f in FAULTS:
        text = (REPOSITORY / f.file).read_text()
        if text.count(f.old) != 1 or f.new == f.old:
            wrong.append(f"{f.file}: {f.old!r}, {text.count(f.old)} times")
        compile(text.replace(f.old, f.new), f.file, "exec")
    assert wrong == []
    assert len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS) >= 30


def test_every_test_of_the_catalogue_exists() -> None:
    """False: a test was renamed and its fault is caught by nothing."""
    lost = []
    for test in {t.split("[")[0] for f in FAULTS for t in f.tests}:
        path, _, name = test.partition("::")
        if not (REPOSITORY / path).is_file() or f"def {name}(" not in (REPOSITORY / path).read_text():
            lost.append(test)
    assert lost == []


def test_two_faults_are_caught() -> None:
    """False: the search does not see what it is told to see."""
    code, said = _search("no clip at all", "used more than K times")
    assert code == 0 and "2 of 2 faults caught" in said, said


def test_a_mistake_of_the_catalogue_does_not_count_as_caught() -> None:
    """False: a typing error in a fault, or a text that is gone, passes for a test that noticed it."""
    gone = check_fault(replace(FAULTS[0], old="there is no such text"))
    assert not gone.failed and "0 times" in gone.mistakes[0]
    assert MISTAKES.search("E   NameError: name 'x' is not defined") and not MISTAKES.search("E   AssertionError: 3")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fault_is_caught() -> None:
    """False: the code can be broken in one line, as the catalogue says, and no test notices."""
    code, said = _search()
    assert code == 0, said
