"""The exceptions of the public boundary.

Each is also a ``RuntimeError``, which is what torch raises for the same call, so a program that
catches torch's error keeps working after it swaps the import.
"""

from __future__ import annotations

LONGEST = 1000  # characters of a message, whatever was passed


def shortened(message: str) -> str:
    """The message, without its middle where it is too long to be read."""
    if len(message) <= LONGEST:
        return message
    gap = f" ... ({len(message)} characters) ... "
    half = (LONGEST - len(gap)) // 2
    return message[:half] + gap + message[-half:]


class _Told(Exception):
    """An exception whose text has a bounded length. ``args`` hold all of it."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class ArgumentError(_Told, ValueError, RuntimeError):
    """A value or a shape that the operation refuses."""


class EmptyOutputError(ArgumentError):
    """An output with an axis of no planes. torch answers such a call in some dtypes and refuses it in others."""


class ArgumentTypeError(_Told, TypeError, RuntimeError):
    """A type or a dtype that the operation refuses."""


class VariantNotApplicable(_Told, ValueError):
    """A variant was forced with :func:`tritonconv.use` on a call it does not serve; the message says why."""


class ResultsError(_Told, ValueError):
    """A results file that cannot be read; the message names the file and the line."""


class StoreError(_Told, RuntimeError):
    """The folder of the tuned choices cannot be written; the message names it."""


class StoreWarning(UserWarning):
    """A file of tuned choices was damaged or foreign; it is not used and nothing else is lost."""


class KernelWarning(UserWarning):
    """A Triton kernel cannot be compiled or launched on this machine; torch's own operation runs instead."""
