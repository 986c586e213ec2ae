r"""The guide: an encoder that looks at a cell once and says where it stands, and a posterior of the rates.

$q(z \mid u, s) = \mathcal{N}(\mu(u, s), \sigma(u, s))$, $q(\pi \mid z)$ from a decoder of z, $q(\text{rates})$ by a
`RateGuide`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_velo.batch import Batch
from pyro_velo.errors import check_part
from pyro_velo.models.base import Guide
from pyro_velo.nn import Decoder, NormalEncoder
from pyro_velo.rates import MeanField, RateGuide

WARP = "clock_warp"
"""The site by which rates and cells hang together in a coupled guide."""
TIME_UNIT = "time_unit"
"""The site of the unit of each gene's times, in a guide to which it was told."""


@dataclass(frozen=True)
class Amortized(Guide):
    """The recipe: the posterior of the rates, and the size of the encoder and of the decoder of q(pi | z)."""

    rates: RateGuide = field(default_factory=MeanField)
    hidden: Sequence[int] = (128,)
    hidden_states: Sequence[int] = (128,)

    def __post_init__(self) -> None:
        """Refuse a posterior of the rates that is none."""
        check_part("rates", self.rates, RateGuide, "pv.rates.MeanField()")

    def __call__(self, program: nn.Module) -> AmortizedProgram:
        """The guide of a velocity program."""
        return AmortizedProgram(self, program)


class AmortizedProgram(nn.Module):
    """Rates, then z from the encoder, then the states from z."""

    def __init__(self, recipe: Amortized, program: Any) -> None:
        super().__init__()
        n_genes, model = program.n_genes, program.recipe
        self.states, self.n_genes = model.states, n_genes
        self.of_kinetics, self.standardised = program.of_kinetics, program.standardised
        self.rough_library = program.rough_library if program.library_sd is not None else None
        told = program.n_covariates
        self.encoder = NormalEncoder(2 * n_genes + told, program.n_latent, recipe.hidden)
        self.state_decoder = Decoder(model.n_latent + told, n_genes, recipe.hidden_states, heads=model.states.heads)
        self.rates = recipe.rates(program)
        self.own: tuple[Tensor, Tensor] | None = None
        """Means and sds (N, d) of q(z) for each cell by its number, where they are known better; see `refinement`.

        Roots of covariances (N, d, d) stand in the place of sds where dimensions hang together; see `coupling`.
        """

    def forward(self, batch: Batch) -> None:
        """Draw every latent site of the model."""
        # An autoguide opens the genes' plate itself; a second site of that name would be one too many.
        with poutine.block(hide=["genes"]):
            drawn = self.rates(batch)
        self.cells(batch, self.given(drawn, self.encode(batch)))

    def encode(self, batch: Batch) -> dist.Distribution:
        """q(z | u, s), which is the same in every draw."""
        if self.own is None:
            pyro.module("encoder", self.encoder)
            loc, scale = self.encoder(self.standardised(batch.seen))
            if self.rough_library is not None:
                loc = torch.cat((loc[:, :-1], loc[:, -1:] + self.rough_library(batch)), 1)
        else:
            loc, scale = (each[batch.index] for each in self.own)
            if scale.ndim > loc.ndim:
                return dist.MultivariateNormal(loc.unsqueeze(-2), scale_tril=scale.unsqueeze(-3))
        return dist.Normal(loc.unsqueeze(-2), scale.unsqueeze(-2)).to_event(1)

    @property
    def coupled(self) -> bool:
        """Whether what is drawn of the genes says something of the cells; see `coupling`."""
        return hasattr(self.rates, "moved")

    def given(self, drawn: Mapping[str, Tensor], latent: dist.Distribution) -> dist.Distribution:
        """q(z), once the gene-level sites are drawn."""
        return self.rates.moved(latent, drawn) if self.coupled else latent

    def cells(self, batch: Batch, latent: dist.Distribution) -> None:
        """Draw the cells' sites."""
        pyro.module("state_decoder", self.state_decoder)
        genes = pyro.plate("genes", self.n_genes, dim=-1)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2):
            z = pyro.sample("z", latent)
            with genes:
                self.states.posterior(self.state_outputs(z, batch))

    def state_outputs(self, z: Tensor, batch: Batch) -> Tensor:
        """What q(pi | z) goes by: z (B, 1, d) to (heads, B, G)."""
        return self.state_decoder(batch.conditioned(self.of_kinetics(z.squeeze(-2))))
