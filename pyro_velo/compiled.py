"""Pure functions of tensors, compiled to fused kernels where that pays and a compiler is at hand."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

WORTH_COMPILING = 120_000_000
"""Elements to go through, below which compiling costs more than it saves (measured on two cores)."""

WORTH_FUSING = 120_000_000
"""Cells x genes x steps, below which compiling what gradients flow through costs more than it saves (on two cores)."""

WORTH_RECORDING = 500
"""Steps from which recording one pays, where fusing does: it takes some 30 s, and 4 with torch's cache on disk."""

WORTH_LOOKING = 60_000_000
"""Cells x genes x looks, from which recording a look pays the first time (on two cores): it takes 19 s, and 3 again."""

OPERATIONS_AT_ONCE = 1000
"""What a function may do in one pass over memory: torch's 64 breaks a draw into several, with arrays between them."""

OPTIONS: Mapping[str, Any] = {"max_fusion_size": OPERATIONS_AT_ONCE, "cpp.vec_isa_ok": True}
"""What torch's compiler is told; not to try out whether g++ knows vectors of each width, which takes 10 s."""

VARIANTS = 256
"""Models and numbers of genes for which one process compiles a function; torch's 8 are soon used up in a notebook."""

_PAYS: ContextVar[bool] = ContextVar("pays", default=False)
_RECORDS: ContextVar[bool] = ContextVar("records", default=False)


def compiled(function: Callable[..., Result], elements: int, device: torch.device) -> Callable[..., Result]:
    """`function`, compiled if it will go through `elements` enough on a CPU; as it is where no compiler works.

    The results agree to rounding. A function that changes its arguments must do so only after everything else.
    """
    return _OrAsItIs(function) if _worth(elements, WORTH_COMPILING, device) else function


@contextmanager
def fusing(elements: int, device: torch.device) -> Iterator[None]:
    """Within it, what is `fusible` is compiled where gradients flow, if `elements` will go through it on a CPU.

    `elements` counts cells x genes x steps. As in `compiled`, results agree to rounding, and all stays as it is where
    no compiler works.
    """
    token = _PAYS.set(_worth(elements, WORTH_FUSING, device))
    try:
        yield
    finally:
        _PAYS.reset(token)


def fuses() -> bool:
    """Whether a `fusible` function that is called now is compiled."""
    return pays() and torch.is_grad_enabled()


def pays() -> bool:
    """Whether it is called within `fusing`, and enough will go through it, be it with a gradient or without."""
    return not torch.compiler.is_compiling() and _PAYS.get()


@contextmanager
def recording() -> Iterator[None]:
    """Within it, what is done to tensors is recorded and will be compiled: `fusible` functions are as they are."""
    tokens = _PAYS.set(True), _RECORDS.set(True)
    try:
        yield
    finally:
        _PAYS.reset(tokens[0])
        _RECORDS.reset(tokens[1])


def worth_recording(steps: int, elements: int, device: torch.device) -> bool:
    """Whether that pays for whole steps, of which all together go through `elements` (as in `fusing`)."""
    return steps >= WORTH_RECORDING and _worth(elements, WORTH_FUSING, device)


def worth_looking(elements: int, device: torch.device) -> bool:
    """Whether recording pays for looks at held-out cells, which go through `elements`."""
    return _worth(elements, WORTH_LOOKING, device)


def compiling() -> bool:
    """Whether what is done now is compiled, and so one pass over memory."""
    return torch.compiler.is_compiling() or _RECORDS.get()


@contextmanager
def unfused() -> Iterator[None]:
    """Within it nothing is compiled: for looks at what a fused function does not tell apart."""
    token = _PAYS.set(False)
    try:
        yield
    finally:
        _PAYS.reset(token)


def fusible(function: Callable[..., Result], where: Callable[[], bool] = fuses) -> Callable[..., Result]:
    """`function`, which within `fusing` is one pass over memory and not one for each of its operations.

    That is `where` gradients flow, or with `pays` where they don't. It is compiled once for each number of genes and
    any number of cells, which are on the last axis but one of the first tensor among its arguments, genes on the last.
    Gene-level values that meet cells in it are `spread` first.
    """

    @cache
    def fused() -> _OrAsItIs:
        return _OrAsItIs(function)

    @wraps(function)
    def call(*args: Any) -> Result:
        if compiling() or not where():
            return function(*args)
        _cells_vary(args)
        return fused()(*args)

    return call


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A gene-level `value` (G,) as (B, G), the shape of `like`, where it is compiled; elsewhere as it is.

    Its gradient is a sum over cells; see `summed_to`.
    """
    wanted = compiling() and torch.is_grad_enabled() and value.ndim == 1
    return _Spread.apply(value, like) if wanted else value


def once(value: Tensor) -> Tensor:
    """A gene-level `value` (G,) that is computed once and not for each cell, where it is compiled without gradients."""
    wanted = compiling() and not torch.is_grad_enabled() and value.ndim == 1
    # The compiler keeps in memory what is looked at by strides.
    return value.as_strided(value.shape, value.stride()) if wanted else value


def summed_to(shape: torch.Size, value: Tensor) -> Tensor:
    """`value.sum_to_size(shape)`, where it is compiled and `shape` is the genes' as a product with ones.

    A sum over cells would be compiled into a pass gene by gene, across all rows of memory.
    """
    if compiling() and len(shape) == 1 and value.ndim == 2 and shape[0] == value.shape[1]:
        return torch.mm(value.new_ones(1, value.shape[0]), value).squeeze(0)
    return value.sum_to_size(shape)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, like: Tensor) -> Tensor:
        ctx.shape = value.shape
        return value.expand_as(like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed_to(ctx.shape, grads[0]), None


def _worth(elements: int, least: int, device: torch.device) -> bool:
    return device.type == "cpu" and elements >= least and shutil.which("g++") is not None


def _tensors(node: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, (tuple, list)):
        for each in node:
            yield from _tensors(each)
    elif isinstance(node, dict):
        yield from _tensors(tuple(node.values()))
    elif is_dataclass(node):
        yield from _tensors(tuple(vars(node).values()))


def _cells_vary(args: tuple[Any, ...]) -> None:
    """Tell the compiler which axes have another length in the next batch: those as long as the first tensor's cells."""
    tensors = tuple(_tensors(args))
    for tensor in tensors:
        for axis, length in enumerate(tensor.shape):
            if length == tensors[0].shape[-2]:
                torch._dynamo.maybe_mark_dynamic(tensor, axis)


class _OrAsItIs:
    """Calls the compiled function, and if a call fails the function itself, from then on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        # Whole, or it would fall into parts, with arrays between them, without a word.
        self.call = torch.compile(function, fullgraph=True, dynamic=False, options=dict(OPTIONS))

    def __call__(self, *args: Any) -> Any:
        try:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                return self.call(*args)
        except Exception as error:
            if self.call is self.function:
                raise
            first = str(error).strip().partition("\n")[0]
            warnings.warn(f"torch.compile failed, so this goes on slower without it: {first}", stacklevel=2)
            self.call = self.function
            return self.call(*args)
