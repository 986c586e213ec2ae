"""A step for all parameters at once is Pyro's own, parameter by parameter, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pyro
import pytest
import torch
from pyro.optim import ClippedAdam
from tolerances import TOLERANCES
from torch import Tensor

from pyro_velo.optimizer import step_together

SHAPES = {"scalar": (), "vector": (7,), "matrix": (5, 3), "empty": (0, 4), "heads": (4, 3, 11)}
SETTINGS = {
    "default": {"lr": 1e-2},
    "clipped": {"lr": 1e-2, "clip_norm": 0.3},
    "decaying": {"lr": 0.1, "lrd": 0.9, "betas": (0.8, 0.95), "eps": 1e-4},
    "decayed weights": {"lr": 1e-2, "weight_decay": 0.1},
    "centered": {"lr": 1e-2, "centered_variance": True},
}


def gradients(step: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Those of a step, ten times larger than the last; the matrix has none at first, the vector none in the middle."""
    draw = torch.Generator().manual_seed(step)
    found = {name: 10.0 ** (step - 3) * torch.randn(s, generator=draw, dtype=dtype) for name, s in SHAPES.items()}
    return {**found, **({"matrix": None} if step < 2 else {}), **({"vector": None} if step == 3 else {})}


def run(together: bool, steps: range, options: dict, dtype: torch.dtype, state: dict | None = None, start=None):
    """The values and the state after some steps."""
    with pyro.get_param_store().scope():
        start = start or {name: torch.linspace(-1, 1, torch.Size(s).numel(), dtype=dtype) for name, s in SHAPES.items()}
        values = [pyro.param(name, value.clone().reshape(SHAPES[name])) for name, value in start.items()]
        optimizer = ClippedAdam(dict(options))
        if state is not None:
            optimizer.set_state(deepcopy(state))
        for step in steps:
            for value, gradient in zip(values, gradients(step, dtype).values(), strict=True):
                value.grad = None if gradient is None else gradient.clone()
            if together:
                step_together(optimizer, values)
            else:
                optimizer(values)
        kept = {name: value.detach().clone() for name, value in zip(start, values, strict=True)}
        return kept, deepcopy(optimizer.get_state())


def same(one, other, equal: Callable[[Tensor, Tensor], bool] = torch.equal) -> bool:
    """Whether nested states agree, tensors as `equal` has it: to the bit."""
    if isinstance(one, Tensor):
        return equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], equal) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*each, equal) for each in zip(one, other, strict=True))
    return one == other


def close(one, other) -> bool:
    """Whether nested states agree to rounding."""
    return same(one, other, lambda a, b: torch.allclose(a, b, **TOLERANCES[a.dtype]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_step_and_state_are_those_of_pyro(options, dtype):
    together, again, apart = (run(each, range(6), options, dtype) for each in (True, True, False))
    assert same(together, again) and close(together, apart)
    assert not close(together[0], run(True, range(5), options, dtype)[0])


def test_states_go_from_one_to_the_other():
    options = SETTINGS["decaying"]
    whole = run(False, range(6), options, torch.float32)
    for first, second in ((True, False), (False, True), (True, True)):
        values, state = run(first, range(3), options, torch.float32)
        assert close(run(second, range(3, 6), options, torch.float32, state, values), whole)


def test_a_gradient_that_lies_otherwise_in_memory_moves_the_elements_that_it_is_of():
    with pyro.get_param_store().scope():
        value, optimizer = pyro.param("matrix", torch.zeros(3, 4)), ClippedAdam({"lr": 0.1})
        for _ in range(3):
            value.grad = torch.tensor([[-1.0, 1, 1, -1], [1, 1, -1, 1], [-1, -1, 1, 1]]).t().contiguous().t()
            step_together(optimizer, [value])
        assert torch.equal(value.detach().sign(), -value.grad.sign())


def test_a_lower_rate_of_one_parameter_is_its_own():
    with pyro.get_param_store().scope():
        slow, fast = (pyro.param(name, torch.zeros(3)) for name in ("slow", "fast"))
        optimizer = ClippedAdam({"lr": 0.1})
        for _ in range(3):
            slow.grad, fast.grad = torch.ones(3), torch.ones(3)
            step_together(optimizer, [slow, fast])
            optimizer.optim_objs[slow].param_groups[0]["lr"] = 0.0
        # A gradient that stays the same moves by the rate: once, and three times.
        torch.testing.assert_close(slow.detach(), torch.full((3,), -0.1), atol=1e-6, rtol=0)
        torch.testing.assert_close(fast.detach(), torch.full((3,), -0.3), atol=1e-6, rtol=0)
