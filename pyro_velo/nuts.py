r"""NUTS on the program of a fit: the exact posterior of small data, to hold a guide against (Hoffman & Gelman 2014).

The networks stay as they were fitted. Which posterior it is, is said by what is `given`:

| given | drawn | compare with |
|---|---|---|
| `cells_at_means(fitted, cells)` | the gene-level sites | a rate guide fitted to the same density, `target(...)` |
| nothing | the gene-level sites and the cells' | the fit itself: what it costs that its guide keeps the two apart |
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_velo.batch import Batch, Cells
from pyro_velo.errors import InputError
from pyro_velo.rates import is_gene_level
from pyro_velo.schedule import WithoutPenalties
from pyro_velo.train import Fitted

MOST = 20_000
"""Cells x genes at most: a chain of 1,000 draws takes some 10,000 gradients, each of all cells."""


def nuts(
    fitted: Fitted,
    cells: Cells,
    *,
    given: Mapping[str, Tensor] | None = None,
    samples: int = 500,
    warmup: int = 500,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """One chain: draws (samples, ...) of every latent site that is not `given`, by name, in the units of the model.

    It starts at a draw of the guide. For several chains call it with several seeds. `progress` shows a bar (None: where
    stderr is a terminal). Warns where the sampler diverged.

    Raises `InputError` for more than `MOST` cells x genes, and for what `target` refuses.
    """
    size = len(cells) * cells.n_genes
    if size > MOST:
        raise InputError(
            f"Expected {MOST} cells x genes at most, since every step of NUTS looks at all of them; got {len(cells)} x "
            f"{cells.n_genes} = {size}. Pass fewer cells, fit fewer genes, or use the guide."
        )
    batch, density = _all(cells), target(fitted, cells, given)
    show = sys.stderr.isatty() if progress is None else progress
    with fitted.parameters(), torch.random.fork_rng([batch.u.device] if batch.u.is_cuda else []):
        torch.manual_seed(seed)
        with torch.no_grad():
            start = init_to_value(values=_latent(poutine.trace(fitted.guide).get_trace(batch)))
        diverged: list[int] = []
        kernel = NUTS(density, init_strategy=start, full_mass=_dense(density, batch, warmup))
        chain = MCMC(kernel, samples, warmup, hook_fn=_notes(diverged), disable_progbar=not show)
        chain.run(batch)
    if diverged:
        warnings.warn(
            f"NUTS diverged in {len(diverged)} of {samples} draws, so that narrow places of the posterior are missing. "
            "Raise warmup, or hold more sites at values with given.",
            stacklevel=2,
        )
    return chain.get_samples()


def target(fitted: Fitted, cells: Cells, given: Mapping[str, Tensor] | None = None) -> Callable[[Batch], None]:
    r"""The program whose density NUTS draws from: sites that are `given` are held there, and penalties are left out.

    A site that the model has at a point stays there. So do `Collapsed` states: their `pi` is the prior, under which all
    states weigh the same, and with equal weights the mixture is the one with pi integrated out:
    $E[\sum_k \pi_k p_k] = \frac{1}{4} \sum_k p_k$, as pi is symmetric.

    Raises `InputError` for a given site that the model does not draw, or of another shape.
    """
    program = WithoutPenalties()(fitted.program)
    with fitted.parameters(), torch.no_grad(), torch.random.fork_rng([cells.u.device] if cells.u.is_cuda else []):
        trace = poutine.trace(program).get_trace(_all(cells))
    drawn, given = _latent(trace), dict(given or {})
    for name, value in given.items():
        if name not in drawn:
            raise InputError(f"Expected given sites among {', '.join(drawn)}; got {name!r}. Leave it out.")
        if value.shape != drawn[name].shape:
            expected, got = tuple(drawn[name].shape), tuple(value.shape)
            raise InputError(f"Expected {name!r} of shape {expected} for these cells; got {got}. Take it from them.")
    points = {name: value for name, value in drawn.items() if _is_point(trace.nodes[name]["fn"])}
    # The networks' parameters are hidden, so that SVI on this density leaves them alone.
    return poutine.block(poutine.condition(program, data=points | given), hide_types=["param"])


@torch.no_grad()
def cells_at_means(fitted: Fitted, cells: Cells) -> dict[str, Tensor]:
    """The cells' sites at the means that the guide has for them, each given the means of those before it."""
    with fitted.parameters(), AtMeans(), torch.random.fork_rng([cells.u.device] if cells.u.is_cuda else []):
        trace = poutine.trace(fitted.guide).get_trace(_all(cells))
    return {name: value for name, value in _latent(trace).items() if _of_cells(trace.nodes[name])}


def _dense(density: Callable, batch: Batch, warmup: int) -> list[tuple[str, ...]]:
    """Gene-level sites share a dense mass matrix, because they are correlated, if the warm-up can learn one."""
    trace = poutine.trace(density).get_trace(batch)
    genes = {name: value for name, value in _latent(trace).items() if is_gene_level(trace.nodes[name])}
    few = sum(value.numel() for value in genes.values()) <= warmup / 5
    return [tuple(genes)] if genes and few else []


def _notes(diverged: list[int]) -> Callable[..., None]:
    """A hook of Pyro's that keeps the numbers of the draws that diverged."""

    def hook(kernel: NUTS, params: dict[str, Tensor], stage: str, i: int) -> None:
        if stage.startswith("Sample"):
            diverged[:] = kernel.diagnostics()["divergences"]

    return hook


class AtMeans(Messenger):
    """Puts the mean in the place of every draw of the cells."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and _of_cells(msg) and not site_is_subsample(msg):
            msg["value"] = msg["fn"].mean


def _all(cells: Cells) -> Batch:
    return cells.batch(torch.arange(len(cells), device=cells.u.device))


def _latent(trace: poutine.Trace) -> dict[str, Tensor]:
    """The values of what was drawn, by site, without a guide's own sites."""
    sites = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    theirs = {name for name, site in sites.items() if site_is_subsample(site) or site["infer"].get("is_auxiliary")}
    return {name: site["value"] for name, site in sites.items() if name not in theirs}


def _of_cells(site: dict[str, Any]) -> bool:
    return any(frame.name == "cells" for frame in site["cond_indep_stack"])


def _is_point(fn: Any) -> bool:
    """Whether a distribution is a Delta, whatever it is wrapped in."""
    while not isinstance(fn, dist.Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)
