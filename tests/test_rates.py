"""One table of laws for all guides of the rates, and those of the one that is our own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuide, AutoIAFNormal, AutoMultivariateNormal
from pyro.optim import ClippedAdam
from small import GUIDE, MODEL, differing, settings, small_cells
from tolerances import assert_close, assert_mean
from torch import Tensor
from torch.nn.functional import softplus
from toys import some_cells, whole

from pyro_velo import checkpoint
from pyro_velo.errors import InputError
from pyro_velo.fitting import in_words
from pyro_velo.kinetics import T_MAX, Rates
from pyro_velo.likelihoods import Likelihood
from pyro_velo.models.velocity import VelocityModel, VelocityProgram
from pyro_velo.posterior import summarise
from pyro_velo.rates import (
    RATE_GUIDES,
    Auto,
    AutoPerGene,
    LowRank,
    MeanField,
    PerGene,
    Point,
    RateGuide,
    gene_sites,
    is_gene_level,
    unit_lower,
)
from pyro_velo.train import Training, restore, train

GENE_LEVEL = {*Rates._fields, "noise_unspliced", "noise_spliced"}
FLOW = Auto(AutoIAFNormal, hidden_dim=[32])
TABLE = {name: make() for name, make in RATE_GUIDES.items()} | {
    "auto-diagonal": Auto(AutoDiagonalNormal, init_scale=0.01),
    "auto-full": Auto(AutoMultivariateNormal, init_scale=0.01),
    "auto-flow": FLOW,
}
everyone = pytest.mark.parametrize("rates", TABLE.values(), ids=TABLE.keys())


class Fixed(Likelihood):
    """A likelihood without parameters of its own."""

    def __call__(self, mean: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float = 1.0) -> dist.Normal:
        """Normal of a given sd."""
        return dist.Normal(mean, torch.as_tensor(0.2) * scale)


class Toy:
    """A program of gene-level sites alone: `body` draws them, and looks at the genes' data (G,)."""

    def __init__(self, body: Callable[[Tensor], None], **start: Tensor) -> None:
        self.body, self.start = body, SimpleNamespace(sites=lambda: start)

    def __call__(self, data: Tensor) -> None:
        with pyro.plate("genes", len(data), dim=-1):
            self.body(data)


def program_of(model: VelocityModel | None = None, n_cells: int = 8) -> VelocityProgram:
    return (model or VelocityModel(n_latent=3, hidden=(7,))).build(some_cells(n_cells))


def latent(trace: poutine.Trace) -> set[str]:
    """Sites that are drawn and that are not a guide's own."""
    return {name for name in trace.stochastic_nodes if not trace.nodes[name]["infer"].get("is_auxiliary")}


@everyone
def test_it_draws_the_gene_level_sites_and_no_others(rates: RateGuide) -> None:
    cells, program = some_cells(8), program_of()
    with pyro.get_param_store().scope():
        trace = poutine.trace(rates(program)).get_trace(whole(cells))
    assert latent(trace) - {"genes"} == GENE_LEVEL
    for name in GENE_LEVEL:
        value = trace.nodes[name]["value"]
        assert value.shape == (cells.n_genes,)
        assert (value > 0).all() and (name != "switch_time" or (value < T_MAX).all())
        assert {frame.name for frame in trace.nodes[name]["cond_indep_stack"]} == {"genes"}


@everyone
def test_sites_are_found_by_tracing(rates: RateGuide) -> None:
    program = program_of(VelocityModel(likelihood=Fixed()))
    with pyro.get_param_store().scope():
        trace = poutine.trace(rates(program)).get_trace(whole(some_cells(8)))
    assert latent(trace) - {"genes"} == set(Rates._fields)


def all_supports(data: Tensor) -> None:
    """A site on each kind of support, two of them with an event: seven numbers a gene on the unconstrained scale."""
    pyro.sample("anywhere", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.LogNormal(0.0, 1.0))
    pyro.sample("within", dist.Uniform(0.0, T_MAX))
    pyro.sample("vector", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("shares", dist.Dirichlet(torch.ones(3)))


@everyone
def test_it_takes_every_support_and_event(rates: RateGuide, double: None) -> None:
    toy, data = Toy(all_supports), torch.zeros(4)
    shapes = {"anywhere": (4,), "positive": (4,), "within": (4,), "vector": (4, 2), "shares": (4, 3)}
    with pyro.get_param_store().scope():
        guide = rates(toy)
        q = poutine.trace(guide).get_trace(data)
        p = poutine.trace(poutine.replay(toy, trace=q)).get_trace(data)
        assert math.isfinite(Trace_ELBO().loss_and_grads(toy, guide, data))
    for name, shape in shapes.items():
        assert q.nodes[name]["value"].shape == shape and q.nodes[name]["value"].dtype == torch.float64
        assert q.nodes[name]["fn"].batch_shape == p.nodes[name]["fn"].batch_shape == (4,)


@pytest.mark.parametrize("rates", [rates for rates in TABLE.values() if rates is not FLOW], ids=repr)
def test_it_starts_at_the_start_values(rates: RateGuide, double: None) -> None:
    program = program_of()
    with pyro.get_param_store().scope():
        guide = rates(program)
        guide(whole(some_cells(8)))
        median = guide.median(whole(some_cells(8)))
    for name, value in program.start.sites().items():
        assert_close(median[name].detach(), value, slack=100)


@everyone
def test_every_parameter_gets_a_gradient(rates: RateGuide, double: None) -> None:
    program, batch = program_of(), whole(some_cells(8))
    with pyro.get_param_store().scope():
        guide = rates(program)
        hidden = poutine.block(program, hide=["z", "pi"])
        Trace_ELBO().loss_and_grads(hidden, guide, batch)
        owned = dict(guide.named_parameters())
        assert sum(parameter.numel() for parameter in owned.values()) >= len(GENE_LEVEL) * program.n_genes
        for name, parameter in owned.items():
            grad = parameter.grad
            assert grad is not None and grad.isfinite().all(), name
            # Some of Pyro's hold numbers that they mask.
            assert (grad != 0).any() if isinstance(rates, Auto) else (grad != 0).all(), name


@everyone
def test_a_conjugate_posterior_is_found(rates: RateGuide) -> None:
    """log x ~ N(0, 1), observed once with sd 0.5 at 1: the posterior of log x is N(0.8, 0.2)."""

    def body(data: Tensor) -> None:
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.log(), 0.5), obs=data)

    data = torch.ones(2)
    with pyro.get_param_store().scope():
        # Long enough to widen from a start that is 45 times too narrow.
        guide = fit(Toy(body, x=torch.ones(2)), rates, data, steps=400, rate=0.09)
        log_x = draws(guide, data)["x"].log()
    # The most probable x, not log x: -log x of the LogNormal's density pulls it down to (4 - 1) / 5.
    assert (log_x.mean(0) - (0.6 if rates == Point() else 0.8)).abs().max() < 0.08
    if rates != Point():
        assert (log_x.std(0) - 0.2**0.5).abs().max() < 0.08


def fit(program: Toy, rates: RateGuide, data: Tensor, *, steps: int, rate: float) -> AutoGuide:
    """SVI with a learning rate that falls to a hundredth; a step sees 16 draws at once."""
    guide = rates(program)
    # An autoguide looks at the program before particles have a plate.
    guide(data)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(program, guide, ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step(data)
    return guide


def draws(guide: AutoGuide, *args: object, n: int = 4000) -> dict[str, Tensor]:
    """Draws of the sites, leading, all of them at once."""
    with torch.no_grad(), pyro.plate("draws", n, dim=-2):
        return {name: value.expand(n, *value.shape[1:]) for name, value in guide(*args).items()}


SPREAD = 0.3


def sum_is_seen(data: Tensor) -> None:
    """x + log y is observed with sd 0.3, both N(0, 1) before: a ridge, along which they are correlated by -0.92."""
    x, y = pyro.sample("x", dist.Normal(0.0, 1.0)), pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("sum", dist.Normal(x + y.log(), SPREAD), obs=data)


@pytest.mark.parametrize("rates", [MeanField(0.3), PerGene(0.3), LowRank(sd=0.3)], ids=repr)
def test_a_correlated_posterior_is_found_where_the_guide_holds_one(rates: RateGuide) -> None:
    precision = torch.eye(2) + 1 / SPREAD**2
    truth, data = precision.inverse(), torch.tensor([-1.0, 0.5, 2.0])
    with pyro.get_param_store().scope():
        guide = fit(Toy(sum_is_seen, x=torch.zeros(3), y=torch.ones(3)), rates, data, steps=1000, rate=0.05)
        found = draws(guide, data)
    x = torch.stack((found["x"], found["y"].log()), -1)
    mean = truth.sum(0) * data[:, None] / SPREAD**2
    covariance = torch.stack([x[:, gene].T.cov() for gene in range(3)])
    assert (x.mean(0) - mean).abs().max() < 0.1 * truth[0, 0].sqrt()
    if isinstance(rates, MeanField):
        # KL(q || p) with an independent q ends at the inverse of the precision's diagonal: 2.5 times too narrow.
        truth = torch.diag(1 / precision.diagonal())
    assert ((covariance - truth).abs() < 0.12 * truth[0, 0]).all()


@everyone
def test_a_checkpoint_keeps_it_and_a_run_goes_on_from_it(rates: RateGuide, tmp_path: Path) -> None:
    guide, cells, kept = replace(GUIDE, rates=rates), small_cells(), list[Training]()
    options = {"settings": settings(max_epochs=3), "progress": False}
    fitted = train(MODEL, guide, cells, on_evaluation=kept.append, **options)
    checkpoint.save(kept[0], tmp_path)
    assert (
        differing(train(MODEL, guide, cells, resume=checkpoint.load(tmp_path)[0], **options).training, kept[-1]) == []
    )
    checkpoint.save(kept[-1], tmp_path)
    restored = restore(MODEL, guide, cells, checkpoint.load(tmp_path)[0])
    one, other = (summarise(each, cells, draws=4, progress=False) for each in (fitted, restored))
    assert one.rates.keys() == GENE_LEVEL
    for name in GENE_LEVEL:
        assert (one.rates[name] == other.rates[name]).all() and (one.rates_sd[name] == other.rates_sd[name]).all()
        assert ((one.rates_sd[name] > 0) == (rates != Point())).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@everyone
def test_it_trains_on_a_gpu(rates: RateGuide) -> None:
    cells = small_cells()
    cells = replace(cells, molecules=cells.molecules.cuda(), ratio=cells.ratio.cuda())
    fitted = train(MODEL, replace(GUIDE, rates=rates), cells, settings=settings(max_epochs=2), progress=False)
    assert all(value.is_cuda and value.isfinite().all() for value in fitted.training.parameters.values())


@pytest.mark.parametrize("rates", [MeanField, PerGene, lambda sd: LowRank(rank=3, sd=sd)])
@pytest.mark.parametrize("sd", [0.01, 0.3])
def test_its_sd_at_the_start_is_as_told(rates: Callable[[float], RateGuide], sd: float, double: None) -> None:
    batch = whole(some_cells(8))
    with pyro.get_param_store().scope():
        guide = rates(sd)(program_of())
        guide(batch)
        quantiles = guide.quantiles([0.25, 0.75], batch)
    for name in GENE_LEVEL - {"switch_time"}:
        found = (quantiles[name][1] / quantiles[name][0]).log().detach() / (2 * 0.6744897501960817)
        # The low-rank part is drawn at random.
        assert_close(found, sd) if rates in (MeanField, PerGene) else assert_close(
            found.log(), math.log(sd), slack=1e10
        )


@pytest.mark.parametrize("sd", [0.0, -1.0])
def test_a_start_sd_is_positive(sd: float) -> None:
    with pytest.raises(InputError, match=f"Expected a start sd > 0; got {sd}"):
        PerGene(sd)(program_of())


def random_parameters(guide: AutoPerGene, *args: object) -> None:
    """Values of the guide's parameters far from their start."""
    guide(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_()


def covariance_root(guide: AutoPerGene) -> Tensor:
    return (unit_lower(guide.below, guide.loc.shape[-1]) * guide.scale.unsqueeze(-2)).detach()


def constrained(x: Tensor) -> dict[str, Tensor]:
    """The sites of `all_supports` that unconstrained values (..., 7) stand for."""
    shares = torch.distributions.StickBreakingTransform()(x[..., 5:])
    within = T_MAX * torch.sigmoid(x[..., 2])
    return {
        "anywhere": x[..., 0],
        "positive": x[..., 1].exp(),
        "within": within,
        "vector": x[..., 3:5],
        "shares": shares,
    }


def coordinates(x: Tensor) -> Tensor:
    """The seven of them that are free: the last share follows from the others."""
    values = constrained(x)
    scalars = torch.stack([values[name] for name in ("anywhere", "positive", "within")], -1)
    return torch.cat((scalars, values["vector"], values["shares"][..., :-1]), -1)


def test_the_density_is_torchs_multivariate_normal_and_the_jacobian(double: None) -> None:
    data = torch.zeros(4)
    with pyro.get_param_store().scope():
        guide = PerGene()(Toy(all_supports))
        random_parameters(guide, data)
        trace = poutine.trace(guide).get_trace(data)
        trace.compute_log_prob()
        normal = dist.MultivariateNormal(guide.loc.detach(), scale_tril=covariance_root(guide))
    x = trace.nodes["genes_unconstrained"]["value"].detach()
    for name, value in constrained(x).items():
        assert_close(trace.nodes[name]["value"].detach(), value)
    jacobians = torch.stack([torch.autograd.functional.jacobian(coordinates, each) for each in x])
    log_q = sum(trace.nodes[name]["log_prob"] for name in ("genes_unconstrained", *constrained(x)))
    assert_close(log_q.detach(), normal.log_prob(x) - jacobians.det().abs().log(), slack=100)


def test_the_normal_is_torchs_wherever_it_is_asked(double: None) -> None:
    """Not where it was just drawn alone, which it remembers."""
    data = torch.zeros(4)
    with pyro.get_param_store().scope():
        guide = PerGene()(Toy(all_supports))
        random_parameters(guide, data)
        root, posterior = covariance_root(guide), guide.get_posterior()
        normal = dist.MultivariateNormal(guide.loc.detach(), scale_tril=root)
        drawn, elsewhere = posterior.rsample((20_000,)), torch.randn(7, 4, 7)
        for x in (drawn, elsewhere):
            assert_close(posterior.log_prob(x).detach(), normal.log_prob(x).detach(), slack=1000)
        quantiles = guide.quantiles([0.5 + 0.5 * math.erf(0.5**0.5)], data)
    assert_mean(-posterior.log_prob(drawn).detach(), normal.entropy())
    assert_mean(drawn.detach(), normal.mean)
    away = (drawn - normal.mean).detach()
    assert_mean(torch.einsum("...i,...j->...ij", away, away), normal.covariance_matrix)
    assert_close(quantiles["anywhere"][0], (normal.mean + normal.stddev)[:, 0], slack=1e5)


def test_its_gradient_is_the_reparametrised_one(double: None) -> None:
    """By hand: log p at mu + L (sigma * eps), plus log sigma, for the same eps; scaled as training scales it."""
    data, cells = torch.tensor([-1.0, 0.5, 2.0]), 7
    toy = Toy(sum_is_seen)
    with pyro.get_param_store().scope():
        guide = PerGene()(toy)
        random_parameters(guide, data)
        scaled = [poutine.scale(each, scale=1 / cells) for each in (toy, guide)]
        torch.manual_seed(1)
        loss = Trace_ELBO().loss_and_grads(*scaled, data)
        grads = {name: parameter.grad for name, parameter in guide.named_parameters()}
        loc, scale, below = (parameter.detach().clone().requires_grad_() for parameter in guide.parameters())
    torch.manual_seed(1)
    noise = torch.normal(torch.zeros(3, 2), torch.ones(3, 2))
    sigma = softplus(scale)
    first, second = (sigma * noise).unbind(-1)
    x = loc + torch.stack((first, below[:, 0] * first + second), -1)
    prior = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    log_p = prior + dist.Normal(x.sum(-1), SPREAD).log_prob(data)
    entropy_term = sigma.log().sum(-1) - dist.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    elbo = (log_p + entropy_term).sum() / cells
    assert_close(torch.tensor(-loss), elbo.detach())
    elbo.backward()
    for (name, grad), mine in zip(grads.items(), (loc, scale, below), strict=True):
        assert_close(grad, -mine.grad), name


def test_genes_do_not_share_in_per_gene(double: None) -> None:
    """Another gene's parameters change nothing in this one's draw."""
    data, seen = torch.zeros(4), []
    with pyro.get_param_store().scope():
        guide = PerGene()(Toy(all_supports))
        random_parameters(guide, data)
        for _ in range(2):
            torch.manual_seed(3)
            seen.append(guide(data))
            with torch.no_grad():
                for parameter in guide.parameters():
                    parameter[2:] += 1.0
    for name, value in seen[0].items():
        assert torch.equal(value[:2], seen[1][name][:2]) and not torch.isclose(value[2:], seen[1][name][2:]).any()


def test_auto_says_what_it_is() -> None:
    one = Auto(AutoMultivariateNormal, init_scale=0.1)
    assert repr(one) == "Auto(AutoMultivariateNormal, init_scale=0.1)"
    assert one == Auto(AutoMultivariateNormal, init_scale=0.1) != Auto(AutoMultivariateNormal, init_scale=0.2)
    told = (
        Auto(AutoIAFNormal, num_transforms=2, hidden_dim=[8]),
        Auto(AutoIAFNormal, hidden_dim=[8], num_transforms=2),
    )
    assert len({in_words(MODEL, replace(GUIDE, rates=rates)) for rates in told}) == 1


@pytest.mark.parametrize("wrong", [AutoMultivariateNormal(lambda: None), dist.Normal, "AutoNormal"])
def test_auto_takes_classes_of_autoguides(wrong: object) -> None:
    with pytest.raises(InputError, match=r"Expected a class of pyro\.infer\.autoguide; got .*Pass the class"):
        Auto(wrong)


def test_gene_sites_hides_cells_and_data() -> None:
    program, batch = program_of(), whole(some_cells(8))
    trace = poutine.trace(gene_sites(program)).get_trace(batch)
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == GENE_LEVEL
    everything = poutine.trace(program).get_trace(batch)
    sites = {name: site for name, site in everything.nodes.items() if "cond_indep_stack" in site}
    assert {name for name, site in sites.items() if is_gene_level(site)} == GENE_LEVEL
