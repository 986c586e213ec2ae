"""Rates and clock held together: the joint Normal is the one its blocks say, and intervals come to cover the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from small import MODEL, settings, small_adata, small_cells
from torch import Tensor

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.batch import Cells
from pyro_velo.cell_scores import scores
from pyro_velo.coupled_rates import CoupledRates, Genes, bends
from pyro_velo.coupling import CLOCKS, ENOUGH, LOOKS, SHORTEST, STRIDE, Information, Search, applies, couple
from pyro_velo.evidence import evidence
from pyro_velo.fitting import Fit
from pyro_velo.guides import WARP, Amortized
from pyro_velo.posterior import draw_rates
from pyro_velo.rates import MeanField, PerGene
from pyro_velo.state_posterior import posterior_of_states
from pyro_velo.times import TIMES
from pyro_velo.train import Fitted, train

GUIDE = Amortized(rates=PerGene(), hidden=(8,), hidden_states=(8,))
SHARED = replace(MODEL, times=TIMES["shared"](), likelihood=pv.likelihoods.Tobit())
COUNTED = replace(SHARED, likelihood=pv.likelihoods.NB(), library=pv.library.Inferred())
G, K, M = 3, 2, 4


@pytest.fixture(scope="module")
def alone() -> Fitted:
    """A fit of a shared clock, whose rates and cells are independent of each other."""
    return train(SHARED, GUIDE, small_cells(), settings=settings(), progress=False)


@pytest.fixture(scope="module")
def uncoupled() -> Fit:
    data = pv.velocity_data(small_adata(150, 20), as_is=True)
    return Fit(train(SHARED, GUIDE, data.cells, settings=pv.TrainSettings(max_steps=500), progress=False), data, "")


@pytest.fixture(scope="module")
def fit(uncoupled: Fit) -> Fit:
    return replace(uncoupled, fitted=couple(uncoupled.fitted, uncoupled.data.cells, progress=False))


def counted_cells(n_cells: int = 40, n_genes: int = 5) -> Cells:
    """Counts of cells whose libraries differ."""
    settings = simulate.Settings(
        noise=simulate.NegativeBinomial(library_size=simulate.LibrarySize(sd=0.5)),
        kinetics=simulate.LogNormalRates(drop=0),
    )
    adata = pv.to_anndata(simulate.simulate(n_cells, n_genes, settings=settings))
    return pv.velocity_data(adata, as_is=True, counts=True).cells


def doubled(cells: Cells) -> Cells:
    """The same in float64."""
    counts = cells.counts and replace(
        cells.counts, **{name: each.double() for name, each in vars(cells.counts).items()}
    )
    return replace(cells, molecules=cells.molecules.double(), counts=counts)


def arrow(seed: int = 0) -> tuple[Information, Tensor]:
    """Information of G genes' K values and M warps, from scores as cells give them; and the whole matrix of it."""
    torch.manual_seed(seed)
    a, b = torch.randn(60, G, K, dtype=torch.float64), torch.randn(60, G, dtype=torch.float64)
    phi = bends(torch.randn(60, dtype=torch.float64), M)
    rows = torch.zeros(60, G, G * K + M, dtype=torch.float64)
    for g in range(G):
        rows[:, g, g * K : (g + 1) * K] = a[:, g]
    rows[..., G * K :] = b[..., None] * phi[:, None]
    rows = rows.flatten(0, 1)
    zero = torch.zeros(())
    information = Information(
        torch.einsum("ngi,ngj->gij", a, a), torch.einsum("ngi,ng,nm->gim", a, b, phi),
        torch.einsum("ng,nm,nl->ml", b**2, phi, phi), zero, zero, 0.0,
    )  # fmt: skip
    return information, rows.T @ rows


def test_the_covariance_is_the_inverse_of_the_whole_matrix() -> None:
    information, whole = arrow()
    root, response, warp_root = information.covariance()
    inverse = torch.linalg.inv(whole)
    warps = warp_root @ warp_root.mT
    torch.testing.assert_close(warps, inverse[G * K :, G * K :])
    for g in range(G):
        own = slice(g * K, (g + 1) * K)
        torch.testing.assert_close(root[g] @ root[g].mT + response[g] @ warps @ response[g].mT, inverse[own, own])
        torch.testing.assert_close(-response[g] @ warps, inverse[own, G * K :])
        other = slice((g + 1) % G * K, (g + 1) % G * K + K)
        torch.testing.assert_close(response[g] @ warps @ response[(g + 1) % G].mT, inverse[own, other])


def test_draws_have_that_covariance() -> None:
    covariance = arrow()[0].covariance()
    torch.manual_seed(0)
    drawn = [covariance.draw() for _ in range(20_000)]
    x, w = (torch.stack(each) for each in zip(*drawn, strict=True))
    inverse = torch.linalg.inv(arrow()[1])
    sd = inverse.diagonal().sqrt()
    correlation = torch.corrcoef(torch.cat((x.flatten(1), w), 1).T)
    torch.testing.assert_close(correlation, inverse / sd / sd[:, None], atol=0.04, rtol=0)


def test_bends_add_up_to_one_and_are_smooth() -> None:
    z = torch.linspace(-3, 3, 201, dtype=torch.float64)
    found = bends(z, 9)
    torch.testing.assert_close(found.sum(1), torch.ones(201, dtype=torch.float64))
    assert (found >= 0).all() and torch.linalg.matrix_rank(found) == 9
    assert found.diff(dim=0).abs().max() < 0.15


@pytest.mark.parametrize("times", ["shared", "hierarchical", "shared, library inferred"])
def test_scores_are_the_gradients_of_the_log_likelihood(double: None, times: str) -> None:
    times, _, inferred = times.partition(",")
    model = replace(COUNTED if inferred else SHARED, times=TIMES[times](), priors=pv.Priors())
    cells = doubled(counted_cells() if inferred else small_cells())
    fitted = train(model, GUIDE, cells, settings=settings(max_epochs=1), progress=False)
    with fitted.parameters():
        batch = cells.batch(torch.arange(7))
        genes = Genes(fitted.program, fitted.guide.rates.marginals())
        torch.manual_seed(0)
        x, z = genes.start() + 0.1 * torch.randn(5, len(genes.coupled)), torch.randn(7, fitted.program.n_latent)
        log_p, in_x, in_place = scores(fitted.program, fitted.guide, genes, x, z, batch)
        torch.testing.assert_close(scores(fitted.program, fitted.guide, genes, x, z, batch)[0], log_p)

        def moved(k: int, h: float) -> Tensor:
            at = x.clone()
            at[:, k] += h
            return scores(fitted.program, fitted.guide, genes, at, z, batch)[0]

        for k in range(x.shape[1]):
            slope = (moved(k, 1e-5) - moved(k, -1e-5)) / 2e-5
            torch.testing.assert_close(in_x[..., k].sum(1), slope, rtol=1e-4, atol=1e-4)
        # The weights of the states stay where z put them, so the clock is moved by what genes read of it alone.
        cell_sites = poutine.trace(fitted.guide.cells).get_trace(batch, dist.Delta(z[:, None], event_dim=1))
        values = genes.values(x) | {"pi": cell_sites.nodes["pi"]["value"]}

        def read(h: float, dimension: int) -> Tensor:
            at = z.clone()
            at[:, dimension] += h
            own = fitted.program.times.own(fitted.program.of_kinetics(at), values)
            timed = fitted.program.times.at(own.expand(7, 5), values["switch_time"], values)
            told = fitted.program.explain_at(timed, values | {"z": at[:, None]}, batch)
            return posterior_of_states(told.log_joint)[1]

        for k, dimension in enumerate([0, -1] if inferred else [0]):
            slope = (read(1e-6, dimension) - read(-1e-6, dimension)) / 2e-6
            torch.testing.assert_close(in_place[..., k], slope, rtol=1e-4, atol=1e-4)
            assert (slope != 0).any()


def test_gradient_and_hessian_of_cells_are_in_the_axes_of_their_normals(double: None) -> None:
    cells = doubled(counted_cells())
    model = replace(COUNTED, priors=pv.Priors())
    fitted = train(model, GUIDE, cells, settings=settings(max_epochs=1), progress=False)
    with fitted.parameters():
        search = Search(fitted, cells)
        search.x = search.x.detach()
        search.root = 1e-3 * (torch.randn_like(search.root).tril(-1) + torch.eye(2))
        rates, place, h = torch.zeros_like(search.x), torch.zeros_like(search.place), 1e-5
        _, slope, curvature = search._either_side(rates, place)
        _, gradient = search._at(search.x, search.place)
        each = [h * torch.eye(2)[c] for c in range(2)]
        moved = [[search._at(search.x, search.place + s * step)[1] for s in (1, -1)] for step in each]
        hessian = torch.stack([(ahead - behind) / (2 * h) for ahead, behind in moved], -1)
    root = search.root
    torch.testing.assert_close(slope, (root.mT @ gradient[..., None])[..., 0], rtol=1e-3, atol=1e-6)
    # In cells at the step of a gene's switch the curve has no second derivative.
    expected = -(root.mT @ hessian @ root)
    close = torch.isclose(curvature, expected, rtol=0.02, atol=1e-7).all(-1).all(-1)
    assert close.double().mean() > 0.8


def test_a_cell_that_has_settled_stays(double: None) -> None:
    cells = doubled(counted_cells())
    fitted = train(COUNTED, GUIDE, cells, settings=settings(max_epochs=1), progress=False)
    with fitted.parameters():
        search = Search(fitted, cells)
        place, root = search.place.clone(), search.root.clone()
        search._move_cells(torch.zeros_like(place), torch.eye(2).expand_as(root))
        torch.testing.assert_close((search.place, search.root @ search.root.mT), (place, root @ root.mT))
        # Twice the information along one axis of a cell: the precision goes half of the way, if steps are half as long.
        search.stride = 0.5
        more = torch.eye(2) + torch.tensor([[1.0, 1.0], [1.0, 1.0]]) / 2
        search._move_cells(torch.zeros_like(place), more.expand_as(root))
        found = torch.linalg.inv(root) @ search.root @ search.root.mT @ torch.linalg.inv(root).mT
        torch.testing.assert_close(found, torch.linalg.inv((more + torch.eye(2)) / 2).expand_as(found))


@pytest.mark.parametrize("inferred", [False, True], ids=["known sizes", "inferred sizes"])
def test_cells_settle_with_the_moments_of_their_posterior(double: None, inferred: bool) -> None:
    cells, model = (doubled(counted_cells()), COUNTED) if inferred else (doubled(small_cells()), SHARED)
    fitted = train(model, GUIDE, cells, settings=settings(), progress=False)
    with fitted.parameters(), pyro.validation_enabled(False):
        search = Search(fitted, cells)
        search.climb(progress=False)
        before, root = search.place, search.root
        # On a grid of the cell's own axes, five sds to either side.
        axis = torch.linspace(-5, 5, 81)
        grid = torch.cartesian_prod(axis, axis) if inferred else axis[:, None]
        batch = cells.batch(torch.arange(len(cells)))
        with torch.no_grad():
            log_p = torch.stack([search._log_joint(before + root @ point, batch) for point in grid])
        weights = torch.softmax(log_p, 0)
        mean = before + (root @ (weights.mT @ grid)[..., None])[..., 0]
        off = (grid - weights[..., None].mul(grid[:, None]).sum(0)[:, None]).unsqueeze(-1)
        covariance = root @ (weights.mT[..., None, None] * (off @ off.mT)).sum(1) @ root.mT
        search.settle()
    sds = root @ root.mT
    scale = sds.diagonal(dim1=1, dim2=2).sqrt()
    # Curves have kinks where genes are switched off, which points far apart do not see.
    close = ((search.place - mean) / scale).abs() < 0.1
    assert close.double().mean() > 0.9
    ratio = (search.root @ search.root.mT).diagonal(dim1=1, dim2=2) / covariance.diagonal(dim1=1, dim2=2)
    assert ((ratio - 1).abs() < 0.15).double().mean() > 0.9
    assert not torch.equal(search.place, before)


@pytest.mark.parametrize("inferred", [False, True], ids=["known sizes", "inferred sizes"])
def test_cells_at_the_wrong_end_of_time_are_brought_back_and_the_others_stay(inferred: bool) -> None:
    cells, model = (counted_cells(80, 20), COUNTED) if inferred else (small_cells(150, 20), SHARED)
    fitted = train(model, GUIDE, cells, settings=settings(max_epochs=1), progress=False)
    with fitted.parameters():
        search = Search(fitted, cells)
        search.seek()
        settled = search.place
        before = torch.cat([search._log_joint(settled[batch.index], batch) for batch in search._batches()])
        # What is left to gain is less than what it takes to move.
        search.seek()
        assert (search.place == settled).all()
        lost = torch.arange(0, len(cells), 7)
        search.place = settled.clone()
        search.place[lost, 0] = 2.5 * torch.where(settled[lost, 0] > 0, -1.0, 1.0).double()
        search.seek()
        after = torch.cat([search._log_joint(search.place[batch.index], batch) for batch in search._batches()])
    others = torch.ones(len(cells), dtype=torch.bool).index_fill(0, lost, False)
    assert (search.place[others] == settled[others]).all()
    # A cell is found within a step of the times at which it is looked for.
    grid = torch.special.ndtr(search.place[lost, 0]) * CLOCKS
    torch.testing.assert_close(grid % 1, torch.full_like(grid, 0.5), rtol=0.0, atol=1e-6)
    assert (search.place[:, 1:] == settled[:, 1:]).all() and after[lost].mean() > before[lost].mean() - 5.0


@pytest.mark.parametrize("lost_at", ["end", "start"])
def test_a_clock_is_turned_to_where_no_cell_stands_and_no_curve_moves(uncoupled: Fit, lost_at: str) -> None:
    """A few cells stand beyond a gap: they come to the other end, and what is expected of all others stays."""
    cells, fitted = uncoupled.data.cells, uncoupled.fitted
    few, gap, n = 5, 6.0, len(cells)
    batch = cells.batch(torch.arange(n))
    with fitted.parameters(), pyro.validation_enabled(False), torch.no_grad():
        search = Search(fitted, cells)
        order = torch.randperm(n)
        time = torch.linspace(0.01, 20 - gap - 0.01, n, dtype=torch.float64)
        time[-few:] += gap
        time = (time if lost_at == "end" else 20 - time)[order.argsort()]
        search.place[:, 0] = torch.special.ndtri(time / 20)
        x = search.x

        def curves() -> Tensor:
            values = search.genes.values(search.x.float()) | {"z": search._placed(search.place, batch)[:, None]}
            values["pi"] = torch.ones(*batch.u.shape, 4)
            means = fitted.program.explain(values, batch)
            return torch.stack([each[state] for each in (means.u, means.s) for state in (0, 2)])

        before = curves()
        assert search.turn() and search.covariance is None
        after, turned = curves(), 20 * torch.special.ndtr(search.place[:, 0])
        others = time < 20 - gap if lost_at == "end" else time > gap
        assert others.sum() == n - few
        # The lost come first where they were last, in the same order, and the clock is full.
        assert (
            turned[~others].max() < turned[others].min()
            if lost_at == "end"
            else turned[~others].min() > turned[others].max()
        )
        assert turned.sort().values.diff().max() < 0.3
        torch.testing.assert_close(after[:, others], before[:, others], rtol=2e-3, atol=2e-3)
        faster = list(search.genes.coupled).index("beta")
        slope = search.x[:, faster] - x[:, faster]
        torch.testing.assert_close(slope, torch.full_like(slope, np.log((20 - gap) / 20)), rtol=0.02, atol=0)
        # A full clock stays.
        assert not search.turn()


def test_the_prior_is_the_models(double: None, alone: Fitted) -> None:
    with alone.parameters():
        genes = Genes(alone.program, alone.guide.rates.marginals())
        x = genes.start()
        _, gradient = genes.prior(x)
        for k in range(x.shape[1]):
            step = torch.zeros_like(x)
            step[:, k] = 1e-4
            up, down = genes.prior(x + step)[0], genes.prior(x - step)[0]
            assert (up - down) / 2e-4 == pytest.approx(float(gradient[:, k].sum()), rel=1e-3, abs=1e-3)
    # A log-normal is a Normal here, of the sd of its logarithm; onsets have the variance of their mixture.
    variances = {"alpha": 1.0, "switch_time": 1.0, "onset": sum(sd**2 for sd in pv.ScaleMixture().sds) / 5}
    for name, variance in variances.items():
        k = list(genes.coupled).index(name)
        torch.testing.assert_close(genes.precision[:, k, k], torch.full((5,), 1 / variance), rtol=0.3, atol=0)


def test_the_logit_of_a_uniform_number_is_logistic(double: None) -> None:
    model = replace(SHARED, priors=pv.Priors(switch_time=dist.Uniform(0.0, 20.0)))
    fitted = train(model, GUIDE, doubled(small_cells()), settings=settings(max_epochs=1), progress=False)
    with fitted.parameters():
        genes = Genes(fitted.program, fitted.guide.rates.marginals())
    k = list(genes.coupled).index("switch_time")
    torch.testing.assert_close(genes.precision[:, k, k], torch.full((5,), 3 / torch.pi**2), rtol=0.3, atol=0)


def test_other_fits_come_back_as_they_are(alone: Fitted) -> None:
    cells = small_cells()
    for model, guide in ((MODEL, GUIDE), (SHARED, replace(GUIDE, rates=MeanField()))):
        fitted = train(model, guide, cells, settings=settings(max_epochs=1), progress=False)
        assert not applies(fitted) and couple(fitted, cells) is fitted
    assert applies(alone) and not alone.guide.coupled


def test_steps_that_lead_nowhere_are_not_taken(alone: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "_move_together", lambda self, *_: setattr(self, "place", self.place + 3))
    with pytest.warns(UserWarning, match="could not be coupled"):
        assert couple(alone, small_cells(), progress=False) is alone


@pytest.mark.parametrize("where", ["bound", "_at_means"])
def test_without_a_covariance_the_fit_comes_back(alone: Fitted, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fails(self: Search, *_: object) -> None:
        raise torch.linalg.LinAlgError("not positive-definite")

    monkeypatch.setattr(Search, where, fails)
    with pytest.warns(UserWarning, match="could not be coupled.*Train it for longer"):
        assert couple(alone, small_cells(), progress=False) is alone


def test_the_search_ends_where_the_bound_was_highest(alone: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, bound = list[float](), Search.bound
    with alone.parameters(), pyro.validation_enabled(False):
        search = Search(alone, small_cells())
        monkeypatch.setattr(Search, "bound", lambda self: bounds.append(bound(self)) or bounds[-1])
        assert search.climb(progress=False)
        assert bounds[0] < max(bounds) == bound(search)
        assert search.stride < SHORTEST or len(bounds) == 1 + LOOKS
        # Steps are halved where the bound rose by next to nothing, and there alone.
        highest, halved = bounds[0], 0
        for found in bounds[1:]:
            halved += not found - highest > ENOUGH * len(search.cells)
            highest = max(highest, found)
        assert search.stride == STRIDE / 2**halved


def test_a_fit_is_coupled_and_its_bound_is_higher(uncoupled: Fit, fit: Fit) -> None:
    assert fit.fitted.guide.coupled and isinstance(fit.fitted.guide.rates, CoupledRates)
    cells = fit.data.cells
    bounds = [evidence(each.fitted, cells, particles=20, draws=20).elbo.mean() for each in (uncoupled, fit)]
    assert bounds[1] > bounds[0] + 0.5
    again = couple(uncoupled.fitted, cells, progress=False)
    assert not uncoupled.fitted.guide.coupled, "what was fitted stays as it is"
    for one, other in zip(again.guide.own, fit.fitted.guide.own, strict=True):
        assert torch.equal(one, other), "the same bits"


def test_a_draw_moves_rates_and_clock_against_each_other(fit: Fit) -> None:
    with fit.fitted.parameters():
        torch.manual_seed(0)
        drawn = draw_rates(fit.fitted, fit.data.cells, 300)
        batch = fit.data.cells.batch(torch.arange(len(fit.data.cells)))
        latent = fit.fitted.guide.encode(batch)
        clocks = torch.stack([fit.fitted.guide.given(each, latent).mean[:, 0, 0] for each in drawn])
    speed = torch.stack([each["beta"].log().mean() for each in drawn])
    span = clocks.quantile(0.9, dim=1) - clocks.quantile(0.1, dim=1)
    assert torch.corrcoef(torch.stack((speed, span)))[0, 1] < -0.3, "faster kinetics take less time"
    assert torch.equal(fit.fitted.guide.given({WARP: 0 * drawn[0][WARP]}, latent).mean, latent.mean)
    assert set(fit.posterior(draws=3).rates) >= {"alpha", "beta", "onset"} and WARP not in fit.posterior(draws=3).rates
    assert fit.refined() == fit


def test_intervals_come_to_cover_the_truth(uncoupled: Fit, fit: Fit) -> None:
    adata = small_adata(150, 20)
    found = [pv.coverage_of(each, adata, progress=False).records[0].tallies["velocity"] for each in (uncoupled, fit)]
    before, after = (each.coverage[0.9] for each in found)
    assert after > before + 0.1 and 0.75 < after < 0.99


def test_a_saved_fit_is_coupled_as_it_was(tmp_path) -> None:
    adata = small_adata()
    data = pv.velocity_data(adata, as_is=True)
    fit = pv.fit(SHARED, GUIDE, adata, settings=settings(), data=data, save=tmp_path, progress=False)
    again = pv.load(tmp_path, SHARED, GUIDE, adata, as_is=True)
    np.testing.assert_array_equal(again.posterior(draws=4).velocity, fit.posterior(draws=4).velocity)


@pytest.mark.parametrize("times", ["shared", "hierarchical", "shared, library inferred"])
def test_a_coupled_guide_draws_the_models_sites_in_their_shapes(times: str) -> None:
    times, _, inferred = times.partition(",")
    cells, model = (counted_cells(), COUNTED) if inferred else (small_cells(), SHARED)
    fitted = train(replace(model, times=TIMES[times]()), GUIDE, cells, settings=settings(max_epochs=1), progress=False)
    with fitted.parameters():
        search = Search(fitted, cells)
        search.round()
        batch = cells.batch(torch.arange(6))
        drawn = poutine.trace(search.guide_found()).get_trace(batch)
        asked = poutine.trace(fitted.program).get_trace(batch)
    sites = [name for name in asked.stochastic_nodes if name in drawn.nodes]
    assert {*TIMES[times].sites, "alpha", "z", "pi"} <= set(sites)
    for name in sites:
        assert drawn.nodes[name]["value"].shape == asked.nodes[name]["value"].shape
