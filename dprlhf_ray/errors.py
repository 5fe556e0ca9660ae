"""Errors with an exit code: the command line prints one line and leaves with it."""


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


class RolloutFailed(DprlhfError):
    """No rollout replica came back, or replicas keep failing."""


class Interrupted(DprlhfError):
    """Stopped from outside; `dprlhf run --resume` continues."""

    exit_code = 130
