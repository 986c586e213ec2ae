"""Special functions and densities are what torch, SciPy and 40 digits say, and their gradients those of the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mpmath
import pytest
import scipy.stats
import torch
from mpmath import mpf
from tolerances import assert_close
from torch import Tensor
from toys import leaf

from pyro_velo.densities import (
    LEAST_MEAN,
    censored_normal_log_density,
    negative_binomial_log_density,
    negative_binomial_with_slopes,
    normal_log_density,
    poisson_log_density,
    student_t_log_density,
    zero_inflated,
)
from pyro_velo.special import log_gamma_and_digamma, stirling_error, stirling_slope

both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@both
def test_log_gamma_and_digamma_are_torchs_with_their_gradients(dtype: torch.dtype) -> None:
    x = leaf(torch.logspace(-3, 5, 2000, dtype=torch.float64).to(dtype))
    exact = leaf(x.double())
    for ours, theirs in zip(log_gamma_and_digamma(x), (torch.lgamma(exact), torch.digamma(exact)), strict=True):
        # Both cross zero, where rounding is that of the terms, about 10 in size: the tolerance is absolute there.
        scale = theirs.detach().abs().clamp_min(1)
        assert_close((ours.detach().double() / scale).to(dtype), (theirs.detach() / scale).to(dtype), slack=5)
        (ours_slope,) = torch.autograd.grad(ours.sum(), x, retain_graph=True)
        (slope,) = torch.autograd.grad(theirs.sum(), exact, retain_graph=True)
        scale = slope.abs().clamp_min(1)
        assert_close((ours_slope.double() / scale).to(dtype), (slope / scale).to(dtype), slack=5)


def test_normal_log_density_is_torchs_with_its_gradients_by_every_argument(double: None) -> None:
    x, mean, scale = leaf(torch.randn(6, 3)), leaf(torch.randn(4, 6, 3)), leaf(0.1 + torch.rand(4, 1, 3))
    assert_close(
        normal_log_density(x, mean, scale).detach(), torch.distributions.Normal(mean, scale).log_prob(x).detach()
    )
    assert torch.autograd.gradcheck(normal_log_density, (x, mean, scale))
    # Broadcast the other way round, too: many values of few means.
    assert torch.autograd.gradcheck(normal_log_density, (leaf(torch.randn(5, 3)), leaf(torch.randn(3)), leaf(scale[0])))


@both
def test_a_zero_of_the_censored_normal_has_all_that_is_below_it(dtype: torch.dtype) -> None:
    mean = torch.cat((torch.zeros(1), torch.logspace(-6, 2, 200))).to(dtype).requires_grad_()
    scale = torch.tensor(1.0, dtype=dtype)
    exact = torch.special.log_ndtr(-mean.detach().double())
    ours = censored_normal_log_density(torch.zeros((), dtype=dtype), mean, scale)
    torch.testing.assert_close(ours.detach().double(), exact, rtol=3e-7, atol=3e-7)
    # The hazard of a Normal: its density over what is below.
    hazard = torch.exp(-(mean.detach().double() ** 2) / 2 - exact) / math.sqrt(2 * math.pi)
    (slope,) = torch.autograd.grad(ours.sum(), mean)
    torch.testing.assert_close(slope.double(), -hazard, rtol=1e-6, atol=1e-7)
    above = torch.linspace(0.1, 3, 7, dtype=dtype)
    assert torch.equal(censored_normal_log_density(above, mean[:1], scale), normal_log_density(above, mean[:1], scale))


@both
def test_the_stirling_error_and_its_slope_are_those_of_the_gamma_function(dtype: torch.dtype) -> None:
    z = torch.logspace(-3, 7, 300, dtype=torch.float64).to(dtype)
    with mpmath.workdps(40):
        for n, exact in ((stirling_error(z), error_40), (stirling_slope(z), slope_40)):
            assert_close(n, torch.tensor([float(exact(mpf(each))) for each in z.tolist()], dtype=dtype))


def error_40(z: mpf) -> mpf:
    return mpmath.loggamma(z) - (z - 0.5) * mpmath.log(z) + z - mpmath.log(2 * mpmath.pi) / 2


def slope_40(z: mpf) -> mpf:
    return mpmath.digamma(z) - mpmath.log(z) + 1 / (2 * z)


COUNTS = (0, 1, 2, 7, 100, 12_345, 1_000_000)
DISPERSIONS = (1e-3, 0.05, 1.0, 30.0, 1e4, 1e6)
OFF = (0.5, 0.99, 0.999, 0.99999, 1.0, 1.00001, 1.001, 1.1)
"""Means around each count, where the naive sum cancels, besides 1e-8 to 1e6."""


def count_grid(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (B, 1), means (K, B, 1) and dispersions (G,), broadcast as states x cells x genes are."""
    x = torch.tensor(COUNTS, dtype=torch.float64)[:, None]
    around = torch.tensor(OFF, dtype=torch.float64)[:, None, None] * x.clamp_min(1)
    mean = torch.cat((torch.logspace(-8, 6, 15, dtype=torch.float64)[:, None, None].expand(-1, len(x), 1), around))
    return x.to(dtype), mean.to(dtype), torch.tensor(DISPERSIONS, dtype=dtype)


@cache
def exact(dtype: torch.dtype) -> dict[str, Tensor]:
    """log p and its slopes by mean and by log r on the grid as `dtype` rounds it, in float64, from 40 digits."""
    x, mean, r = (each.tolist() for each in torch.broadcast_tensors(*(e.double() for e in count_grid(dtype))))
    with mpmath.workdps(40):
        each = [
            [[nb_40(*map(mpf, at)) for at in zip(*b, strict=True)] for b in zip(*k, strict=True)]
            for k in zip(x, mean, r, strict=True)
        ]
        poisson = [
            [poisson_40(mpf(b[0][0]), mpf(b[1][0])) for b in zip(*k, strict=True)] for k in zip(x, mean, strict=True)
        ]
    nb = torch.tensor(each, dtype=torch.float64)
    p = torch.tensor(poisson, dtype=torch.float64)[:, :, None]
    return {
        "nb": nb[..., 0],
        "nb by mean": nb[..., 1],
        "nb by log r": nb[..., 2],
        "poisson": p[..., 0],
        "poisson by mean": p[..., 1],
    }


def nb_40(x: mpf, mean: mpf, r: mpf) -> tuple[float, float, float]:
    log = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1) - r * mpmath.log1p(mean / r)
    by_r = mpmath.digamma(x + r) - mpmath.digamma(r) - mpmath.log1p(mean / r) + (mean - x) / (r + mean)
    return float(log + x * mpmath.log(mean / (r + mean))), float(r * (x - mean) / (mean * (r + mean))), float(r * by_r)


def poisson_40(x: mpf, mean: mpf) -> tuple[float, float]:
    return float(x * mpmath.log(mean) - mean - mpmath.loggamma(x + 1)), float(x / mean - 1)


# Rounding a logarithm costs eps |x - mean|: 1e-4, beside a log p of -8, at a million molecules and a mean 0.1 % off.
SLACK = 2.0


@both
def test_poisson_is_exact_from_no_count_to_a_million(dtype: torch.dtype) -> None:
    x, mean, _ = count_grid(dtype)
    mean = leaf(mean)
    value = poisson_log_density(x, mean)
    value.sum().backward()
    assert_close(value.detach(), exact(dtype)["poisson"].to(dtype), slack=SLACK)
    assert_close(mean.grad, exact(dtype)["poisson by mean"].to(dtype))


@both
def test_negative_binomial_is_exact_from_no_count_to_a_million(dtype: torch.dtype) -> None:
    x, mean, r = count_grid(dtype)
    shape = torch.broadcast_shapes(x.shape, mean.shape, r.shape)
    mean, r = leaf(mean.expand(shape)), leaf(r.expand(shape))
    value = negative_binomial_log_density(x, mean, r)
    value.sum().backward()
    assert_close(value.detach(), exact(dtype)["nb"].to(dtype), slack=SLACK)
    assert_close(mean.grad, exact(dtype)["nb by mean"].to(dtype))
    # By log r, where (x + r) / (mean + r) is rounded, worth r times its distance from 1; so that is the unit.
    by_log_r, truth = (r.detach() * r.grad).double(), exact(dtype)["nb by log r"]
    unit = 1 + truth.abs() + (r * (x - mean) / (mean + r)).detach().abs().double()
    assert_close((by_log_r / unit).to(dtype), (truth / unit).to(dtype))


@both
def test_the_slopes_of_a_negative_binomial_are_its_gradients(dtype: torch.dtype) -> None:
    x, mean, r = count_grid(dtype)
    shape = torch.broadcast_shapes(x.shape, mean.shape, r.shape)
    each, dispersion = leaf(mean.expand(shape)), leaf(r.expand(shape))
    value = negative_binomial_log_density(x, each, dispersion)
    value.sum().backward()
    found = negative_binomial_with_slopes(x, mean.expand(shape), r)
    for one, expected in zip(found, (value.detach(), each.grad, dispersion.grad), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_the_counts_are_scipys(double: None) -> None:
    x, mean, r = count_grid(torch.float64)
    poisson = torch.from_numpy(scipy.stats.poisson.logpmf(x.numpy(), mean.numpy()))
    assert_close(poisson_log_density(x, mean), poisson, slack=10)
    share = (mean / (mean + r)).numpy()
    nb = torch.from_numpy(scipy.stats.nbinom.logpmf(x.numpy(), r.numpy(), 1 - share))
    # SciPy takes 1 - share and sums logarithms of gamma functions, 1e7 large: no more of its digits are good.
    good = torch.from_numpy(share > 1e-4)
    assert_close(negative_binomial_log_density(x, mean, r)[good], nb[good], slack=1000)


def test_student_t_is_scipys(double: None) -> None:
    x, mean, scale = torch.randn(6, 3), torch.randn(4, 6, 3), 0.1 + torch.rand(3)
    theirs = scipy.stats.t.logpdf(x.numpy(), 4.0, mean.numpy(), scale.numpy())
    assert_close(student_t_log_density(x, 4.0, mean, scale), torch.from_numpy(theirs))


def test_an_expected_count_of_zero_leaves_everything_finite() -> None:
    x, r = torch.tensor(COUNTS, dtype=torch.float32)[:, None], leaf(torch.tensor(DISPERSIONS))
    mean = leaf(torch.zeros(len(COUNTS), len(DISPERSIONS)))
    for value in (poisson_log_density(x, mean), negative_binomial_log_density(x, mean, r)):
        # None is as good as certain, one is as good as impossible, and each further one more so.
        assert (value[0].abs() < 1e-11).all() and (value[1] < -20).all() and (value.diff(dim=0) < 0).all()
        slopes = torch.autograd.grad(value.sum(), mean)[0]
        assert slopes.isfinite().all()
        assert_close(slopes[0], -1.0)
    (by_r,) = torch.autograd.grad(negative_binomial_log_density(x, mean, r).sum(), r)
    assert by_r.isfinite().all()
    assert torch.equal(poisson_log_density(x, mean), poisson_log_density(x, torch.full_like(mean, LEAST_MEAN)))


@both
def test_zero_inflation_is_the_mixture_with_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0], dtype=dtype)[:, None, None]
    log_prob = -torch.logspace(-8, 7, 31, dtype=dtype)[:, None]
    g = torch.tensor([-100.0, -20.0, -3.0, -0.5, 0.0, 0.5, 3.0, 20.0, 100.0], dtype=dtype)
    with mpmath.workdps(60):
        truth = [
            [[float(mixed_60(*map(mpf, (a, b, c)))) for c in g.tolist()] for b in log_prob[:, 0].tolist()]
            for a in (0, 1)
        ]
    assert_close(zero_inflated(log_prob, x, g), torch.tensor(truth, dtype=dtype))
    log_prob, g = leaf(log_prob), leaf(g)
    for slope in torch.autograd.grad(zero_inflated(log_prob, x, g).sum(), (log_prob, g)):
        assert slope.isfinite().all()


def mixed_60(x: mpf, log_prob: mpf, g: mpf) -> mpf:
    e, p = mpmath.exp(g), mpmath.exp(log_prob)
    return mpmath.log(e + p) - mpmath.log1p(e) if x == 0 else log_prob - mpmath.log1p(e)


@both
def test_zero_inflation_ends_in_its_base(dtype: torch.dtype) -> None:
    x, log_prob, g = (
        counts(6, 3).to(dtype),
        leaf(-torch.rand(6, 3).to(dtype)),
        torch.full((3,), -torch.inf, dtype=dtype),
    )
    value = zero_inflated(log_prob, x, g)
    assert torch.equal(value, log_prob)
    (slope,) = torch.autograd.grad(value.sum(), log_prob)
    assert torch.equal(slope, torch.ones_like(slope))
    assert_close(zero_inflated(log_prob, x, torch.full_like(g, -40.0)).detach(), log_prob.detach())


def counts(*shape: int) -> Tensor:
    """Small counts, a third of them 0."""
    return torch.poisson(2 * torch.rand(*shape)) * (torch.rand(*shape) > 0.2)


Call = Callable[..., Tensor]
DENSITIES: dict[str, tuple[Call, int]] = {
    "normal": (normal_log_density, 2),
    "censored normal": (censored_normal_log_density, 2),
    "student t": (lambda x, mean, scale: student_t_log_density(x, 4.0, mean, scale), 2),
    "poisson": (poisson_log_density, 1),
    "negative binomial": (negative_binomial_log_density, 2),
    "zero-inflated": (lambda x, mean, gate: zero_inflated(-mean, x, gate - 1), 2),
}
"""Each with the number of its positive arguments behind x."""
every = pytest.mark.parametrize(("density", "n"), DENSITIES.values(), ids=DENSITIES.keys())
SHAPES = [
    ((6, 3), (4, 6, 3), (3,)),
    ((1, 6, 3), (4, 6, 3), (3,)),
    ((6, 3), (3,), (3,)),
    ((5, 1, 6, 3), (4, 6, 3), (6, 3)),
    ((3,), (4, 6, 3), (4, 1, 1)),
    ((3,), (3,), ()),
]
"""Of x, the mean and the parameter: states lead; also draws before them, a mean for all cells, one cell."""


@every
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradients_are_those_of_the_value(density: Call, n: int, shapes: list[tuple[int, ...]], double: None) -> None:
    x, arguments = counts(*shapes[0]), [leaf(0.2 + torch.rand(shape)) for shape in shapes[1 : n + 1]]
    assert torch.autograd.gradcheck(lambda *each: density(x, *each), arguments)


@every
def test_they_compile_to_one_graph_without_gradients(density: Call, n: int) -> None:
    x, arguments = counts(6, 3), [0.2 + torch.rand(4, 6, 3), 0.2 + torch.rand(3)][:n]
    torch.compiler.reset()
    with torch.no_grad():
        traced = torch.compile(density, fullgraph=True, dynamic=False, backend="aot_eager")(x, *arguments)
        assert_close(traced, density(x, *arguments))


@pytest.mark.parametrize("name", sorted(DENSITIES.keys() - {"normal"}))  # whose backward torch differentiates again
def test_a_second_derivative_is_refused(name: str, double: None) -> None:
    density, n = DENSITIES[name]
    x, arguments = counts(6, 3), [leaf(0.2 + torch.rand(4, 6, 3)), leaf(0.2 + torch.rand(3))][:n]
    mixture = density(x, *arguments).logsumexp(0).sum()
    (slope,) = torch.autograd.grad(mixture, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
