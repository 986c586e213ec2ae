r"""What the posterior says of every cell and gene, streamed: never draws x cells x genes, but a batch of cells at once.

A draw takes the rates once for all cells, then z and pi of each cell from the guide, or of pi its mean where the family
of the states draws none. Given these, the state has the exact posterior
$p(k \mid u, s) \propto \pi_k\, p(u \mid k)\, p(s \mid k)$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_velo.batch import Batch, equal_parts
from pyro_velo.compiled import compiled
from pyro_velo.disk import AnyCells
from pyro_velo.errors import InputError
from pyro_velo.guides import TIME_UNIT, WARP, AmortizedProgram
from pyro_velo.kinetics import Rates
from pyro_velo.models.velocity import RATES, Given, Landmarks, VelocityProgram
from pyro_velo.quantiles import directional_uncertainty, quantiles
from pyro_velo.state_posterior import best_state, drawn_states, most_likely, of_draw, over, posterior_of_states
from pyro_velo.states import STATES
from pyro_velo.train import Fitted

Array = NDArray[np.float32]
OverStates = Literal["expected", "most likely", "drawn"]
OVER_STATES: OverStates = "drawn"
"""What is told of a fit: an interval of a velocity holds that its state is not known."""
OF_DIRECTIONS: OverStates = "expected"
"""Where cells go: a direction is of all genes together, and averages over their states."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""By which the number that a state is drawn by moves on from draw to draw: so few draws hold a state in its share."""
CELLS_GENES_AT_ONCE = 512 * 1024
"""Cells x genes that are looked at together: measured; smaller batches pay more overhead, larger ones more memory.

The draws of one batch take 2 MiB each, 200 MiB for 100 draws."""


@dataclass(frozen=True)
class Posterior:
    """Summaries in the units of the model: scaled abundance, and latent time, in [0, 20] unless a unit was told.

    Cells x genes: `velocity` (mean), `velocity_sd`, `velocity_q05`, `velocity_q95`, `t`, `t_sd`, `u`, `s` (posterior
    mean expression), `state` (most likely, 0 to 3). (4, cells, genes) is never kept; `state_use` (4, genes) is its
    mean. Genes: `rates` and `rates_sd` by site name, `log_likelihood` (mean over cells). Cells: `z` (cells, d),
    `uncertainty`, and `library`, 1 the median, where library sizes are inferred.
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
    library: Array | None = None


class Draws(NamedTuple):
    """One batch: the velocity in every draw (D, B, G); the means over draws, and the sds of `SPREAD`, (B, G) each.

    In the units of the model; `z` (B, d) is the mean over draws.
    """

    velocities: Tensor
    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    z: Tensor

    def first(self, n: int) -> Draws:
        """The first `n` cells."""
        mean, sd = ({name: value[:n] for name, value in each.items()} for each in (self.mean, self.sd))
        return Draws(self.velocities[:, :n], mean, sd, self.z[:n])


class Summaries(NamedTuple):
    """What the draws say of a batch of cells, in the units of the model.

    `layers` by the names of `LAYERS` (B, G), `state` (B, G), `z` (B, d), `uncertainty` (B,); summed over the cells,
    float64: `state_use` (4, G) and `log_likelihood` (G,).
    """

    layers: dict[str, Array]
    state: NDArray[np.uint8]
    z: Array
    uncertainty: Array
    state_use: NDArray[np.float64]
    log_likelihood: NDArray[np.float64]


LAYERS = ("velocity", "velocity_sd", "velocity_q05", "velocity_q95", "t", "t_sd", "u", "s")
AVERAGED = ("velocity", "t", "u", "s", "log_likelihood", *STATES)
SPREAD = ("velocity", "t")


@torch.no_grad()
def summarise(
    fitted: Fitted,
    cells: AnyCells,
    *,
    draws: int = 100,
    over_states: OverStates = OVER_STATES,
    seed: int = 0,
    progress: bool | None = None,
    as_if: AnyCells | None = None,
) -> Posterior:
    """Draw `draws` times from the guide for all `cells` and summarise.

    `as_if`: the same cells with other covariates, under which they are predicted once the encoder has seen them.

    `over_states`: each draw's velocity and time are the expectation over the four states, those of the most likely one,
    or those of one that is drawn with its probability.

    Raises InputError for fewer than two draws, which have no spread.
    """
    out = _Summary(len(cells), cells.n_genes, fitted.program.n_latent)
    rates = stream(
        fitted, cells, out.add, draws=draws, over_states=over_states, seed=seed, progress=progress, as_if=as_if
    )
    found = out.finish(rates)
    z, library = with_library(fitted, found.z)
    return replace(found, z=z, library=library)


@torch.no_grad()
def with_library(fitted: Fitted, z: Array) -> tuple[Array, Array | None]:
    """Latent vectors (N, d) without the library size, and that (N,), where it is the last dimension."""
    if getattr(fitted.program, "library_sd", None) is None:
        return z, None
    latent = torch.from_numpy(z).to(fitted.program.library_sd.device)
    library = fitted.program.library_size(latent).squeeze(-1)
    return fitted.program.of_kinetics(latent).cpu().numpy(), library.cpu().numpy()


@torch.no_grad()
def stream(
    fitted: Fitted,
    cells: AnyCells,
    receive: Callable[[NDArray[np.int64], Draws], None],
    *,
    draws: int = 100,
    over_states: OverStates = OVER_STATES,
    seed: int = 0,
    progress: bool | None = None,
    as_if: AnyCells | None = None,
) -> list[dict[str, Tensor]]:
    """Call `receive` with the numbers of a batch of cells and their draws, batch by batch; return the draws' rates.

    Draw i has the same rates in every batch, so that the i-th draws of all cells are one draw of the whole. The same
    seed gives the same draws. Raises `InputError` for fewer than two.
    """
    check_draws(draws)
    device = cells.device
    with (
        fitted.parameters(),
        pyro.validation_enabled(False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        rates = draw_rates(fitted, cells, draws)
        work = draws * len(cells) * cells.n_genes
        take = compiled(partial(_take, fitted.program, fitted.guide, over_states), work, device)
        bar = tqdm(total=len(cells), desc="posterior", unit="cell", disable=None if progress is None else not progress)
        with bar:
            for index, new in equal_parts(len(cells), CELLS_GENES_AT_ONCE // cells.n_genes):
                batch = cells.batch(index.to(device))
                told = batch if as_if is None else as_if.batch(index.to(device))
                receive(
                    index[:new].numpy(),
                    _draw_batch(fitted, batch, told, rates, take, over_states == "drawn").first(new),
                )
                bar.update(new)
    return rates


def check_draws(draws: int) -> None:
    """Raises `InputError` for fewer than two draws."""
    if draws < 2:
        raise InputError(f"Expected 2 draws or more, because one has no spread; got {draws}. The default is 100.")


def draw_rates(fitted: Fitted, cells: AnyCells, draws: int) -> list[dict[str, Tensor]]:
    """Every draw's gene-level values, by site, which all cells share.

    Call it under the fit's parameters, as `stream` does.
    """
    batch = cells.batch(torch.arange(1, device=cells.device))
    taken = []
    for _ in range(draws):
        trace = poutine.trace(fitted.guide).get_trace(batch)
        shared = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
            and (name == WARP or {frame.name for frame in site["cond_indep_stack"]} == {"genes"})
        }
        taken.append(shared)
    return taken


def _draw_batch(
    fitted: Fitted,
    seen: Batch,
    batch: Batch,
    rates: list[dict[str, Tensor]],
    take: Callable[..., None],
    states_drawn: bool,
) -> Draws:
    """Every draw for one batch, which the encoder knows as `seen`."""
    velocities = batch.u.new_empty(len(rates), *batch.u.shape)
    # What is the genes' alone is not computed again for each cell.
    landmarks = [fitted.program.landmarks(Rates(*(each[name] for name in RATES)), each) for each in rates]
    mean = {name: torch.zeros_like(batch.u) for name in AVERAGED}
    squares = {name: torch.zeros_like(batch.u) for name in SPREAD}
    draw_cells, z = cells_of(fitted.guide, seen, batch, states=False), torch.zeros(())
    place = torch.rand_like(batch.u) if states_drawn else torch.zeros_like(batch.u[:1, :1])
    for i, shared in enumerate(rates):
        values = draw_cells(shared)
        # A tensor: a number would be compiled in, and everything compiled again for the next. One for each gene: what
        # does not look at genes would be compiled into a pass of its own.
        share = batch.u.new_full(batch.u.shape[-1:], 1 / (i + 1))
        turn = torch.full_like(share, i * GOLDEN % 1)
        take(values, landmarks[i], batch, mean, squares, (share, place, turn), velocities[i])
        z = z + values["z"].squeeze(-2) / len(rates)
    sd = {name: (value / (len(rates) - 1)).sqrt() for name, value in squares.items()}
    return Draws(velocities, mean, sd, z)


def _take(
    program: VelocityProgram,
    guide: Any,
    over_states: OverStates,
    values: dict[str, Tensor],
    landmarks: Landmarks,
    batch: Batch,
    mean: dict[str, Tensor],
    squares: dict[str, Tensor],
    how: tuple[Tensor, Tensor, Tensor],
    into: Tensor,
) -> None:
    """One draw: its velocity (B, G) `into`, and all of it into the running moments (Welford 1962).

    `how`: as which share (G,), and by which uniform numbers (B, G), moved on by how much (G,), states are drawn.
    """
    share, place, turn = how
    if "pi" in values:
        given = of_draw(program, values)
    else:
        given = Given(log_weights=program.recipe.states.weights_of(guide.state_outputs(values["z"], batch)))
    explained = program.explain(values, batch, given._replace(landmarks=landmarks))
    probability, log_likelihood = posterior_of_states(explained.log_joint)
    if over_states == "most likely" or program.recipe.states.hard:
        weights = most_likely(probability)
    else:
        weights = drawn_states(probability, torch.frac(place + turn)) if over_states == "drawn" else probability
    drawn = {name: over(weights, getattr(explained, name)) for name in ("velocity", "t", "u", "s")}
    drawn |= {"log_likelihood": log_likelihood, **dict(zip(STATES, probability, strict=True))}
    into.copy_(drawn["velocity"])
    for name, value in drawn.items():
        gap = value - mean[name]
        step = gap * share
        mean[name].add_(step)
        if name in squares:
            squares[name].add_(gap.mul_(gap - step))


def cells_of(
    guide: Any, seen: Batch, batch: Batch, *, states: bool = True
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What draws the sites of a batch's cells, the gene-level ones given, which are among what it returns.

    The encoder knows the cells as `seen`; `batch` is what the model then explains (see `as_if` of `stream`). Without
    `states` the site `pi` is left out where z alone tells it (`StateFamily.weights_of`).
    """
    if isinstance(guide, AmortizedProgram):
        # Its cells know of the rates only through the model, and its encoder looks at a batch once for all draws.
        program, latent = guide.cells, guide.encode(seen)
        if not states and guide.states.certain:
            return lambda shared: {**shared, "z": guide.given(shared, latent).sample()}
        return lambda shared: {**shared, **_sampled(program, batch, guide.given(shared, latent))}
    return lambda shared: _sampled(poutine.condition(guide, data=shared), seen)


def _sampled(program: Callable, *args: Any) -> dict[str, Tensor]:
    trace = poutine.trace(program).get_trace(*args)
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}


def of_batch(draws: Draws) -> Summaries:
    """Summaries of the draws of one batch."""
    mean, sd = draws.mean, draws.sd
    low, high = quantiles(draws.velocities, (0.05, 0.95))
    layers = (mean["velocity"], sd["velocity"], low, high, mean["t"], sd["t"], mean["u"], mean["s"])
    probability = torch.stack([mean[state] for state in STATES])
    return Summaries(
        {name: value.cpu().numpy() for name, value in zip(LAYERS, layers, strict=True)},
        best_state(probability).to(torch.uint8).cpu().numpy(),
        draws.z.cpu().numpy(),
        directional_uncertainty(draws.velocities, mean["velocity"]).cpu().numpy(),
        probability.sum(1).double().cpu().numpy(),
        mean["log_likelihood"].sum(0).double().cpu().numpy(),
    )


def moments_of(rates: list[dict[str, Tensor]]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Means and sds over draws of the gene-level sites that are reported, by name."""
    stacked = {name: torch.stack([draw[name] for draw in rates]) for name in rates[0] if _is_rate(name, rates[0])}
    means = {name: value.mean(0).cpu().numpy() for name, value in stacked.items()}
    return means, {name: value.std(0).cpu().numpy() for name, value in stacked.items()}


class _Summary:
    """The arrays of a `Posterior`, filled batch by batch."""

    def __init__(self, n_cells: int, n_genes: int, n_latent: int) -> None:
        self.layers = {name: np.empty((n_cells, n_genes), np.float32) for name in LAYERS}
        self.state = np.empty((n_cells, n_genes), np.uint8)
        self.state_use = np.zeros((4, n_genes), np.float64)
        self.log_likelihood = np.zeros(n_genes, np.float64)
        self.uncertainty = np.empty(n_cells, np.float32)
        self.z = np.empty((n_cells, n_latent), np.float32)

    def add(self, index: NDArray, draws: Draws) -> None:
        """Summarise the draws of the cells at `index`."""
        found = of_batch(draws)
        for name, values in found.layers.items():
            self.layers[name][index] = values
        self.state[index], self.uncertainty[index] = found.state, found.uncertainty
        self.state_use += found.state_use
        self.log_likelihood += found.log_likelihood
        self.z[index] = found.z

    def finish(self, rates: list[dict[str, Tensor]]) -> Posterior:
        """The summaries of all cells, with those of the rates."""
        n_cells = len(self.state)
        mean, sd = moments_of(rates)
        return Posterior(
            **self.layers,
            state=self.state,
            state_use=(self.state_use / n_cells).astype(np.float32),
            rates=mean,
            rates_sd=sd,
            log_likelihood=(self.log_likelihood / n_cells).astype(np.float32),
            z=self.z,
            uncertainty=self.uncertainty,
        )


def _is_rate(name: str, draw: dict[str, Tensor]) -> bool:
    """Autoguides keep an unconstrained twin of every site; it is not reported, nor is what couples them."""
    return name in RATES or (
        name not in (WARP, TIME_UNIT) and not name.endswith("_unconstrained") and draw[name].ndim == 1
    )
