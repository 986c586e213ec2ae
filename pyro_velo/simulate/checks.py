"""Settings out of range, told as: what was expected, what came, and the remedy."""

from __future__ import annotations

from numbers import Integral, Real

from pyro_velo.errors import InputError


def require(fine: bool, expected: str, came: object, remedy: str) -> None:
    """Raise InputError unless `fine`."""
    if not fine:
        raise InputError(f"Expected {expected}; got {came!r}. {remedy}")


def require_number(name: str, value: object, interval: str, remedy: str) -> None:
    """Raise InputError unless `value` is a number in `interval`, such as "[0, 1)" or "(0, inf)".

    >>> require_number("sd", -0.5, "[0, inf)", "Pass sd=0.4.")
    Traceback (most recent call last):
    pyro_velo.errors.InputError: Expected sd to be a number in [0, inf); got -0.5. Pass sd=0.4.
    """
    low, high = map(float, interval[1:-1].split(","))
    number = float("nan") if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    above = low <= number if interval[0] == "[" else low < number
    below = number <= high if interval[-1] == "]" else number < high
    require(above and below, f"{name} to be a number in {interval}", value, remedy)


def require_count(name: str, value: object, least: int, remedy: str) -> int:
    """`value` as an int; raises InputError unless it is a whole number of `least` or more."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    number = int(value) if isinstance(value, Integral) else least
    require(whole and number >= least, f"{name} to be a whole number >= {least}", value, remedy)
    return number
