r"""RNA velocity as a Pyro program (Gayoso et al. 2023, with priors on the rates and one state for both molecules).

| site | batch shape | event |
|---|---|---|
| alpha, beta, gamma, switch_time, noise_unspliced, noise_spliced | (G,) | |
| z | (B, 1) | d |
| pi | (B, G) | 4 |
| molecules | (B, G) | 2 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_velo.batch import Batch, Cells
from pyro_velo.initial import Initialisation, Start, SteadyState
from pyro_velo.kinetics import T_MAX, Rates, induction, repression, velocity
from pyro_velo.likelihoods import JointMixture, Likelihood, Normal
from pyro_velo.models.base import Model
from pyro_velo.nn import Decoder
from pyro_velo.priors import Priors
from pyro_velo.states import Collapsed, StateFamily

RATES = Rates._fields
MOLECULES = ("unspliced", "spliced")


C_K = (1.0, 1.0, 1.0, 0.1)
"""What each state's noise is multiplied by: in the repression steady state nothing is left to vary (veloVI)."""


class Means(NamedTuple):
    """What each of the four states says of each cell and gene: `u` and `s`, both in units of scaled spliced.

    The entries broadcast to (B, G): in a steady state a gene has one number.
    """

    u: tuple[Tensor, ...]
    s: tuple[Tensor, ...]


class Explained(NamedTuple):
    """What one draw says of a batch, state by state: `log_joint` is log p(k, u, s), (B, G) each.

    The entries of the other tuples broadcast to (B, G): a steady state has no velocity.
    """

    log_joint: tuple[Tensor, ...]
    u: tuple[Tensor, ...]
    s: tuple[Tensor, ...]
    velocity: tuple[Tensor | float, ...]
    t: tuple[Tensor | float, ...]


@dataclass(frozen=True)
class SwitchPenalty:
    r"""$-w \sum_g (u_g(t^s_g) - u^*_g)^2 + (s_g(t^s_g) - s^*_g)^2$, per cell (veloVI's; seed 000).

    It leads the rates while the KL warms up and is gone when it has (`annealed`), or stays (`annealed=False`).
    """

    weight: float = 0.2
    annealed: bool = True

    def __call__(self, rates: Rates, start: Start, ratio: Tensor, n_cells: int) -> None:
        """Add the factor, inside the genes' plate."""
        u, s = induction(rates.alpha, rates.beta, rates.gamma, rates.switch_time)
        miss = ((u - start.switch_unspliced) / ratio) ** 2 + (s - start.switch_spliced) ** 2
        factor = dist.Unit(-self.weight * n_cells * miss)
        pyro.sample("switch_penalty", factor, obs=miss.new_empty(*miss.shape, 0), infer={"penalty": self.annealed})


@dataclass(frozen=True)
class VelocityModel(Model):
    """The recipe: which likelihood, priors, state family and start values, and how large the decoder is.

    >>> VelocityModel(priors=Priors(concentration=0.5)).priors.concentration
    0.5
    """

    likelihood: Likelihood = field(default_factory=Normal)
    priors: Priors = field(default_factory=Priors)
    states: StateFamily = field(default_factory=Collapsed)
    initial: Initialisation = field(default_factory=SteadyState)
    penalty: SwitchPenalty = field(default_factory=SwitchPenalty)
    n_latent: int = 10
    hidden: Sequence[int] = (128,)

    def build(self, cells: Cells) -> VelocityProgram:
        """The program for these cells' genes, its start values read off the cells."""
        return VelocityProgram(self, cells)


class VelocityProgram(nn.Module):
    """The generative story of unspliced and spliced RNA; see `forward`."""

    def __init__(self, recipe: VelocityModel, cells: Cells) -> None:
        super().__init__()
        self.recipe, self.n_genes = recipe, cells.n_genes
        self.start = recipe.initial(cells)
        self.times = Decoder(recipe.n_latent, cells.n_genes, recipe.hidden, heads=2)
        self.ratio: Tensor
        self.state_scale: Tensor
        self.register_buffer("ratio", torch.as_tensor(cells.ratio).to(cells.molecules))
        self.register_buffer("state_scale", cells.molecules.new_tensor(C_K)[:, None, None])

    def forward(self, batch: Batch) -> None:
        """Rates per gene; then, for each cell, its latent vector, its genes' states, and what is measured of them."""
        pyro.module("model", self)
        recipe, priors, start = self.recipe, self.recipe.priors, self.start.sites()
        genes = pyro.plate("genes", self.n_genes, dim=-1)
        cells = pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2)
        with genes:
            rates = Rates(*(pyro.sample(name, priors.of(name, start)) for name in RATES))
            parameters = {
                f"{kind}_{molecule}": pyro.sample(
                    f"{kind}_{molecule}", priors.of(f"{kind}_{molecule}", start, kind=kind)
                )
                for molecule in MOLECULES
                for kind in recipe.likelihood.parameters
            }
            recipe.penalty(rates, self.start, self.ratio, batch.n_cells)
        with cells:
            z = pyro.sample("z", priors.latent.expand([recipe.n_latent]).to_event(1))
            with genes:
                log_weights = recipe.states.prior(priors.concentration, batch.u)
                means = self.means(rates, *self.latent_times(rates.switch_time, z.squeeze(-2)))
                mixture = self.mixture(log_weights, means, parameters)
                pyro.sample("molecules", mixture, obs=batch.molecules.movedim(0, -1))

    def latent_times(self, switch: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Time since the start in induction, and since the switch in repression, (B, G), from `z` (B, d)."""
        rho_induction, rho_repression = torch.sigmoid(self.times(z))
        return rho_induction * switch, rho_repression * (T_MAX - switch)

    def means(self, rates: Rates, t_on: Tensor, t_off: Tensor) -> Means:
        """The four states' (u, s): on the way up, at its end, on the way down, and empty."""
        alpha, beta, gamma, switch = rates
        u_on, s_on = induction(alpha, beta, gamma, t_on)
        u_off, s_off = repression(*induction(alpha, beta, gamma, switch), beta, gamma, t_off)
        empty = torch.zeros_like(alpha)
        return Means((u_on, alpha / beta, u_off, empty), (s_on, alpha / gamma, s_off, empty))

    def mixture(self, log_weights: Tensor, means: Means, parameters: Mapping[str, Tensor]) -> JointMixture:
        """The joint mixture over the states for both molecules."""
        u, s = (torch.stack([mean.expand(log_weights.shape[1:]) for mean in each]) for each in means)
        return JointMixture(log_weights, *self.likelihoods(u, s, parameters, self.state_scale))

    def likelihoods(
        self, u: Tensor, s: Tensor, parameters: Mapping[str, Tensor], scale: Tensor | float
    ) -> tuple[TorchDistribution, TorchDistribution]:
        """p(unspliced) and p(spliced) around their means, both given in units of scaled spliced."""
        kinds = self.recipe.likelihood.parameters
        unspliced, spliced = ({kind: parameters[f"{kind}_{molecule}"] for kind in kinds} for molecule in MOLECULES)
        likelihood = self.recipe.likelihood
        return likelihood(u / self.ratio, unspliced, scale), likelihood(s, spliced, scale)

    def explain(self, values: Mapping[str, Tensor], batch: Batch) -> Explained:
        """What a draw of every latent site (by name) says of the cells of `batch`, state by state."""
        rates, z = Rates(*(values[name] for name in RATES)), values["z"].squeeze(-2)
        t_on, t_off = self.latent_times(rates.switch_time, z)
        means = self.means(rates, t_on, t_off)
        (u_on, _, u_off, _), (s_on, _, s_off, _) = means
        # State by state, and not stacked: a steady state's arithmetic is then that of one number a gene.
        log_joint = []
        for log_weight, u, s, scale in zip(self.recipe.states.log_weights(values["pi"]), *means, C_K, strict=True):
            unspliced, spliced = self.likelihoods(u, s, values, scale)
            log_joint.append(log_weight + unspliced.log_prob(batch.u) + spliced.log_prob(batch.s))
        return Explained(
            tuple(log_joint),
            *means,
            # In both steady states beta u = gamma s.
            velocity=(velocity(rates, u_on, s_on), 0.0, velocity(rates, u_off, s_off), 0.0),
            t=(t_on, rates.switch_time, rates.switch_time + t_off, T_MAX),
        )
