"""The ELBO of a fit, taken apart: what each site of the model costs or explains, by cell, gene and dimension."""

from __future__ import annotations

import torch
from pyro import poutine
from torch import Tensor

from pyro_velo.batch import Data, Minibatch
from pyro_velo.doctor.terms import Terms, combined, terms_of
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions
from pyro_velo.train import Fitted, per_cell, split


@torch.no_grad()
def decompose(fitted: Fitted, cells: Data, *, index: Tensor | None = None, draws: int = 1, seed: int = 0) -> Terms:
    """The summands of the ELBO per cell of a fit on `cells`, in nats, at KL weight 1.

    Of the held-out cells (all, where none are held out), or those at `index` (n,), in that order; each draw takes the
    gene-level sites and the cells' latent vectors once for each batch of the size that the fit was trained with. What
    cells share counts by training cell, as it does in the fit. The noise is the same for the same seed.

    Raises `InputError` for no draws and for no cells.
    """
    settings = fitted.training.settings
    train_index, held_index = split(len(cells), settings.held_out, settings.seed)
    if index is None:
        index = held_index if len(held_index) else train_index
    if draws < 1 or not len(index):
        raise InputError(f"Expected 1 draw and 1 cell or more; got {draws} and {len(index)}. Leave both out.")
    n_train, found = len(train_index), []
    with conditions(fitted, cells, seed):
        for _ in range(draws):
            batches = list(cells.batches(index.to(cells.device), settings.batch_size, n_train))
            parts = [draw_terms(fitted, batch) for batch in batches]
            found.append(combined(parts, [len(batch.index) / len(index) for batch in batches], apart=True))
    return combined(found, [1 / draws] * draws, apart=False)


def draw_terms(fitted: Fitted, batch: Minibatch) -> Terms:
    """The summands at one draw for one batch, through which gradients flow; to be called in `fitted.parameters()`.

    Penalties cost what they do at weight 1, unless a handler is in force.
    """
    guide, program = (per_cell(part, batch.n_cells) for part in (fitted.guide, fitted.program))
    drawn = poutine.trace(guide).get_trace(batch)
    return terms_of(drawn, poutine.trace(poutine.replay(program, trace=drawn)).get_trace(batch))
