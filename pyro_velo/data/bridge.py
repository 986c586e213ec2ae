"""AnnData to tensors, and the posterior back into the AnnData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.batch import Cells, Counts
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.checks import NO_LIMIT, check_adata, check_key, check_two, check_whole, checked_layers
from pyro_velo.data.covariates import Design, design
from pyro_velo.data.matrices import checked_matrix, sums
from pyro_velo.data.stored import state_of
from pyro_velo.disk import AnyCells
from pyro_velo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from pyro_velo.posterior import Posterior

Array = NDArray[np.float32]

TOP = 99.0
"""The percentile that counts as a gene's maximum: one extreme cell must not set the scale of all others."""
GENES_AT_ONCE = 256
AMBIENT = 0.0001
"""The least abundance that a count is expected from, in units of a gene's range: RNA that is in every droplet.

Ten times as much is not small beside what late cells still have of a gene, and changes its rates (benchmarks/trust.md).
"""
BASAL = 0.05
"""The share of its range below which what a gene shows at its lowest is none: neighbours' means reach into its rise."""


@dataclass(frozen=True)
class Scaling:
    """Each fitted gene's own zero and unit, (G,): scaled = (layer - zero) / unit, for unspliced and spliced."""

    u_zero: Array
    u_unit: Array
    s_zero: Array
    s_unit: Array


@dataclass(frozen=True)
class Source:
    """The file that cells on disk were read from, and its `state` then (`stored.state_of`).

    `ranges` names the layers, spliced and unspliced, in whose units the kinetics are: with counts the smoothed ones.
    """

    path: Path
    state: tuple[int, int]
    ranges: tuple[str, str]

    def check(self) -> None:
        """Raises `InputError` where the file has changed since."""
        if not self.path.exists() or state_of(self.path) != self.state:
            raise InputError(
                f"{self.path} has changed since it was fitted, expected it as it was; fit it again, or put the old one "
                "back."
            )


@dataclass(frozen=True)
class VelocityData:
    """What is fitted: the scaled cells, which genes of the AnnData they are (`genes`, a mask), and their scaling.

    `layers` names those that it was read from, spliced and unspliced; `source` is the file of cells that are on disk.
    """

    cells: AnyCells
    cell_names: pd.Index
    genes: NDArray[np.bool_]
    gene_names: list[str]
    scaling: Scaling
    layers: tuple[str, str]
    design: Design | None = None
    source: Source | None = None

    @property
    def resident(self) -> Cells:
        """The cells, all of them in memory. Raises `InputError` where they are on disk."""
        if isinstance(self.cells, Cells):
            return self.cells
        raise InputError(
            f"Expected the {len(self.cells):,} cells in memory, because this looks at all of them at once; they are on "
            "disk. Read the file (pyro_velo.read) and fit that, or take fewer cells."
        )


def velocity_data(
    adata: AnnData,
    *,
    as_is: bool = False,
    counts: bool = False,
    spliced: str | None = None,
    unspliced: str | None = None,
    batch_key: str | None = None,
    covariates: Sequence[str] = (),
    device: str | torch.device = "cpu",
) -> VelocityData:
    """The genes that carry dynamics: min-max scaled, from `Ms` and `Mu` or from the raw layers (`as_is`); or `counts`.

    `spliced` and `unspliced` name other layers. The maximum is the 99th percentile. Genes whose 99th percentile is
    their minimum are left out, and so, unless `as_is`, are those that preprocessing found to carry no dynamics
    (`velocity_genes`). With `as_is` no ratio of unspliced to spliced is refused. With `counts` the layers are raw
    counts, each molecule with its size factor; range and start values are those of `Ms` and `Mu`, or with `as_is` of
    the normalised counts. `batch_key` and `covariates` are columns of obs (see `data.covariates.design`).

    Memory: 8 bytes a cell and fitted gene (16 with `counts`), and 8 more while it is made.

    Raises `InputError` for missing, malformed, NaN, infinite or negative layers, counts that are not whole, and where
    no gene is left.
    """
    raw = as_is or counts
    names = (spliced or (keys.SPLICED if raw else keys.MS), unspliced or (keys.UNSPLICED if raw else keys.MU))
    s, u = _layers(adata, names, raw)
    sizes = None
    range_s, range_u = s, u
    if counts:
        for layer, name in zip((s, u), names, strict=True):
            check_whole(layer, f"{name}")
        sizes = [_sizes(adata, layer, name, as_is) for layer, name in ((u, keys.UNSPLICED), (s, keys.SPLICED))]
        if as_is:
            range_u, range_s = (_divided(layer, size) for layer, size in zip((u, s), sizes, strict=True))
        else:
            range_s, range_u = _layers(adata, (keys.MS, keys.MU), False)
    wanted = np.ones(adata.n_vars, bool)
    if not as_is and keys.VELOCITY_GENES in adata.var:
        wanted = adata.var[keys.VELOCITY_GENES].to_numpy().astype(bool)
    (u_zero, u_top), (s_zero, s_top) = _range(range_u), _range(range_s)
    genes = wanted & (u_top > u_zero) & (s_top > s_zero)
    if not genes.any():
        raise InputError(
            f"None of the {adata.n_vars} genes varies in both layers; expected at least one that does. "
            "Look at the layers' values, or lower min_shared_counts when preparing."
        )
    if counts:
        u_zero, s_zero = (
            np.where(zero < BASAL * (top - zero), 0, zero).astype(np.float32)
            for zero, top in ((u_zero, u_top), (s_zero, s_top))
        )
    scaling = Scaling(u_zero[genes], (u_top - u_zero)[genes], s_zero[genes], (s_top - s_zero)[genes])
    scaled = stacked(range_u, range_s, genes, scaling).to(device)
    ratio = torch.from_numpy(scaling.u_unit / scaling.s_unit).to(device)
    told = design(adata, batch_key, covariates)
    cells = Cells(scaled, ratio)
    if sizes is not None:
        zero, unit = (
            torch.from_numpy(np.stack(pair))[:, None].to(device)
            for pair in ((scaling.u_zero, scaling.s_zero), (scaling.u_unit, scaling.s_unit))
        )
        size_factors = torch.from_numpy(np.stack(sizes).astype(np.float32))[..., None].to(device)
        # Nowhere is a count impossible: what floats about reaches every cell.
        cells = Cells(
            stacked(u, s, genes).to(device),
            ratio,
            Counts(size_factors, torch.maximum(zero, AMBIENT * unit), unit, scaled),
        )
    if told is not None:
        matrix, group = told.tensors(device)
        cells = replace(cells, covariates=matrix, group=group, n_groups=len(told.batches))
    return VelocityData(cells, adata.obs_names, genes, adata.var_names[genes].tolist(), scaling, names, told)


def _sizes(adata: AnnData, layer: Any, molecule: str, as_is: bool) -> Array:
    """How deeply each cell was sequenced, 1 the median: what preprocessing noted, or the layer's own totals."""
    key = keys.size_factor(molecule)
    if not as_is and key in adata.obs:
        return adata.obs[key].to_numpy(np.float32)
    totals = sums(layer, 1)
    return relative(totals, totals)


def relative(totals: NDArray[np.float64], among: NDArray[np.float64]) -> Array:
    """Each cell's total over the median one of the cells with the totals `among`."""
    counted = among[among > 0]
    # An empty cell counts as the smallest other one: any factor explains it.
    return (np.maximum(totals, counted.min()) / np.median(counted)).astype(np.float32)


def _divided(layer: Any, sizes: Array) -> Any:
    """Counts over the size factors of their cells."""
    return sparse.diags(1 / sizes) @ sparse.csr_matrix(layer)


def stacked(u: Any, s: Any, genes: NDArray[np.bool_], scaling: Scaling | None = None) -> torch.Tensor:
    """Both layers' fitted genes, (2, N, G), scaled if it is said how."""
    out = torch.empty(2, u.shape[0], int(genes.sum()))
    for into, layer in zip(out, (u, s), strict=True):
        columns = sparse.csr_matrix(layer) if sparse.issparse(layer) else layer
        into[:] = torch.from_numpy(_dense(columns[:, genes]))
    if scaling is not None:
        for into, zero, unit in ((out[0], scaling.u_zero, scaling.u_unit), (out[1], scaling.s_zero, scaling.s_unit)):
            into.sub_(torch.from_numpy(zero)).div_(torch.from_numpy(unit))
    return out


def check_same(adata: AnnData, data: VelocityData) -> None:
    """Raises `InputError` unless `adata` has the cells and genes of `data`, in their order."""
    shape = (len(data.cells), len(data.genes))
    if adata.shape != shape:
        raise InputError(
            f"Expected the AnnData that was fitted, of shape {shape}; got {adata.shape}. Write into that one."
        )
    same_genes = adata.var_names[data.genes].tolist() == data.gene_names
    if not (same_genes and adata.obs_names.equals(data.cell_names)):
        what = "cells" if same_genes else "genes"
        raise InputError(f"Expected the {what} that were fitted, in their order; got others. Write into that AnnData.")


def _layers(adata: AnnData, names: tuple[str, str], as_is: bool) -> tuple[Any, Any]:
    """Spliced and unspliced, checked."""
    if as_is:
        return checked_layers(adata, spliced=names[0], unspliced=names[1], max_unspliced_ratio=NO_LIMIT)
    check_adata(adata)
    check_two(*names)
    if names[0] == keys.MS and keys.MS not in adata.layers:
        raise InputError(
            f"Layer {keys.MS!r} is missing; present: {sorted(map(str, adata.layers))}. "
            "Run pyro_velo.pp.prepare(adata) first, or fit the layers as they are with as_is=True."
        )
    found = []
    for name in names:
        check_key(adata, "layers", name)
        found.append(checked_matrix(adata.layers[name], f"Layer {name!r}", gene_names=adata.var_names))
    return found[0], found[1]


def _range(layer: Any) -> tuple[Array, Array]:
    """Each gene's minimum and 99th percentile, some genes at a time."""
    low, top = np.empty(layer.shape[1], np.float32), np.empty(layer.shape[1], np.float32)
    columns = sparse.csc_matrix(layer) if sparse.issparse(layer) else layer
    for start in range(0, layer.shape[1], GENES_AT_ONCE):
        block = slice(start, start + GENES_AT_ONCE)
        values = _dense(columns[:, block])
        low[block], top[block] = values.min(0), np.percentile(values, TOP, axis=0)
    return low, top


def _dense(layer: Any) -> Array:
    return np.asarray(layer.toarray() if sparse.issparse(layer) else layer, np.float32)


def write_posterior(adata: AnnData, data: VelocityData, posterior: Posterior, *, about: dict[str, Any]) -> None:
    """Put every summary where `anndata_keys` says, in the layers' own units; genes that were not fitted hold NaN.

    All that can fail is done before the first key is written. A view becomes an AnnData of its own.
    """
    scale, genes = data.scaling, data.genes
    everywhere = {key: spread(getattr(posterior, name), genes, *unit_of(name, scale)) for name, key in LAYER_OF.items()}
    var = gene_columns(of_genes(posterior, data), data)
    time = latent_time(posterior.t, posterior.t_sd, posterior.log_likelihood)
    states = np.full(adata.shape, keys.NOT_FITTED, np.uint8)
    states[:, genes] = posterior.state
    if adata.is_view:
        adata._init_as_actual(adata.copy())
    for name, values in (everywhere | {keys.FIT_STATE: states}).items():
        adata.layers[name] = values
    for name, column in (var | {keys.VELOCITY_GENES: genes}).items():
        adata.var[name] = column
    adata.obs[keys.LATENT_TIME] = time
    adata.obs[keys.VELOCITY_UNCERTAINTY] = posterior.uncertainty
    if posterior.library is not None:
        adata.obs[keys.LIBRARY_SIZE] = posterior.library
    adata.obsm[keys.LATENT] = posterior.z
    adata.uns[keys.UNS] = noted(adata.uns.get(keys.UNS, {}), about, data)


LAYER_OF = {
    "velocity": keys.VELOCITY,
    "velocity_sd": keys.VELOCITY_SD,
    "velocity_q05": keys.VELOCITY_Q05,
    "velocity_q95": keys.VELOCITY_Q95,
    "t": keys.FIT_T,
    "t_sd": keys.FIT_T_SD,
    "s": keys.FIT_S,
    "u": keys.FIT_U,
}
"""Where each layer of a posterior is put."""


def unit_of(name: str, scale: Scaling) -> tuple[Any, Any]:
    """The unit and the zero, (G,) each, of a layer of the posterior in the layers' own units."""
    if name in ("t", "t_sd"):
        return 1, 0
    # The kinetics live in units of scaled spliced, for both molecules.
    return scale.s_unit, {"u": scale.u_zero, "s": scale.s_zero}.get(name, 0)


def noted(before: Mapping[str, Any], about: Mapping[str, Any], data: VelocityData) -> dict[str, Any]:
    """What stands in uns: what stood there before, how the fit was made, and the layers that it was of."""
    return {**before, **about, keys.UNS_LAYERS: dict(zip((keys.SPLICED, keys.UNSPLICED), data.layers, strict=True))}


class OfGenes(NamedTuple):
    """What a posterior says of the fitted genes: `rates` and `rates_sd` by site, the mean log-density, and R2, (G,)."""

    rates: Mapping[str, Array]
    rates_sd: Mapping[str, Array]
    log_likelihood: Array
    r2: Array


def of_genes(posterior: Posterior, data: VelocityData) -> OfGenes:
    """What a posterior of cells in memory says of the genes."""
    measured_u, measured_s = data.resident.scaled
    u, s = (measured_u * data.resident.ratio).cpu().numpy(), measured_s.cpu().numpy()
    r2 = np.minimum(explained_variance(u, posterior.u), explained_variance(s, posterior.s))
    return OfGenes(posterior.rates, posterior.rates_sd, posterior.log_likelihood, r2)


def gene_columns(found: OfGenes, data: VelocityData) -> dict[str, Array]:
    """The columns of var: alpha in units of Mu per time, noise in units of its own layer; NaN of genes not fitted."""
    scale = data.scaling
    columns: dict[str, Array] = {}
    for name, site in zip(keys.RATES, ("alpha", "beta", "gamma", "switch_time"), strict=True):
        unit = scale.s_unit if site == "alpha" else np.float32(1)
        columns[name] = found.rates[site] * unit
        columns[f"{name}_sd"] = found.rates_sd[site] * unit
    units = {"noise_unspliced": (keys.FIT_STD_U, scale.u_unit), "noise_spliced": (keys.FIT_STD_S, scale.s_unit)}
    for site in found.rates.keys() - {"alpha", "beta", "gamma", "switch_time"}:
        name, unit = units.get(site, (keys.of_site(site), scale.s_unit if site == "alpha_1" else np.float32(1)))
        columns[name] = found.rates[site] * unit
    columns[keys.FIT_LIKELIHOOD], columns[keys.FIT_R2] = np.exp(found.log_likelihood / 2), found.r2
    columns[keys.FIT_U0], columns[keys.FIT_S0] = scale.u_zero, scale.s_zero
    return {name: spread(column, data.genes) for name, column in columns.items()}


def explained_variance(observed: Array, fitted: Array) -> Array:
    """R2 of each gene, 1 - sum of squared residuals / sum of squares about the mean: (N, G), (N, G) to (G,)."""
    return np.asarray(1 - ((observed - fitted) ** 2).sum(0) / ((observed - observed.mean(0)) ** 2).sum(0))


def spread(values: Array, genes: NDArray[np.bool_], unit: Any = 1, zero: Any = 0) -> Array:
    """Values of the fitted genes, (..., fitted), times `unit` plus `zero`, among all genes, (..., G); NaN elsewhere."""
    out = np.full((*values.shape[:-1], len(genes)), np.nan, np.float32)
    out[..., genes] = values
    # In place, because these are the largest arrays there are.
    for change, by in ((np.multiply, unit), (np.add, zero)):
        each = np.ones(len(genes), np.float32)
        each[genes] = by
        change(out, each, out=out)
    return out


def reliability(t_sd: Array, scatter: Array) -> Array:
    """How far each latent time is known: the share of its gene's variance that is not the time's own error, roughly.

    Shapes: t_sd (..., G), `scatter` (G,), the sd of a gene's times over cells; returns (..., G), in (0, 1].
    """
    variance = scatter**2 + np.finfo(np.float32).tiny
    return variance / (variance + t_sd**2)


def latent_time(t: Array, t_sd: Array, log_likelihood: Array) -> Array:
    """One time per cell in [0, 1]: the mean rank over genes of the latent time, genes weighted by their likelihood.

    It stands where there is no neighbour graph, along which the velocities themselves order the cells
    (`embedding.potential`). A cell that a gene has not reached yet looks to that gene as one that has left it, and
    counts there as far as its time is known (`reliability`). Ranks, because each gene has a clock of its own. Shapes:
    t, t_sd (N, G), log_likelihood (G,); returns (N,).
    """
    ranks = np.argsort(np.argsort(t, axis=0, kind="stable"), axis=0, kind="stable").astype(np.float32)
    weights = np.exp(log_likelihood - log_likelihood.max()) * reliability(t_sd, t.std(axis=0))
    mean = (ranks * weights).sum(1) / weights.sum(1)
    spread = np.ptp(mean)
    return (mean - mean.min()) / spread if spread > 0 else np.zeros_like(mean)
