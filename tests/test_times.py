"""The times of a cell's genes: where they may be, and what ties them to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_velo.kinetics import T_MAX, Rates, induction, repression
from pyro_velo.times import TIMES, Timed, cell_time, from_time

N, G, D = 200, 6, 3
SWITCH = torch.linspace(1.0, 19.0, G)


ONSET = torch.linspace(0.5, 4.0, G)


def timed(name: str, seed: int = 0, spread: float = 0.0) -> Timed:
    """Times of random cells; `spread` moves every parameter and loading away from its start."""
    torch.manual_seed(seed)
    recipe = TIMES[name]()
    network = recipe.build(D, G, (8,))
    values = {**recipe.start(SWITCH), **({"onset": ONSET} if recipe.shared else {})}
    if recipe.width("deviation"):
        values["deviation"] = spread * torch.randn_like(values["deviation"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        return network(torch.randn(N, D), SWITCH, values)


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
    assert found.own is not None and found.shared is not None
    torch.testing.assert_close(full(found.own), full(found.shared))
    after = (found.own - ONSET).clamp_min(0)
    torch.testing.assert_close(full(found.on) + full(found.off), full(after))


def test_a_cell_is_at_any_time_before_it_is_seen() -> None:
    torch.manual_seed(0)
    z = torch.randn(20_000, 1).double()
    share = cell_time(z) / T_MAX
    edges = torch.linspace(0.1, 0.9, 9)
    below = (share <= edges).double().mean(0)
    assert (below - edges).abs().max() < 0.015


def test_genes_of_the_hierarchy_can_leave_the_cells_time() -> None:
    found = timed("hierarchical", spread=2.0)
    assert found.own is not None and found.shared is not None
    assert (found.own - found.shared).std(1).min() > 0.1
    torch.testing.assert_close(full(timed("hierarchical").own), full(timed("hierarchical").shared))


def test_a_deviation_is_linear_in_its_loadings_on_the_scale_of_z() -> None:
    recipe = TIMES["hierarchical"]()
    network, z = recipe.build(D, G, (8,)), torch.randn(N, D)
    values = recipe.start(SWITCH)
    loadings = 0.1 * torch.randn_like(values["deviation"])
    at = [network(z, SWITCH, {**values, "deviation": x * loadings}).own for x in (0.0, 1.0, 2.0)]
    one, two, three = (torch.special.ndtri(x.double() / T_MAX) for x in at)
    torch.testing.assert_close(two - one, three - two, rtol=1e-3, atol=1e-4)


def test_time_says_which_state_a_gene_is_in() -> None:
    t = torch.linspace(0, T_MAX, 41)[:, None]
    found = from_time(t, ONSET, SWITCH, elsewhere=0.1)
    assert found.log_weights is not None
    on, full_on, off, empty = (weight.exp().expand(41, G) for weight in found.log_weights)
    torch.testing.assert_close(on + off, torch.ones(41, G))
    since = t - ONSET
    assert torch.equal(on == 1, since <= SWITCH)
    torch.testing.assert_close(empty, torch.full((41, G), 0.1))
    assert (full_on == 0).all(), "a steady state tells no time"
    torch.testing.assert_close(found.on + found.off, since.clamp_min(0))
    assert (found.on[since <= 0] == 0).all() and (found.off[since <= 0] == 0).all()


def test_the_curve_has_no_step_at_the_switch_and_a_gradient_in_it() -> None:
    rates = Rates(
        *(torch.tensor([value], dtype=torch.float64) for value in (2.0, 0.5, 0.4)), torch.tensor([5.0]).double()
    )
    onset = torch.tensor([3.0]).double()

    def at(t: float, switch: Tensor) -> Tensor:
        found = from_time(torch.tensor([[t]]).double(), onset, switch, elsewhere=0.1)
        assert found.log_weights is not None
        u, s = induction(*rates[:3], found.on)
        after = repression(*induction(*rates[:3], switch), rates.beta, rates.gamma, found.off)
        state = torch.stack([weight[0, 0] for weight in found.log_weights]).argmax()
        return torch.stack((u, s) if state == 0 else after).squeeze()

    switch = rates.switch_time
    torch.testing.assert_close(at(8 - 1e-9, switch), at(8 + 1e-9, switch))
    for t in (9.0, 14.0):
        slope = torch.autograd.functional.jacobian(lambda x, t=t: at(t, x), switch).squeeze()
        torch.testing.assert_close(slope, (at(t, switch + 1e-6) - at(t, switch - 1e-6)) / 2e-6, rtol=1e-5, atol=1e-7)
        assert (slope != 0).all()
