"""One table of laws for all guides of the rates."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.optim import ClippedAdam
from tolerances import assert_close
from torch import Tensor
from toys import some_cells, whole

from pyro_velo.kinetics import T_MAX, Rates
from pyro_velo.likelihoods import Likelihood
from pyro_velo.models.velocity import VelocityModel, VelocityProgram
from pyro_velo.rates import RATE_GUIDES, MeanField, Point, RateGuide, gene_sites, is_gene_level

GENE_LEVEL = {*Rates._fields, "noise_unspliced", "noise_spliced"}
everyone = pytest.mark.parametrize("make", RATE_GUIDES.values(), ids=RATE_GUIDES.keys())


class Fixed(Likelihood):
    """A likelihood without parameters of its own."""

    def __call__(self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0) -> dist.Normal:
        """Normal of a given sd."""
        return dist.Normal(mean, torch.as_tensor(0.2) * scale)


def program_of(model: VelocityModel | None = None, n_cells: int = 8) -> VelocityProgram:
    return (model or VelocityModel(n_latent=3, hidden=(7,))).build(some_cells(n_cells))


def latent(trace: poutine.Trace) -> set[str]:
    """Sites that are drawn and that are not a guide's own."""
    return {name for name in trace.stochastic_nodes if not trace.nodes[name]["infer"].get("is_auxiliary")}


@everyone
def test_it_draws_the_gene_level_sites_and_no_others(make: type[RateGuide]) -> None:
    cells, program = some_cells(8), program_of()
    with pyro.get_param_store().scope():
        trace = poutine.trace(make()(program)).get_trace(whole(cells))
    assert latent(trace) - {"genes"} == GENE_LEVEL
    for name in GENE_LEVEL:
        value = trace.nodes[name]["value"]
        assert value.shape == (cells.n_genes,)
        assert (value > 0).all() and (name != "switch_time" or (value < T_MAX).all())


@everyone
def test_sites_are_found_by_tracing(make: type[RateGuide]) -> None:
    program = program_of(VelocityModel(likelihood=Fixed()))
    with pyro.get_param_store().scope():
        trace = poutine.trace(make()(program)).get_trace(whole(some_cells(8)))
    assert latent(trace) - {"genes"} == set(Rates._fields)


@everyone
def test_it_starts_at_the_start_values(make: type[RateGuide], double: None) -> None:
    program = program_of()
    with pyro.get_param_store().scope():
        guide = make()(program)
        guide(whole(some_cells(8)))
        median = guide.median(whole(some_cells(8)))
    for name, value in program.start.sites().items():
        assert_close(median[name].detach(), value, slack=100)


@everyone
def test_every_parameter_gets_a_gradient(make: type[RateGuide], double: None) -> None:
    program, batch = program_of(), whole(some_cells(8))
    with pyro.get_param_store().scope():
        guide = make()(program)
        hidden = poutine.block(program, hide=["z", "pi"])
        Trace_ELBO().loss_and_grads(hidden, guide, batch)
        owned = dict(guide.named_parameters())
        assert len(owned) >= len(GENE_LEVEL)
        for name, parameter in owned.items():
            grad = parameter.grad
            assert grad is not None and grad.isfinite().all() and (grad != 0).all(), name


@everyone
def test_a_conjugate_posterior_is_found(make: type[RateGuide]) -> None:
    """log x ~ N(0, 1), observed once with sd 0.5 at 1: the posterior of log x is N(0.8, 0.2)."""

    def program(data: Tensor) -> None:
        with pyro.plate("genes", 2, dim=-1):
            x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x.log(), 0.5), obs=data)

    program.start = type("Start", (), {"sites": lambda self: {"x": torch.ones(2)}})()
    data = torch.ones(2)
    with pyro.get_param_store().scope():
        guide = make()(program)
        svi = SVI(program, guide, ClippedAdam({"lr": 0.05, "lrd": 0.993}), Trace_ELBO(num_particles=4))
        # Long enough to widen from a start that is 45 times too narrow.
        for _ in range(700):
            svi.step(data)
        log_median = guide.median(data)["x"].detach().log()
        # The most probable x, not log x: -log x of the LogNormal's density pulls it down to (4 - 1) / 5.
        assert (log_median - (0.6 if make is Point else 0.8)).abs().max() < 0.08
        if make is not Point:
            assert (log_sd(guide, data)["x"] - 0.2**0.5).abs().max() < 0.08


def log_sd(guide: AutoGuide, *args: object) -> dict[str, Tensor]:
    """The sd of the logarithm of a LogNormal posterior."""
    half = 0.6744897501960817
    return {name: (q[1] / q[0]).log().detach() / (2 * half) for name, q in guide.quantiles([0.25, 0.75], *args).items()}


@pytest.mark.parametrize("sd", [0.01, 0.05, 0.3])
def test_mean_field_starts_with_its_sd_on_the_unconstrained_scale(sd: float, double: None) -> None:
    batch = whole(some_cells(8))
    with pyro.get_param_store().scope():
        guide = MeanField(sd)(program_of())
        guide(batch)
        for name in GENE_LEVEL - {"switch_time"}:
            assert_close(log_sd(guide, batch)[name], sd)


def test_gene_sites_hides_cells_and_data() -> None:
    program, batch = program_of(), whole(some_cells(8))
    trace = poutine.trace(gene_sites(program)).get_trace(batch)
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == GENE_LEVEL
    everything = poutine.trace(program).get_trace(batch)
    sites = {name: site for name, site in everything.nodes.items() if "cond_indep_stack" in site}
    assert {name for name, site in sites.items() if is_gene_level(site)} == GENE_LEVEL
