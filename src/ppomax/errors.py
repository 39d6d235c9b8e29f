"""Errors that reach a user, and the exit code each stands for. Nothing else belongs here."""


class PpomaxError(Exception):
    """Base of every error raised on purpose; its text is one line for the user."""

    exit_code = 1


class ConfigError(PpomaxError):
    """A setting is wrong: the text names the setting, what was found and what would do."""

    exit_code = 2


class DataError(PpomaxError):
    """A data file or row is wrong: the text names file:line, what was found and what would do."""

    exit_code = 2


class ModelError(PpomaxError):
    """A model folder or name cannot be used as asked."""

    exit_code = 2


class CheckpointError(PpomaxError):
    """A checkpoint or run directory cannot be written, read or continued."""

    exit_code = 2


class TrainingError(PpomaxError):
    """Training cannot go on (non-finite numbers, a stop rule)."""

    exit_code = 1


class Interrupted(PpomaxError):
    """Stopped at a signal; the run can be resumed."""

    exit_code = 75
