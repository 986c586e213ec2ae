"""Who is to blame for a number that is not finite: the data, else a site, else a gradient; with the gene."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_velo.batch import Cells
from pyro_velo.errors import FitError
from pyro_velo.forensics import Culprit, NonFiniteError, blame

G = 4
CELLS = Cells.of(torch.rand(6, G), torch.rand(6, G))
BATCH = CELLS.batch(torch.arange(3))


@pytest.fixture(autouse=True)
def as_in_a_fit():
    """A fit runs without validation."""
    with pyro.validation_enabled(False):
        yield


def guide(loc):
    def program(batch):
        with pyro.plate("genes", G, dim=-1):
            pyro.sample("rate", dist.Delta(loc))

    return program


def model(noise):
    def program(batch):
        with pyro.plate("genes", G, dim=-1):
            rate = pyro.sample("rate", dist.LogNormal(torch.zeros(G), 1.0))
            with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
                pyro.sample("u", dist.Normal(rate, noise), obs=batch.u)

    return program


def bad(position, value=math.nan):
    x = torch.ones(G)
    x[position] = value
    return x


@pytest.mark.parametrize(
    ("loc", "noise", "culprit"),
    [
        (bad(2), torch.ones(G), Culprit("value of site 'rate' in the guide", 2)),
        (bad(1, math.inf), torch.ones(G), Culprit("value of site 'rate' in the guide", 1)),
        (bad(3, -1.0), torch.ones(G), Culprit("log-density of site 'rate' in the model", 3)),
        (torch.ones(G), bad(0), Culprit("log-density of site 'u' in the model", 0)),
        (bad(2), bad(0), Culprit("value of site 'rate' in the guide", 2)),
    ],
)
def test_the_first_site_that_is_not_finite_is_named(loc, noise, culprit):
    assert blame(model(noise), guide(loc), BATCH, {}) == culprit


def test_the_data_comes_before_every_site():
    molecules = BATCH.molecules.clone()
    molecules[1, 0, 3] = math.nan
    batch = type(BATCH)(molecules, BATCH.index, BATCH.n_cells)
    assert blame(model(torch.ones(G)), guide(bad(0)), batch, {}).gene == 3


@pytest.mark.parametrize(("shape", "gene"), [((G,), 1), ((G, 7), 1), ((7, G), 1), ((7,), None), ((), None)])
def test_then_the_first_gradient_with_its_gene(shape, gene):
    fine, value = torch.ones(3, requires_grad=True), torch.ones(shape, requires_grad=True)
    fine.grad, value.grad = torch.ones(3), torch.zeros(shape)
    where = tuple(1 if size == G else 5 for size in shape)
    value.grad[where] = math.inf
    found = blame(model(torch.ones(G)), guide(torch.ones(G)), BATCH, {"fine": fine, "w": value})
    assert found == Culprit("gradient of parameter 'w'", gene)


def test_where_all_is_finite_the_loss_is_blamed():
    assert blame(model(torch.ones(G)), guide(torch.ones(G)), BATCH, {}) == Culprit("the loss itself", None)


def test_the_error_says_step_site_and_gene():
    error = NonFiniteError(Culprit("value of site 'alpha'", 2), step=17)
    assert isinstance(error, FitError)
    assert "step 17, value of site 'alpha', gene number 2. Look at" in str(error)
    assert "gene Sox9. Look at" in str(error.named(["A", "B", "Sox9"]))
    assert "gene" not in str(NonFiniteError(Culprit("the loss itself", None), step=0).named([])).partition("Look")[0]
