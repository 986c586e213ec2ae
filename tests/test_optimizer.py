"""A step for all parameters at once is Pyro's own, parameter by parameter, to the bit."""

from __future__ import annotations

from copy import deepcopy

import pyro
import pytest
import torch
from pyro.optim import ClippedAdam

from pyro_velo.optimizer import step_together

SHAPES = {"scalar": (), "vector": (7,), "matrix": (5, 3), "empty": (0, 4), "heads": (4, 3, 11)}
SETTINGS = {
    "default": {"lr": 1e-2},
    "clipped": {"lr": 1e-2, "clip_norm": 0.3},
    "decaying": {"lr": 0.1, "lrd": 0.9, "betas": (0.8, 0.95), "eps": 1e-4},
    "decayed weights": {"lr": 1e-2, "weight_decay": 0.1},
    "centered": {"lr": 1e-2, "centered_variance": True},
}


def gradients(step: int, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
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


def same(one, other) -> bool:
    """Whether nested states agree to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_step_and_state_are_those_of_pyro(options, dtype):
    together, apart = (run(each, range(6), options, dtype) for each in (True, False))
    assert same(together, apart)
    assert not same(together[0], run(True, range(5), options, dtype)[0])


def test_states_go_from_one_to_the_other():
    options = SETTINGS["decaying"]
    whole = run(False, range(6), options, torch.float32)
    for first, second in ((True, False), (False, True), (True, True)):
        values, state = run(first, range(3), options, torch.float32)
        assert same(run(second, range(3, 6), options, torch.float32, state, values), whole)


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
