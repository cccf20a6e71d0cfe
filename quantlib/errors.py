"""Errors whose text is a sentence for the user: what is wrong, where, and what to do about it.

The command line prints the text alone and exits with `exit_code`; a traceback that reaches a user
is a bug.
"""


class QuantlibError(Exception):
    """Something the user can act on. Exit code 1: understood, and could not be done."""

    exit_code = 1


class UsageError(QuantlibError):
    """The request itself is wrong (a flag, a pattern, contradicting constraints). Exit code 2."""

    exit_code = 2


class FormatError(QuantlibError):
    """A number format, a packed tensor, or a value that cannot be represented."""


class ModelError(QuantlibError):
    """A source model: missing or truncated files, unknown parameters, non-finite weights."""


class DataError(QuantlibError):
    """Calibration or evaluation data."""


class TransformError(QuantlibError):
    """A change of basis: of another model, not orthogonal, or of a size nothing constructs."""


class RoundingError(QuantlibError):
    """A rounding method was given tensors it cannot work with."""


class SearchError(QuantlibError):
    """A budget, a constraint, a sensitivity table or a plan."""


class CheckpointError(QuantlibError):
    """The work directory or a packed checkpoint."""
