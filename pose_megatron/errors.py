"""What goes wrong that a user can mend, and how a message names a flag."""


class ConfigError(ValueError):
    """A flag, a value or a file cannot be used; the message names it and says the way out."""


class DamagedCheckpoint(ValueError):
    """A checkpoint is missing, incomplete or unreadable: with --load-fallback an earlier one is
    taken. A checkpoint that is whole and does not fit the run is a ConfigError."""


class SaveFailed(OSError):
    """A checkpoint could not be written; those before it are whole."""


def flag_name(name: str) -> str:
    """The flag of a name: --seq-length of seq_length."""
    return "--" + name.replace("_", "-")


def gist(error: BaseException) -> str:
    """An error's class and first line, for a message about a damaged file."""
    if failures := getattr(error, "failures", None):  # torch's CheckpointException, by rank
        error = next(iter(failures.values()))[0]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
