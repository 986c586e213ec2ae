"""Laws of the start values: right where the data says them, finite where it says nothing."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from toys import SEED_TOP, seed_cells, some_cells

from pyro_velo.batch import Cells
from pyro_velo.initial import Constant, Initialisation, SteadyState, top_median
from pyro_velo.kinetics import T_MAX, Rates, trajectory
from pyro_velo.models.velocity import VelocityModel

INITIALISATIONS: dict[str, type[Initialisation]] = {"steady state": SteadyState, "constant": Constant}
everyone = pytest.mark.parametrize("make", INITIALISATIONS.values(), ids=INITIALISATIONS.keys())


def at_steady_states(rates: Rates, ratio: Tensor, n_cells: int = 60) -> Cells:
    """Half the cells empty, half in the upper steady state, without noise."""
    on = (torch.arange(n_cells) % 2)[:, None]
    return Cells.of(on * rates.alpha / rates.beta / ratio, on * rates.alpha / rates.gamma, ratio)


def some_rates(beta: float, n_genes: int = 4) -> Rates:
    gamma = beta * torch.tensor([0.1, 0.5, 1.0, 3.0])
    return Rates(torch.linspace(0.1, 0.6, n_genes), torch.full_like(gamma, beta), gamma, torch.full_like(gamma, 10.0))


@pytest.mark.parametrize("beta", [0.1, 0.2, 1.5])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_alpha_and_gamma_of_the_steady_states_are_recovered(beta: float, ratio: float, double: None) -> None:
    rates = some_rates(beta)
    start = SteadyState(beta=beta)(at_steady_states(rates, torch.full((4,), ratio)))
    assert_close(start.rates.alpha, rates.alpha)
    assert_close(start.rates.beta, rates.beta)
    assert_close(start.rates.gamma, rates.gamma)
    assert_close(start.switch_unspliced, rates.alpha / rates.beta)
    assert_close(start.switch_spliced, rates.alpha / rates.gamma)


def test_a_gene_that_is_observed_on_its_way_starts_nearby(double: None) -> None:
    rates = some_rates(0.4)._replace(switch_time=torch.full((4,), 15.0))
    cells = Cells.of(*trajectory(rates, torch.linspace(0, T_MAX, 200)[:, None].expand(200, 4)))
    start = SteadyState(beta=0.4)(cells).rates
    assert ((start.alpha / rates.alpha - 1).abs() < 0.1).all()
    # gamma is that of the steady state if the gene comes near it before the switch, and above it if not.
    assert (start.gamma > 0.9 * rates.gamma).all()
    assert (start.gamma.argsort() == rates.gamma.argsort()).all()


@everyone
def test_the_ratio_puts_unspliced_into_units_of_spliced(make: type[Initialisation], double: None) -> None:
    cells, one = some_cells(40), some_cells(40)
    ratio = torch.linspace(0.2, 3.0, cells.n_genes)
    # The same cells, once measured in other units.
    cells, one = Cells.of(cells.u, cells.s, ratio), Cells.of(cells.u * ratio, cells.s)
    for name, value in make()(one).sites().items():
        if name != "gamma":
            assert_close(make()(cells).sites()[name], value)


def test_the_slope_takes_the_ratio(double: None) -> None:
    cells = some_cells(40, ratio=1.0)
    slope = {ratio: SteadyState()(Cells.of(cells.u, cells.s, ratio)).rates.gamma for ratio in (1.0, 2.0)}
    assert_close(slope[2.0], 2 * slope[1.0])


def test_constants_of_seed_000(double: None) -> None:
    start = Constant(top=SEED_TOP)(seed_cells())
    expected = {
        "alpha": [0.85, 0.75, 0.55],
        "beta": [0.1] * 3,
        "gamma": [0.05] * 3,
        "switch_time": [10.0] * 3,
    }
    assert list(start.sites()) == list(expected)
    for name, value in start.sites().items():
        assert_close(value, torch.tensor(expected[name]))
    assert_close(start.switch_unspliced, start.rates.alpha)


def test_the_top_percentile_of_four_cells_is_one_cell(double: None) -> None:
    assert_close(Constant()(seed_cells()).rates.alpha, torch.tensor([0.9, 0.8, 0.6]))


@pytest.mark.parametrize(("n_cells", "top"), [(4, 0.5), (100, 0.01), (100, 0.05), (101, 0.5), (7, 1.0), (3, 1e-9)])
def test_top_median_is_the_median_of_the_top(n_cells: int, top: float, double: None) -> None:
    values, ranked_by = torch.rand(n_cells, 3), torch.rand(n_cells, 3)
    n_top = max(1, round(top * n_cells))
    expected = [
        torch.quantile(values[order[-n_top:], g], 0.5) for g, order in enumerate(ranked_by.argsort(0).unbind(1))
    ]
    assert_close(top_median(values, ranked_by, top), torch.stack(expected))


@everyone
@pytest.mark.parametrize("empty", ["unspliced", "spliced", "both"])
def test_a_gene_without_counts_starts_finite_and_positive(make: type[Initialisation], empty: str) -> None:
    cells = some_cells(30)
    molecules = cells.molecules.clone()
    molecules[{"unspliced": slice(0, 1), "spliced": slice(1, 2), "both": slice(0, 2)}[empty], :, 0] = 0
    start = make()(Cells(molecules, cells.ratio))
    for name, value in start.sites().items():
        assert value.isfinite().all() and (value > 0).all(), name
    # The other genes are not touched by it.
    for name, value in make()(cells).sites().items():
        assert_close(start.sites()[name][1:], value[1:])


def test_a_gene_without_spliced_counts_starts_at_gamma_equals_beta() -> None:
    cells = some_cells(30)
    start = SteadyState(beta=0.3)(Cells.of(cells.u, torch.zeros_like(cells.s)))
    assert_close(start.rates.gamma, start.rates.beta)


@everyone
@pytest.mark.parametrize("n_cells", [2, 3, 1000])
def test_shapes_and_dtype_are_the_data_s(make: type[Initialisation], n_cells: int) -> None:
    for dtype in (torch.float32, torch.float64):
        cells = some_cells(n_cells)
        start = make()(Cells.of(cells.u.to(dtype), cells.s.to(dtype)))
        for name, value in start.sites().items():
            assert value.shape == (cells.n_genes,) and value.dtype == dtype, name


@everyone
def test_cells_may_come_in_any_order(make: type[Initialisation], double: None) -> None:
    cells = some_cells(50)
    again = Cells(cells.molecules[:, torch.randperm(50)], cells.ratio)
    for name, value in make()(again).sites().items():
        assert_close(value, make()(cells).sites()[name])


@everyone
def test_the_sites_are_those_of_the_model(make: type[Initialisation]) -> None:
    cells = some_cells()
    program = VelocityModel(initial=make()).build(cells)
    assert set(program.start.sites()) == {*Rates._fields, "noise_unspliced", "noise_spliced"}


@everyone
def test_start_values_lie_within_their_priors(make: type[Initialisation]) -> None:
    program = VelocityModel(initial=make()).build(some_cells(200))
    start = program.start.sites()
    for name, value in start.items():
        prior = program.recipe.all_priors.of(name, start, kind="noise" if name.startswith("noise") else None)
        assert prior.support.check(value).all() and prior.log_prob(value).isfinite().all(), name
