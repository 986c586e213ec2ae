r"""What an encoder could not say exactly of a cell is made up for: steps along the ELBO in q(z) of that cell alone.

An encoder places all cells by one function of their molecules, and hundreds of genes know better where a cell stands:
between the function and the best Normal is the amortisation gap, which no width of the Normal accounts for.

Reference: Kim et al. 2018, Semi-amortized variational autoencoders.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_velo.batch import Batch
from pyro_velo.disk import AnyCells
from pyro_velo.errors import InputError
from pyro_velo.guides import AmortizedProgram
from pyro_velo.schedule import WithoutPenalties
from pyro_velo.train import Fitted

CELLS_GENES_AT_ONCE = 512 * 1024
SLOWER_FROM, SLOWER = 0.6, 5
"""From this share of the steps on, they are so many times smaller."""


def refine(
    fitted: Fitted,
    cells: AnyCells,
    *,
    steps: int = 50,
    learning_rate: float = 0.02,
    seed: int = 0,
    progress: bool | None = None,
) -> Fitted:
    """The same fit with q(z) of each of `cells`, those that were fitted, moved from the encoder's to a better one.

    `steps` of Adam on means and log-sds, a batch of cells at a time; nothing else moves, and `fitted` stays as it is.
    What is then asked of the fit (posterior, evidence, checks) is asked of the refined one. A coupled
    fit has been refined already (`coupling`) and comes back as it is.

    Raises `InputError` for a guide without an encoder, and for no steps.
    """
    if not isinstance(fitted.guide, AmortizedProgram):
        raise InputError(
            f"Expected a guide with an encoder to refine; got {type(fitted.guide).__name__}. Leave it out."
        )
    if fitted.guide.coupled:
        # Its cells have been placed together with the rates.
        return fitted
    if steps < 1:
        raise InputError(f"Expected 1 step or more; got {steps}. 50 are enough for most.")
    device = cells.device
    with fitted.parameters(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        every, size = torch.arange(len(cells), device=device), max(1, CELLS_GENES_AT_ONCE // cells.n_genes)
        bar = tqdm(total=len(cells), desc="refinement", unit="cell", disable=None if progress is None else not progress)
        parts = []
        with bar:
            for batch in cells.batches(every, size):
                parts.append(_refined(fitted, batch, steps, learning_rate))
                bar.update(len(batch.index))
    guide = copy(fitted.guide)
    guide.own = (torch.cat([loc for loc, _ in parts]), torch.cat([scale for _, scale in parts]))
    return replace(fitted, guide=guide)


def _refined(fitted: Fitted, batch: Batch, steps: int, learning_rate: float) -> tuple[Tensor, Tensor]:
    """Means and sds (B, d) of a batch."""
    guide = fitted.guide
    with torch.no_grad():
        start = guide.encode(batch).base_dist
    values = [start.loc.clone().requires_grad_(), start.scale.log().requires_grad_()]
    optimizer = torch.optim.Adam(values, learning_rate)

    def moved(batch: Batch) -> None:
        with poutine.block(hide=["genes"]):
            guide.rates(batch)
        guide.cells(batch, dist.Normal(values[0], values[1].exp()).to_event(1))

    with WithoutPenalties(), pyro.validation_enabled(False):
        for step in range(steps):
            if step == int(SLOWER_FROM * steps):
                optimizer.param_groups[0]["lr"] = learning_rate / SLOWER
            loss = Trace_ELBO().differentiable_loss(fitted.program, moved, batch)
            for value, gradient in zip(values, torch.autograd.grad(loss, values), strict=True):
                value.grad = gradient
            optimizer.step()
    return values[0].detach().squeeze(-2), values[1].detach().exp().squeeze(-2)
