"""Laws of the state families: what their bounds are, that they are bounds, and that they keep their gradients."""

from __future__ import annotations

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

from pyro_velo.priors import Priors
from pyro_velo.states import STATE_FAMILIES, STATES, Collapsed, Dirichlet, StateFamily, dirichlet_kl

K, CELLS, GENES = len(STATES), 3, 2
CONCENTRATION = Priors().concentration

everyone = pytest.mark.parametrize("make", STATE_FAMILIES.values(), ids=STATE_FAMILIES.keys())


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
            pyro.factor("molecules", (log_weights + log_likelihood).logsumexp(0))

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
    return sum((1 if t is p else -1) * site["log_prob"] for t, site in sites) * torch.ones(CELLS, GENES)


PLATES = ("cells", "genes")


def some_outputs() -> Tensor:
    return 2 * torch.randn(K, CELLS, GENES)


def some_likelihoods() -> Tensor:
    return 3 * torch.randn(K, CELLS, GENES)


def concentrations_of(family: StateFamily, outputs: Tensor) -> Tensor:
    """What q(pi) the guide means by the network's outputs: (B, G, 4)."""
    _, guide = programs(family, outputs, torch.zeros_like(outputs))
    fn = poutine.trace(guide).get_trace().nodes["pi"]["fn"]
    return fn.concentration if hasattr(fn, "concentration") else poutine.trace(guide).get_trace().nodes["pi"]["value"]


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
    model, guide = programs(make(), some_outputs(), some_likelihoods())
    q = poutine.trace(guide).get_trace()
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace()
    for trace in (p, q):
        fn = trace.nodes["pi"]["fn"]
        assert (fn.batch_shape, fn.event_shape) == ((CELLS, GENES), (K,))
        assert trace.nodes["pi"]["value"].shape == (CELLS, GENES, K)
    assert make().log_weights(q.nodes["pi"]["value"]).shape == (K, CELLS, GENES)


@everyone
def test_the_prior_runs_without_a_guide_and_favours_no_state(make: type[StateFamily], double: None) -> None:
    model, _ = programs(make(), torch.zeros(K, 4000, 1), torch.zeros(K, 4000, 1))
    trace = poutine.trace(model).get_trace()
    share = make().log_weights(trace.nodes["pi"]["value"]).softmax(0)[..., 0].T
    assert_mean(share, torch.full((K,), 1 / K))


@everyone
def test_more_of_an_output_is_more_of_its_state(make: type[StateFamily], double: None) -> None:
    family, low = make(), torch.zeros(K, CELLS, GENES)
    for k in range(K):
        high = low.clone()
        high[k] = 6.0
        q = concentrations_of(family, high)
        assert (q.argmax(-1) == k).all() and (q > 0).all()


def test_both_dirichlet_families_mean_the_same_posterior(double: None) -> None:
    outputs = some_outputs()
    assert_close(concentrations_of(Dirichlet(), outputs), concentrations_of(Collapsed(), outputs))


def test_the_collapsed_bound_is_its_formula(double: None) -> None:
    outputs, log_likelihood = some_outputs(), some_likelihoods()
    q = torch.distributions.Dirichlet(concentrations_of(Collapsed(), outputs))
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
    sampled = torch.stack([per_gene(*programs(Dirichlet(), outputs, log_likelihood)) for _ in range(3000)])
    evidence = log_likelihood.logsumexp(0) - torch.tensor(K).log()
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
    evidence = log_likelihood.logsumexp(0) - torch.tensor(K).log()
    assert ((evidence - bound) >= 0).all() and ((evidence - bound) < 2 / concentration).all()


def test_the_collapsed_gradient_is_that_of_its_formula(double: None) -> None:
    outputs, log_likelihood = leaf(some_outputs()), some_likelihoods()

    def bound(x: Tensor) -> Tensor:
        return per_gene(*programs(Collapsed(), x, log_likelihood)).sum()

    assert torch.autograd.gradcheck(bound, outputs)


def test_both_families_climb_the_same_way_in_expectation(double: None) -> None:
    # One state explains the data; both bounds' gradients raise its output.
    log_likelihood = torch.zeros(K, CELLS, GENES)
    log_likelihood[2] = 8.0
    for family in (Dirichlet(), Collapsed()):
        outputs = leaf(torch.zeros(K, CELLS, GENES))
        for _ in range(200):
            (-per_gene(*programs(family, outputs, log_likelihood)).sum()).backward()
        assert (outputs.grad[2] < 0).all(), family


@everyone
@pytest.mark.parametrize("size", [30.0, 1e3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_extreme_outputs(make: type[StateFamily], size: float, dtype: torch.dtype) -> None:
    signs = torch.tensor([[1, 1, 1, 1], [-1, -1, -1, -1], [1, -1, -1, -1], [1, -1, 1, 0], [0, 0, 0, 0]])
    outputs = leaf((size * signs.T[:, :, None]).to(dtype).expand(K, 5, 40))
    log_likelihood = (50 * torch.randn(K, 5, 40)).to(dtype)
    loss = Trace_ELBO().differentiable_loss(*programs(make(), outputs, log_likelihood))
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad.isfinite().all()


@everyone
def test_draws_are_probabilities_even_in_a_corner(make: type[StateFamily]) -> None:
    outputs = torch.full((K, 50, 40), -30.0)
    _, guide = programs(make(), outputs, outputs)
    log_weights = make().log_weights(poutine.trace(guide).get_trace().nodes["pi"]["value"])
    assert log_weights.isfinite().all()
    assert (log_weights.logsumexp(0) <= 1e-5).all(), "log-weights of a bound never sum to more than one"


def test_the_families_have_the_four_states() -> None:
    assert STATES == ("induction", "induction steady state", "repression", "repression steady state")
    assert dist.Dirichlet(torch.full((K,), CONCENTRATION)).event_shape == (4,)
