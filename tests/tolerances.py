"""How close is equal: the one place that says so."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
}

STANDARD_ERRORS = 5.0
"""How far a Monte Carlo mean may be from its expectation: one false alarm in two million."""


def assert_close(actual: Tensor, expected: Tensor | float, *, slack: float = 1.0) -> None:
    """Equal within the tolerance of `actual`'s dtype, `slack` times as wide; one number stands for any shape."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    expected = expected.expand_as(actual) if expected.ndim == 0 else expected
    tolerance = {name: slack * value for name, value in TOLERANCES[actual.dtype].items()}
    torch.testing.assert_close(actual, expected, **tolerance)


def standard_error(draws: Tensor) -> Tensor:
    """Of the mean over the leading axis."""
    return draws.std(0) / len(draws) ** 0.5


def assert_mean(draws: Tensor, expected: Tensor | float) -> None:
    """The mean over the leading axis is the expectation, up to Monte Carlo error."""
    expected = torch.as_tensor(expected, dtype=draws.dtype)
    # The last term is for draws that do not vary.
    allowed = STANDARD_ERRORS * standard_error(draws) + TOLERANCES[draws.dtype]["rtol"] * expected.abs()
    miss = (draws.mean(0) - expected).abs()
    assert (miss <= allowed).all(), f"off by {(miss / allowed).max():.2f} times what chance allows"
