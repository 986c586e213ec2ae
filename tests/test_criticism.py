"""What a fit fails to reproduce: on replicates of itself nothing, and on what was spoiled, what was spoiled."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import permutations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from scipy.spatial import cKDTree
from small import small_cells, small_fit
from tolerances import STANDARD_ERRORS
from torch import Tensor, nn

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.batch import Cells
from pyro_velo.checking import (
    FEW,
    FIT,
    KINETICS,
    LINE,
    NOISE,
    Limits,
    departures_explained,
    morans_i,
    unexplained_genes,
)
from pyro_velo.criticism import (
    UNRELIABLE,
    generalised_pareto,
    importance,
    leave_one_out,
    pareto_smoothed,
    permutation_score,
    permuting,
    predictive_check,
    replicates,
)
from pyro_velo.data.bridge import explained_variance
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions, evidence
from pyro_velo.posterior import draw_rates
from pyro_velo.train import Fitted, Training, TrainSettings, train

N, G = 120, 10
SETTINGS = TrainSettings(max_steps=100, batch_size=60, evaluate_steps=50, learning_rate=2e-2)
SMALL_GUIDE = pv.guides.Amortized(hidden=(16,), hidden_states=(16,))


def simulated(noise: simulate.Noise | None = None):
    parts = {} if noise is None else {"noise": noise}
    parts |= {"kinetics": simulate.LogNormalRates(drop=0)}
    return pv.to_anndata(simulate.simulate(N, G, settings=simulate.Settings(**parts), seed=0))


def small_model(**parts) -> pv.VelocityModel:
    return pv.VelocityModel(n_latent=3, hidden=(16,), **parts)


@pytest.fixture(scope="module")
def spoiled() -> tuple[pv.Fit, AnnData]:
    """A fit where genes 0 to 3 are a line, against each other in two halves, never unspliced, and noise."""
    rng, adata = np.random.default_rng(0), simulated()
    t = adata.obs["true_t"].to_numpy()
    s, u = adata.layers["spliced"], adata.layers["unspliced"]
    level = np.sort(rng.uniform(0, 1, N))[np.argsort(np.argsort(t))]
    u[:, 0], s[:, 0] = level + rng.normal(0, 0.05, N), 2 * level + rng.normal(0, 0.1, N)
    u[:, 0] -= u[:, 0].min()
    s[:, 0] -= s[:, 0].min()
    half = np.arange(N) % 2 == 0
    s[half, 1], u[half, 1] = 0.15 * s[half, 1], 2 * u[half, 1]
    u[:, 2], u[:3, 2] = 0, 1
    u[:, 3] = rng.uniform(0, 1, N)
    place = np.column_stack((t, 8 * half))
    near = cKDTree(place).query(place, 9)[1][:, 1:]
    pairs = np.repeat(np.arange(N), 8), near.ravel()
    adata.obsp["distances"] = sparse.csr_matrix((np.ones(8 * N), pairs), shape=(N, N))
    data = pv.velocity_data(adata, as_is=True)
    return pv.fit(small_model(), SMALL_GUIDE, adata, settings=SETTINGS, data=data, progress=False), adata


@pytest.fixture(scope="module")
def normal(spoiled: tuple[pv.Fit, AnnData]) -> tuple[Fitted, Cells]:
    return spoiled[0].fitted, spoiled[0].data.cells


@pytest.fixture(scope="module")
def counts() -> tuple[Fitted, Cells]:
    adata = simulated(simulate.NOISES["nb"](library_size=simulate.noise.LibrarySize(depth=20.0)))
    cells = pv.velocity_data(adata, as_is=True, counts=True).cells
    model = small_model(likelihood=pv.likelihoods.NB())
    return train(model, SMALL_GUIDE, cells, settings=replace(SETTINGS, max_steps=50), progress=False), cells


each_likelihood = pytest.mark.parametrize("fit", ["normal", "counts"])


def labels_of(cells: Cells, n_types: int = 3) -> np.ndarray:
    """Types by the rank of a total, so that each holds many cells."""
    rank = cells.scaled.sum((0, 2)).argsort().argsort().numpy()
    return np.array(["a", "b", "c"])[rank * n_types // len(rank)]


# Replicated data


def replicate(fitted: Fitted, cells: Cells, seed: int) -> Cells:
    """The cells with the molecules of one replicate."""
    with conditions(fitted, cells, seed), torch.no_grad():
        rates = draw_rates(fitted, cells, 1)
        batches = replicates._drawn(fitted, cells, rates)
        found = [replicates._replicate(fitted.program, next(values), batch)[:, :new] for batch, new, values in batches]
    return replace(cells, molecules=torch.cat(found, 1))


@each_likelihood
@pytest.mark.parametrize("copies", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_where_the_model_is_right_p_values_are_uniform(fit: str, copies: int, request: pytest.FixtureRequest) -> None:
    fitted, cells = request.getfixturevalue(fit)
    # 20 ranks, so that p <= 0.1 and p <= 0.5 are as likely as they say.
    draws = 19
    found = [
        predictive_check(fitted, cells, draws=draws, seed=i, against=replicate(fitted, cells, 100 + i))
        for i in range(copies)
    ]
    p = np.stack([each.p_value for each in found])
    # Statistics of one replicate hang together by its rates: the standard error is over replicates.
    for level in (0.1, 0.5):
        shares = (p <= level).mean((1, 2))
        assert abs(shares.mean() - level) < STANDARD_ERRORS * max(shares.std(ddof=1), 0.05) / copies**0.5
    assert p.min() >= 2 / (draws + 1) and p.max() <= 1
    inside = np.mean([(each.low <= each.observed) & (each.observed <= each.high) for each in found])
    # The range of 19 draws holds 16 to 18 of their 20 gaps.
    assert 0.7 < inside < 0.95


@each_likelihood
def test_a_gene_whose_u_is_permuted_is_flagged_by_its_covariance_alone(
    fit: str, request: pytest.FixtureRequest
) -> None:
    fitted, cells = request.getfixturevalue(fit)
    before = predictive_check(fitted, cells, draws=40, against=replicate(fitted, cells, 5))
    row = before.of("covariance")
    gene = int((before.mean[row] / before.sd[row]).argmax())
    molecules = replicate(fitted, cells, 5).molecules
    molecules[0, :, gene] = molecules[0, torch.randperm(N), gene]
    found = predictive_check(fitted, cells, draws=40, against=replace(cells, molecules=molecules))
    assert found.z[row, gene] < -5 and np.abs(before.z).max() < 5
    # Nothing else has changed, but for sums in another order.
    changed = np.zeros_like(found.z, dtype=bool)
    changed[row, gene] = True
    assert_allclose(found.z[~changed], before.z[~changed], rtol=1e-6, atol=1e-6)
    first = found.table([str(g) for g in range(G)]).iloc[0]
    assert (first.gene, first.statistic, first.p_value) == (str(gene), "covariance", 2 / 41)


def test_lost_counts_are_flagged_by_the_zeros(counts: tuple[Fitted, Cells]) -> None:
    fitted, cells = counts
    right = replicate(fitted, cells, 6)
    spoiled = right.molecules.clone()
    spoiled[1, :, 3] *= torch.rand(N) > 0.3
    found = predictive_check(fitted, cells, draws=40, against=replace(cells, molecules=spoiled))
    zeros = found.z[found.of("zeros_spliced")]
    assert zeros[3] > 5 and np.abs(np.delete(zeros, 3)).max() < 5
    assert found.observed[found.of("zeros_spliced"), 3] == (spoiled[1, :, 3] == 0).double().mean()
    assert found.skipped == ()


def test_scaled_layers_have_no_zeros_and_it_says_so(normal: tuple[Fitted, Cells]) -> None:
    found = predictive_check(*normal, draws=2)
    assert found.skipped == ("zeros_unspliced", "zeros_spliced")
    assert not set(found.skipped) & set(found.statistics)
    with pytest.raises(InputError, match=r"Expected one of the statistics mean_unspliced.*got 'zeros_spliced'"):
        found.of("zeros_spliced")


def test_the_statistics_are_numpys(counts: tuple[Fitted, Cells]) -> None:
    fitted, cells = counts
    found = predictive_check(fitted, cells, draws=3)
    u, s = cells.molecules.double().numpy()
    covariance = np.array([np.cov(u[:, g], s[:, g])[0, 1] for g in range(G)])
    expected = [u.mean(0), s.mean(0), u.var(0, ddof=1), s.var(0, ddof=1), covariance, (u == 0).mean(0)]
    assert_allclose(found.observed, [*expected, (s == 0).mean(0)], rtol=1e-10)
    # Of replicates too, whose sums are about the data's mean.
    x = replicate(fitted, cells, 0).molecules
    centre = cells.molecules.mean(1, keepdim=True, dtype=torch.float64)
    sums = replicates._sums(x, centre)[:, None]
    streamed = replicates._statistics(sums, centre, N)[:, 0]
    assert_allclose(streamed[4], [np.cov(*x[..., g])[0, 1] for g in range(G)], rtol=1e-6)
    assert_allclose(streamed[:2], x.double().mean(1), rtol=1e-10)


def test_batches_change_the_noise_and_nothing_else(
    normal: tuple[Fitted, Cells], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = predictive_check(*normal, draws=25)
    # Seven batches of 18 cells, the last filled up by six, which count once.
    monkeypatch.setattr(replicates, "CELLS_GENES_AT_ONCE", 18 * G)
    parts = predictive_check(*normal, draws=25)
    assert_array_equal(whole.observed, parts.observed)
    error = np.hypot(whole.sd, parts.sd) / 25**0.5
    assert (np.abs(whole.mean - parts.mean) < STANDARD_ERRORS * error).all()
    assert abs(np.log(whole.sd / parts.sd).mean()) < 0.15


def test_the_same_seed_gives_the_same_and_nothing_else_changes(normal: tuple[Fitted, Cells]) -> None:
    fitted, cells = normal
    before, molecules = torch.get_rng_state(), cells.molecules.clone()
    one, other, again = (predictive_check(fitted, cells, draws=5, seed=seed) for seed in (1, 2, 1))
    assert_array_equal(one.mean, again.mean)
    assert (one.mean != other.mean).all()
    scores = [permutation_score(fitted, cells, labels_of(cells), seed=1, draws=2).score for _ in range(2)]
    assert_array_equal(*scores)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(molecules, cells.molecules)


def test_what_a_check_refuses(normal: tuple[Fitted, Cells]) -> None:
    fitted, cells = normal
    with pytest.raises(InputError, match="Expected 2 draws or more"):
        predictive_check(fitted, cells, draws=1)
    fewer = Cells(cells.molecules[:, :5], cells.ratio)
    with pytest.raises(InputError, match=r"Expected molecules of the same cells and genes, \(2, 120, 10\)"):
        predictive_check(fitted, cells, against=fewer)


# Importance weights


@pytest.mark.parametrize("k", [-0.3, 0.0, 0.3, 0.5, 0.7, 1.0])
def test_the_fit_of_a_pareto_tail_finds_its_shape(k: float, rng: np.random.Generator) -> None:
    n, copies, sigma = 500, 300, 2.0
    level = rng.standard_exponential((copies, n))
    x = np.sort(sigma * (np.expm1(k * level) / k if k else level), axis=1)
    found = generalised_pareto(x)
    # The estimate's bias is of order 1/n, its sd that of maximum likelihood, (1 + k)/sqrt(n).
    assert abs(found.k.mean() - k) < 10 / n
    if k > -0.25:
        assert_allclose(found.k.std(), (1 + k) / n**0.5, rtol=0.25)
    assert_allclose(found.sigma.mean(), sigma, rtol=0.05)
    other = generalised_pareto(7 * x)
    assert_allclose(other.k, found.k, rtol=1e-9)
    assert_allclose(other.sigma, 7 * found.sigma, rtol=1e-9)


@pytest.mark.parametrize("rate", [1.25, 2.0, 10 / 3])
def test_k_hat_is_the_tail_of_weights_that_are_known(rate: float, rng: np.random.Generator) -> None:
    """Target Exp(1), proposal Exp(rate): P(w > t) = t^-(rate / (rate - 1)), exactly, so k = 1 - 1/rate."""
    log_weights = (rate - 1) * rng.standard_exponential((50, 20_000)) / rate - np.log(rate)
    smoothed, k_hat = pareto_smoothed(log_weights)
    truth, tail = 1 - 1 / rate, 3 * 20_000**0.5
    # The prior of ten weights at 1/2 draws it there.
    expected = (tail * truth + 5) / (tail + 10)
    assert abs(k_hat.mean() - expected) < STANDARD_ERRORS * (1 + truth) / (tail * 50) ** 0.5
    assert ((k_hat > UNRELIABLE).mean() < 0.1) == (rate < 3)
    # What is smoothed keeps its order, its bound and all weights below the tail.
    order = np.argsort(log_weights, axis=1)
    assert (np.diff(np.take_along_axis(smoothed, order, 1), axis=1) >= -1e-12).all()
    assert_array_equal(smoothed.max(1) <= log_weights.max(1) + 1e-12, True)
    assert ((smoothed != log_weights).sum(1) <= np.ceil(tail)).all()


def test_smoothing_makes_an_estimate_better_where_its_variance_is_infinite(rng: np.random.Generator) -> None:
    weights = 0.6 * rng.standard_exponential((400, 500)) - np.log(2.5)
    smoothed, _ = pareto_smoothed(weights)
    errors = [np.sqrt(np.square(np.exp(each).mean(1) - 1).mean()) for each in (weights, smoothed)]
    assert errors[1] < errors[0]


def test_weights_without_a_tail_stay_as_they_are() -> None:
    equal = np.full((2, 100), -3.0)
    smoothed, k_hat = pareto_smoothed(equal)
    assert_array_equal(smoothed, equal)
    assert (k_hat == -np.inf).all()
    with pytest.raises(InputError, match="Expected 25 weights or more a cell; got 24"):
        pareto_smoothed(np.zeros(24))


SIGMA, GENES, CELLS = 0.5, 3, 40


class Shifted(nn.Module):
    """u = shift + z + noise with shift (G,) shared by cells and z (G,) a cell's own, all standard; s is noise."""

    def forward(self, batch):
        genes = pyro.plate("genes", GENES, dim=-1)
        with genes:
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([GENES]).to_event(1)).squeeze(-2)
            with genes:
                mean = torch.stack((shift + z, torch.zeros_like(z)), -1)
                pyro.sample("molecules", dist.Normal(mean, SIGMA).to_event(1), obs=batch.molecules.movedim(0, -1))


class ShiftedGuide(nn.Module):
    """The posterior: of the shift given `cells`, and of z given the shift, its sd times `width`."""

    def __init__(self, u: Tensor, width: float, held: bool = False) -> None:
        super().__init__()
        precision = 1 + len(u) / (1 + SIGMA**2)
        self.mean, self.sd = u.sum(0) / (1 + SIGMA**2) / precision, precision**-0.5
        self.width, self.held = width, held

    def forward(self, batch):
        with pyro.plate("genes", GENES, dim=-1):
            at = dist.Delta(self.mean) if self.held else dist.Normal(self.mean, self.sd)
            shift = pyro.sample("shift", at)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            precision = 1 + SIGMA**-2
            loc = ((batch.u - shift) * SIGMA**-2 / precision).unsqueeze(-2)
            pyro.sample("z", dist.Normal(loc, self.width * precision**-0.5).to_event(1))


def shifted(width: float = 1.0, held_out: float = 0.0, held: bool = False) -> tuple[Fitted, Cells]:
    torch.manual_seed(1)
    u = torch.randn(GENES) + (1 + SIGMA**2) ** 0.5 * torch.randn(CELLS, GENES)
    cells = Cells.of(u, SIGMA * torch.randn(CELLS, GENES))
    with pyro.get_param_store().scope() as store:
        pass
    return Fitted(Shifted(), ShiftedGuide(u, width, held), store, Training(TrainSettings(held_out=held_out))), cells


exact = pytest.mark.usefixtures("double")


@exact
def test_leave_one_out_is_the_density_under_the_other_cells() -> None:
    fitted, cells = shifted()
    found = leave_one_out(fitted, cells, particles=2, draws=500)
    spread = 1 + SIGMA**2
    without = 1 + (CELLS - 1) / spread
    mean = (cells.u.sum(0) - cells.u) / spread / without
    truth = dist.Normal(mean, (1 / without + spread) ** 0.5).log_prob(cells.u).sum(-1)
    truth = (truth + dist.Normal(0.0, SIGMA).log_prob(cells.s).sum(-1)).numpy()
    assert_allclose(found.density, truth[found.index], atol=0.08)
    assert found.k_hat.max() < 0.5 and not len(found.flagged)
    # In-sample it is higher.
    inside = dist.Normal(fitted.guide.mean, (fitted.guide.sd**2 + spread) ** 0.5).log_prob(cells.u).sum(-1)
    inside = (inside + dist.Normal(0.0, SIGMA).log_prob(cells.s).sum(-1)).numpy()
    assert (inside - truth).mean() > 0.05
    assert (found.density - inside[found.index]).mean() < -0.05


@exact
def test_with_the_exact_posterior_no_weight_has_a_tail() -> None:
    fitted, cells = shifted(held_out=0.5, held=True)
    found = importance(fitted, cells, particles=20, draws=2)
    assert (found.k_hat == -np.inf).all() and len(found.index) == 20
    assert_allclose(found.density, evidence(fitted, cells, particles=2, draws=2).density, rtol=1e-12)


@exact
@pytest.mark.parametrize(("width", "low", "high"), [(0.5, 0.6, 0.85), (0.7, 0.3, 0.6), (1.3, -1.0, 0.35)])
def test_a_guide_that_is_too_narrow_has_the_tail_it_must(width: float, low: float, high: float) -> None:
    """q(z) = N(0, width^2) for N(0, 1): P(w > t) falls as t^-(1 / (1 - width^2)), so k nears 1 - width^2."""
    fitted, cells = shifted(width, held_out=0.9, held=True)
    found = importance(fitted, cells, particles=4000, draws=1)
    assert low < found.k_hat.mean() < high
    assert set(found.flagged) == set(found.index[found.k_hat > UNRELIABLE])
    assert (len(found.flagged) > 0.3 * len(found.index)) == (width == 0.5)


def test_rates_at_a_point_leave_nothing_out() -> None:
    fitted, cells = shifted(held=True)
    with pytest.raises(InputError, match="Expected a guide that spreads the rates"):
        leave_one_out(fitted, cells)


def test_a_velocity_fit_has_a_k_hat_for_every_held_out_cell() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    found = importance(fitted, cells, particles=20, draws=3)
    assert len(found.index) == 4 and np.isfinite(found.density).all()
    loo = leave_one_out(fitted, cells, particles=5, draws=25, index=torch.arange(5))
    assert_array_equal(loo.index, np.arange(5))
    assert np.isfinite(loo.density).all() and np.isfinite(loo.k_hat).all()


# Permuted molecules


def looking_away(fitted: Fitted, gene: int) -> Fitted:
    """The same fit with an encoder that does not see one gene."""
    guide = deepcopy(fitted.guide)
    with torch.no_grad():
        guide.encoder.trunk[0].weight[:, [gene, G + gene]] = 0.0
    return replace(fitted, guide=guide)


def test_one_gene_at_a_time_is_the_same_as_z_unmoved_where_the_encoder_does_not_see_it(
    normal: tuple[Fitted, Cells],
) -> None:
    fitted, cells = normal
    fitted = looking_away(fitted, 5)
    quick, exactly = (permutation_score(fitted, cells, labels_of(cells), folds=f, draws=3) for f in (0, G))
    for name in ("permuted", "nats", "observed"):
        assert_allclose(getattr(quick, name)[:, 5], getattr(exactly, name)[:, 5], rtol=1e-5, atol=1e-6)
    assert (quick.permuted[:, 6:] != exactly.permuted[:, 6:]).any()


def test_z_unmoved_is_close_to_one_gene_at_a_time_and_closer_than_all_at_once(normal: tuple[Fitted, Cells]) -> None:
    fitted, cells = normal
    labels = labels_of(cells)
    quick, one, all_genes = (permutation_score(fitted, cells, labels, folds=f, draws=5).score for f in (0, G, 1))
    assert np.abs(quick - one).mean() < 0.06
    assert np.corrcoef(quick.ravel(), one.ravel())[0, 1] > 0.95
    assert np.abs(quick - one).mean() < np.abs(all_genes - one).mean()


def test_a_gene_that_is_permuted_already_loses_nothing(normal: tuple[Fitted, Cells]) -> None:
    fitted, cells = normal
    labels = labels_of(cells)
    right = permutation_score(fitted, cells, labels)
    gene = int(right.t.max(0).argmax())
    molecules = cells.molecules.clone()
    for name in "abc":
        rows = torch.from_numpy(np.flatnonzero(labels == name))
        for molecule in (0, 1):
            molecules[molecule, rows, gene] = molecules[molecule, rows[torch.randperm(len(rows))], gene]
    found = permutation_score(fitted, replace(cells, molecules=molecules), labels)
    assert np.abs(found.t[:, gene]).max() < 4 < right.t[:, gene].max()
    assert right.score[:, gene].max() > 0.3 > np.abs(found.score[:, gene]).max()
    assert right.nats[:, gene].max() > 0.5
    assert (right.score[right.t > STANDARD_ERRORS] > 0).all()


def test_molecules_stay_in_their_type_and_batch_and_keep_their_size_factors(counts: tuple[Fitted, Cells]) -> None:
    _, cells = counts
    cells = replace(cells, group=torch.arange(N) % 2, n_groups=2)
    labels = labels_of(cells)
    names, strata = permuting._strata(labels, cells)
    moved = permuting._permuted(cells, strata)
    assert names == ("a", "b", "c") and (moved.molecules != cells.molecules).any(1).all()
    pairs = [
        torch.stack((each.molecules, each.counts.size_factors.expand_as(each.molecules)), -1) for each in (cells, moved)
    ]
    for name in names:
        for group in (0, 1):
            rows = (labels == name) & (cells.group == group).numpy()
            for molecule, gene in ((0, 0), (1, 4)):
                before, after = (sorted(map(tuple, each[molecule, rows, gene].tolist())) for each in pairs)
                assert before == after


def test_a_cell_alone_in_its_type_has_no_score(normal: tuple[Fitted, Cells]) -> None:
    fitted, cells = normal
    labels = labels_of(cells).astype("<U5")
    labels[7] = "alone"
    found = permutation_score(fitted, cells, labels, draws=2)
    assert found.types == ("a", "alone", "b", "c")
    for values in (found.score, found.t, found.nats):
        assert np.isnan(values[1]).all() and np.isfinite(np.delete(values, 1, 0)).all()


def test_what_a_permutation_refuses(normal: tuple[Fitted, Cells]) -> None:
    fitted, cells = normal
    with pytest.raises(InputError, match="Expected one label for each of the 120 cells"):
        permutation_score(fitted, cells, ["a", "b"])
    with pytest.raises(InputError, match="Expected folds from 0 to the 10 genes; got 11"):
        permutation_score(fitted, cells, labels_of(cells), folds=11)


# Genes that are not explained


def test_morans_i_has_the_mean_and_variance_of_all_permutations(rng: np.random.Generator) -> None:
    graph = sparse.csr_matrix(rng.random((6, 6)) < 0.5)
    x = rng.gamma(1.0, size=6)
    orders = np.array(list(permutations(range(6))))
    found = morans_i(x[orders.T], graph)
    assert_allclose(found.i.mean(), -1 / 5, rtol=1e-10)
    assert_allclose((found.z.mean(), found.z.std()), (0, 1), atol=1e-10)


def test_morans_i_of_a_chessboard_is_minus_one_and_of_two_islands_one() -> None:
    ring = sparse.csr_matrix(np.roll(np.eye(8), 1, 0) + np.roll(np.eye(8), -1, 0))
    islands = sparse.block_diag([np.ones((4, 4))] * 2)
    assert_allclose(morans_i(np.array([[1.0, -1.0] * 4]).T, ring).i, -1)
    assert_allclose(morans_i(np.repeat([[1.0], [-1.0]], 4, axis=0), islands).i, 1)
    with pytest.raises(InputError, match="Expected a graph with edges between 4 cells or more"):
        morans_i(np.zeros((8, 1)), sparse.csr_matrix((8, 8)))


def test_a_curve_is_better_than_a_line_by_the_departures_it_explains(rng: np.random.Generator) -> None:
    t = np.linspace(0, np.pi, 200)[:, None]
    truth = np.stack((np.sin(t), 2 - 2 * np.cos(t)))
    observed = truth + rng.normal(0, 0.1, truth.shape)
    assert_allclose(departures_explained(observed, observed), 1)
    away = observed[..., 0].T - observed[..., 0].T.mean(0)
    along = np.linalg.svd(away, full_matrices=False)[2][0]
    feet = (away @ along)[:, None] * along + observed[..., 0].T.mean(0)
    assert_allclose(departures_explained(observed, feet.T[..., None]), 0, atol=1e-12)
    # The identity of the docstring, for points of the curve and their feet on the line.
    found = departures_explained(observed, truth)
    points = truth[..., 0].T - observed[..., 0].T.mean(0)
    total = (away**2).sum()
    across = np.array([-along[1], along[0]])
    curve, line = ((away @ across - by) ** 2 for by in (points @ across, 0))
    r2 = [1 - each.sum() / total for each in (curve, line)]
    assert_allclose(found, (r2[0] - r2[1]) / (1 - r2[1]), rtol=1e-10)
    assert 0.5 < found[0] < 1
    assert departures_explained(np.stack((t, 2 * t)), np.stack((t, 2 * t + 1)))[0] == 0


def test_each_spoiled_gene_is_found_for_its_reason(spoiled) -> None:
    fit, adata = spoiled
    layers = {name: layer.copy() for name, layer in adata.layers.items()}
    found = unexplained_genes(fit, adata, draws=60)
    reasons = {(each.gene, each.reason) for each in found}
    assert {("gene_0", LINE), ("gene_1", KINETICS), ("gene_2", FEW), ("gene_3", NOISE), ("gene_3", LINE)} <= reasons
    sound = {f"gene_{g}" for g in range(4, G)}
    assert not {gene for gene, reason in reasons if reason in (FEW, NOISE, LINE, FIT)} & sound
    severities = [each.severity for each in found]
    assert severities == sorted(severities, reverse=True) and severities[-1] >= 0 and severities[0] <= 1
    (few,) = [each for each in found if each.reason == FEW]
    assert few.figure == pytest.approx(3 / N) and few.threshold == Limits().unspliced_cells and few.remedy
    assert all((adata.layers[name] == layer).all() for name, layer in layers.items())


def test_limits_that_nothing_is_beyond_find_nothing(spoiled) -> None:
    fit, adata = spoiled
    none = Limits(-1, -1, -np.inf, 2, 5, -np.inf, np.inf)
    check = predictive_check(fit.fitted, fit.data.cells, draws=20)
    assert unexplained_genes(fit, adata, check=check, limits=none, draws=2) == []
    # A limit on R2 that no fit can reach lists all genes, by the figure that `fit_r2` holds.
    found = unexplained_genes(fit, adata, check=check, limits=replace(none, r2=2), draws=2)
    posterior, (u, s) = fit.posterior(draws=2), fit.data.cells.molecules.numpy()
    u = u * fit.data.cells.ratio.numpy()
    r2 = np.minimum(explained_variance(u, posterior.u), explained_variance(s, posterior.s))
    assert {each.reason for each in found} == {FIT}
    figures = {each.gene: each.figure for each in found}
    assert_allclose([figures[name] for name in fit.data.gene_names], r2, rtol=1e-4)
    bare = adata.copy()
    del bare.obsp["distances"]
    with pytest.raises(InputError, match="obsp key 'distances'"):
        unexplained_genes(fit, bare)
