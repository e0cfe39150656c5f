"""The exceptions of the public boundary.

Each is also a ``RuntimeError``, which is what torch raises for the same call, so a program that
catches torch's error keeps working after it swaps the import.
"""

from __future__ import annotations


class ArgumentError(ValueError, RuntimeError):
    """A value or a shape that the operation refuses."""


class EmptyOutputError(ArgumentError):
    """An output with an axis of no planes. torch answers such a call in some dtypes and refuses it in others."""


class ArgumentTypeError(TypeError, RuntimeError):
    """A type or a dtype that the operation refuses."""


class VariantNotApplicable(ValueError):
    """A variant was forced with :func:`tritonconv.use` on a call it does not serve; the message says why."""


class ResultsError(ValueError):
    """A results file that cannot be read; the message names the file and the line."""


class StoreError(RuntimeError):
    """The folder of the tuned choices cannot be written; the message names it."""


class StoreWarning(UserWarning):
    """A file of tuned choices was damaged or foreign; it is not used and nothing else is lost."""


class KernelWarning(UserWarning):
    """A Triton kernel cannot be compiled or launched on this machine; torch's own operation runs instead."""
