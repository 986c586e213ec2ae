"""The two errors that are no bug: the input is at fault, or the numbers of a fit went astray."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, told in one sentence: what was expected, what came, and the remedy.

    The command line prints it as one line and exits with code 2; Python users catch it as a `ValueError`.
    """


class FitError(RuntimeError):
    """A fit that could not go on, told in one sentence, which the command line prints; it exits with code 1."""
