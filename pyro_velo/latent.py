"""What a fitted autoencoder says of cells: where they lie, of which cluster they are, and what their profiles mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_velo.disk_profiles import AnyProfiles
from pyro_velo.encoders import PerClusterProgram
from pyro_velo.errors import InputError
from pyro_velo.last_layer import LastLayer
from pyro_velo.profiles import ProfileBatch
from pyro_velo.train import Fitted

Array = NDArray[np.float64]
Look = Callable[[dict[str, Tensor], ProfileBatch], Tensor]
DRAWS = 50
"""Draws of the latent sites by which a mean over the posterior is taken."""
CELLS_AT_ONCE = 512
NUMBERS_AT_ONCE = 2**24
"""Draws x cells x genes that are held together: 64 MiB."""


class Interval(NamedTuple):
    """The mean over the posterior and its 5 % and 95 % quantiles, one shape."""

    mean: Array
    q05: Array
    q95: Array


@contextmanager
def _apart(fitted: Fitted, cells: AnyProfiles, seed: int) -> Iterator[None]:
    noise = torch.random.fork_rng([cells.device] if cells.device.type == "cuda" else [])
    with fitted.parameters(), pyro.validation_enabled(False), noise, torch.no_grad():
        torch.manual_seed(seed)
        yield


def _batches(cells: AnyProfiles, size: int = CELLS_AT_ONCE) -> Iterator[ProfileBatch]:
    yield from cells.batches(torch.arange(len(cells), device=cells.device), size)


def latent_means(fitted: Fitted, cells: AnyProfiles) -> Array:
    """E[z] of each cell, (N, d), as the encoder has it."""
    with _apart(fitted, cells, 0):
        return _gathered((_encoded(fitted, batch) for batch in _batches(cells)), len(cells))


def _gathered(parts: Iterator[Tensor], n_cells: int) -> Array:
    """The rows of all cells, put where they belong as they come.

    Kept apart until the end, small ones would lie where the next batch's large arrays then can't.
    """
    first = next(parts)
    found, start = np.empty((n_cells, *first.shape[1:])), 0
    for part in chain((first,), parts):
        found[start : start + len(part)] = part.cpu().numpy()
        start += len(part)
    return found


def _encoded(fitted: Fitted, batch: ProfileBatch) -> Tensor:
    if isinstance(fitted.guide, PerClusterProgram):
        return fitted.guide.mean_latent(batch)
    return poutine.trace(fitted.guide).get_trace(batch).nodes["z"]["fn"].mean.squeeze(-2)


def cluster_probabilities(fitted: Fitted, cells: AnyProfiles, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """E[q(y | z)] of each cell over its posterior of z, (N, K); a cell's known label is no part of it.

    Raises `InputError` for a model without clusters.
    """
    if not hasattr(fitted.program, "log_clusters"):
        raise InputError("Expected a model with clusters; got one without. Fit a GMVAE or a CGMDVAE.")

    def look(values: dict[str, Tensor], batch: ProfileBatch) -> Tensor:
        return fitted.program.log_clusters(values, batch).exp()

    with _apart(fitted, cells, seed):
        probabilities = (_mean(_draws(fitted, batch, batch, [look] * draws)) for batch in _batches(cells))
        return _gathered(probabilities, len(cells))


def denoised(fitted: Fitted, cells: AnyProfiles, *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float32]:
    """The posterior mean of each cell's profile, (N, G): counts at the median depth, shares where x is on or off."""
    return np.concatenate(list(denoised_in_blocks(fitted, cells, draws=draws, seed=seed)))


def denoised_in_blocks(
    fitted: Fitted, cells: AnyProfiles, *, draws: int = DRAWS, seed: int = 0
) -> Iterator[NDArray[np.float32]]:
    """As `denoised`, `CELLS_AT_ONCE` cells at a time, in their order."""
    with _apart(fitted, cells, seed):
        for batch in _batches(cells):
            looks = [_profile_of(fitted)] * draws
            yield _mean(_draws(fitted, batch, _at_median_depth(batch), looks)).cpu().numpy()


def converted(
    fitted: Fitted,
    cells: AnyProfiles,
    covariates: Tensor,
    *,
    last_layer: LastLayer | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    mean: bool = False,
) -> Interval:
    """The profiles of cells as if their covariates (N, C) were others: encoded under their own, decoded under these.

    (N, G) each, as in `denoised`; with `mean` those of the mean profile of all cells, (G,), for which each draw of the
    latent sites of all cells gives one. Interval ends are those of expected profiles: of the posterior of the latent
    sites, and of the decoder's `last_layer`; without it the decoder is a point, and the interval of a mean over many
    cells far too narrow.

    Raises `InputError` for a model that is told nothing of a cell, and covariates of another shape.
    """
    if cells.covariates is None or covariates.shape != cells.covariates.shape:
        shape = None if cells.covariates is None else tuple(cells.covariates.shape)
        raise InputError(
            f"Expected covariates of shape {shape}; got {tuple(covariates.shape)}. Pass the cells' others."
        )
    others = cells.told(covariates)
    size = max(1, min(CELLS_AT_ONCE, NUMBERS_AT_ONCE // (draws * cells.n_genes)))
    parts, total = [], torch.zeros(())
    with _apart(fitted, cells, seed):
        looks = [_profile_of(fitted)] * draws
        if last_layer is not None:
            looks = [_profile_of(fitted, last_layer, change) for change in last_layer.draw(draws)]
        for batch, other in zip(_batches(cells, size), _batches(others, size), strict=True):
            drawn = torch.stack(list(_draws(fitted, batch, _at_median_depth(other), looks))).double()
            if mean:
                total = total + drawn.sum(1) / len(cells)
            else:
                parts.append(_summary(drawn))
    if mean:
        return Interval(*(each.cpu().numpy() for each in _summary(total)))
    return Interval(*(torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True)))


def _mean(drawn: Iterator[Tensor]) -> Tensor:
    """The mean of draws that are not held together."""
    total, n = torch.zeros(()), 0
    for each in drawn:
        total, n = total + each, n + 1
    return total / n


def _summary(drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = torch.quantile(drawn, torch.tensor([0.05, 0.95], dtype=drawn.dtype, device=drawn.device), dim=0)
    return drawn.mean(0), low, high


def _profile_of(fitted: Fitted, last_layer: LastLayer | None = None, change: Tensor | None = None) -> Look:
    """The mean profile of a draw, of weights that are a `change` away; shares instead of log-odds."""
    binary, decoding = fitted.program.recipe.likelihood.binary, fitted.program.decoding

    def look(values: dict[str, Tensor], batch: ProfileBatch) -> Tensor:
        if last_layer is None or change is None:
            mean = fitted.program.mean(values, batch)
        else:
            mean = decoding.emission.mean(last_layer.outputs(decoding, values["z"].squeeze(-2), batch, change), batch)
        return mean.sigmoid() if binary else mean

    return look


def _draws(fitted: Fitted, batch: ProfileBatch, seen_as: ProfileBatch, looks: Sequence[Look]) -> Iterator[Tensor]:
    """What draws of the guide's sites for `batch`, one for each look, say of `seen_as`."""
    for look in looks:
        trace = poutine.trace(fitted.guide).get_trace(batch)
        values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
        # The clusters' sizes may be a site.
        yield poutine.replay(look, trace=trace)(values, seen_as)


def _at_median_depth(batch: ProfileBatch) -> ProfileBatch:
    return batch if batch.size_factors is None else replace(batch, size_factors=torch.ones_like(batch.size_factors))
