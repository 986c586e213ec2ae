"""NUTS draws from the density that it says, and the guides of the rates are held against it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from pyro.optim import ClippedAdam
from small import GUIDE, settings, small_cells
from tolerances import STANDARD_ERRORS, assert_close
from torch import Tensor

from benchmarks.rates import Problem, approximate, correlations, exact
from pyro_velo import nuts as module
from pyro_velo.batch import Batch, Cells
from pyro_velo.errors import InputError
from pyro_velo.models.velocity import VelocityModel
from pyro_velo.nuts import cells_at_means, nuts, target
from pyro_velo.rates import RATE_GUIDES, gene_sites
from pyro_velo.states import STATE_FAMILIES
from pyro_velo.train import Fitted, parameters, train

Values = dict[str, Tensor]
GENE_LEVEL = {"alpha", "beta", "gamma", "switch_time", "noise_unspliced", "noise_spliced"}
# Two steps are too few to find a step size.
short = pytest.mark.filterwarnings("ignore:NUTS diverged")
families = pytest.mark.parametrize("states", STATE_FAMILIES)


@pytest.fixture(scope="module")
def cells() -> Cells:
    return small_cells(12, 3)


@pytest.fixture(scope="module")
def fitted(cells: Cells) -> Fitted:
    return fit_of(cells, "collapsed")


def fit_of(cells: Cells, states: str) -> Fitted:
    # Built here: its priors take the dtype of the test.
    model = VelocityModel(states=STATE_FAMILIES[states](), n_latent=2, hidden=(8,))
    return train(model, GUIDE, cells, settings=settings(max_epochs=2), progress=False)


def whole(cells: Cells) -> Batch:
    return cells.batch(torch.arange(len(cells)))


def of(program: Callable, guide: Callable) -> Fitted:
    """As if programs of one's own had been fitted."""
    with pyro.get_param_store().scope() as store:
        return Fitted(program, guide, store, SimpleNamespace())


def ridge(batch: Batch) -> None:
    """x and log y are N(0, 1), and their sum is seen as 1.5 with sd 0.5."""
    with pyro.plate("genes", 2, dim=-1):
        x, y = pyro.sample("x", dist.Normal(0.0, 1.0)), pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("sum", dist.Normal(x + y.log(), 0.5), obs=torch.full((2,), 1.5))


def near_the_start(batch: Batch) -> None:
    with pyro.plate("genes", 2, dim=-1):
        pyro.sample("x", dist.Normal(0.0, 0.1))
        pyro.sample("y", dist.LogNormal(0.0, 0.1))


def test_it_draws_a_known_posterior(cells: Cells, double: None) -> None:
    covariance = (torch.eye(2) + 4 * torch.ones(2, 2)).inverse()
    mean = covariance.sum(0) * 4 * 1.5
    found = nuts(of(ridge, near_the_start), cells, samples=200, warmup=80, progress=False)
    assert {name: value.shape for name, value in found.items()} == {"x": (200, 2), "y": (200, 2)}
    for i, draws in enumerate((found["x"], found["y"].log())):
        # Of the mean, and of the sd, both in sds.
        error = STANDARD_ERRORS / effective_sample_size(draws[None]).clamp_max(200).sqrt()
        sd = covariance[i, i].sqrt()
        assert ((draws.mean(0) - mean[i]).abs() < error * sd).all()
        assert ((draws.std(0) / sd - 1).abs() < error).all()
    correlation = torch.corrcoef(torch.stack((found["x"][:, 0], found["y"][:, 0].log())))[0, 1]
    assert abs(correlation - covariance[0, 1] / covariance[0, 0]) < 0.1


@short
def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state(fitted: Fitted, cells: Cells) -> None:
    given = cells_at_means(fitted, cells)
    torch.manual_seed(5)
    before, names = torch.get_rng_state(), set(pyro.get_param_store().keys())
    one, again, other = (nuts(fitted, cells, given=given, samples=3, warmup=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(pyro.get_param_store().keys()) == names
    for name in GENE_LEVEL:
        assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])


@short
@families
def test_sites_are_found_by_tracing(states: str, cells: Cells) -> None:
    fitted = fit_of(cells, states)
    given = cells_at_means(fitted, cells)
    found = nuts(fitted, cells, given=given, samples=2, warmup=2)
    assert {name: value.shape for name, value in found.items()} == {name: (2, 3) for name in GENE_LEVEL}
    assert all((value > 0).all() for value in found.values()) and (found["switch_time"] < 20).all()
    # Where the model has a point there is no site to draw.
    left = GENE_LEVEL | {"z"} | (set() if states in {"collapsed", "hard"} else {"pi"})
    trace = poutine.trace(target(fitted, cells)).get_trace(whole(cells))
    assert set(trace.stochastic_nodes) - {"genes", "cells"} == left


@short
def test_the_cells_are_drawn_where_they_are_not_given(fitted: Fitted, cells: Cells) -> None:
    found = nuts(fitted, cells, samples=2, warmup=2)
    assert found.keys() == GENE_LEVEL | {"z"} and found["z"].shape == (2, 12, 1, 2)


def some_values(fitted: Fitted) -> Values:
    """Values of the gene-level sites near their start."""
    return {name: start * (0.5 + torch.rand_like(start)) for name, start in fitted.program.start.sites().items()}


def log_density(program: Callable, values: Values, cells: Cells) -> Tensor:
    return poutine.trace(poutine.condition(program, data=values)).get_trace(whole(cells)).log_prob_sum()


def by_hand(fitted: Fitted, values: Values, cells: Cells, *, equal_weights: bool = False) -> Tensor:
    """The gene-level sites' priors, and the mixture of the states in every cell."""
    trace = poutine.trace(poutine.condition(gene_sites(fitted.program), data=values)).get_trace(whole(cells))
    priors = sum(trace.nodes[name]["fn"].log_prob(values[name]).sum() for name in GENE_LEVEL)
    states = fitted.program.recipe.states
    log_joint = torch.stack(fitted.program.explain(values, whole(cells)).log_joint)
    if equal_weights:
        log_joint = log_joint - states.log_weights(values["pi"]) - torch.tensor(4.0).log()
    return priors + (log_joint.amax(0) if states.hard else log_joint.logsumexp(0)).sum()


@families
def test_its_density_is_the_models_without_penalties(states: str, double: None) -> None:
    """Up to a constant: between any two values of the rates it differs as it should."""
    cells = small_cells(12, 3)
    cells = replace(cells, molecules=cells.molecules.double(), ratio=cells.ratio.double())
    fitted = fit_of(cells, states)
    given = cells_at_means(fitted, cells)
    density, (one, other) = target(fitted, cells, given), (some_values(fitted) for _ in range(2))
    with torch.no_grad():
        found = log_density(density, one, cells) - log_density(density, other, cells)
        expected = by_hand(fitted, one | given, cells) - by_hand(fitted, other | given, cells)
    assert abs(expected) > 1
    assert_close(found, expected, slack=100)


def test_without_pi_the_collapsed_states_are_integrated_out(double: None) -> None:
    """Equal weights, which are the Dirichlet's means: E[sum of pi_k p_k] = sum of p_k / 4."""
    cells = small_cells(12, 3)
    cells = replace(cells, molecules=cells.molecules.double(), ratio=cells.ratio.double())
    fitted = fit_of(cells, "collapsed")
    given = cells_at_means(fitted, cells)
    density, (one, other) = target(fitted, cells, {"z": given["z"]}), (some_values(fitted) for _ in range(2))
    with torch.no_grad():
        found = log_density(density, one, cells) - log_density(density, other, cells)
        hand = [by_hand(fitted, each | given, cells, equal_weights=True) for each in (one, other)]
    assert_close(found, hand[0] - hand[1], slack=100)


@families
def test_cells_at_means_takes_the_guides_own(states: str, cells: Cells) -> None:
    fitted = fit_of(cells, states)
    given = cells_at_means(fitted, cells)
    with fitted.parameters(), torch.no_grad():
        z = fitted.guide.encode(whole(cells)).mean
        trace = poutine.trace(poutine.condition(fitted.guide, data={"z": z})).get_trace(whole(cells))
    assert given.keys() == {"z", "pi"}
    assert torch.equal(given["z"], z) and torch.equal(given["pi"], trace.nodes["pi"]["fn"].mean)


@short
def test_the_networks_stay_as_they_are(fitted: Fitted, cells: Cells) -> None:
    density = target(fitted, cells, cells_at_means(fitted, cells))
    with fitted.parameters():
        before = parameters()
    nuts(fitted, cells, samples=2, warmup=2)
    with pyro.get_param_store().scope():
        guide = RATE_GUIDES["mean-field"]()(fitted.program)
        svi = SVI(density, guide, ClippedAdam({"lr": 0.1}), Trace_ELBO())
        svi.step(whole(cells))
    with fitted.parameters():
        assert all(torch.equal(value, before[name]) for name, value in parameters().items())


def test_correlated_sites_share_a_mass_matrix_that_the_warm_up_can_learn(fitted: Fitted, cells: Cells) -> None:
    """Five draws a value: 18 values want 90."""
    density = target(fitted, cells)
    (together,) = module._dense(density, whole(cells), 90)
    assert set(together) == GENE_LEVEL
    assert module._dense(density, whole(cells), 89) == []


def wall(batch: Batch) -> None:
    """A Normal that ends, where no gradient tells of it beforehand."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("wall", -1e5 * (x - 1).clamp_min(0))


def test_it_warns_where_it_diverged(cells: Cells) -> None:
    with pytest.warns(UserWarning, match=r"NUTS diverged in \d+ of 30 draws.*Raise warmup"):
        nuts(of(wall, lambda batch: pyro.sample("x", dist.Normal(0.0, 0.1))), cells, samples=30, warmup=10)


def test_large_data_is_refused(fitted: Fitted, cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 35)
    with pytest.raises(InputError, match=r"Expected 35 cells x genes at most.*got 12 x 3 = 36\. Pass fewer cells"):
        nuts(fitted, cells)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"rho": torch.zeros(3)}, "Expected given sites among alpha, .*, z, pi; got 'rho'. Leave it out."),
        ({"alpha": torch.ones(4)}, r"Expected 'alpha' of shape \(3,\) for these cells; got \(4,\)"),
    ],
)
def test_what_is_given_is_checked(fitted: Fitted, cells: Cells, given: Values, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        nuts(fitted, cells, given=given)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.simulated(100, 5)


@pytest.fixture(scope="module")
def truth(problem: Problem) -> Tensor:
    chains = exact(problem, chains=1, samples=300, warmup=300)
    assert split_gelman_rubin(chains).max() < 1.1
    return chains.flatten(0, 1)


@pytest.fixture(scope="module")
def guides(problem: Problem) -> dict[str, Tensor]:
    return {name: approximate(problem, make(), draws=500) for name, make in RATE_GUIDES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RATE_GUIDES)
def test_means_are_within_one_posterior_sd(name: str, truth: Tensor, guides: dict[str, Any]) -> None:
    gap = (guides[name].mean(0) - truth.mean(0)).abs() / truth.std(0)
    assert gap.max() < 1


@pytest.mark.slow
def test_per_gene_has_the_sds_and_correlations_that_mean_field_lacks(truth: Tensor, guides: dict[str, Any]) -> None:
    ratios = {name: guides[name].std(0) / truth.std(0) for name in ("mean-field", "per-gene")}
    off = {name: ratio.log().abs() for name, ratio in ratios.items()}
    assert off["per-gene"].mean() < off["mean-field"].mean() / 2
    assert (off["per-gene"].median(0).values <= off["mean-field"].median(0).values + 0.1).all()
    assert (correlations(guides["per-gene"]) - correlations(truth)).abs().median() < 0.1


@pytest.mark.slow
def test_the_example_of_the_docs_runs() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "rates.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["sd"].shape == (5,) and (names["sd"] > 0).all()
