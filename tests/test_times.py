"""The times of a cell's genes: where they may be, and what ties them to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_velo.kinetics import T_MAX
from pyro_velo.times import TIMES, Timed, from_time

N, G, D = 200, 6, 3
SWITCH = torch.linspace(1.0, 19.0, G)


def timed(name: str, seed: int = 0, spread: float = 0.0) -> Timed:
    """Times of random cells; `spread` moves every parameter away from its start."""
    torch.manual_seed(seed)
    recipe = TIMES[name]()
    network = recipe.build(D, G, (8,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        return network(3 * torch.randn(N, D), SWITCH, recipe.start(SWITCH))


def full(x: Tensor) -> Tensor:
    return x.expand(N, G)


@pytest.mark.parametrize("name", TIMES)
def test_times_stay_in_their_state(name: str) -> None:
    found = timed(name, spread=2.0)
    on, off = full(found.on), full(found.off)
    assert (on >= 0).all() and (on <= SWITCH).all()
    assert (off >= 0).all() and (off <= T_MAX - SWITCH + 1e-5).all()


@pytest.mark.parametrize("name", ["shared", "hierarchical"])
def test_a_cell_starts_with_one_time_for_all_its_genes(name: str) -> None:
    found = timed(name)
    t = full(found.on) + full(found.off)
    torch.testing.assert_close(t, t[:, :1].expand(N, G), rtol=1e-5, atol=1e-4)


def test_genes_of_the_hierarchy_can_leave_it_and_pay() -> None:
    torch.manual_seed(0)
    found = timed("hierarchical", spread=2.0)
    assert found.deviations is not None and found.deviations.std(1).min() > 0.1
    assert timed("hierarchical").deviations.abs().max() == 0


def test_time_says_which_state_a_gene_is_in() -> None:
    t = torch.linspace(0, T_MAX, 41)[:, None]
    found = from_time(t, SWITCH, blur=0.5)
    on, off = (weight.exp() for weight in found.log_weights)
    torch.testing.assert_close(on + off, torch.ones(41, G))
    assert (on[t.expand(41, G) < SWITCH - 3] > 0.99).all() and (off[t.expand(41, G) > SWITCH + 3] > 0.99).all()
    torch.testing.assert_close(full_time(found), t.expand(41, G))


def full_time(found: Timed) -> Tensor:
    return found.on + found.off


def test_the_switch_has_a_gradient_from_either_side() -> None:
    switch = torch.full((1,), 8.0, requires_grad=True)
    for t, sign in ((6.0, 1), (10.0, 1)):
        found = from_time(torch.tensor([[t]]), switch, blur=0.5)
        (gradient,) = torch.autograd.grad(found.log_weights[0].sum(), switch)
        assert gradient.sign() == sign
