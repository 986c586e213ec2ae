r"""What the posterior says of every cell and gene, streamed: never draws x cells x genes, but a batch of cells at once.

A draw takes the rates once for all cells, then z and pi of each cell from the guide. Given these, the state has the
exact posterior $p(k \mid u, s) \propto \pi_k\, p(u \mid k)\, p(s \mid k)$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_velo.batch import Batch, Cells
from pyro_velo.errors import InputError
from pyro_velo.models.velocity import RATES, Explained
from pyro_velo.train import Fitted

Array = NDArray[np.float32]
OverStates = Literal["expected", "most likely"]

CELLS_GENES_AT_ONCE = 256 * 1024
"""Cells x genes that are looked at together: measured; smaller batches pay more overhead, larger ones leave the cache.

The draws of one batch take 1 MiB each, 100 MiB for 100 draws."""


@dataclass(frozen=True)
class Posterior:
    """Summaries in the units of the model (scaled abundance, latent time in [0, 20]).

    Cells x genes: `velocity` (mean), `velocity_sd`, `velocity_q05`, `velocity_q95`, `t`, `t_sd`, `u`, `s` (posterior
    mean expression), `state` (most likely, 0 to 3). (4, cells, genes) is never kept; `state_use` (4, genes) is its
    mean. Genes: `rates` and `rates_sd` by site name, `log_likelihood` (mean over cells). Cells: `z` (cells, d),
    `uncertainty`.
    """

    velocity: Array
    velocity_sd: Array
    velocity_q05: Array
    velocity_q95: Array
    t: Array
    t_sd: Array
    u: Array
    s: Array
    state: NDArray[np.uint8]
    state_use: Array
    rates: dict[str, Array]
    rates_sd: dict[str, Array]
    log_likelihood: Array
    z: Array
    uncertainty: Array


class _Draws(NamedTuple):
    """One batch: the velocity in every draw (D, B, G), and moments over the draws of it and of the rest."""

    velocities: Tensor
    velocity: Moments
    t: Moments
    u: Moments
    s: Moments
    probability: Moments
    log_likelihood: Moments
    z: Moments


@torch.no_grad()
def summarise(
    fitted: Fitted,
    cells: Cells,
    *,
    draws: int = 100,
    over_states: OverStates = "expected",
    seed: int = 0,
    progress: bool | None = None,
) -> Posterior:
    """Draw `draws` times from the guide for all `cells` and summarise.

    `over_states`: each draw's velocity and time are the expectation over the four states, or those of the most likely
    one.

    Raises InputError for fewer than two draws, which have no spread.
    """
    check_draws(draws)
    device = cells.molecules.device
    size = max(1, CELLS_GENES_AT_ONCE // cells.n_genes)
    with (
        fitted.parameters(),
        pyro.validation_enabled(False),
        torch.random.fork_rng([device] if cells.molecules.is_cuda else []),
    ):
        torch.manual_seed(seed)
        rates = _draw_rates(fitted, cells, draws)
        out = _Summary(len(cells), cells.n_genes)
        bar = tqdm(total=len(cells), desc="posterior", unit="cell", disable=None if progress is None else not progress)
        with bar:
            for batch in cells.batches(torch.arange(len(cells), device=device), size):
                out.add(batch.index.cpu().numpy(), _draw_batch(fitted, batch, rates, over_states))
                bar.update(len(batch.index))
    return out.finish(rates)


def check_draws(draws: int) -> None:
    """Raises `InputError` for fewer than two draws."""
    if draws < 2:
        raise InputError(f"Expected 2 draws or more, because one has no spread; got {draws}. The default is 100.")


def _draw_rates(fitted: Fitted, cells: Cells, draws: int) -> list[dict[str, Tensor]]:
    """Every draw's gene-level values, which all cells share."""
    batch = cells.batch(torch.arange(1, device=cells.molecules.device))
    taken = []
    for _ in range(draws):
        trace = poutine.trace(fitted.guide).get_trace(batch)
        shared = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and {frame.name for frame in site["cond_indep_stack"]} == {"genes"}
        }
        taken.append(shared)
    return taken


def _draw_batch(fitted: Fitted, batch: Batch, rates: list[dict[str, Tensor]], over_states: OverStates) -> _Draws:
    """Every draw for one batch."""
    velocity = batch.u.new_empty(len(rates), *batch.u.shape)
    names = ("velocity", "t", "u", "s", "probability", "log_likelihood", "z")
    moments = {name: Moments() for name in names}
    for i, shared in enumerate(rates):
        values = _values(fitted, batch, shared)
        explained: Explained = fitted.program.explain(values, batch)
        probability, log_likelihood = _posterior_of_states(explained.log_joint)
        weights = probability if over_states == "expected" else _one_hot(probability)
        velocity[i] = over(weights, explained.velocity)
        moments["velocity"].add(velocity[i])
        moments["t"].add(over(weights, explained.t))
        for name, value in (
            ("u", over(weights, explained.u)),
            ("s", over(weights, explained.s)),
            ("probability", probability),
            ("log_likelihood", log_likelihood),
            ("z", values["z"].squeeze(-2)),
        ):
            moments[name].add(value, spread=False)
    return _Draws(velocity, **moments)


def _posterior_of_states(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """p(k | u, s) (4, B, G), made in the memory of `log_joint`, and log p(u, s) (B, G)."""
    peak = log_joint.amax(0)
    probability = log_joint.sub_(peak).exp_()
    total = probability.sum(0)
    return probability.div_(total), total.log_().add_(peak)


class Moments:
    """Mean and sd of arrays that come one by one (Welford 1962), without keeping them."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.empty(0)

    def add(self, value: Tensor, *, spread: bool = True) -> None:
        """Take one more array into account; without `spread`, for the mean alone."""
        self.count += 1
        if self.count == 1:
            self.mean, self.squares = value.clone(), torch.zeros_like(value)
            return
        gap = value - self.mean
        self.mean.add_(gap, alpha=1 / self.count)
        if spread:
            self.squares.addcmul_(gap, gap, value=(self.count - 1) / self.count)

    @property
    def sd(self) -> Tensor:
        """The sample sd; meaningful where every array was added with `spread`."""
        return (self.squares / (self.count - 1)).sqrt()


def _values(fitted: Fitted, batch: Batch, shared: dict[str, Tensor]) -> dict[str, Tensor]:
    """A draw of the cells' sites, the gene-level ones given."""
    trace = poutine.trace(poutine.condition(fitted.guide, data=shared)).get_trace(batch)
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


def over(weights: Tensor, values: tuple[Tensor | float, ...]) -> Tensor:
    """The expectation over states: weights (4, B, G), values that broadcast to (B, G); zeros cost nothing."""
    total = torch.zeros_like(weights[0])
    for weight, value in zip(weights, values, strict=True):
        if isinstance(value, Tensor):
            total.addcmul_(weight, value)
        elif value:
            total.add_(weight, alpha=value)
    return total


def _one_hot(probability: Tensor) -> Tensor:
    return torch.zeros_like(probability).scatter_(0, probability.argmax(0, keepdim=True), 1.0)


class _Summary:
    """The arrays of a `Posterior`, filled batch by batch."""

    def __init__(self, n_cells: int, n_genes: int) -> None:
        names = ("velocity", "velocity_sd", "velocity_q05", "velocity_q95", "t", "t_sd", "u", "s")
        self.layers = {name: np.empty((n_cells, n_genes), np.float32) for name in names}
        self.state = np.empty((n_cells, n_genes), np.uint8)
        self.state_use = np.zeros((4, n_genes), np.float64)
        self.log_likelihood = np.zeros(n_genes, np.float64)
        self.uncertainty = np.empty(n_cells, np.float32)
        self.z: dict[int, NDArray] = {}

    def add(self, index: NDArray, draws: _Draws) -> None:
        """Summarise the draws of the cells at `index`."""
        low, high = quantiles(draws.velocities, (0.05, 0.95))
        v, t = draws.velocity, draws.t
        summaries = (v.mean, v.sd, low, high, t.mean, t.sd, draws.u.mean, draws.s.mean)
        for layer, value in zip(self.layers.values(), summaries, strict=True):
            layer[index] = value.cpu().numpy()
        self.state[index] = draws.probability.mean.argmax(0).cpu().numpy()
        self.state_use += draws.probability.mean.sum(1).double().cpu().numpy()
        self.log_likelihood += draws.log_likelihood.mean.sum(0).double().cpu().numpy()
        self.uncertainty[index] = directional_uncertainty(draws.velocities, v.mean).cpu().numpy()
        self.z[int(index[0])] = draws.z.mean.cpu().numpy()

    def finish(self, rates: list[dict[str, Tensor]]) -> Posterior:
        """The summaries of all cells, with those of the rates."""
        n_cells = len(self.state)
        stacked = {name: torch.stack([draw[name] for draw in rates]) for name in rates[0] if _is_rate(name, rates[0])}
        return Posterior(
            **self.layers,
            state=self.state,
            state_use=(self.state_use / n_cells).astype(np.float32),
            rates={name: value.mean(0).cpu().numpy() for name, value in stacked.items()},
            rates_sd={name: value.std(0).cpu().numpy() for name, value in stacked.items()},
            log_likelihood=(self.log_likelihood / n_cells).astype(np.float32),
            z=np.concatenate([self.z[key] for key in sorted(self.z)]),
            uncertainty=self.uncertainty,
        )


def _is_rate(name: str, draw: dict[str, Tensor]) -> bool:
    """Autoguides keep an unconstrained twin of every site; it is not reported."""
    return name in RATES or (not name.endswith("_unconstrained") and draw[name].ndim == 1)


def quantiles(draws: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Quantiles over the leading axis, linearly interpolated, from one sort: (D, ...) to one (...) a level."""
    ordered = draws.sort(0).values
    last = len(draws) - 1
    found = []
    for level in levels:
        below = int(level * last)
        above = min(below + 1, last)
        found.append(torch.lerp(ordered[below], ordered[above], level * last - below))
    return tuple(found)


def directional_uncertainty(draws: Tensor, mean: Tensor) -> Tensor:
    """Variance over draws of the cosine between a draw's velocity and the mean one: (D, B, G), (B, G) to (B,).

    A draw without any velocity points nowhere: its cosine counts 0.
    """
    along = torch.einsum("dbg,bg->db", draws, mean)
    lengths = torch.linalg.vector_norm(draws, dim=-1) * torch.linalg.vector_norm(mean, dim=-1)
    return torch.where(lengths > 0, along / lengths, 0.0).var(0)
