"""The gamma function's relatives in a few vectorised passes, each with its gradient in closed form.

They stand where torch's own are what a step spends its time on: torch evaluates digamma and trigamma one element at a
time and asks for digamma again in the gradient of log-gamma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from pyro_velo.compiled import compiling


def log_gamma_and_digamma(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\log\Gamma(x)$ and $\psi(x)$ for x > 0, any shape, in one go; float64 is left to torch.

    By the recurrence to x + 6 and the asymptotic series there (Abramowitz & Stegun 1964, 6.1.41, 6.3.18, 6.4.12), whose
    first omitted terms are below 1e-9; in float32 the error is that of rounding, and x has to stay below 2e6, where the
    product of six terms overflows.
    """
    return _GammaFunctions.apply(x)


def stirling_error(z: Tensor) -> Tensor:
    r"""$\delta(z) = \log\Gamma(z) - (z - 1/2)\log z + z - \log(2\pi)/2$ for z > 0, without a gradient.

    Stieltjes' continued fraction (Abramowitz & Stegun 1964, 6.1.48), and below 1 that of z + 1.
    """
    step, from_1 = (z + 0.5) * torch.log1p(1 / z) - 1, z.clamp_min(1)
    below = step + stirling_series(z + 1, 1 / (z + 1))
    return torch.where(z < 1, below, stirling_series(from_1, 1 / from_1))


def stirling_slope(z: Tensor) -> Tensor:
    r"""$\delta'(z) = \psi(z) - \log z + 1/(2z)$ for z > 0, without a gradient; see `stirling_error`."""
    step = torch.log1p(1 / z) - (z + 0.5) / (z * (z + 1))
    from_1 = z.clamp_min(1)
    below = step + stirling_series_slope(z + 1, 1 / (z + 1))
    return torch.where(z < 1, below, stirling_series_slope(from_1, 1 / from_1))


class _GammaFunctions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values = (torch.lgamma(x), torch.digamma(x)) if x.dtype == torch.float64 else _log_gamma_and_digamma(x)
        ctx.save_for_backward(x, values[1])
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, digamma = ctx.saved_tensors
        return torch.addcmul(grads[0] * digamma, grads[1], trigamma(x))


def digamma(x: Tensor) -> Tensor:
    r"""$\psi(x)$ for x > 0, without a gradient; float64 is left to torch.

    By the recurrence to x + 3 and five terms of the series there, with one division; the first term left out is 4e-8.
    """
    if x.dtype == torch.float64:
        return torch.digamma(x)
    # 1/x + 1/(x+1) + 1/(x+2) = (3w - 3x + 2) / p with w = x(x + 3), and p their common denominator.
    y = x + 3
    w = x * y
    p = (w + 2).mul_(x)
    over = (p * y).reciprocal_()
    inverse, below = p * over, (w - x).mul_(3).add_(2).mul_(y.mul_(over))
    square = inverse * inverse
    series = (square * (1 / 132)).sub_(1 / 240).mul_(square).add_(1 / 252).mul_(square).sub_(1 / 120)
    series = series.mul_(square).add_(1 / 12).mul_(square)
    return (x + 3).log_().sub_(inverse, alpha=0.5).sub_(series).sub_(below)


def softplus(x: Tensor) -> Tensor:
    r"""$\log(1 + e^x)$: torch's, and in float32, where it is compiled, in half its time."""
    if x.dtype != torch.float32 or not compiling():
        return torch.nn.functional.softplus(x)
    t = torch.exp(-x.abs())
    return x.clamp_min(0) + t * _polynomial(t, _LOG1P)


_LOG1P = (
    0.999999971, -0.499995015, 0.333192713, -0.248443699, 0.191114311, -0.136747697, 0.078361668, -0.0295885074,
    0.0052534578,
)  # fmt: skip
"""log(1 + t) / t on [0, 1], by Chebyshev's points: 3e-8 off."""


def trigamma(x: Tensor) -> Tensor:
    r"""$\psi'(x)$ for x > 0, without a gradient; as in `log_gamma_and_digamma`."""
    return torch.special.polygamma(1, x) if x.dtype == torch.float64 else _trigamma(x)


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
    v, y = w + 4, w + 6
    # One division for the three squares.
    over = (w * v).mul_(y).reciprocal_()
    below = (w * 2).add_(25).mul_((v * y).mul_(over).square_())
    below.addcmul_((w * 2).add_(17), (w * y).mul_(over).square_())
    below.addcmul_((w * 2).add_(13), (w * v).mul_(over).square_())
    inverse = (x + 6).reciprocal_()
    square = inverse * inverse
    series = (square * (1 / 42)).sub_(1 / 30).mul_(square).add_(1 / 6).mul_(square).add_(1)
    return series.mul_(inverse).add_(square, alpha=0.5).add_(below)


_STIELTJES = (1 / 30, 53 / 210, 195 / 371, 22999 / 22737, 29944523 / 19773142, 109535241009 / 48264275462)


_STIELTJES_FROM_1 = (1 / 30, 53 / 210, 0.67617085)


_STIELTJES_TAIL = 1.03048053
"""Below 4e-8 off."""


_SLOPE = (0.1, 79 / 210, 0.72634116938, 1.25314545741, 1.84977576114, 2.63006660044, 3.47302238573, 4.50689602579)


_SLOPE_FROM_1 = (0.1, 79 / 210, 0.72634117, 1.01805271)


_SLOPE_TAIL = 0.5216099
"""A share of 3.2e-6 off at most."""


_LARGE = 16.0
"""Where the fractions are as good as float64; below, in float64, nothing cancels that matters."""


def stirling_series(z: Tensor, inverse: Tensor) -> Tensor:
    """For z >= 1, whose `inverse` is at hand; finite for all z > 0."""
    if z.dtype != torch.float64:
        t = inverse.clamp_max(1)
        return _ratio(t, *_SERIES).mul_(t)
    small = torch.lgamma(z) - (z - 0.5) * z.log() + z - math.log(2 * math.pi) / 2
    return torch.where(z < _LARGE, small, _fraction(z, z, _STIELTJES))


def stirling_series_slope(z: Tensor, inverse: Tensor) -> Tensor:
    """As `stirling_series`. The coefficients are those of the asymptotic series (6.3.18) as a fraction."""
    if z.dtype != torch.float64:
        t = inverse.clamp_max(1).square()
        return _ratio(t, *_SERIES_SLOPE).mul_(t).neg_()
    small = torch.digamma(z) - z.log() + 0.5 / z
    return torch.where(z < _LARGE, small, -_fraction(z * z, z.new_ones(()), _SLOPE))


def _fraction(y: Tensor, other: Tensor, levels: Sequence[float]) -> Tensor:
    """1/12 / (y + c_1 / (other + c_2 / (y + ... / y))), a pass over memory for each level."""
    one, below = y.new_ones(()), y
    for k in range(len(levels), 0, -1):
        below = torch.addcdiv(y if k % 2 else other, one, below, value=levels[k - 1])
    return below.reciprocal_().mul_(1 / 12)


def _as_ratio(levels: Sequence[float], tail: float, power: int) -> tuple[list[float], list[float]]:
    r"""Such a fraction, its last y made y + `tail`, as t A(t) / B(t) with a single division; powers of t rise.

    With `other` = y and t = 1/y a level c makes $y B/A$ into $y + c A / (y B) = y (B + c t^2 A) / B$: `power` 2. With
    `other` = 1 it makes $B + c t A$ of B either way: `power` 1.
    """
    above, below = [1 / 12], [1 / 12, tail / 12]
    for level in reversed(levels):
        shifted = [0.0] * power + [level * each for each in above]
        above, below = below, [a + b for a, b in zip_longest(below, shifted, fillvalue=0.0)]
    return above, [12 * each for each in below]


_SERIES = _as_ratio(_STIELTJES_FROM_1, _STIELTJES_TAIL, 2)


_SERIES_SLOPE = _as_ratio(_SLOPE_FROM_1, _SLOPE_TAIL, 1)


def _ratio(t: Tensor, above: Sequence[float], below: Sequence[float]) -> Tensor:
    """A(t) / B(t)."""
    return _polynomial(t, above).div_(_polynomial(t, below))


def _polynomial(t: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Lowest powers first."""
    *rest, value = (t.new_full((), each) for each in coefficients)
    for each in reversed(rest):
        value = torch.addcmul(each, value, t)
    return value
