"""Special functions and densities in a few vectorised passes, each with its gradient in closed form.

They stand where torch's own are what a step spends its time on: torch evaluates digamma and trigamma one element at a
time and asks for digamma again in the gradient of log-gamma, and its normal density takes twice the passes over memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def log_gamma_and_digamma(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\log\Gamma(x)$ and $\psi(x)$ for x > 0, any shape, in one go; float64 is left to torch.

    By the recurrence to x + 6 and the asymptotic series there (Abramowitz & Stegun 1964, 6.1.41, 6.3.18, 6.4.12), whose
    first omitted terms are below 1e-9; in float32 the error is that of rounding, and x has to stay below 2e6, where the
    product of six terms overflows.
    """
    return _GammaFunctions.apply(x)


def normal_log_density(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    r"""$\log\mathcal{N}(x \mid \mathrm{mean}, \mathrm{scale}^2)$; x, mean and scale broadcast."""
    return _NormalLogDensity.apply(x, mean, scale)


class _GammaFunctions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values = (torch.lgamma(x), torch.digamma(x)) if x.dtype == torch.float64 else _log_gamma_and_digamma(x)
        ctx.save_for_backward(x, values[1])
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, digamma = ctx.saved_tensors
        trigamma = torch.special.polygamma(1, x) if x.dtype == torch.float64 else _trigamma(x)
        return torch.addcmul(grads[0] * digamma, grads[1], trigamma)


def digamma(x: Tensor) -> Tensor:
    r"""$\psi(x)$ for x > 0, without a gradient; as in `log_gamma_and_digamma`."""
    return torch.digamma(x) if x.dtype == torch.float64 else _digamma(x, *_recurrence(x))


def _log_gamma_and_digamma(x: Tensor) -> tuple[Tensor, Tensor]:
    w, product, y, log_y, inverse = _recurrence(x)
    digamma = _digamma(x, w, product, y, log_y, inverse)
    square = inverse * inverse
    log_gamma = (square * (1 / 1260)).sub_(1 / 360).mul_(square).add_(1 / 12).mul_(inverse)
    log_gamma.addcmul_(y - 0.5, log_y).sub_(y).add_(math.log(2 * math.pi) / 2).sub_(product.log_())
    return log_gamma, digamma


def _recurrence(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The product w = x(x + 5); x(x+1)...(x+5) = w(w+4)(w+6); y = x + 6, its logarithm and its inverse."""
    w = (x + 5).mul_(x)
    y = x + 6
    return w, (w + 4).mul_(w + 6).mul_(w), y, y.log(), y.reciprocal()


def _digamma(x: Tensor, w: Tensor, product: Tensor, y: Tensor, log_y: Tensor, inverse: Tensor) -> Tensor:
    """The series at y, less the sum of 1/(x+i), which is (2x+5)(3w^2+20w+24) over the product."""
    below = (w * 3).add_(20).mul_(w).add_(24).mul_(x * 2 + 5).div_(product)
    square = inverse * inverse
    series = (square * (-1 / 252)).add_(1 / 120).mul_(square).sub_(1 / 12).mul_(square)
    return series.add_(log_y).sub_(inverse, alpha=0.5).sub_(below)


def _trigamma(x: Tensor) -> Tensor:
    """The sum of 1/(x+i)^2 in pairs (0, 5), (1, 4), (2, 3), and the series at x + 6."""
    w = (x + 5).mul_(x)
    below = (w * 2).add_(25).div_(w).div_(w)
    for shift, constant in ((4.0, 17.0), (6.0, 13.0)):
        v = w + shift
        below.add_((w * 2).add_(constant).div_(v).div_(v))
    inverse = (x + 6).reciprocal_()
    square = inverse * inverse
    series = (square * (1 / 42)).sub_(1 / 30).mul_(square).add_(1 / 6).mul_(square).add_(1)
    return series.mul_(inverse).add_(square, alpha=0.5).add_(below)


class _NormalLogDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        inverse = scale.reciprocal()
        d = (x - mean).mul_(inverse)
        ctx.save_for_backward(d, inverse)
        ctx.shapes = x.shape, mean.shape, scale.shape
        return torch.addcmul(-scale.log() - math.log(2 * math.pi) / 2, d, d, value=-0.5)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (d, inverse) = grads, ctx.saved_tensors
        slope = grad * d
        for_x = for_mean = for_scale = None
        if ctx.needs_input_grad[2]:
            # d log p / d scale = (d^2 - 1) / scale, summed over the cells before it is divided.
            for_scale = torch.addcmul(-grad, slope, d).sum_to_size(ctx.shapes[2]) * inverse
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            slope = slope.mul_(inverse)
            for_mean = slope.sum_to_size(ctx.shapes[1])
            for_x = -slope.sum_to_size(ctx.shapes[0]) if ctx.needs_input_grad[0] else None
        return for_x, for_mean, for_scale
