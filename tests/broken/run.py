"""Breaks the package in one place at a time and expects the tests to notice: `make faults`, or
`python -m tests.broken.run WORDS...` for the faults whose "rule: description" contains one of them.

Each fault gets a fresh copy of the package and the tests, and a process of its own, forked from one that has imported
the large libraries but nothing of ours. The same tests are first run on an unbroken copy. A fault counts as caught only
where a test that had passed fails by its own judgement: an import, a collection, a fixture or a name that is not there
is a mistake of the catalogue.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.broken.catalogue import FAULTS, Fault

REPOSITORY = Path(__file__).parents[2]
COPIED = ("dprlhf_ray", "tests", "pyproject.toml")
OURS = ("dprlhf_ray", "tests")
LIBRARIES = ("torch", "transformers", "peft", "dp_accounting.pld", "dp_accounting.rdp", "sqlalchemy", "hypothesis")
MISTAKES = re.compile(r"\b(Name|Import|ModuleNotFound|Syntax|Indentation|UnboundLocal|Attribute)Error\b")
SECONDS = 600


@dataclass(frozen=True)
class Outcome:
    """passed: node ids. failed: those that failed by their own judgement. mistakes: reports of everything else."""

    passed: tuple[str, ...]
    failed: tuple[str, ...]
    mistakes: tuple[str, ...]
    seconds: float = 0.0


class Verdict:
    """A pytest plugin: what became of each phase of each test. A skipped test does not count as run."""

    def __init__(self) -> None:
        self.reports: list[dict[str, object]] = []

    def pytest_configure(self) -> None:
        """Refuse to test anything but the copy: an editable install would be found otherwise."""
        package = Path(importlib.import_module("dprlhf_ray").__file__ or "").resolve()
        if not package.is_relative_to(Path.cwd().resolve()):
            raise pytest.UsageError(f"{package} is tested, not the copy in {Path.cwd()}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.skipped:
            text = report.longreprtext[-4000:]
            self.reports.append({"test": report.nodeid, "when": report.when, "failed": report.failed, "text": text})


def copy(folder: Path) -> Path:
    """The package and the tests in `folder`."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy(source, folder / name)
    return folder


def apply(fault: Fault, folder: Path) -> None:
    """Make the one replacement; ValueError unless the old text is there exactly once and the file still compiles."""
    path = folder / fault.file
    text = path.read_text()
    if (count := text.count(fault.old)) != 1:
        raise ValueError(f"{fault.file}: {fault.old!r} occurs {count} times, not once: bring the catalogue up to date")
    path.write_text(text.replace(fault.old, fault.new))
    compile(path.read_text(), fault.file, "exec")


def run_tests(folder: Path, tests: Sequence[str], stop: bool) -> Outcome:
    """pytest in `folder`, in a process of its own; `stop` at the first failure."""
    started = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_in_copy, args=(folder, tests, stop))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    seconds = time.monotonic() - started
    answer = folder / "verdict.json"
    if process.exitcode not in (0, 1) or not answer.exists():
        said = (folder / "output").read_text()[-400:] if (folder / "output").exists() else ""
        return Outcome((), (), (f"pytest ended with {process.exitcode}: {said}",), seconds)
    reports = json.loads(answer.read_text())
    calls = [r for r in reports if r["when"] == "call"]
    return Outcome(
        tuple(r["test"] for r in calls if not r["failed"]),
        tuple(r["test"] for r in calls if r["failed"] and not MISTAKES.search(r["text"])),
        tuple(r["text"] for r in reports if r["failed"] and (r["when"] != "call" or MISTAKES.search(r["text"]))),
        seconds,
    )


def _in_copy(folder: Path, tests: Sequence[str], stop: bool) -> None:
    """What the forked process does: forget ours, see the copy only, test it."""
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}  # of the processes that tests start
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(p for p in sys.path if p and Path(p).resolve() != REPOSITORY.resolve())]
    for name in [n for n in sys.modules if n.split(".")[0] in OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()
    verdict = Verdict()
    options = ["-q", "-p", "no:cacheprovider", *(["-x"] if stop else [])]
    code = pytest.main([*options, *tests], plugins=[verdict])
    Path("verdict.json").write_text(json.dumps(verdict.reports))
    sys.stdout.flush()
    os._exit(int(code))


def unsound(faults: Iterable[Fault]) -> dict[str, str]:
    """Tests that prove nothing when they fail, because they do not pass on an unbroken copy either: test -> why."""
    tests = sorted({t for f in faults for t in f.tests})
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        outcome = run_tests(copy(Path(scratch)), tests, stop=False)

    def among(test: str, nodes: Iterable[str]) -> bool:
        return any(n == test or n.startswith(f"{test}[") for n in nodes)

    failed = {t: "fails unbroken" for t in tests if among(t, outcome.failed)}
    absent = {t: f"did not pass unbroken {' '.join(outcome.mistakes)}" for t in tests if not among(t, outcome.passed)}
    return absent | failed


def check_fault(fault: Fault) -> Outcome:
    """Run a fault's tests on a copy that has it."""
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = copy(Path(scratch))
        try:
            apply(fault, folder)
        except (ValueError, SyntaxError) as e:
            return Outcome((), (), (str(e),))
        return run_tests(folder, fault.tests, stop=True)


def main(words: list[str]) -> int:
    """Print the table; 1 when a fault is not caught, or its tests or its place are not what the catalogue says."""
    for library in LIBRARIES:
        importlib.import_module(library)
    chosen = [f for f in FAULTS if not words or any(w in f"{f.rule}: {f.what}" for w in words)]
    bad, missed = unsound(chosen), 0
    print("| rule | fault | caught by | seconds |\n| --- | --- | --- | --- |", flush=True)
    for fault in chosen:
        why = [f"{t} {bad[t]}" for t in fault.tests if t in bad]
        outcome = Outcome((), (), tuple(why)) if why else check_fault(fault)
        caught = bool(outcome.failed) and not outcome.mistakes
        missed += not caught
        names = ", ".join(t.partition("::")[2] for t in outcome.failed)
        by = names if caught else f"NOT CAUGHT {' '.join(outcome.mistakes)}"
        print(f"| {fault.rule} | {fault.what} | {by} | {outcome.seconds:.0f} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} faults caught")
    return int(missed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
