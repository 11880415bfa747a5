"""Every error that a user can cause or meet, in one tree.

    MorlaifError
     ├─ ConfigError          a config file or --set value is wrong
     ├─ DataError            a data file, row or split is wrong
     ├─ PrincipleError       a principle file is missing or wrong
     ├─ ArtifactError        a run folder, stage folder or saved model is missing, foreign or unwritable
     ├─ FeedbackError        the judge or its provider cannot go on
     ├─ ScalarizerError      scores or weights that no scalarizer can take
     ├─ ResourceError        the cluster cannot satisfy the plan, or cannot be reached
     ├─ ActorLostError       an actor died more often than its restart budget allows
     └─ NumericalError       a loss or a score became NaN or infinite

The CLI prints `error: <message>` (one line: what, where, what to write instead) and ends with `exit_code`.
All of them survive pickling, because they cross process borders inside Ray.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MorlaifError(Exception):
    """Base of all errors with a message that is meant for the user."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[type[MorlaifError], tuple[str]]:
        return type(self), (self.message,)


class ConfigError(MorlaifError):
    """A config file or a `--set` value is wrong."""

    exit_code = 2


class DataError(MorlaifError):
    """A data file, a row of it, or a split is wrong."""

    exit_code = 2


class PrincipleError(MorlaifError):
    """A principle has no file, or its file is wrong."""

    exit_code = 2


class ArtifactError(MorlaifError):
    """A run folder, a stage folder or a saved model is missing, foreign, damaged or unwritable."""

    exit_code = 3


class FeedbackError(MorlaifError):
    """The judge, or the provider behind it, cannot go on."""

    exit_code = 4


class ScalarizerError(MorlaifError):
    """Scores or weights that the scalarizer cannot take."""

    exit_code = 2


class ResourceError(MorlaifError):
    """The cluster cannot be reached or cannot satisfy the plan."""

    exit_code = 5


class ActorLostError(MorlaifError):
    """An actor died more often than its restart budget allows."""

    exit_code = 6


class NumericalError(MorlaifError):
    """A loss or a score became NaN or infinite."""

    exit_code = 7


@contextmanager
def explain_os_errors(where: Path) -> Iterator[None]:
    """Turns a full disk or a read-only folder into one line that says what to do; other errors pass."""
    try:
        yield
    except MorlaifError:
        raise
    except Exception as error:
        code = _system_code(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(
                f"{where}: the disk is full; free some space and run the same command again "
                f"(what was published stays)"
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            reason = getattr(error, "strerror", None) or str(error)
            raise ArtifactError(
                f"{where}: cannot be written ({reason}); choose another --run-dir"
            ) from error
        raise


def _system_code(error: Exception) -> int | None:
    """The system's error number. safetensors, written in Rust, has it in its text alone: "(os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None
