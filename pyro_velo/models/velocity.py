r"""RNA velocity as a Pyro program (Gayoso et al. 2023, with priors on the rates and one state for both molecules).

| site | batch shape | event |
|---|---|---|
| alpha, beta, gamma, switch_time; those of the transcription and of the times; noise_unspliced, noise_spliced or what
  else the likelihood has | (G,) | |
| batch_effect_unspliced, batch_effect_spliced, with experimental batches | (G,) | batches |
| z | (B, 1) | d, and one more where library sizes are inferred |
| pi | (B, G) | 4 |
| molecules | (B, G) | 2 |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_velo.batch import Batch, Cells
from pyro_velo.compiled import fuses, fusible, pays, spread
from pyro_velo.errors import InputError, check_part
from pyro_velo.initial import Initialisation, Start, SteadyState
from pyro_velo.kinetics import Rates, repression, velocity
from pyro_velo.library import Known, Library, rough
from pyro_velo.likelihoods import Likelihood, Tobit
from pyro_velo.mixture import JointMixture, ScoredMolecules
from pyro_velo.models.base import Model
from pyro_velo.ordering import by_phase, curves_along, rough_order
from pyro_velo.priors import Priors
from pyro_velo.states import Collapsed, StateFamily
from pyro_velo.times import OrderPenalty, PerGene, Timed, Times
from pyro_velo.transcription import Constant, Transcription

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


class Landmarks(NamedTuple):
    """What a gene's curve goes by, (u, s) of (G,) each: at the switch, and in the steady state that it approaches."""

    switch: tuple[Tensor, Tensor]
    full: tuple[Tensor, Tensor]


class Given(NamedTuple):
    """What `explain` need not compute: the genes' landmarks, and the states' log-weights, (B, G) each, without `pi`."""

    landmarks: Landmarks | None = None
    log_weights: Sequence[Tensor] | Tensor | None = None


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

    def __call__(self, u: Tensor, s: Tensor, start: Start, ratio: Tensor, n_cells: int) -> None:
        """Add the factor, inside the genes' plate; `u` and `s` (G,) are those at the switch."""
        miss = ((u - start.switch_unspliced) / ratio) ** 2 + (s - start.switch_spliced) ** 2
        factor = dist.Unit(-self.weight * n_cells * miss)
        pyro.sample("switch_penalty", factor, obs=miss.new_empty(*miss.shape, 0), infer={"penalty": self.annealed})


PARTS = (
    ("likelihood", Likelihood, "pv.likelihoods.Tobit()"),
    ("priors", Priors, "pv.Priors()"),
    ("states", StateFamily, "pv.states.Collapsed()"),
    ("times", Times, "pv.times.PerGene()"),
    ("transcription", Transcription, "pv.transcription.Constant()"),
    ("library", Library, "pv.library.Known()"),
    ("initial", Initialisation, "pv.initial.SteadyState()"),
)
"""What a model's parts must be, and one of each."""


@dataclass(frozen=True)
class VelocityModel(Model):
    """The recipe: every part of the model, each an object to swap, and how large the decoder is.

    `hidden=()` makes the decoder linear: a loading for each gene and latent dimension. Raises `InputError` for a part
    that is none (a class, a name), and where library sizes are to be inferred of what is not counts.

    >>> VelocityModel(priors=Priors(concentration=0.5)).priors.concentration
    0.5
    """

    likelihood: Likelihood = field(default_factory=Tobit)
    priors: Priors = field(default_factory=Priors)
    states: StateFamily = field(default_factory=Collapsed)
    times: Times = field(default_factory=PerGene)
    transcription: Transcription = field(default_factory=Constant)
    library: Library = field(default_factory=Known)
    initial: Initialisation = field(default_factory=SteadyState)
    penalty: SwitchPenalty = field(default_factory=SwitchPenalty)
    order: OrderPenalty = field(default_factory=OrderPenalty)
    n_latent: int = 10
    hidden: Sequence[int] = (128,)

    def __post_init__(self) -> None:
        """Check that the parts are parts, and go together."""
        for name, kind, example in PARTS:
            check_part(name, getattr(self, name), kind, example)
        if self.library.inferred and not self.likelihood.counts:
            raise InputError(
                f"Expected a likelihood of counts, where library sizes are inferred; got {self.likelihood!r}. Use NB() "
                "or the like, or take library sizes as known."
            )

    @property
    def all_priors(self) -> Priors:
        """The priors, with that of switching times which the times have where it is left open."""
        if self.priors.switch_time is not None:
            return self.priors
        return replace(self.priors, switch_time=self.times.switch_prior)

    def build(self, cells: Cells) -> VelocityProgram:
        """The program for these cells' genes, its start values read off the cells."""
        return VelocityProgram(self, cells)


class VelocityProgram(nn.Module):
    """The generative story of unspliced and spliced RNA; see `forward`."""

    def __init__(self, recipe: VelocityModel, cells: Cells) -> None:
        super().__init__()
        self.recipe, self.n_genes = recipe, cells.n_genes
        self.n_covariates, self.n_groups = cells.n_covariates, cells.n_groups
        self.start = self._start(cells)
        self.times = recipe.times.build(recipe.n_latent + cells.n_covariates, cells.n_genes, recipe.hidden)
        self.ratio: Tensor
        self.state_scale: Tensor
        self.zero: Tensor | None
        self.unit: Tensor | None
        self.order: Tensor | None
        self.register_buffer("ratio", torch.as_tensor(cells.ratio).to(cells.molecules))
        self.register_buffer("state_scale", cells.molecules.new_tensor(C_K)[:, None, None])
        self.register_buffer("zero", cells.counts.zero if cells.counts else None)
        self.register_buffer("order", cells.order, persistent=False)
        self.register_buffer("unit", cells.counts.unit if cells.counts else None)
        self.seen_mean: Tensor
        self.seen_sd: Tensor
        for name, value in zip(("seen_mean", "seen_sd"), cells.seen_moments, strict=True):
            self.register_buffer(name, value, persistent=False)
        self.library_sd: Tensor | None
        self.register_buffer("library_sd", recipe.library.spread(cells.counts.size_factors) if cells.counts else None)

    def _start(self, cells: Cells) -> Start:
        """Start values of every gene-level site."""
        recipe, start = self.recipe, self.recipe.initial(cells)
        if recipe.times.shared:
            order = by_phase(cells, start.rates) if cells.order is None else cells.order
            rates, onset, *_ = curves_along(cells, order, start.rates)
            start = replace(start, rates=rates)
        likelihood = {
            f"{kind}_{molecule}": torch.full_like(start.rates.alpha, recipe.likelihood.starts[kind])
            for molecule in MOLECULES
            for kind in recipe.likelihood.parameters
        }
        effects = {
            f"batch_effect_{molecule}": start.rates.alpha.new_zeros(self.n_genes, self.n_groups)
            for molecule in MOLECULES
            if self.n_groups
        }
        others = recipe.transcription.start(start.rates) | recipe.times.start(start.rates.switch_time)
        if recipe.times.shared:
            others |= {"onset": onset}
        return replace(start, others=others | likelihood | effects)

    def forward(self, batch: Batch) -> None:
        """Rates per gene; then, for each cell, its latent vector, its genes' states, and what is measured of them."""
        pyro.module("model", self)
        recipe, priors = self.recipe, self.recipe.priors
        genes = pyro.plate("genes", self.n_genes, dim=-1)
        cells = pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-2)
        with genes:
            values = self.sample_genes()
            rates = Rates(*(values[name] for name in RATES))
            landmarks = self.landmarks(rates, values)
            recipe.penalty(*landmarks.switch, self.start, self.ratio, batch.n_cells)
        with cells:
            z = pyro.sample("z", priors.latent.expand([self.n_latent]).to_event(1))
            timed = self.times(batch.conditioned(self.of_kinetics(z.squeeze(-2))), rates.switch_time, values)
            if timed.shared is not None:
                recipe.order(timed.shared, self.rough_order(batch), self.n_genes)
            with genes:
                log_weights = recipe.states.prior(priors.concentration, batch.u)
                molecules = self.molecules(log_weights, timed, landmarks, values | {"z": z}, batch)
                pyro.sample("molecules", molecules, obs=batch.molecules.movedim(0, -1))

    @property
    def n_latent(self) -> int:
        """How many latent dimensions a cell has, its library size among them where that is inferred."""
        return self.recipe.n_latent + (self.library_sd is not None)

    def of_kinetics(self, z: Tensor) -> Tensor:
        """Without the library size, which says nothing of times and states: (B, d)."""
        return z[:, : self.recipe.n_latent]

    def standardised(self, seen: Tensor) -> Tensor:
        """What an encoder looks at, (B, 2G+C), each number with mean 0 and sd 1 over the cells.

        As it is where cells share a clock: fits of counts are then nearer to the unit of time (benchmarks/trust.md).
        """
        return seen if self.recipe.times.shared else (seen - self.seen_mean) / self.seen_sd

    def size_factors(self, values: Mapping[str, Tensor], batch: Batch) -> Tensor | None:
        """Those of unspliced and spliced, (2, B, 1), or (2, B, G) where `values` has a z for each gene."""
        if self.library_sd is None:
            return batch.size_factors
        return self.library_size(values["z"]).squeeze(-1).expand(2, -1, -1)

    def library_size(self, z: Tensor) -> Tensor:
        """What latent vectors (..., d) say of the library size, 1 the median: (..., 1)."""
        prior = self.recipe.priors.latent
        return torch.exp(self.library_sd * (z[..., -1:] - prior.mean) / prior.stddev)

    def rough_library(self, batch: Batch) -> Tensor:
        """Where the last latent dimension of each cell starts, (B, 1)."""
        assert self.library_sd is not None and batch.size_factors is not None
        prior = self.recipe.priors.latent
        return prior.mean + prior.stddev * rough(batch.size_factors) / self.library_sd

    def rough_order(self, batch: Batch) -> Tensor:
        """The order of the batch's cells before any fit, (B,) in [0, 1]."""
        if self.order is not None:
            return self.order[batch.index]
        x = batch.molecules
        if self.unit is not None and self.zero is not None and batch.size_factors is not None:
            x = (x / batch.size_factors - self.zero) / self.unit
        return rough_order(x[0] * self.ratio, x[1], self.start.rates)

    def sample_genes(self) -> dict[str, Tensor]:
        """Every gene-level site, inside the genes' plate."""
        recipe, start, values = self.recipe, self.start.sites(), {}
        priors = recipe.all_priors
        for name in (*RATES, *recipe.transcription.sites, *recipe.times.sites):
            prior, width = priors.of(name, start), recipe.times.width(name)
            values[name] = pyro.sample(name, prior.expand([self.n_genes, width]).to_event(1) if width else prior)
        for molecule in MOLECULES:
            for kind in recipe.likelihood.parameters:
                name = f"{kind}_{molecule}"
                values[name] = pyro.sample(name, priors.of(name, start, kind=kind))
            if self.n_groups:
                name = f"batch_effect_{molecule}"
                prior = priors.of(name, start, kind="batch_effect")
                values[name] = pyro.sample(name, prior.expand([self.n_groups]).to_event(1))
        return values

    def landmarks(self, rates: Rates, values: Mapping[str, Tensor]) -> Landmarks:
        """Where the states begin and end."""
        transcription = self.recipe.transcription
        return Landmarks(transcription.induction(rates, values, rates.switch_time), transcription.full(rates, values))

    def molecules(
        self, log_weights: Tensor, timed: Timed, landmarks: Landmarks, values: Mapping[str, Tensor], batch: Batch
    ) -> TorchDistribution:
        """p(u, s) of the batch: the joint mixture, or where it is fused its density at what was measured alone."""
        # An effect of the experimental batch picks genes' values by cell, whose gradient is no pass over memory.
        if fuses() and batch.group is None:
            told = (log_weights, timed, landmarks, dict(values), batch)
            return ScoredMolecules(self.log_density(*told), lambda: self.log_unspliced(*told))
        means = self.means(Rates(*(values[name] for name in RATES)), values, timed, landmarks)
        return self.mixture(self.weighted(log_weights, timed), means, values, batch)

    @fusible
    def log_density(
        self, log_weights: Tensor, timed: Timed, landmarks: Landmarks, values: dict[str, Tensor], batch: Batch
    ) -> Tensor:
        """Log p(u, s), (B, G), as one function of tensors: that of `mixture`, state by state."""
        like = log_weights[0]
        values = {name: spread(value, like) for name, value in values.items()}
        landmarks = Landmarks(*((spread(u, like), spread(s, like)) for u, s in landmarks))
        means = self.means(Rates(*(values[name] for name in RATES)), values, timed, landmarks)
        terms = torch.stack(self.log_joint(self.by_state(log_weights, timed), means, values, batch))
        return terms.amax(0) if self.recipe.states.hard else terms.logsumexp(0)

    @partial(fusible, where=pays)
    def log_unspliced(
        self, log_weights: Tensor, timed: Timed, landmarks: Landmarks, values: dict[str, Tensor], batch: Batch
    ) -> Tensor:
        """Log p(u), (B, G), of the same mixture."""
        means = self.means(Rates(*(values[name] for name in RATES)), values, timed, landmarks)
        found = []
        for log_weight, u, s, scale in zip(self.by_state(log_weights, timed), *means, C_K, strict=True):
            found.append(log_weight + self.likelihoods(u, s, values, batch, scale)[0].log_prob(batch.u))
        return torch.stack(found).amax(0) if self.recipe.states.hard else torch.stack(found).logsumexp(0)

    def means(self, rates: Rates, values: Mapping[str, Tensor], timed: Timed, landmarks: Landmarks) -> Means:
        """The four states' (u, s): on the way up, at its end, on the way down, and empty."""
        u_on, s_on = self.recipe.transcription.induction(rates, values, timed.on)
        u_off, s_off = repression(*landmarks.switch, rates.beta, rates.gamma, timed.off)
        u_full, s_full = landmarks.full
        empty = torch.zeros_like(rates.alpha)
        return Means((u_on, u_full, u_off, empty), (s_on, s_full, s_off, empty))

    def weighted(self, log_weights: Tensor, timed: Timed) -> Tensor:
        """The states' log-weights (4, B, G), with what the times say of them."""
        return log_weights if timed.log_weights is None else torch.stack(tuple(self.by_state(log_weights, timed)))

    def by_state(self, log_weights: Sequence[Tensor] | Tensor, timed: Timed) -> Sequence[Tensor] | Tensor:
        """The same, state by state.

        Where the times say which of the states on the way a gene is in, these share one weight: their sum.
        """
        if timed.log_weights is None:
            return log_weights
        running = torch.stack(tuple(log_weights[:3])).logsumexp(0)
        every = (running, running, running, log_weights[3])
        return tuple(weight + told for weight, told in zip(every, timed.log_weights, strict=True))

    def mixture(self, log_weights: Tensor, means: Means, values: Mapping[str, Tensor], batch: Batch) -> JointMixture:
        """The joint mixture over the states for both molecules."""
        u, s = (torch.stack([mean.expand(log_weights.shape[1:]) for mean in each]) for each in means)
        return JointMixture(
            log_weights, *self.likelihoods(u, s, values, batch, self.state_scale), hard=self.recipe.states.hard
        )

    def log_joint(
        self, log_weights: Sequence[Tensor] | Tensor, means: Means, values: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, ...]:
        """Log p(k, u, s) of each state, (B, G)."""
        found = []
        # State by state, and not stacked: a steady state's arithmetic is then that of one number a gene.
        for log_weight, u, s, scale in zip(log_weights, *means, C_K, strict=True):
            unspliced, spliced = self.likelihoods(u, s, values, batch, scale)
            found.append(log_weight + unspliced.log_prob(batch.u) + spliced.log_prob(batch.s))
        return tuple(found)

    def likelihoods(
        self, u: Tensor, s: Tensor, values: Mapping[str, Tensor], batch: Batch, scale: Tensor | float
    ) -> tuple[TorchDistribution, TorchDistribution]:
        """p(unspliced) and p(spliced) around their means, both given in units of scaled spliced."""
        found, sizes = [], self.size_factors(values, batch)
        for i, (molecule, mean) in enumerate(zip(MOLECULES, (u / self.ratio, s), strict=True)):
            if batch.group is not None:
                mean = mean * torch.exp(batch_effect(values[f"batch_effect_{molecule}"], batch.group))
            if self.unit is not None and self.zero is not None and sizes is not None:
                mean = sizes[i] * (self.zero[i] + self.unit[i] * mean)
            own = {kind: values[f"{kind}_{molecule}"] for kind in self.recipe.likelihood.parameters}
            found.append(self.recipe.likelihood(mean, own, scale))
        return found[0], found[1]

    def explain(self, values: Mapping[str, Tensor], batch: Batch, given: Given | None = None) -> Explained:
        """What a draw of every latent site (by name) says of the cells of `batch`, state by state.

        What is `given` already is not computed, nor is the site that it takes the place of needed.
        """
        z = self.of_kinetics(values["z"].squeeze(-2))
        timed = self.times(batch.conditioned(z), values["switch_time"], values)
        return self.explain_at(timed, values, batch, given)

    def explain_at(
        self, timed: Timed, values: Mapping[str, Tensor], batch: Batch, given: Given | None = None
    ) -> Explained:
        """As `explain`, the times given; gene-level values are (G,) or, one for each cell, (B, G).

        z (B, 1, d), or (B, G, d) where each gene has its own.
        """
        rates, given = Rates(*(values[name] for name in RATES)), given or Given()
        means = self.means(rates, values, timed, given.landmarks or self.landmarks(rates, values))
        (u_on, _, u_off, _), (s_on, _, s_off, _) = means
        weights = self.recipe.states.log_weights(values["pi"]) if given.log_weights is None else given.log_weights
        return Explained(
            self.log_joint(self.by_state(weights, timed), means, values, batch),
            *means,
            # In both steady states beta u = gamma s.
            velocity=(velocity(rates, u_on, s_on), 0.0, velocity(rates, u_off, s_off), 0.0),
            t=(timed.on, rates.switch_time, rates.switch_time + timed.off, self.times.end(values))
            if timed.own is None
            # A cell has its time whatever state a gene is in.
            else (timed.own.expand_as(u_on),) * len(C_K),
        )


def batch_effect(effects: Tensor, group: Tensor) -> Tensor:
    """Each cell's log-factor (B, G) from those of the experimental batches (G, K), which are 0 on average."""
    return (effects - effects.mean(-1, keepdim=True)).T[group]
