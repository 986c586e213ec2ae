"""Pure functions of tensors, compiled to fused kernels where that pays and a compiler is at hand."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

WORTH_COMPILING = 500_000_000
"""Elements to go through, below which the 10 to 30 s of compiling cost more than they save (measured on two cores)."""


def compiled(function: Callable[..., Result], elements: int, device: torch.device) -> Callable[..., Result]:
    """`function`, compiled if it will go through `elements` enough on a CPU; as it is where no compiler works.

    The results agree to rounding. A function that changes its arguments must do so only after everything else.
    """
    if device.type != "cpu" or elements < WORTH_COMPILING or shutil.which("g++") is None:
        return function
    return _OrAsItIs(function)


class _OrAsItIs:
    """Calls the compiled function, and if its first call fails the function itself, from then on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.call, self.tried = function, torch.compile(function, dynamic=False), False

    def __call__(self, *args: Any) -> Any:
        if self.tried:
            return self.call(*args)
        self.tried = True
        try:
            return self.call(*args)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            warnings.warn(f"torch.compile failed, so this goes on slower without it: {first}", stacklevel=2)
            self.call = self.function
            return self.call(*args)
