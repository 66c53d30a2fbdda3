"""Everything that mobilemix raises on purpose.

    MobilemixError                  the user can mend it; the command line prints one line and exits with 2
    ├── UnknownNameError            no model, target, precision … is called that; lists the valid names
    ├── CheckpointError             a weights file is missing, corrupt, unsafe, or does not fit the model
    ├── InputError                  a shape, image or file that the model or the command cannot take
    ├── OutputError                 the destination cannot be written
    ├── CaptureError                torch.export could not capture the model
    ├── BatchError                  a model that cannot leave its batch open
    ├── UnsupportedOpError          a pass or a target has no rule for an operator
    ├── TargetError                 the target's own compiler refused the graph
    └── MissingDependencyError      an optional package is not installed

A failed verification is a result, not an error: it is reported, and the command line exits with 1.
"""

import difflib
from collections.abc import Iterable


class MobilemixError(Exception):
    """Base class: one line that says what was wrong, what is valid and what to do."""


class UnknownNameError(MobilemixError):
    """A name that is not in a table of mobilemix."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]) -> None:
        """Compose "unknown KIND 'NAME'; did you mean …? Valid: …" from the table's names."""
        names = sorted(valid)
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        super().__init__(f"unknown {kind} '{name}'{hint} Valid: {', '.join(names)}")


class CheckpointError(MobilemixError):
    """A weights file is missing, corrupt, unsafe to load, or does not fit the model."""


class InputError(MobilemixError):
    """A shape, image or file that the model or the command cannot take."""


class OutputError(MobilemixError):
    """The destination cannot be written."""


class CaptureError(MobilemixError):
    """`torch.export` could not capture the model."""


class BatchError(MobilemixError):
    """A model that cannot leave its batch open: it takes one size, couples the samples, or is not the same for all."""


class UnsupportedOpError(MobilemixError):
    """A pass or a target has no rule for an operator; names it and its place in the user's source."""


class TargetError(MobilemixError):
    """The target's own compiler refused the graph."""


class MissingDependencyError(MobilemixError):
    """An optional package is not installed."""

    def __init__(self, package: str, purpose: str, extra: str) -> None:
        """Name the package, what needs it, and the extra that installs it."""
        super().__init__(f"{purpose} needs {package}, which is not installed; pip install 'mobilemix[{extra}]'")


def first_line(error: Exception) -> str:
    """What an error of native code says before its stack trace or details."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
