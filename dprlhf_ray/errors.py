"""Errors with an exit code: the command line prints one line and leaves with it."""

import os
import traceback


class DprlhfError(Exception):
    """Base class; `exit_code` is what the command returns."""

    exit_code = 1


class ConfigError(DprlhfError):
    """A bad config or input: the key, what is wrong, what would be right."""

    exit_code = 2


class BudgetExhausted(DprlhfError):
    """A charge would exceed what was planned and paid for; checkpoints of what was trained so far are there."""

    exit_code = 3


class NoLedger(ConfigError):
    """There is no ledger yet where one was looked for."""


class LedgerDamaged(DprlhfError):
    """The ledger is damaged, or a newer accountant has taken over (fenced)."""

    exit_code = 4


class SyncFailed(DprlhfError):
    """Rollout engines and learner disagree after a weight sync."""


class LearnersRestarted(DprlhfError):
    """The learner group died and came back; the command in flight is lost, its charge is spent."""


class WeightsLost(LearnersRestarted):
    """A published weight version cannot be had any more, most likely because who published it died: it is published
    again, and what was in flight is lost as after any other death of the learners."""


class RolloutFailed(DprlhfError):
    """No rollout replica came back, or replicas keep failing."""


class Interrupted(DprlhfError):
    """Stopped from outside; `dprlhf run --resume` continues."""

    exit_code = 130


def place_of(error: BaseException) -> str:
    """Type of an error and where it was raised. Never its message: that may quote a record."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return type(error).__name__ + place
