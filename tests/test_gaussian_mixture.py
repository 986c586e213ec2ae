"""The mixture as a density and as a prior whose component others infer; and the sizes of its clusters."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from tolerances import assert_close, assert_mean

from pyro_velo.assignments import ASSIGNMENTS, Assignment, Entropy, Exact, PerCell
from pyro_velo.cluster_sizes import SIZES, Dirichlet, Given, Learned, Uniform
from pyro_velo.errors import InputError
from pyro_velo.gaussian_mixture import BoundedMixture, GaussianMixture
from pyro_velo.models.mixing import Components

SHARES = torch.tensor([0.2, 0.5, 0.3])
exact = pytest.mark.usefixtures("double")


def mixture(n_latent: int = 2) -> GaussianMixture:
    """Three clusters."""
    torch.manual_seed(1)
    loc, scale = 2 * torch.randn(3, n_latent), torch.rand(3, n_latent) + 0.3
    return GaussianMixture((SHARES.to(loc) / SHARES.to(loc).sum()).log(), loc, scale)


# The density


@exact
def test_it_is_the_one_of_pyro_and_integrates_to_one() -> None:
    p = mixture(1)
    z = torch.linspace(-15, 15, 30_001)[:, None]
    assert_close(p.log_prob(z).exp().sum() * (30 / 30_000), 1.0)
    other = dist.MixtureSameFamily(dist.Categorical(p.log_weights.exp()), dist.Normal(p.loc, p.scale).to_event(1))
    assert_close(p.log_prob(z), other.log_prob(z))


@pytest.mark.parametrize("correlated", [False, True])
def test_its_draws_have_its_mean_and_covariance(correlated: bool) -> None:
    p = mixture()
    root, lower = torch.diag_embed(p.scale), None
    if correlated:
        lower = torch.randn(3, 2, 2)
        root = p.scale[..., None] * torch.linalg.inv(torch.eye(2) + lower.tril(-1))
    p = GaussianMixture(p.log_weights, p.loc, p.scale, lower)
    z = p.sample(torch.Size([20_000]))
    mean = SHARES @ p.loc
    assert_mean(z, mean)
    away = p.loc - mean
    covariance = torch.einsum("k,kij->ij", SHARES, root @ root.mT + away[:, :, None] * away[:, None])
    assert_mean((z - mean)[:, :, None] * (z - mean)[:, None], covariance)


@exact
@pytest.mark.parametrize("correlated", [False, True])
def test_a_component_is_that_of_the_mixture(correlated: bool) -> None:
    torch.manual_seed(3)
    lower = torch.randn(3, 4, 4) if correlated else None
    p = GaussianMixture(torch.zeros(3), torch.randn(3, 4), torch.rand(3, 4) + 0.5, lower)
    k, z = torch.tensor([2, 0, 1, 1, 2]), torch.randn(5, 4)
    assert_close(p.component(k).log_prob(z), p.log_components(z).gather(1, k[:, None]).squeeze(1))


@exact
def test_correlated_components_are_those_of_torch_and_start_from_their_covariances() -> None:
    torch.manual_seed(2)
    factor = torch.randn(3, 4, 4)
    covariance = factor @ factor.mT + 0.1 * torch.eye(4)
    components, loc, z = Components(3, 4, correlated=True), torch.randn(3, 4), torch.randn(7, 4)
    components.begin(loc, torch.linalg.cholesky(covariance))
    p = GaussianMixture(torch.zeros(3), components.loc, components.log_scale.exp(), components.lower)
    assert_close(p.log_components(z), dist.MultivariateNormal(loc, covariance).log_prob(z[:, None]), slack=10)
    plain = Components(3, 4, correlated=False)
    plain.begin(loc, torch.linalg.cholesky(covariance))
    assert_close(plain.log_scale.exp() ** 2, covariance.diagonal(dim1=1, dim2=2))


@exact
def test_a_cluster_of_no_weight_is_none() -> None:
    p, z = mixture(), torch.randn(6, 2)
    alone = GaussianMixture(torch.tensor([-torch.inf, 0.0, -torch.inf]), p.loc, p.scale)
    assert_close(alone.log_prob(z), dist.Normal(p.loc[1], p.scale[1]).to_event(1).log_prob(z))


# Bounds


@exact
def test_the_bound_is_below_the_mixture_and_reaches_it_where_q_is_the_posterior() -> None:
    p, z = mixture(), 2 * torch.randn(50, 2)

    def bound(q):
        rest = (torch.special.entr(q) + q * p.log_weights).sum(-1)
        return BoundedMixture(p, q, rest).log_prob(z)

    assert (bound(torch.rand(50, 3).softmax(-1)) < p.log_prob(z)).all()
    assert_close(bound(p.log_joint(z).softmax(-1)), p.log_prob(z))


@exact
def test_the_regulariser_is_the_most_that_any_dirichlet_of_the_cell_gives() -> None:
    p, z, logits = mixture(), torch.randn(20, 2), torch.randn(20, 3)
    for alpha in (0.3, 1.0, 4.0):
        best = Entropy(alpha).prior(p, logits[:, None], None).log_prob(z)

        def per_cell(concentration, alpha=alpha, prior=p, z=z):
            outputs = torch.stack((logits, torch.log(torch.expm1(concentration - 1e-3))), -2)
            return PerCell(alpha).prior(prior, outputs, None).log_prob(z)

        # At q(d) = Dir(alpha + q(y)).
        assert_close(per_cell(alpha + logits.softmax(-1)), best)
        for other in (1.0, 2.0):
            assert (per_cell(alpha + other * torch.rand(20, 3)) < best).all()


@exact
def test_a_cell_that_is_sure_has_one_cluster_in_k_whatever_alpha() -> None:
    q = torch.eye(4)
    for alpha in (0.1, 1.0, 30.0):
        assert_close(Entropy(alpha).regulariser(q, torch.zeros(4)), -torch.tensor(4.0).log())
    # Never above 0; with a large alpha the KL from equally likely clusters.
    q = torch.randn(100, 4).softmax(-1)
    entropy = torch.special.entr(q).sum(-1)
    assert all((Entropy(alpha).regulariser(q, entropy) < 0).all() for alpha in (0.1, 1.0))
    kl = (q * (q * 4).log()).sum(-1)
    assert_close(Entropy(1e6).regulariser(q, entropy), -kl, slack=1e6)


@exact
@pytest.mark.parametrize("make", ASSIGNMENTS.values(), ids=ASSIGNMENTS.keys())
def test_a_known_cluster_is_the_joint_with_it_and_no_part_of_q(make: type[Assignment]) -> None:
    p, z, family = mixture(), torch.randn(3, 2), make()
    p = GaussianMixture(torch.full((3,), 1 / 3).log(), p.loc, p.scale)
    outputs = torch.randn(3, family.heads, 3)
    allowed = torch.eye(3).bool()
    found = family.prior(p, outputs, allowed).log_prob(z)
    if not isinstance(family, PerCell):
        assert_close(found, p.log_joint(z).diagonal())
    else:
        assert (found < p.log_joint(z).diagonal()).all()
    assert_close(family.log_q(p, z, outputs).exp().sum(-1), 1.0)
    assert (family.log_q(p, z, outputs).exp() < 1).all()


@pytest.mark.parametrize("make", ASSIGNMENTS.values(), ids=ASSIGNMENTS.keys())
def test_a_cluster_that_is_out_of_the_question_leaves_gradients_finite(make: type[Assignment]) -> None:
    p, family = mixture(), make()
    outputs = torch.zeros(2, family.heads, 3)
    if family.heads:
        outputs[:, 0] = torch.tensor([0.0, -500.0, 3.0])
    z = torch.tensor([[100.0, -80.0], [0.0, 0.0]], requires_grad=True)
    outputs.requires_grad_()
    log_prob = family.prior(p, outputs, None).log_prob(z)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and z.grad.isfinite().all()
    assert not family.heads or outputs.grad.isfinite().all()


def test_exact_is_bayes_rule() -> None:
    p, z = mixture(), torch.randn(5, 2)
    outputs = torch.zeros(0, 3)
    shares = p.log_joint(z).exp()
    assert_close(Exact().log_q(p, z, outputs).exp(), shares / shares.sum(-1, keepdim=True))


# Sizes


@pytest.mark.parametrize("make", SIZES.values(), ids=SIZES.keys())
def test_sizes_sum_to_one_and_start_where_they_are_told(make: type) -> None:
    program = make().build(3)
    program.begin(SHARES)
    with poutine.trace() as guide:
        program.posterior()
    with poutine.trace(), poutine.replay(trace=guide.trace):
        found = program.prior().exp()
    assert_close(found.sum(), 1.0)
    if make is Learned:
        assert_close(found, SHARES)
    elif make is Uniform:
        assert_close(found, 1 / 3)
    else:
        q = guide.trace.nodes["sizes"]["fn"]
        assert_close(q.mean, SHARES, slack=100)


def test_given_sizes_stay_and_wrong_ones_are_refused() -> None:
    assert_close(Given((0.25, 0.75)).build(2).prior().exp(), torch.tensor([0.25, 0.75]))
    for wrong in (lambda: Given((0.5, 0.6)), lambda: Given((0.5, 0.5)).build(3), lambda: Dirichlet(0.0)):
        with pytest.raises(InputError, match="Expected"):
            wrong()
    for make in (Entropy, PerCell):
        with pytest.raises(InputError, match="alpha > 0"):
            make(-1.0)


def test_a_dirichlet_of_sizes_is_judged_as_bayes_rule_has_it(double: None) -> None:
    """A hundred cells of known clusters: at q = Dirichlet(1 + counts) every draw gives the evidence, and no other q."""
    counts = torch.tensor([20.0, 50.0, 30.0])
    program = Dirichlet(1.0).build(3)

    def model() -> None:
        pyro.factor("cells", (counts * program.prior()).sum())

    def elbos(concentration: torch.Tensor) -> torch.Tensor:
        program.outputs.data = torch.log(torch.expm1(concentration - 1e-3))
        elbo = pyro.infer.Trace_ELBO()
        return torch.tensor([-elbo.loss(model, program.posterior) for _ in range(50)])

    prior, posterior = torch.ones(3), 1 + counts
    evidence = (torch.lgamma(posterior).sum() - torch.lgamma(posterior.sum())) - (
        torch.lgamma(prior).sum() - torch.lgamma(prior.sum())
    )
    assert_close(elbos(posterior), evidence)
    assert elbos(1 + 0.5 * counts).mean() < evidence - 0.1
