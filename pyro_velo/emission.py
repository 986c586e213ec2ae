r"""From what a decoder puts out to the distribution of what is measured: links, units and the genes' own parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_velo.compiled import fusible
from pyro_velo.densities import negative_binomial_with_slopes
from pyro_velo.errors import InputError
from pyro_velo.likelihoods import NB, Likelihood
from pyro_velo.profiles import ProfileBatch, Profiles

STRAIGHT = 7.0
"""Where the exponential goes on as a straight line, at 1,100 times a gene's unit, so that nothing overflows."""


def straightened_exp(x: Tensor) -> Tensor:
    r"""$e^x$ up to x = 7, and from there its tangent: positive, smooth, finite for any finite x."""
    return torch.exp(x.clamp_max(STRAIGHT)) * (1 + (x - STRAIGHT).clamp_min(0))


class Emission(nn.Module):
    r"""p(x | o) of a decoder's outputs o, which are 0 where a gene is as it is on average.

    | x | mean | start of the parameters |
    |---|---|---|
    | counts | size factor x (gene's mean count) x $e^o$ | the likelihood's |
    | zeros and ones | log-odds: those of the gene + o | |
    | real numbers | gene's mean + gene's sd x o | a noise of one sd |

    A parameter of the likelihood belongs to a gene, or, if it is among `decoded`, to a cell and gene: then the decoder
    has a further head for it (Grønbech et al. 2020 decode them all). A mean that is known from the data makes the first
    steps ones of learning differences, whatever the counts' size.
    """

    def __init__(self, likelihood: Likelihood, cells: Profiles, decoded: Sequence[str] = ()) -> None:
        super().__init__()
        unknown = sorted(set(decoded) - set(likelihood.parameters))
        if unknown:
            known = ", ".join(likelihood.parameters) or "none"
            raise InputError(
                f"Expected decoded parameters that {likelihood!r} has ({known}); got {unknown}. Name these."
            )
        check_suits(likelihood, cells)
        self.likelihood, self.decoded = likelihood, tuple(decoded)
        zero, unit = _range(likelihood, cells)
        self.zero: Tensor
        self.unit: Tensor
        self.register_buffer("zero", zero)
        self.register_buffer("unit", unit)
        starts = {name: zero.new_full((cells.n_genes,), _start(likelihood, name)) for name in likelihood.parameters}
        self.start = nn.ParameterDict({name: nn.Parameter(value) for name, value in starts.items()})

    @property
    def noise(self) -> Tensor | None:
        """The noise of real numbers by gene, in its sds, (G,); None where there is none, or the decoder gives it."""
        if "noise" not in self.start or "noise" in self.decoded:
            return None
        return straightened_exp(self.start["noise"])

    @property
    def heads(self) -> int:
        """How many numbers a cell and gene the decoder gives."""
        return 1 + len(self.decoded)

    def mean(self, output: Tensor, batch: ProfileBatch) -> Tensor:
        """The mean (..., B, G) of outputs of that shape; log-odds where x is zeros and ones."""
        if self.likelihood.counts:
            size = 1.0 if batch.size_factors is None else batch.size_factors
            return size * (self.unit * straightened_exp(output))
        return self.zero + self.unit * output

    def forward(self, outputs: Tensor, batch: ProfileBatch) -> TorchDistribution:
        """p(x) of outputs (heads, ..., B, G)."""
        mean, *own = outputs
        moved = dict(zip(self.decoded, own, strict=True))
        values = {name: start + moved[name] if name in moved else start for name, start in self.start.items()}
        return self.likelihood(self.mean(mean, batch), {name: self._value(name, v) for name, v in values.items()})

    @property
    def has_slopes(self) -> bool:
        """Whether `log_density_of_cells` knows its gradient: of NB counts with a dispersion for each gene."""
        return type(self.likelihood) is NB and not self.decoded

    def log_density_of_cells(self, outputs: Tensor, batch: ProfileBatch) -> Tensor:
        """Log p(x) summed over genes, (..., B), of outputs (1, ..., B, G), where it `has_slopes`.

        One pass over memory gives value and slopes: autograd's way back would compute most of the value again.
        """
        r = self._value("dispersion", self.start["dispersion"])
        # Not outputs[0], whose gradient would be copied into zeros.
        output = outputs.squeeze(0)
        # What is compiled for steps serves looks, too.
        with torch.enable_grad():
            found = _counts_with_slopes(output.detach(), batch.size_factors, self.unit, batch.x, r.detach())
        return _Sloped.apply(output, r, *found)

    def _value(self, name: str, value: Tensor) -> Tensor:
        # A gate is a logit, the others are positive; a noise is in units of the gene's sd.
        if name == "gate":
            return value
        return straightened_exp(value) * (self.unit if name == "noise" else 1.0)


@fusible
def _counts_with_slopes(
    output: Tensor, size: Tensor, unit: Tensor, x: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log NB(x) by cell (..., B), and its derivatives by the output and by the dispersion r, (..., B, G)."""
    slope = size * (unit * torch.exp(output.clamp_max(STRAIGHT)))
    mean = slope * (1 + (output - STRAIGHT).clamp_min(0))
    value, by_mean, by_r = negative_binomial_with_slopes(x, mean, r)
    return value.sum(-1), by_mean * slope, by_r


class _Sloped(torch.autograd.Function):
    """A value of cells (..., B) whose derivatives by the output (..., B, G) and by r (G,) are known."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, r: Tensor, value: Tensor, by_output: Tensor, by_r: Tensor) -> Tensor:
        ctx.save_for_backward(by_output, by_r)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (by_output, by_r) = grads, ctx.saved_tensors
        # In place: a second way back through it is an error of torch's, and not a wrong number.
        return by_output.mul_(grad.unsqueeze(-1)), grad.flatten() @ by_r.flatten(0, -2), None, None, None


def check_suits(likelihood: Likelihood, cells: Profiles) -> None:
    """Raises `InputError` where the likelihood and the kind of numbers disagree."""
    wants, has = likelihood.counts, cells.size_factors is not None
    if wants != has:
        kinds = {True: "raw counts with size factors", False: "profiles without size factors"}
        raise InputError(f"{likelihood!r} expects {kinds[wants]}; got {kinds[has]}. Make them with counts={wants}.")
    if likelihood.binary and not ((cells.x == 0) | (cells.x == 1)).all():
        raise InputError(
            f"{likelihood!r} expects zeros and ones; got other numbers. Binarise them first: x > threshold."
        )


def _start(likelihood: Likelihood, name: str) -> float:
    if name == "noise":
        return 0.0
    return likelihood.starts[name] if name == "gate" else math.log(likelihood.starts[name])


def _range(likelihood: Likelihood, cells: Profiles) -> tuple[Tensor, Tensor]:
    """Each gene's zero and unit, (G,)."""
    x, n = cells.x, len(cells)
    if likelihood.counts:
        assert cells.size_factors is not None
        # A gene without a molecule counts as one that has a single one.
        unit = x.sum(0, dtype=torch.float64).clamp_min(1) / cells.size_factors.sum(dtype=torch.float64)
        return torch.zeros_like(unit).to(x), unit.to(x)
    if likelihood.binary:
        # Half a count more of each (Jeffreys): a gene that is never on has finite log-odds.
        share = (x.sum(0, dtype=torch.float64) + 0.5) / (n + 1)
        return torch.logit(share).to(x), torch.ones_like(share).to(x)
    sd, mean = torch.std_mean(x, 0)
    if not (sd > 0).all():
        gene = int((sd <= 0).nonzero()[0])
        raise InputError(
            f"Expected genes that vary; number {gene} is the same in every cell, and its density has no bound. "
            "Leave it out."
        )
    return mean, sd
