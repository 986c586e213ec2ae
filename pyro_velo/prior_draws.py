r"""Cells drawn from a model's own prior: genes, times, states and molecules, with the truth beside them.

What has no prior in the model is drawn so: z is what the model says, and what networks make of z in a fit, such as the
times of `PerGene`, are functions of z through random directions, made uniform by the Normal's distribution function
$\Phi$. States have the mean of the Dirichlet, one quarter each, times what the times say of them. The data are never
rescaled between truth and fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_velo.batch import Batch, Cells, Counts
from pyro_velo.data.bridge import AMBIENT, VelocityData, velocity_data
from pyro_velo.errors import InputError
from pyro_velo.kinetics import T_MAX, Rates, trajectory
from pyro_velo.models.velocity import C_K, Explained, VelocityModel, VelocityProgram
from pyro_velo.priors import Priors
from pyro_velo.times import Hierarchical, PerGene, Timed, TimesProgram, cell_time, from_time
from pyro_velo.truth import Truth

if TYPE_CHECKING:
    from anndata import AnnData


Like: TypeAlias = "tuple[int, int] | Cells | VelocityData | AnnData"
TYPICAL = Rates(*(torch.tensor([value]) for value in (0.2, 0.2, 0.2, T_MAX / 2)))
"""The gene that a prior which is read off data is centred on where there are none: both molecules fill a range of 1."""
DEPTH, SPREAD_OF_DEPTH = 20.0, 0.3
"""The count of a full gene where there are no data, and the sd of the logarithm of how deeply cells are sequenced."""


@dataclass(frozen=True)
class Simulated:
    """Cells drawn from a model's prior, in its units.

    `values` (G, ...) of every gene-level site; `u`, `s` (N, G) without noise, in units of scaled spliced; `velocity`
    (N, G), 0 in a steady state; `time` and `state` (N, G), 0 to 3.
    """

    cells: Cells
    values: dict[str, Tensor]
    u: Tensor
    s: Tensor
    velocity: Tensor
    time: Tensor
    state: Tensor

    @property
    def truth(self) -> Truth:
        """The truth in float64."""
        values = {name: value.double().cpu().numpy() for name, value in self.values.items()}
        return Truth(values, self.velocity.double().cpu().numpy(), self.time.double().cpu().numpy())


def reference(data: Like, model: VelocityModel) -> Cells:
    """The cells that size, units and start values are taken from; see `calibrate`."""
    if not isinstance(model, VelocityModel):
        raise InputError(f"Expected a VelocityModel, whose prior can be simulated; got {model!r}. Pass one.")
    counts = model.likelihood.counts
    if isinstance(data, tuple):
        return typical_cells(*data, counts=counts)
    if not isinstance(data, Cells):
        data = (data if isinstance(data, VelocityData) else velocity_data(data, counts=counts)).resident
    if (data.counts is not None) != counts:
        raise InputError(
            f"{model.likelihood!r} expects {'raw counts' if counts else 'scaled layers'}; got the other kind. "
            f"Call velocity_data with counts={counts}."
        )
    return data


def typical_cells(cells: int, genes: int, *, counts: bool = False) -> Cells:
    """Cells without noise, evenly along the curve of `TYPICAL` genes; ratio 1."""
    if cells < 4 or genes < 1:
        raise InputError(f"Expected 4 cells and 1 gene or more; got {cells} and {genes}. Raise both.")
    t = torch.linspace(0, T_MAX, cells)[:, None].expand(cells, genes)
    scaled = torch.stack(trajectory(TYPICAL, t)).contiguous()
    if not counts:
        return Cells(scaled)
    share = (torch.arange(cells) + 0.5) / cells
    sizes = torch.exp(SPREAD_OF_DEPTH * torch.special.ndtri(share)).expand(2, cells)[..., None]
    unit = torch.full((2, 1, genes), DEPTH)
    molecules = (sizes * unit * (AMBIENT + scaled)).round()
    return Cells(molecules, counts=Counts(sizes, AMBIENT * unit, unit, scaled))


def with_fixed_priors(model: VelocityModel, like: Cells) -> VelocityModel:
    """The model, with priors that are functions of start values replaced by those at the start values of `like`."""
    with torch.random.fork_rng([like.u.device] if like.u.is_cuda else []):
        start = model.build(like).start.sites()
    fixed = {}
    for each in fields(Priors):
        prior = getattr(model.all_priors, each.name)
        # What a likelihood adds has a site for each molecule, and one start value for both.
        site = next((name for name in (each.name, f"{each.name}_spliced") if name in start), None)
        if site is not None and not isinstance(prior, dist.Distribution):
            fixed[each.name] = prior(start[site])
    return replace(model, priors=replace(model.priors, **fixed))


@torch.no_grad()
def draw_from_prior(model: VelocityModel, like: Cells | tuple[int, int], *, seed: int = 0) -> Simulated:
    r"""Genes, cells and molecules from the model's prior, at the size and in the units of `like`.

    | times | drawn from z |
    |---|---|
    | `PerGene` | $\rho^{(k)} = \Phi(w_g^{(k)} z)$, uniform: $t = \rho^{(1)} t^s$, or $t^s + \rho^{(3)} (20 - t^s)$ |
    | `Shared` | as in the model: $T = 20\,\Phi(z_1)$, uniform on [0, 20], from each gene's `onset` on |
    | `Hierarchical` | $t_g = 20\,\Phi(z_1 + \sum_k w_{gk} \phi_k)$ with features $\phi_k = 2\,\Phi(w_k z) - 1$ |
    | others | by their own network as it is built |

    where every w is a direction, $|w| = 1$, but for the loadings $w_{gk}$, the site `deviation`. Then a state for each
    cell and gene, and its molecules by the likelihood.

    Raises `InputError` for an improper prior.
    """
    like = reference(like, model)
    device, n, g = like.u.device, len(like), like.n_genes
    with pyro.validation_enabled(False), torch.random.fork_rng([device] if like.u.is_cuda else []):
        torch.manual_seed(seed)
        program, batch = model.build(like), like.batch(torch.arange(n, device=device))
        values = _genes(program)
        latent = model.priors.latent
        every = latent.sample((n, program.n_latent)).to(like.u)
        z = program.of_kinetics(every)
        timed = _times(program, (z - latent.mean) / latent.stddev, z, values, batch)
        program.times = _Known(timed)
        # Any probabilities that are alike do: they say nothing of the states.
        told = program.explain(values | {"z": every[:, None], "pi": like.u.new_ones(n, g, len(C_K))}, batch)
        log_weights = program.weighted(like.u.new_zeros(len(C_K), n, g), timed)
        state = dist.Categorical(logits=log_weights.movedim(0, -1)).sample()
        u, s, velocity, time = _picked(told, state)
        scale = program.state_scale[:, 0, 0][state]
        values = values | {"z": every[:, None]}
        molecules = torch.stack([each.sample() for each in program.likelihoods(u, s, values, batch, scale)])
        cells = _measured(like, molecules, program.size_factors(values, batch))
        del values["z"]
    return Simulated(cells, values, u, s, velocity, time, state)


def _genes(program: VelocityProgram) -> dict[str, Tensor]:
    with pyro.plate("genes", program.n_genes, dim=-1):
        try:
            return program.sample_genes()
        except NotImplementedError:
            raise InputError(
                "Expected priors that can be drawn from; got one that is flat. Use Priors.weak(), or give each a "
                "distribution, as in Priors(beta=dist.LogNormal(-1.0, 0.5))."
            ) from None


def _times(program: VelocityProgram, x: Tensor, z: Tensor, values: Mapping[str, Tensor], batch: Batch) -> Timed:
    """The times of cells with latent vectors z, which are standard Normal as x."""
    recipe, switch = program.recipe.times, values["switch_time"]

    def share(n: int) -> Tensor:
        """Uniform on (0, 1), (N, n)."""
        return torch.special.ndtr(x @ _directions(x, n)).clamp(1e-6, 1 - 1e-6)

    if isinstance(recipe, PerGene):
        return Timed(share(program.n_genes) * switch, share(program.n_genes) * (T_MAX - switch))
    if isinstance(recipe, Hierarchical):
        features = 2 * share(recipe.features) - 1
        own = T_MAX * torch.special.ndtr(z[:, :1] + features @ values["deviation"].mT)
        return from_time(own, values["onset"], switch, recipe.elsewhere)._replace(shared=cell_time(z))
    # That of `Shared` has nothing to learn: it is the prior.
    return program.times(batch.conditioned(z), switch, values)


def _directions(x: Tensor, n: int) -> Tensor:
    """Random unit vectors, (d, n)."""
    return torch.nn.functional.normalize(torch.randn(x.shape[1], n).to(x), dim=0)


class _Known(TimesProgram):
    """Times that are known already."""

    def __init__(self, timed: Timed) -> None:
        super().__init__()
        self.timed = timed

    def forward(self, z: Tensor, switch: Tensor, values: Mapping[str, Tensor]) -> Timed:
        return self.timed


def _picked(told: Explained, state: Tensor) -> list[Tensor]:
    """u, s, velocity and time (N, G) of each one's own state."""
    found = []
    for each in (told.u, told.s, told.velocity, told.t):
        stacked = torch.stack([torch.as_tensor(x).to(told.log_joint[0]).expand(state.shape) for x in each])
        found.append(stacked.gather(0, state[None])[0])
    return found


def _measured(like: Cells, molecules: Tensor, sizes: Tensor | None) -> Cells:
    """The molecules and the size factors in the place of those of `like`, all else the same."""
    if like.counts is None or sizes is None:
        return replace(like, molecules=molecules)
    scaled = (molecules / sizes - like.counts.zero) / like.counts.unit
    counts = replace(like.counts, size_factors=sizes.contiguous(), scaled=scaled)
    return replace(like, molecules=molecules, counts=counts)
