"""The two errors that are no bug: the input is at fault (`check_part` has one kind), or a fit went astray."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """Bad input, told in one sentence: what was expected, what came, and the remedy.

    The command line prints it as one line and exits with code 2; Python users catch it as a `ValueError`.
    """


def check_part(name: str, part: Any, kind: type, example: str) -> None:
    """Raises `InputError` for a part of a model or a guide that is no object of its kind, but a class or a name."""
    if not isinstance(part, kind):
        got = f"the class {part.__name__}" if isinstance(part, type) else repr(part)
        raise InputError(f"Expected {name} to be a {kind.__name__}, such as {example}; got {got}. Pass such an object.")


class FitError(RuntimeError):
    """A fit that could not go on, told in one sentence, which the command line prints; it exits with code 1."""
