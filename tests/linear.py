r"""A program of which everything is known: x = W z + noise with orthogonal columns of W, and its posteriors.

With $\lambda_d = \lVert w_d \rVert^2 / \sigma^2$ the posterior has precision $1 + \lambda_d$ in dimension d, and the
optimum of the ELBO whose KL weighs $\beta$ has $1 + \lambda_d / \beta$.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_velo.batch import Cells
from pyro_velo.train import Fitted, Training, TrainSettings

G, NOISE = 3, 0.5
LENGTHS = (2.0, 1.0, 0.0)
"""Of the columns of W: the decoder does not hear the last dimension."""


def weights() -> Tensor:
    """W (2G, 3), of orthogonal columns."""
    q, _ = torch.linalg.qr(torch.randn(2 * G, len(LENGTHS), generator=torch.Generator().manual_seed(4)))
    return q * torch.tensor(LENGTHS)


class Linear(nn.Module):
    """x ~ Normal(W z, 0.5) with z ~ Normal(0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = weights()

    def forward(self, batch):
        genes = pyro.plate("genes", G, dim=-1)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(LENGTHS)]).to_event(1))
            u, s = (z.squeeze(-2) @ self.weight.T).split(G, -1)
            with genes:
                x = dist.Normal(torch.stack((u, s), -1), NOISE).to_event(1)
                pyro.sample("molecules", x, obs=batch.molecules.movedim(0, -1))


class LinearGuide(nn.Module):
    """q(z | x) that is best where the KL weighs `beta`, its sds times `width`; the prior itself where `blind`."""

    def __init__(self, program: Linear, beta: float = 1.0, width: float = 1.0, blind: bool = False) -> None:
        super().__init__()
        precision = 1 + (program.weight**2).sum(0) / (NOISE**2 * beta)
        self.gain = (program.weight / (NOISE**2 * beta) / precision) * (not blind)
        self.sd = torch.ones(len(LENGTHS)) if blind else width * precision.rsqrt()

    def forward(self, batch):
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            loc = (torch.cat((*batch.molecules,), -1) @ self.gain).unsqueeze(-2)
            pyro.sample("z", dist.Normal(loc, self.sd.expand_as(loc)).to_event(1))


def linear(n_cells: int = 60, held_out: float = 0.5, **guide) -> tuple[Fitted, Cells]:
    """The program with its guide, as a fit, and cells drawn from it."""
    torch.manual_seed(3)
    program = Linear()
    z = torch.randn(n_cells, len(LENGTHS))
    x = z @ program.weight.T + NOISE * torch.randn(n_cells, 2 * G)
    with pyro.get_param_store().scope() as store:
        pass
    training = Training(TrainSettings(held_out=held_out))
    return Fitted(program, LinearGuide(program, **guide), store, training), Cells.of(*x.split(G, -1))


def log_evidence(fitted: Fitted, cells: Cells) -> Tensor:
    """Log p(x) of every cell."""
    weight = fitted.program.weight
    covariance = weight @ weight.T + NOISE**2 * torch.eye(2 * G)
    return dist.MultivariateNormal(torch.zeros(2 * G), covariance).log_prob(torch.cat((*cells.molecules,), -1))


def capacity() -> float:
    """I(x; z) of the program, in nats."""
    return sum(math.log1p(length**2 / NOISE**2) for length in LENGTHS) / 2
