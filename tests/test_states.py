"""Laws of the state families: what their bounds are, that they are bounds, and that they keep their gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from tolerances import STANDARD_ERRORS, assert_close, assert_mean, standard_error
from torch import Tensor
from torch.distributions import kl_divergence
from toys import leaf

from pyro_velo.errors import InputError
from pyro_velo.priors import Priors
from pyro_velo.states import (
    STATE_FAMILIES,
    STATES,
    Collapsed,
    Dirichlet,
    Hard,
    LogisticNormal,
    StateFamily,
    concentrations,
    dirichlet_kl,
)

K, CELLS, GENES = len(STATES), 3, 2
CONCENTRATION = Priors().concentration

everyone = pytest.mark.parametrize("make", STATE_FAMILIES.values(), ids=STATE_FAMILIES.keys())

PROBABILITIES = {Dirichlet, LogisticNormal}
"""The families that draw pi itself, whose weights sum to one; those of the others are in a bound, and sum to less."""


def programs(
    family: StateFamily, outputs: Tensor, log_likelihood: Tensor, concentration: float = CONCENTRATION
) -> tuple[Callable, Callable]:
    """The smallest model and guide with states: the likelihood of each state is given, (4, B, G)."""

    def plates() -> tuple[pyro.plate, pyro.plate]:
        return pyro.plate("cells", outputs.shape[1], dim=-2), pyro.plate("genes", outputs.shape[2], dim=-1)

    def model() -> None:
        cells, genes = plates()
        with cells, genes:
            log_weights = family.prior(concentration, outputs[0].detach())
            terms = log_weights + log_likelihood
            pyro.factor("molecules", terms.amax(0) if family.hard else terms.logsumexp(0))

    def guide() -> None:
        cells, genes = plates()
        with cells, genes:
            family.posterior(outputs)

    return model, guide


def per_gene(model: Callable, guide: Callable) -> Tensor:
    """One draw of the ELBO of each cell and gene."""
    q = poutine.trace(guide).get_trace()
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace()
    q.compute_log_prob()
    p.compute_log_prob()
    sites = [(t, s) for t in (p, q) for s in t.nodes.values() if s["type"] == "sample" and s["name"] not in PLATES]
    return sum((1 if t is p else -1) * site["log_prob"] for t, site in sites)


def draws_per_gene(family: StateFamily, outputs: Tensor, log_likelihood: Tensor, draws: int) -> Tensor:
    """So many draws of the ELBO of each cell and gene, (draws, B, G), each cell having as many twins."""
    twins = (each.repeat(1, draws, 1) for each in (outputs, log_likelihood))
    return per_gene(*programs(family, *twins)).view(draws, *outputs.shape[1:])


PLATES = ("cells", "genes")


def some_outputs(family: StateFamily | None = None) -> Tensor:
    return 2 * torch.randn((family or Dirichlet()).heads, CELLS, GENES)


def some_likelihoods() -> Tensor:
    return 3 * torch.randn(K, CELLS, GENES)


def drawn(family: StateFamily, outputs: Tensor) -> Tensor:
    """The log-weights (4, B, G) of one draw of the guide."""
    _, guide = programs(family, outputs, torch.zeros(K, *outputs.shape[1:]))
    return family.log_weights(poutine.trace(guide).get_trace().nodes["pi"]["value"])


def log_evidence(log_likelihood: Tensor) -> Tensor:
    """Log p(u, s) of each cell and gene, the states being equally likely on average."""
    return log_likelihood.logsumexp(0) - torch.tensor(K).log()


@pytest.mark.parametrize("concentration", [0.05, 0.25, 1.0, 7.0])
def test_dirichlet_kl_equals_torchs(concentration: float, double: None) -> None:
    q = torch.distributions.Dirichlet(torch.rand(50, K) * torch.logspace(-2, 2, 50)[:, None] + 1e-3)
    p = torch.distributions.Dirichlet(torch.full((K,), concentration))
    kl, expected_log = dirichlet_kl(q.concentration.movedim(-1, 0), concentration)
    assert_close(kl, kl_divergence(q, p))
    assert_close(expected_log, Collapsed().log_weights(q.concentration))


def test_dirichlet_kl_is_zero_at_the_prior_and_positive_elsewhere(double: None) -> None:
    at = torch.full((K, 1), CONCENTRATION)
    assert_close(dirichlet_kl(at, CONCENTRATION)[0], 0.0)
    for factor in (0.9, 1.1):
        assert (dirichlet_kl(factor * at, CONCENTRATION)[0] > 1e-4).all()


@everyone
def test_sites_and_shapes(make: type[StateFamily], double: None) -> None:
    family = make()
    model, guide = programs(family, some_outputs(family), some_likelihoods())
    q = poutine.trace(guide).get_trace()
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace()
    for trace in (p, q, poutine.trace(model).get_trace()):
        fn = trace.nodes["pi"]["fn"]
        assert (fn.batch_shape, fn.event_shape) == ((CELLS, GENES), (K,))
        assert trace.nodes["pi"]["value"].shape == (CELLS, GENES, K)
        assert family.log_weights(trace.nodes["pi"]["value"]).shape == (K, CELLS, GENES)
    assert torch.equal(p.nodes["pi"]["value"], q.nodes["pi"]["value"])


@everyone
def test_the_guide_stays_within_the_support_of_the_model(make: type[StateFamily], double: None) -> None:
    family = make()
    model, guide = programs(family, some_outputs(family), some_likelihoods())
    prior, drawn_by_guide = (poutine.trace(program).get_trace().nodes["pi"] for program in (model, guide))
    assert type(prior["fn"].support) is type(drawn_by_guide["fn"].support)
    for site in (prior, drawn_by_guide):
        assert prior["fn"].support.check(site["value"]).all()


@everyone
def test_the_prior_runs_without_a_guide_and_favours_no_state(make: type[StateFamily], double: None) -> None:
    family = make()
    model, _ = programs(family, torch.zeros(family.heads, 4000, 1), torch.zeros(K, 4000, 1))
    trace = poutine.trace(model).get_trace()
    share = family.log_weights(trace.nodes["pi"]["value"]).softmax(0)[..., 0].T
    assert_mean(share, torch.full((K,), 1 / K))


@everyone
def test_more_of_an_output_is_more_of_its_state(make: type[StateFamily], double: None) -> None:
    family = make()
    for k in range(K):
        high = torch.zeros(family.heads, 400, 1)
        high[k] = 6.0
        share = drawn(family, high).softmax(0).mean(1)
        assert share.argmax() == k and share[k] > 0.6


@everyone
def test_weights_of_probabilities_sum_to_one_and_of_bounds_to_less(make: type[StateFamily], double: None) -> None:
    family = make()
    total = drawn(family, some_outputs(family)).logsumexp(0)
    if make in PROBABILITIES:
        assert_close(total, 0.0)
    else:
        assert (total < -1e-3).all()


@everyone
def test_expected_weights_are_probabilities_before_the_molecules_are_looked_at(
    make: type[StateFamily], double: None
) -> None:
    family = make()
    outputs = some_outputs(family)
    pi = poutine.trace(family.posterior).get_trace(outputs).nodes["pi"]["value"]
    found = family.expected_weights(pi)
    if family.hard:
        # Of which the largest counts, and no scale.
        found = found + math.log(K)
    assert_close(found.logsumexp(0), 0.0)
    if make is Collapsed:
        expected = dist.Dirichlet(pi).mean.movedim(-1, 0)
        assert_close(found.exp(), expected)
        assert (found.amax(0) < (family.log_weights(pi) - family.log_weights(pi).logsumexp(0)).amax(0)).all()


@everyone
def test_every_output_of_the_network_gets_a_gradient(make: type[StateFamily], double: None) -> None:
    family = make()
    outputs = leaf(some_outputs(family))
    (-per_gene(*programs(family, outputs, some_likelihoods())).sum()).backward()
    assert outputs.grad.isfinite().all()
    assert (outputs.grad.abs() > 0).all()


@everyone
def test_every_bound_is_below_the_evidence(make: type[StateFamily], double: None) -> None:
    family = make()
    outputs, log_likelihood = some_outputs(family), some_likelihoods()
    bounds = draws_per_gene(family, outputs, log_likelihood, 2000)
    # A draw that does not vary has no error but that of rounding.
    assert (bounds.mean(0) <= log_evidence(log_likelihood) + STANDARD_ERRORS * standard_error(bounds) + 1e-12).all()


@everyone
def test_climbing_the_bound_finds_the_state_that_explains_the_data(make: type[StateFamily], double: None) -> None:
    family, log_likelihood = make(), torch.zeros(K, CELLS, GENES)
    log_likelihood[2] = 8.0
    outputs = torch.zeros(family.heads, CELLS, GENES, requires_grad=True)
    optimiser = torch.optim.Adam([outputs], lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (-draws_per_gene(family, outputs, log_likelihood, 10).sum()).backward()
        optimiser.step()
    share = drawn(family, outputs.detach().repeat(1, 200, 1)).softmax(0).view(K, 200, CELLS, GENES).mean(1)
    # The prior is worth four times its concentration: the best Dirichlet has a mean of 1.25 / 2.
    assert (share[2] > 0.45).all()


@everyone
def test_families_say_what_they_are_without_an_address(make: type[StateFamily]) -> None:
    assert repr(make()) == repr(make())
    assert re.fullmatch(rf"{make.__name__}\([^<>]*\)", repr(make()))
    assert make() == make()


def test_both_dirichlet_families_mean_the_same_posterior(double: None) -> None:
    outputs = some_outputs()
    guides = (programs(family, outputs, some_likelihoods())[1] for family in (Dirichlet(), Collapsed()))
    sampled, collapsed = (poutine.trace(guide).get_trace().nodes["pi"] for guide in guides)
    assert_close(sampled["fn"].concentration, collapsed["value"])


def test_the_collapsed_bound_is_its_formula(double: None) -> None:
    outputs, log_likelihood = some_outputs(), some_likelihoods()
    q = torch.distributions.Dirichlet(concentrations(outputs))
    p = torch.distributions.Dirichlet(torch.full((K,), CONCENTRATION))
    expected_log = torch.digamma(q.concentration) - torch.digamma(q.concentration.sum(-1, keepdim=True))
    formula = (expected_log.movedim(-1, 0) + log_likelihood).logsumexp(0) - kl_divergence(q, p)
    assert_close(per_gene(*programs(Collapsed(), outputs, log_likelihood)), formula)
    loss = Trace_ELBO().loss(*programs(Collapsed(), outputs, log_likelihood))
    assert loss == pytest.approx(-formula.sum().item(), rel=1e-10)


def test_expected_log_weights_are_the_mean_of_draws(double: None) -> None:
    q = torch.tensor([0.4, 1.0, 2.5, 9.0])
    assert_mean(torch.distributions.Dirichlet(q).sample((20_000,)).log(), Collapsed().log_weights(q))


def test_collapsed_is_below_sampled_is_below_the_evidence(double: None) -> None:
    # log-sum-exp is convex: log-sum-exp of E[log pi + log p] is at most E of the log-sum-exp, the sampled ELBO.
    outputs, log_likelihood = some_outputs(), some_likelihoods()
    collapsed = per_gene(*programs(Collapsed(), outputs, log_likelihood))
    sampled = draws_per_gene(Dirichlet(), outputs, log_likelihood, 3000)
    evidence = log_evidence(log_likelihood)
    spare = STANDARD_ERRORS * standard_error(sampled)
    assert (collapsed <= sampled.mean(0) + spare).all()
    assert (sampled.mean(0) <= evidence + spare).all()
    assert (collapsed < evidence).all()
    assert sampled.std(0).min() > 0, "the sampled family varies; the collapsed one does not"


def test_the_evidence_that_is_bounded_is_that_of_the_prior(double: None) -> None:
    # E[pi_k] = 1/4, so the mixture's evidence needs no integral; sampling from the prior agrees.
    log_likelihood = some_likelihoods()
    pi = torch.distributions.Dirichlet(torch.full((K,), CONCENTRATION)).sample((20_000, CELLS, GENES))
    draws = (pi.movedim(-1, 1) * log_likelihood.exp()).sum(1)
    assert_mean(draws, log_likelihood.exp().mean(0))


@pytest.mark.parametrize("concentration", [1e4, 1e6])
def test_the_collapsed_bound_is_tight_where_pi_does_not_vary(concentration: float, double: None) -> None:
    log_likelihood = some_likelihoods()
    outputs = torch.full((K, CELLS, GENES), concentration - 1e-3)
    bound = per_gene(*programs(Collapsed(), outputs, log_likelihood, concentration))
    evidence = log_evidence(log_likelihood)
    assert ((evidence - bound) >= 0).all() and ((evidence - bound) < 2 / concentration).all()


@pytest.mark.parametrize("concentration", [0.05, CONCENTRATION, 3.0])
@pytest.mark.parametrize("k", range(K))
def test_the_collapsed_bound_is_exact_where_one_state_is_certain(k: int, concentration: float, double: None) -> None:
    # p(pi | u, s) is then the prior's Dirichlet with one more of state k, which is in the family of q.
    log_likelihood = torch.full((K, CELLS, GENES), -1e4)
    log_likelihood[k] = torch.randn(CELLS, GENES)
    at_best, elsewhere = (torch.full((K, CELLS, GENES), concentration) for _ in range(2))
    at_best[k] += 1
    elsewhere[k] += 1.3
    exact, below = (
        per_gene(*programs(Collapsed(), torch.log(torch.expm1(q - 1e-3)), log_likelihood, concentration))
        for q in (at_best, elsewhere)
    )
    assert_close(exact, log_evidence(log_likelihood))
    assert (below < exact - 1e-3).all()


def test_the_collapsed_bound_is_its_monte_carlo_estimate(double: None) -> None:
    outputs, log_likelihood = some_outputs(), some_likelihoods()
    q = torch.distributions.Dirichlet(concentrations(outputs))
    p = torch.distributions.Dirichlet(torch.full((K,), CONCENTRATION))
    # It is the ELBO of a posterior in which pi and the state are independent; r is the best one of the state.
    expected_log = torch.digamma(q.concentration) - torch.digamma(q.concentration.sum(-1, keepdim=True))
    r = (expected_log.movedim(-1, 0) + log_likelihood).softmax(0)
    pi = q.sample((20_000,))
    explained = (r * (pi.log().movedim(-1, 1) + log_likelihood - r.log())).sum(1)
    draws = explained + p.log_prob(pi) - q.log_prob(pi)
    assert_mean(draws, per_gene(*programs(Collapsed(), outputs, log_likelihood)))


def test_the_collapsed_gradient_is_that_of_its_formula(double: None) -> None:
    outputs, log_likelihood = leaf(some_outputs()), some_likelihoods()

    def bound(x: Tensor) -> Tensor:
        return per_gene(*programs(Collapsed(), x, log_likelihood)).sum()

    assert torch.autograd.gradcheck(bound, outputs)


@everyone
@pytest.mark.parametrize("size", [30.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_extreme_outputs(make: type[StateFamily], size: float, dtype: torch.dtype) -> None:
    family = make()
    signs = torch.tensor([[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, -1, -1], [1, -1, 1, 0], [0, 0, 0, 0]])
    signs = torch.cat([signs] * (family.heads // K), 1)
    outputs = leaf((size * signs.T[:, :, None]).to(dtype).expand(family.heads, 5, 40))
    log_likelihood = (50 * torch.randn(K, 5, 40)).to(dtype)
    loss = Trace_ELBO().differentiable_loss(*programs(family, outputs, log_likelihood))
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad.isfinite().all()


@everyone
def test_draws_are_probabilities_even_in_a_corner(make: type[StateFamily]) -> None:
    for corner in (-30.0, 30.0):
        log_weights = drawn(make(), torch.full((make.heads, 50, 40), corner))
        assert log_weights.isfinite().all()
        assert (log_weights.logsumexp(0) <= 1e-5).all(), "log-weights of a bound never sum to more than one"


@pytest.mark.parametrize("concentration", [0.1, 0.25, 1.0, 5.0])
def test_log_ratios_of_the_logistic_normal_spread_as_the_dirichlets(concentration: float, double: None) -> None:
    like = torch.zeros(40_000, 1)
    with pyro.plate("cells", 40_000, dim=-2), pyro.plate("genes", 1, dim=-1):
        normal, dirichlet = (family.prior(concentration, like)[..., 0] for family in (LogisticNormal(), Dirichlet()))
    exact = 2 * torch.special.polygamma(1, torch.tensor(concentration)).item()
    assert 2 * LogisticNormal().sd(concentration) ** 2 == pytest.approx(exact)
    for log_weights in (normal, dirichlet):
        log_ratio = log_weights[0] - log_weights[2]
        assert_mean(log_ratio, 0.0)
        assert_mean(log_ratio**2, exact)


def test_the_logistic_normals_kl_is_that_of_its_normals(double: None) -> None:
    family = LogisticNormal(scale=1.7)
    outputs = some_outputs(family)
    model, guide = programs(family, outputs, torch.zeros(K, CELLS, GENES))
    q, p = (poutine.trace(program).get_trace().nodes["pi"]["fn"] for program in (guide, model))
    draws = draws_per_gene(family, outputs, torch.zeros(K, CELLS, GENES), 4000)
    assert_mean(draws, -kl_divergence(q.base_dist, p.base_dist).sum(-1))
    assert_close(p.base_dist.scale, 1.7)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_no_normal_has_is_refused(scale: float) -> None:
    with pytest.raises(InputError, match=r"scale, to be a number > 0; got .* Leave it out"):
        LogisticNormal(scale=scale)


def test_the_hard_bound_is_exact_once_the_weights_are_settled_and_one_state_is_certain(double: None) -> None:
    log_likelihood = torch.full((K, CELLS, GENES), -1e4)
    log_likelihood[1] = torch.randn(CELLS, GENES)
    outputs = torch.zeros(K, CELLS, GENES)
    before = per_gene(*programs(Hard(), outputs, log_likelihood))
    outputs[1] = 60.0
    after = per_gene(*programs(Hard(), outputs, log_likelihood))
    assert_close(after, log_evidence(log_likelihood))
    assert_close(after - before, torch.tensor(K).log().item())


def test_only_the_hard_family_takes_the_maximum() -> None:
    assert [name for name, family in STATE_FAMILIES.items() if family.hard] == ["hard"]


def test_the_families_have_the_four_states() -> None:
    assert STATES == ("induction", "induction steady state", "repression", "repression steady state")
    assert dist.Dirichlet(torch.full((K,), CONCENTRATION)).event_shape == (4,)
