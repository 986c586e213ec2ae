"""How noisy gradients are: where they are known, and why the optimiser's own memory does not tell it."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_velo.batch import Cells
from pyro_velo.doctor.findings import THRESHOLDS
from pyro_velo.doctor.noise import noise_ratio
from pyro_velo.models.base import Model
from pyro_velo.train import TrainSettings, train

ALONE = math.sqrt((1 - 0.9) / (1 + 0.9))
N = 4000


class Means(Model):
    """A thousand numbers of each cell about means that are parameters: x ~ Normal(mu, 1)."""

    def __init__(self, mu: float = 0.0) -> None:
        self.mu = mu

    def build(self, cells):
        return MeansProgram(cells.n_genes, self.mu)


class MeansProgram(nn.Module):
    def __init__(self, n_genes: int, mu: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.full((n_genes,), mu))

    def forward(self, batch) -> None:
        pyro.module("means", self)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
            pyro.sample("x", dist.Normal(self.mu, 1.0).to_event(1), obs=batch.u)


def fitted(mu: float, **settings):
    """A fit that took next to no step from `mu`, on cells whose numbers are 0 on average, and unrelated."""
    x = torch.randn(N, 400)
    x = (x - x.mean(0)) / x.std(0)
    cells = Cells.of(x, x)
    plan = TrainSettings(**{"max_epochs": 1, "learning_rate": 1e-12, "held_out": 0.0, **settings})
    return train(Means(mu), lambda _: lambda batch: None, cells, settings=plan, progress=False), cells


@pytest.mark.parametrize(("mu", "size"), [(0.0, 40), (0.05, 40), (0.2, 40), (0.2, 200)])
def test_the_figure_is_that_of_the_means_and_variances_of_gradients(mu: float, size: int) -> None:
    """Of a batch of B cells the gradient is mu less their mean: E g = mu, Var g = 1 / B where B << N."""
    found = noise_ratio(*fitted(mu, batch_size=size), draws=40)
    agreement = mu**2 / (mu**2 + 1 / size)
    assert found == pytest.approx(math.sqrt(agreement + (1 - agreement) * ALONE**2), rel=0.05)
    if mu == 0:
        assert found < THRESHOLDS["noisy-gradients"].value
    assert THRESHOLDS["noisy-gradients"].value > ALONE


def test_adams_step_has_that_size() -> None:
    """The formula of the module, of gradients with a mean and a variance, after so many steps that m and v settle."""
    b, v_memory, mean, steps = 0.9, 0.999, 0.3, 3000
    m = v = torch.zeros(20000)
    for _ in range(steps):
        g = mean + torch.randn(20000)
        m, v = b * m + (1 - b) * g, v_memory * v + (1 - v_memory) * g**2
    agreement = mean**2 / (mean**2 + 1)
    v = v / (1 - v_memory**steps)
    assert (m**2 / v).mean().item() == pytest.approx(agreement + (1 - agreement) * ALONE**2, rel=0.05)


def test_gradients_without_noise_agree_even_where_they_shrink() -> None:
    """All cells in every step. The optimiser's memory of large gradients would call this noise: the false alarm."""
    fit, cells = fitted(3.0, batch_size=N, learning_rate=0.3, max_epochs=60, drop=1.0, patience=100)
    assert noise_ratio(fit, cells) == pytest.approx(1.0, abs=1e-6)
    (slots,) = (state["state"][0] for state in fit.training.optimizer.values())
    m, v = slots["exp_avg"] / (1 - 0.9**60), slots["exp_avg_sq"] / (1 - 0.999**60)
    assert (m**2 / v).mean().sqrt() < THRESHOLDS["noisy-gradients"].value


def test_elements_without_a_gradient_do_not_count_and_none_is_nan() -> None:
    fit, cells = fitted(0.2, batch_size=N)
    assert noise_ratio(fit, cells) == pytest.approx(1.0, abs=1e-6)
    fit.program.eval().requires_grad_(False)
    assert math.isnan(noise_ratio(fit, cells))


def test_the_same_seed_gives_the_same_and_leaves_all_as_it_was() -> None:
    fit, cells = fitted(0.05, batch_size=40)
    kept, before = fit.program.mu.detach().clone(), torch.get_rng_state()
    one, other, third = (noise_ratio(fit, cells, draws=5, seed=seed) for seed in (1, 1, 2))
    assert one == other != third and torch.equal(before, torch.get_rng_state())
    assert torch.equal(kept, fit.program.mu)
