"""The scores of held-out cells: on a program whose evidence is known, and what they say of every part of ours."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small import GUIDE, MODEL, settings, small_adata, small_cells, small_fit
from tolerances import STANDARD_ERRORS
from torch import Tensor, nn

import pyro_velo as pv
from pyro_velo import evidence as module
from pyro_velo.batch import Cells
from pyro_velo.errors import InputError
from pyro_velo.evidence import evidence, held_out
from pyro_velo.forensics import NonFiniteError
from pyro_velo.rates import RATE_GUIDES
from pyro_velo.schedule import WithoutPenalties
from pyro_velo.states import STATE_FAMILIES
from pyro_velo.times import TIMES, Shared, SharedProgram
from pyro_velo.train import Fitted, Training, TrainSettings, per_cell, train

D, G, N = 2, 3, 60
NOISE = 0.4
SCORES = ("elbo", "iw_bound", "density")


class Linear(nn.Module):
    r"""x ~ Normal(shift + W z, 0.4) with z ~ Normal(0, 1): x (2G,) of a cell has a known evidence.

    `shift` (G,) is what cells share, for unspliced alone.
    """

    def __init__(self, weight: Tensor, shared: bool = True) -> None:
        super().__init__()
        self.weight, self.shared = weight, shared

    def forward(self, batch):
        genes = pyro.plate("genes", G, dim=-1)
        with genes:
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if self.shared else torch.zeros(G)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            u, s = (z.squeeze(-2) @ self.weight.T).split(G, -1)
            with genes:
                x = dist.Normal(torch.stack((u + shift, s), -1), NOISE).to_event(1)
                pyro.sample("molecules", x, obs=batch.molecules.movedim(0, -1))

    def moments(self, shift: Tensor, spread: float = 0.0):
        """p(x), where shift ~ Normal(its mean, `spread`)."""
        mean = torch.cat((shift, torch.zeros(G)))
        variance = torch.diag(torch.cat((torch.full((G,), spread**2), torch.zeros(G))))
        return dist.MultivariateNormal(mean, self.weight @ self.weight.T + NOISE**2 * torch.eye(2 * G) + variance)


class LinearGuide(nn.Module):
    """q(z | x) of the exact mean given a shift of 0 and covariance times `width`^2; q(shift) = Normal(mean, sd)."""

    def __init__(self, program: Linear, width: float, mean: Tensor, sd: float) -> None:
        super().__init__()
        precision = torch.eye(D) + program.weight.T @ program.weight / NOISE**2
        self.gain = torch.linalg.solve(precision, program.weight.T) / NOISE**2
        self.root = width * torch.linalg.cholesky(torch.linalg.inv(precision))
        self.shared, self.mean, self.sd = program.shared, mean, sd

    def forward(self, batch):
        if self.shared:
            with pyro.plate("genes", G, dim=-1):
                pyro.sample("shift", dist.Normal(self.mean, self.sd))
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            loc = (torch.cat((*batch.molecules,), -1) @ self.gain.T).unsqueeze(-2)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.root))


SHIFT, SD = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), 0.1


def linear(shared: bool = True, width: float = 1.0, share: float = 0.5, **others) -> tuple[Fitted, Cells, Linear]:
    """The program with its guide, as a fit, and cells drawn from it; half of them are held out."""
    torch.manual_seed(3)
    program = Linear(torch.randn(2 * G, D), shared)
    x = program.moments(SHIFT if shared else torch.zeros(G)).sample((N,))
    guide = LinearGuide(program, width, others.get("mean", SHIFT), others.get("sd", SD))
    with pyro.get_param_store().scope() as store:
        pass
    training = Training(TrainSettings(held_out=share))
    return Fitted(program, guide, store, training), Cells.of(*x.split(G, -1)), program


def log_evidence(fitted: Fitted, cells: Cells, of: dist.Distribution) -> np.ndarray:
    """Log p of every held-out cell."""
    _, index = held_out(fitted, len(cells))
    return of.log_prob(torch.cat((*cells.molecules,), -1)[index]).numpy()


def mean_error(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


exact = pytest.mark.usefixtures("double")


# Laws, where the evidence is known


@exact
def test_with_the_exact_posterior_every_score_is_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, cells, program = linear(shared=False)
    truth = log_evidence(fitted, cells, program.moments(torch.zeros(G)))
    # Whatever the batches: each weight is the evidence itself.
    for at_once in (1, 7 * G, 10**6):
        monkeypatch.setattr(module, "CELLS_GENES_AT_ONCE", at_once)
        found = evidence(fitted, cells, particles=3, draws=2)
        for values in (found.elbo, found.iw_bound, found.density):
            assert_allclose(values, truth, rtol=1e-9)


@exact
def test_the_bounds_are_below_the_evidence_and_rise_with_k_up_to_it() -> None:
    fitted, cells, program = linear(shared=False, width=1.5)
    truth = log_evidence(fitted, cells, program.moments(torch.zeros(G)))
    bounds = {k: evidence(fitted, cells, particles=k, draws=40) for k in (1, 5, 50)}
    assert_allclose(bounds[1].iw_bound, bounds[1].elbo, rtol=1e-12)
    for found in bounds.values():
        assert (found.elbo <= found.iw_bound + 1e-12).all()
    # KL(q || exact) of a Gaussian that is 1.5 times too wide, in D dimensions.
    gap = D * ((1.5**2 - 1) / 2 - np.log(1.5))
    mean, error = mean_error(bounds[50].elbo - truth)
    assert abs(mean + gap) < STANDARD_ERRORS * error
    for few, many in ((1, 5), (5, 50)):
        mean, error = mean_error(bounds[many].iw_bound - bounds[few].iw_bound)
        assert mean > STANDARD_ERRORS * error
    mean, error = mean_error(bounds[50].iw_bound - truth)
    assert -0.02 < mean < STANDARD_ERRORS * error
    assert_allclose(evidence(fitted, cells, particles=20_000, draws=2).iw_bound, truth, atol=0.03)


@exact
def test_what_cells_share_costs_its_kl_by_training_cell() -> None:
    fitted, cells, _ = linear()
    alone = (SHIFT**2 + SD**2 - 1 - 2 * np.log(SD)).sum().item() / 2
    found = evidence(fitted, cells, draws=20)
    # The same, with a prior that is the posterior, which costs nothing.
    free, _, _ = linear(mean=torch.zeros(G), sd=1.0)
    looked = [module._look_at_genes(each, cells.batch(torch.arange(1))).kl for each in (fitted, free)]
    assert abs(looked[1]) < 1e-12
    # The log-density of 3 Normals has a variance of 3/2; that of the prior hardly varies.
    assert abs(looked[0] - alone) < STANDARD_ERRORS * (3 / 2 / module.DRAWS_OF_GENES) ** 0.5
    assert (found.density - looked[0] / 30 >= found.iw_bound - 0.05).all()
    assert found.sites == ("shift",) and found.no_kl == () and found.left_out == ()


@exact
@pytest.mark.slow
def test_the_density_is_the_one_predicted_with_the_rates_integrated_out() -> None:
    fitted, cells, program = linear(sd=0.15, width=1.2)
    truth = log_evidence(fitted, cells, program.moments(SHIFT, 0.15))
    found = evidence(fitted, cells, particles=50, draws=1500)
    assert_allclose(found.density, truth, atol=0.1)
    assert abs((found.density - truth).mean()) < 0.01


@exact
def test_the_scores_are_those_of_a_loop_over_draws_and_cells() -> None:
    """Brute force: one cell and one draw at a time, the log-densities written out."""
    fitted, cells, program = linear(width=1.3, share=0.1)
    _, index = held_out(fitted, len(cells))
    x, guide, generator = torch.cat((*cells.molecules,), -1)[index], fitted.guide, torch.Generator().manual_seed(1)
    log_w = torch.empty(400, len(index), 50)
    for r in range(len(log_w)):
        shift = SHIFT + SD * torch.randn(G, generator=generator)
        mean = x @ guide.gain.T
        z = mean[:, None] + torch.randn(len(index), 50, D, generator=generator) @ guide.root.T
        q = dist.MultivariateNormal(mean[:, None], scale_tril=guide.root).log_prob(z)
        mean_x = z @ program.weight.T + torch.cat((shift, torch.zeros(G)))
        p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(mean_x, NOISE).log_prob(x[:, None]).sum(-1)
        log_w[r] = p - q
    found = evidence(fitted, cells, particles=50, draws=400)
    share = module._look_at_genes(fitted, cells.batch(torch.arange(1))).kl / (N - len(index))
    expected = {
        "elbo": log_w.mean((0, 2)) - share,
        "iw_bound": (log_w.logsumexp(2) - np.log(50)).mean(0) - share,
        "density": log_w.logsumexp((0, 2)) - np.log(50 * 400),
    }
    for name, values in expected.items():
        # The shares are of other draws: 3 genes, 54 cells.
        assert_allclose(getattr(found, name), values.numpy(), atol=0.1, err_msg=name)


# Ours


def test_the_elbo_is_the_one_that_training_reports() -> None:
    cells = small_cells(80)
    fitted = small_fit(cells)
    train_index, index = held_out(fitted, len(cells))
    parts = [per_cell(part, len(train_index)) for part in (fitted.program, fitted.guide)]
    with fitted.parameters(), WithoutPenalties(), torch.no_grad():
        batch, elbo = cells.batch(index, len(train_index)), pyro.infer.Trace_ELBO()
        reported = np.array([-elbo.loss(*parts, batch) for _ in range(60)])
    scored = np.array([evidence(fitted, cells, particles=10, seed=seed).elbo.mean() for seed in range(4)])
    (mean, error), (ours, our_error) = mean_error(reported), mean_error(scored)
    assert abs(ours - mean) < STANDARD_ERRORS * np.hypot(error, our_error)


@pytest.mark.parametrize("name", RATE_GUIDES)
def test_a_point_has_no_kl_and_every_other_guide_has(name: str) -> None:
    cells = small_cells()
    guide = pv.guides.Amortized(rates=RATE_GUIDES[name](), hidden=(8,), hidden_states=(8,))
    fitted = train(MODEL, guide, cells, settings=settings(max_epochs=2), progress=False)
    found = evidence(fitted, cells, particles=2, draws=2)
    assert set(found.sites) == set(fitted.program.start.sites())
    assert set(found.no_kl) == (set(found.sites) if name == "point" else set())


def test_a_flat_prior_has_no_kl() -> None:
    cells, model = small_cells(), pv.VelocityModel(n_latent=2, hidden=(8,), priors=pv.Priors.flat())
    found = evidence(train(model, GUIDE, cells, settings=settings(max_epochs=1), progress=False), cells, particles=2)
    assert set(found.no_kl) == {"alpha", "beta", "gamma", "noise_unspliced", "noise_spliced"}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("states", STATE_FAMILIES)
def test_every_part_of_the_model_can_be_scored(times: str, states: str) -> None:
    cells = small_cells()
    model = pv.VelocityModel(n_latent=2, hidden=(8,), times=TIMES[times](), states=STATE_FAMILIES[states]())
    fitted = train(model, GUIDE, cells, settings=settings(max_epochs=2), progress=False)
    found = evidence(fitted, cells, particles=4, draws=2)
    assert found.left_out == ()
    share = found.density - found.iw_bound
    assert (found.elbo <= found.iw_bound).all() and (share > share.min() - 1e-9).all()
    assert np.isfinite(found.density).all() and len(found.density) == 4


class TiedProgram(SharedProgram):
    """Says what it believes of a function of z as if that were data."""

    def forward(self, z, switch, values):
        timed = super().forward(z, switch, values)
        pyro.sample("tie", dist.Normal(0.0, 1.0), obs=timed.shared)
        return timed


class Tied(Shared):
    def build(self, n_in, n_genes, hidden):
        return TiedProgram(self.elsewhere)


def test_what_the_model_says_of_itself_is_no_data() -> None:
    cells = small_cells()
    found = [
        evidence(
            train(pv.VelocityModel(n_latent=2, times=times), GUIDE, cells, settings=settings(), progress=False), cells
        )
        for times in (Tied(), Shared())
    ]
    assert [each.left_out for each in found] == [("tie",), ()]
    # Some hundred nats a cell, where times are in the tens.
    assert abs(found[0].density.mean() - found[1].density.mean()) < 20


def test_a_penalty_is_no_part_of_any_score() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    penalised = pv.VelocityModel(n_latent=2, hidden=(8,), penalty=pv.SwitchPenalty(1e6, annealed=False))
    program = penalised.build(cells)
    program.load_state_dict(fitted.program.state_dict())
    other = Fitted(program, fitted.guide, fitted.store, fitted.training)
    one, two = evidence(fitted, cells), evidence(other, cells)
    for name in SCORES:
        assert_array_equal(getattr(one, name), getattr(two, name))


def test_the_same_seed_gives_the_same_and_leaves_the_generator_alone() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = evidence(fitted, cells, seed=1), evidence(fitted, cells, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = evidence(fitted, cells, seed=1)
    for name in SCORES:
        assert_array_equal(getattr(one, name), getattr(again, name))
        assert (getattr(one, name) != getattr(other, name)).any()


def test_nan_stops_it_and_is_named() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    _, index = held_out(fitted, len(cells))
    cells.molecules[0, index[0], 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the data \(site 'molecules'\), gene number 3"):
        evidence(fitted, cells)


def test_one_held_out_cell_is_too_few() -> None:
    cells = pv.velocity_data(small_adata(10), as_is=True).cells
    fitted = small_fit(cells, settings=settings(max_epochs=1))
    with pytest.raises(InputError, match="Expected 2 held-out cells or more to score; got 1"):
        evidence(fitted, cells)
