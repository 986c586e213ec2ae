"""Laws of the order before a fit: curves that made the cells are found, and an order comes out better."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from tolerances import assert_close
from torch import Tensor

from pyro_velo import simulate
from pyro_velo.batch import Cells
from pyro_velo.initial import SteadyState
from pyro_velo.kinetics import T_MAX, Rates, trajectory
from pyro_velo.ordering import ONSETS, SWITCHES, _scored, by_phase, curves_along, improved, nearest, ranks

GAMMA = torch.tensor([0.1, 0.2, 0.4, 0.1, 0.2, 0.4], dtype=torch.float64)
START = Rates(torch.ones_like(GAMMA), torch.full_like(GAMMA, 0.2), GAMMA, torch.full_like(GAMMA, 10.0))
ONSET = torch.tensor([ONSETS[i] for i in (1, 2, 0, 5, 3, 1)], dtype=torch.float64)
SWITCH = torch.tensor([SWITCHES[i] for i in (3, 3, 3, 4, 4, 4)], dtype=torch.float64)
TRUE = Rates(torch.linspace(0.2, 1.2, 6, dtype=torch.float64), 2 * START.beta, 2 * START.gamma, SWITCH)
RATIO = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)


def on_their_curves(n_cells: int = 400) -> tuple[Cells, Tensor]:
    """Cells without noise, one after the other in time, and their times."""
    t = T_MAX * (torch.arange(n_cells, dtype=torch.float64) + 0.5) / n_cells
    u, s = trajectory(TRUE, (t[:, None] - ONSET).clamp_min(0))
    return Cells.of(u / RATIO, s, RATIO), t


def simulated(n_cells: int = 300, n_genes: int = 40, seed: int = 0) -> tuple[Cells, Tensor]:
    found = simulate.simulate(n_cells, n_genes, seed=seed)
    layers = [torch.as_tensor(x / x.max(0), dtype=torch.float32) for x in (found.unspliced, found.spliced)]
    return Cells.of(*layers), torch.as_tensor(found.true_t)


def test_curves_that_made_the_cells_are_found_whatever_their_place_in_the_table() -> None:
    cells, t = on_their_curves()
    mixed = torch.randperm(len(t))
    found = curves_along(Cells(cells.molecules[:, mixed], cells.ratio), ranks(t[mixed]), START)
    assert_close(found.onset, ONSET)
    for name in ("beta", "gamma", "switch_time"):
        assert_close(getattr(found.rates, name), getattr(TRUE, name))
    # Bins are means of cells, which lie a little inside of a bend.
    torch.testing.assert_close(found.rates.alpha, TRUE.alpha, rtol=0.01, atol=0.0)


def test_cells_on_the_curves_are_put_where_they_are() -> None:
    cells, t = on_their_curves()
    away = (ranks(t) + 0.1 * torch.sin(37 * t)).clamp(0, 1)
    order = nearest(cells, curves_along(cells, ranks(t), START), away)
    assert spearmanr(order, t).statistic > 0.999
    assert order.min() == 0 and order.max() == 1 and len(order.unique()) == len(order)


@pytest.mark.parametrize("seed", [0, 3])
def test_an_order_comes_out_better_than_it_went_in_and_misses_less(seed: int) -> None:
    cells, t = simulated(seed=seed)
    start = SteadyState()(cells).rates
    phase = by_phase(cells, start)
    # Late cells look like early ones: an order that takes a third of them for the other.
    looped = torch.where(t > 14, 20 - t, t)
    order = improved(cells, [ranks(looped), phase], start)
    before, after = spearmanr(phase, t).statistic, spearmanr(order, t).statistic
    assert after > 0.99 > before
    assert _scored(cells, order, start)[0] <= min(_scored(cells, each, start)[0] for each in (ranks(looped), phase))


def test_an_order_that_is_right_stays() -> None:
    cells, t = simulated(seed=1)
    order = improved(cells, [ranks(t)], SteadyState()(cells).rates)
    assert spearmanr(order, t).statistic > 0.995


@pytest.mark.parametrize("n_cells", [1, 2, 3, 60])
def test_few_cells_have_an_order_too(n_cells: int) -> None:
    cells, _ = on_their_curves(n_cells)
    order = improved(cells, [by_phase(cells, START)], START)
    assert order.shape == (n_cells,) and order.isfinite().all() and order.min() == 0


def test_ranks_run_from_zero_to_one_and_leave_ties_in_place() -> None:
    assert_close(ranks(torch.tensor([3.0, -1.0, 3.0, 0.0, 7.0])), torch.tensor([0.5, 0.0, 0.75, 0.25, 1.0]))
    assert_close(ranks(torch.tensor([5.0])), torch.tensor([0.0]))
