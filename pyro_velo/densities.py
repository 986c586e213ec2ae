"""Log-densities in a few vectorised passes, each with its gradient in closed form: torch's normal takes twice as many.

Those of counts are in saddle-point form (Loader 2000, "Fast and accurate computation of binomial probabilities"). A sum
such as x log mean - mean - log x! loses all of float32's digits at a million molecules; here the log-probability is
that of x where x is expected, which is small, plus terms that are 0 there and never positive, so nothing cancels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_velo.compiled import compiling, once, summed_to
from pyro_velo.special import stirling_error, stirling_series, stirling_series_slope, stirling_slope

LEAST_MEAN = 2.0**-40
"""A smaller expected count is taken as this one, a molecule in 10^12 cells.

At 0 a molecule would be impossible, and a single one would make the loss infinite. Here it costs 28 nats, enough to
rule a state out, and its gradient is finite for any count.
"""


_NO_COUNT = 2.0**-96
"""What stands for a count x of 0 in x log(mean / x), which vanishes with x: here it is below 1e-26."""


def normal_log_density(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    r"""$\log\mathcal{N}(x \mid \mathrm{mean}, \mathrm{scale}^2)$; x, mean and scale broadcast."""
    return _NormalLogDensity.apply(x, mean, scale) if _followed(x, mean, scale) else _normal(x, mean, scale)[0]


def censored_normal_log_density(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    r"""The Normal's log-density where x > 0, and $\log\Phi(-\mathrm{mean}/\mathrm{scale})$ at x = 0 (Tobin 1958).

    What is not above zero was measured as zero. x is >= 0 and without a gradient; the three broadcast.
    """
    if _followed(mean, scale):
        # Places that are picked by what is measured are no one pass over memory.
        either = _FusedCensoredNormalLogDensity if compiling() else _CensoredNormalLogDensity
        return either.apply(x, mean, scale)
    value, d, _ = _normal(x, mean, scale)
    return torch.where(x > 0, value, _log_half_erfcx(d) - d * d / 2)


def student_t_log_density(x: Tensor, df: float, mean: Tensor, scale: Tensor) -> Tensor:
    r"""$\log t_\nu((x - \mathrm{mean}) / \mathrm{scale}) - \log\mathrm{scale}$, $\nu$ = df; the tensors broadcast."""
    if _followed(x, mean, scale):
        return _StudentTLogDensity.apply(x, df, mean, scale)
    return _student_t(x, df, mean, scale)[0]


def poisson_log_density(x: Tensor, mean: Tensor) -> Tensor:
    r"""$\log\mathrm{Poisson}(x \mid \mathrm{mean})$ of counts x, without a gradient, and means >= 0; they broadcast.

    $-\delta(x) - \log(2\pi x)/2 + x f(\mathrm{mean}/x)$ with $f(t) = \log t - (t - 1)$ and the $\delta$ of
    `stirling_error`; $-\mathrm{mean}$ for x = 0. As f is flat at 1, it does no harm that the quotient is rounded.
    """
    x = x.to(mean.dtype)
    if _followed(mean):
        return _PoissonLogDensity.apply(x, mean)
    return _poisson(x, mean)


def negative_binomial_log_density(x: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    r"""$\log\mathrm{NB}(x)$ of counts x, without a gradient, of variance mean + mean^2 / dispersion; they broadcast.

    With the dispersion r and $n = x + r$,
    $\delta(n) - \delta(r) - \delta(x) + \log(r / (2\pi x n))/2 + r f(p) + x f(w)$ at $p = n / (\mathrm{mean} + r)$ and
    $w = p\,\mathrm{mean}/x$, with f and $\delta$ as for Poisson; $r \log p$ for x = 0. What depends on x and r alone is
    computed once for all states.
    """
    x = x.to(mean.dtype)
    if _followed(mean, dispersion):
        return _NegativeBinomialLogDensity.apply(x, mean, dispersion)
    return _negative_binomial(x, mean, dispersion)[0]


def negative_binomial_with_slopes(x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and its derivatives by the mean and by the dispersion r, all in one pass and without autograd.

    x and mean (..., G), r (G,); three times (..., G).
    """
    value, flat = _negative_binomial(x, mean, r)
    return value, _nb_by_mean(x, mean, r), _nb_by_r_at_itself(x, r) + flat


def zero_inflated(log_prob: Tensor, x: Tensor, gate_logits: Tensor) -> Tensor:
    r"""$\log(\pi [x = 0] + (1 - \pi) p(x))$ of a base's log p(x), $\pi$ the gate's sigmoid; the three broadcast.

    Any finite gate does, and -inf, which leaves log p(x) itself.
    """
    if _followed(log_prob, gate_logits):
        return _ZeroInflated.apply(log_prob, x, gate_logits)
    return _zero_inflated(x, log_prob, gate_logits)[0]


class _NormalLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        value, d, inverse = _normal(x, mean, scale)
        ctx.save_for_backward(d, inverse)
        ctx.shapes = x.shape, mean.shape, scale.shape
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (d, inverse) = grads, ctx.saved_tensors
        slope = grad * d
        for_x = for_mean = for_scale = None
        if ctx.needs_input_grad[2]:
            # d log p / d scale = (d^2 - 1) / scale, summed over the cells before it is divided.
            for_scale = summed_to(ctx.shapes[2], torch.addcmul(-grad, slope, d)) * inverse
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            slope = slope.mul_(inverse)
            for_mean = slope.sum_to_size(ctx.shapes[1])
            for_x = -slope.sum_to_size(ctx.shapes[0]) if ctx.needs_input_grad[0] else None
        return for_x, for_mean, for_scale


def _normal(x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-density, (x - mean) / scale, and 1 / scale."""
    inverse = once(scale.reciprocal())
    d = (x - mean).mul_(inverse)
    return torch.addcmul(once(-scale.log() - math.log(2 * math.pi) / 2), d, d, value=-0.5), d, inverse


class _CensoredNormalLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        value, d, inverse = _normal(x, mean, scale)
        value, d = value.contiguous(), d.contiguous()
        # Few values are zero, and they alone need the tail.
        zeros = _numbers_of((x <= 0), d)
        at_zero = d.flatten()[zeros]
        tail = _log_half_erfcx(at_zero)
        value.view(-1)[zeros] = tail - at_zero * at_zero / 2
        # d log p / d mean is `pull` / scale: (x - mean) / scale, and at zero -phi(d) / Phi(d).
        pull = d.view(-1)
        pull[zeros] = -torch.exp(-tail) / math.sqrt(2 * math.pi)
        ctx.save_for_backward(d, inverse, zeros, at_zero)
        ctx.shapes = mean.shape, scale.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (pull, inverse, zeros, at_zero) = grads, ctx.saved_tensors
        slope = (grad * pull).contiguous()
        for_scale = None
        if ctx.needs_input_grad[2]:
            # (d^2 - 1) / scale, and at zero pull d / scale.
            each = torch.addcmul(-grad, slope, pull).contiguous()
            each.view(-1)[zeros] = slope.view(-1)[zeros] * at_zero
            for_scale = each.sum_to_size(ctx.shapes[1]) * inverse
        for_mean = slope.mul_(inverse).sum_to_size(ctx.shapes[0]) if ctx.needs_input_grad[1] else None
        return None, for_mean, for_scale


class _FusedCensoredNormalLogDensity(torch.autograd.Function):
    """The same, with the tail of every value, for the compiler."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        value, d, inverse = _normal(x, mean, scale)
        zero = x <= 0
        tail = _log_half_erfcx(torch.where(zero, d, 0.0))
        pull = torch.where(zero, -torch.exp(-tail) / math.sqrt(2 * math.pi), d)
        ctx.save_for_backward(zero, d, pull, inverse)
        ctx.shapes = mean.shape, scale.shape
        return torch.where(zero, tail - d * d / 2, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (zero, d, pull, inverse) = grads, ctx.saved_tensors
        slope, for_scale = grad * pull, None
        if ctx.needs_input_grad[2]:
            each = torch.where(zero, slope * d, slope * pull - grad)
            for_scale = summed_to(ctx.shapes[1], each) * inverse
        for_mean = (slope * inverse).sum_to_size(ctx.shapes[0]) if ctx.needs_input_grad[1] else None
        return None, for_mean, for_scale


def _numbers_of(mask: Tensor, like: Tensor) -> Tensor:
    """Where `mask` is True once it is broadcast to `like`, as numbers of the flattened tensor."""
    own = mask.shape[next((i for i, n in enumerate(mask.shape) if n != 1), mask.ndim) :]
    if like.shape[like.ndim - len(own) :] != own:
        return mask.expand_as(like).flatten().nonzero().squeeze(-1)
    # The mask repeats itself: it is looked through once.
    once, size = mask.flatten().nonzero().squeeze(-1), mask.numel()
    return (once + size * torch.arange(like.numel() // max(size, 1), device=mask.device)[:, None]).flatten()


_ERFC = (
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806,
    0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277,
)  # fmt: skip


def _log_half_erfcx(d: Tensor) -> Tensor:
    r"""$\log(\mathrm{erfcx}(-d/\sqrt 2)/2) = \log\Phi(d) + d^2/2$ for d <= 0; float64 is left to torch.

    In float32 the Chebyshev fit of Press et al. 1992, Numerical Recipes, 6.2, of relative error below 1.2e-7.
    """
    x = (d * -math.sqrt(0.5)).clamp_min_(0)
    if d.dtype == torch.float64:
        return torch.log(torch.special.erfcx(x) / 2)
    t = (x * 0.5).add_(1).reciprocal_()
    series = t * _ERFC[-1]
    for coefficient in _ERFC[-2:0:-1]:
        series = series.add_(coefficient).mul_(t)
    return series.add_(_ERFC[0]).add_(torch.log(t / 2))


class _StudentTLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, df: float, mean: Tensor, scale: Tensor) -> Tensor:
        value, d, inverse = _student_t(x, df, mean, scale)
        ctx.save_for_backward(d, inverse)
        ctx.df, ctx.shapes = df, (x.shape, mean.shape, scale.shape)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (d, inverse) = grads, ctx.saved_tensors
        # d log p / d mean = (df + 1) d / (df + d^2) / scale, and by scale d times as much, less 1 / scale.
        slope = (d * d).add_(ctx.df).reciprocal_().mul_(d).mul_(grad).mul_(ctx.df + 1)
        for_scale = summed_to(ctx.shapes[2], (slope * d).sub_(grad)) * inverse if ctx.needs_input_grad[3] else None
        slope = slope.mul_(inverse)
        for_x = -slope.sum_to_size(ctx.shapes[0]) if ctx.needs_input_grad[0] else None
        return for_x, None, slope.sum_to_size(ctx.shapes[1]), for_scale


def _student_t(x: Tensor, df: float, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-density, (x - mean) / scale, and 1 / scale."""
    inverse = scale.reciprocal()
    d = (x - mean) * inverse
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi * df) / 2
    return (d * d).div_(df).log1p_().mul_(-(df + 1) / 2).add_(constant - scale.log()), d, inverse


class _PoissonLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean)
        return _poisson(x, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        above = mean.clamp_min(LEAST_MEAN)
        return None, (x - above).div_(above).mul_(grads[0]).sum_to_size(mean.shape)


def _poisson(x: Tensor, mean: Tensor) -> Tensor:
    count = x.clamp_min(_NO_COUNT)
    inverse = count.reciprocal()
    at_itself = (count * (2 * math.pi)).log_().mul_(-0.5).sub_(stirling_series(count, inverse)).mul_(x.sign())
    t = mean.clamp_min(LEAST_MEAN) * inverse
    return torch.addcmul(at_itself, count, _flat_at_one(t))


def _flat_at_one(t: Tensor) -> Tensor:
    """f(t) = log t - (t - 1) for t > 0, at most 0; leaves t - 1 in `t`."""
    # t - 1 is exact around 1, so f is as good as the logarithm.
    return t.log().sub_(t.sub_(1))


class _NegativeBinomialLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
        value, flat = _negative_binomial(x, mean, r)
        ctx.save_for_backward(x, mean, r, flat)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, mean, r, flat) = grads, ctx.saved_tensors
        by_mean = by_r = None
        if ctx.needs_input_grad[1]:
            by_mean = _nb_by_mean(x, mean, r).mul_(grad).sum_to_size(mean.shape)
        if ctx.needs_input_grad[2]:
            # f(p), as the value is stationary in p and w, and what the terms in x and r alone add, once for all states.
            at_itself = _nb_by_r_at_itself(x, r)
            at_itself.mul_(grad.sum_to_size(at_itself.shape))
            by_r = summed_to(r.shape, grad * flat) + summed_to(r.shape, at_itself)
        return None, by_mean, by_r


def _negative_binomial(x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability, and f(p)."""
    count, total, mean = x.clamp_min(_NO_COUNT), x + r, mean.clamp_min(LEAST_MEAN)
    inverse, over = count.reciprocal(), total.reciprocal()
    at_itself = (r * over).mul_(inverse).mul_(1 / (2 * math.pi)).log_().mul_(0.5)
    at_itself.add_(stirling_series(total, over)).sub_(stirling_error(r))
    at_itself.sub_(stirling_series(count, inverse)).mul_(x.sign())
    p = total * (mean + r).reciprocal()
    w = (p * mean).mul_(inverse)
    flat = _flat_at_one(p)
    return torch.addcmul(at_itself, count, _flat_at_one(w)).addcmul_(r, flat), flat


def _nb_by_mean(x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    above = mean.clamp_min(LEAST_MEAN)
    return (x - above).div_(above).mul_(r * (above + r).reciprocal())


def _nb_by_r_at_itself(x: Tensor, r: Tensor) -> Tensor:
    """The derivative by r of the terms that hang on x and r alone."""
    total = x + r
    over = total.reciprocal()
    return (x * over).mul_(0.5 / r).add_(stirling_series_slope(total, over)).sub_(stirling_slope(r)).mul_(x.sign())


class _ZeroInflated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        value, of_base = _zero_inflated(x, log_prob, gate)
        ctx.save_for_backward(of_base, gate)
        ctx.shape = log_prob.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (of_base, gate) = grads, ctx.saved_tensors
        by_log_prob = grad * of_base
        # The probability that the gate made x, less what it is before x is seen.
        found, before = summed_to(gate.shape, grad - by_log_prob), summed_to(gate.shape, grad)
        return by_log_prob.sum_to_size(ctx.shape), None, found - before * torch.sigmoid(gate)


def _zero_inflated(x: Tensor, log_prob: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability, and the probability that x is the base's, which is 1 for x > 0."""
    # log(e^g [x = 0] + p) - log(1 + e^g), with the larger of e^g and 1 taken out of both.
    log_both = torch.log1p(torch.exp(-gate.abs()))
    of_gate = torch.where(x > 0, -torch.inf, gate.clamp_max(0) - log_both)
    of_base = log_prob - (gate.clamp_min(0) + log_both)
    is_base = (of_base - of_gate).sigmoid_()
    # log(e^a + e^b) = max(a, b) - log sigmoid(|a - b|); torch.logaddexp goes element by element.
    surer = torch.maximum(is_base, 1 - is_base)
    return of_base.maximum(of_gate).sub_(surer.log_()), is_base


def _followed(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked for; the compiler wants no `Function` where none is."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
