"""What a user can get wrong, each with the exit code a script can rely on.

Every message has three parts: what was wrong (first line), what was expected, and what to do (further lines).
Programming mistakes of ours are `assert`s, never these.
"""

import difflib
from collections.abc import Iterable


class RpgError(Exception):
    """A failure that the user can understand and mend. The first line says what was wrong, the rest what to do."""

    exit_code = 1

    def __init__(self, what: str, *advice: str) -> None:
        super().__init__(what, *advice)
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        return "\n".join([self.what, *("  " + line for part in self.advice for line in part.splitlines())])


class UsageError(RpgError):
    """A wrong argument, option or recipe."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read, or that asks for something that does not exist; lists all problems at once."""


class DataError(UsageError):
    """A data set that is not where it should be, or is not what its name says."""


class ArtifactError(RpgError):
    """An artifact that is missing, corrupt, or made for something else."""

    exit_code = 3


class LayoutError(ArtifactError):
    """Parameters whose names, shapes or dtypes do not fit the layout."""


class OutputError(RpgError):
    """The output exists with other settings, is unfinished, or another process is writing it."""

    exit_code = 4


class LockedError(OutputError):
    """Another process is writing the output; it may be waited for."""


class GateError(RpgError):
    """A quality gate that was asked for was not met; everything was written."""

    exit_code = 5


class Interrupted(RpgError):
    """A signal ended the stage after its state was made safe."""

    def __init__(self, signal_number: int, *advice: str) -> None:
        super().__init__(f"stopped by signal {signal_number}", *advice)
        self.exit_code = 128 + signal_number


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant: `; did you mean 'ddim'? known: ddim, ddpm`."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    meant = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{meant} known: {', '.join(known)}"
