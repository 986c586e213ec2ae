"""Which genes a fit does not explain, and why: each reason a figure with a threshold, and a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pyro_velo.criticism import PredictiveCheck, predictive_check
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.bridge import check_same, explained_variance
from pyro_velo.data.checks import check_key
from pyro_velo.errors import InputError
from pyro_velo.fitting import Fit
from pyro_velo.models.velocity import MOLECULES
from pyro_velo.preprocess import averaging_weights

if TYPE_CHECKING:
    from anndata import AnnData

Array = NDArray[np.float64]

NULL_DRAWS = 200
"""White noise that is smoothed as the layers were, to see what autocorrelation smoothing makes by itself."""
FEW, NOISE, LINE = "few unspliced molecules", "unspliced is noise", "no curvature"
KINETICS, FIT, REPLICATES = "multiple kinetics", "poor fit", "replicates differ"
REMEDIES = {
    FEW: "Leave the gene out of the velocity; its unspliced molecules carry none. Deeper sequencing would.",
    NOISE: "Smooth over more neighbours, or fit raw counts with likelihood=NB(); or leave the gene out.",
    LINE: "Its cells lie on the steady-state line: take its velocity as zero, or leave it out of latent times.",
    KINETICS: "Fit the lineages apart, or leave the gene out; a batch effect would need batch_key.",
    FIT: "Look at its phase portrait; try transcription=TimeDependent() or times=PerGene(), or leave it out.",
    REPLICATES: "Try another likelihood (NB for variance, ZINB for zeros, StudentT for outliers); see its statistics.",
}


@dataclass(frozen=True)
class Limits:
    r"""The thresholds of `unexplained_genes`.

    Attributes:
        unspliced_cells: share of cells with any unspliced molecule, at least.
        signal: sd of the fitted unspliced over that of its residuals, at least.
        curvature: R2 of the cells' departures from the steady-state line, at least.
        structure: share of a molecule's variance that is left over and alike in neighbours, at most.
        significance: sds by which Moran's I of the residuals is above that of noise, where `structure` counts.
        r2: variance explained, the lower of the two molecules', at least.
        sds: distance of a statistic from the replicates' mean, in their sds, at most.
    """

    unspliced_cells: float = 0.05
    signal: float = 0.5
    curvature: float = 0.05
    structure: float = 0.05
    significance: float = 5.0
    r2: float = 0.1
    sds: float = 4.0


@dataclass(frozen=True)
class Finding:
    """A gene that is not explained, with the figure that says so and the threshold that it is beyond.

    `detail` says which molecule or statistic. `severity` is how far beyond, from 0 at the threshold to 1 where there is
    nothing left: no molecule, no variance explained, no replicate within any number of sds.
    """

    gene: str
    reason: str
    figure: float
    threshold: float
    remedy: str
    severity: float
    detail: str = ""


def unexplained_genes(
    fit: Fit, adata: AnnData, *, check: PredictiveCheck | None = None, limits: Limits | None = None, draws: int = 100
) -> list[Finding]:
    r"""The fitted genes that the model cannot explain, worst first; a gene may stand there for several reasons.

    | reason | figure |
    |---|---|
    | few unspliced molecules | share of cells with any |
    | unspliced is noise | $\mathrm{sd}(\hat u) / \mathrm{sd}(u - \hat u)$ |
    | no curvature | R2 of the departures from the steady-state line, by the neighbours' fits: `departures_explained` |
    | multiple kinetics | $(I - I_0)(1 - R^2)$: the share of variance that is left over and alike in neighbours |
    | poor fit | `fit_r2` |
    | replicates differ | sds between a statistic and its replicates; see `criticism.predictive_check` |

    A cell's own fit has seen its noise, and takes the state that noise suggests: hence its neighbours' for the
    curvature. $I$ is Moran's, of the residuals over the neighbour graph, and $I_0$ that of noise: where the layers are
    smoothed over neighbours, of white noise smoothed alike. Smoothed neighbours share noise, so that a gene without
    curvature may pass. `check` is one that has been made already.

    Raises `InputError` for an AnnData of other cells or genes, and one without a neighbour graph.
    """
    check_same(adata, fit.data)
    check_key(adata, "obsp", "distances")
    limits = limits or Limits()
    check = check or predictive_check(fit.fitted, fit.data.resident, draws=draws)
    posterior = fit.posterior(draws=draws)
    measured, cells = fit.data.resident.scaled.double().cpu().numpy(), fit.data.resident
    ratio = np.broadcast_to(np.asarray(cells.ratio, dtype=np.float64), cells.n_genes)
    observed = np.stack((measured[0] * ratio, measured[1]))
    fitted = np.stack((posterior.u, posterior.s)).astype(np.float64)
    names, r2 = fit.data.gene_names, _r2(observed, fitted)
    found = [
        *_below(names, FEW, _share_with_unspliced(adata, fit), limits.unspliced_cells),
        *_below(names, NOISE, fitted[0].std(0) / (observed[0] - fitted[0]).std(0), limits.signal),
        *_below(names, LINE, departures_explained(observed, _of_neighbours(fitted, adata)), limits.curvature),
        *_below(names, FIT, r2.min(0), limits.r2, [MOLECULES[k] for k in r2.argmin(0)]),
        *_kinetics(names, observed - fitted, r2, adata, fit, limits),
        *_replicates(names, check, limits),
    ]
    return sorted(found, key=lambda each: (-each.severity, each.gene))


def departures_explained(observed: ArrayLike, fitted: ArrayLike) -> Array:
    r"""Does a fitted curve explain more than a line? R2 of the distances from the line, (2, N, G) twice to (G,).

    With $d = (x - \bar x) \cdot e$ the signed distance of a cell's (u, s) from the first principal axis of the gene's
    cells, and $\hat d$ that of its fitted point from the same line, $1 - \sum (d - \hat d)^2 / \sum d^2$. It is
    $(R^2_{curve} - R^2_{line}) / (1 - R^2_{line})$ of the fitted points and their feet on the line: 0 or less where
    the line does as well, and 0 for cells that all lie on it.
    """
    x, y = (np.asarray(each, dtype=np.float64) for each in (observed, fitted))
    centre = x.mean(1, keepdims=True)
    x, y = x - centre, y - centre
    # The axis of least variance of two variables, in closed form.
    angle = 0.5 * np.arctan2(2 * (x[0] * x[1]).sum(0), (x[0] ** 2).sum(0) - (x[1] ** 2).sum(0)) + np.pi / 2
    across = np.stack((np.cos(angle), np.sin(angle)))[:, None]
    d, d_hat = (x * across).sum(0), (y * across).sum(0)
    total = (d**2).sum(0)
    rounding = 1e-20 * (x**2).sum((0, 1))
    miss = ((d - d_hat) ** 2).sum(0)
    return 1 - np.divide(miss, total, out=np.ones_like(total), where=total > rounding)


class Moran(NamedTuple):
    """Moran's I of each column, and its distance from what columns in random order have, in their sds."""

    i: Array
    z: Array


def morans_i(values: ArrayLike, graph: sparse.spmatrix | sparse.sparray) -> Moran:
    r"""Spatial autocorrelation over a graph of neighbours, (cells, G) to (G,) each.

    $$I = \frac{N}{W} \frac{\sum_{ij} w_{ij} x_i x_j}{\sum_i x_i^2}, \qquad E[I] = -\frac{1}{N - 1}$$

    of centred x, with w = 1 for neighbours and 0 otherwise; the variance is that under random permutations of the
    cells. A column without spread has an I and a z of NaN.

    Raises `InputError` for fewer than four cells, a graph of others, and one without an edge.

    References: Moran 1950; Cliff and Ord 1981, Spatial processes, eq. 1.37 and 2.27.
    """
    x = np.asarray(values, dtype=np.float64)
    edges = _edges(graph)
    n, weight = len(x), edges.sum()
    if n < 4 or edges.shape != (n, n) or not weight:
        raise InputError(
            f"Expected a graph with edges between 4 cells or more; got one of shape {edges.shape} with {edges.nnz} "
            f"edges for {n} cells. Pass obsp['distances'] of the same cells."
        )
    x = x - x.mean(0)
    squares = (x**2).sum(0)
    varies = squares > 1e-20 * n
    squares = np.where(varies, squares, np.nan)
    i = n / weight * (x * (edges @ x)).sum(0) / squares
    both = edges + edges.T
    s1 = both.multiply(both).sum() / 2
    s2 = (np.asarray(both.sum(1)) ** 2).sum()
    kurtosis = n * (x**4).sum(0) / squares**2
    mean = -1 / (n - 1)
    free = n * ((n**2 - 3 * n + 3) * s1 - n * s2 + 3 * weight**2)
    tails = kurtosis * ((n**2 - n) * s1 - 2 * n * s2 + 6 * weight**2)
    variance = (free - tails) / ((n - 1) * (n - 2) * (n - 3) * weight**2) - mean**2
    return Moran(i, (i - mean) / np.sqrt(variance))


def _edges(graph: sparse.spmatrix | sparse.sparray) -> sparse.csr_matrix:
    """One for each pair of neighbours, and nothing for a cell and itself."""
    pairs = sparse.coo_matrix(graph)
    away = (pairs.row != pairs.col) & (pairs.data != 0)
    return sparse.csr_matrix((np.ones(int(away.sum())), (pairs.row[away], pairs.col[away])), shape=pairs.shape)


def _below(
    names: list[str], reason: str, figures: Array, threshold: float, details: list[str] | None = None
) -> Iterator[Finding]:
    for j in np.flatnonzero(figures < threshold):
        detail = "" if details is None else details[j]
        severity = min(1.0, (threshold - figures[j]) / threshold)
        yield Finding(names[j], reason, float(figures[j]), threshold, REMEDIES[reason], float(severity), detail)


def _share_with_unspliced(adata: AnnData, fit: Fit) -> Array:
    """Of the raw layer where it is there: smoothing gives a cell its neighbours' molecules."""
    name = keys.UNSPLICED if keys.UNSPLICED in adata.layers else fit.data.layers[1]
    return np.asarray((adata.layers[name] > 0).mean(0), dtype=np.float64).ravel()[fit.data.genes]


def _r2(observed: Array, fitted: Array) -> Array:
    """Of unspliced and spliced, (2, G)."""
    return np.stack([explained_variance(x, y) for x, y in zip(observed, fitted, strict=True)])


def _of_neighbours(fitted: Array, adata: AnnData) -> Array:
    """The mean over each cell's neighbours, without itself, (2, N, G); a cell without any keeps its own."""
    graph = _edges(adata.obsp["distances"])
    degree = np.asarray(graph.sum(1)).ravel()
    mean = [graph @ each / np.maximum(degree, 1)[:, None] for each in fitted]
    return np.where(degree[:, None] > 0, np.stack(mean), fitted)


def _kinetics(
    names: list[str], residuals: Array, r2: Array, adata: AnnData, fit: Fit, limits: Limits
) -> Iterator[Finding]:
    """Genes whose residuals are alike in neighbours, and large."""
    found = [_beyond_noise(each, adata, fit) for each in residuals]
    excess, z = np.stack([each.i for each in found]), np.stack([each.z for each in found])
    left = np.where(z > limits.significance, excess * (1 - r2), 0.0)
    for j in np.flatnonzero(left.max(0) > limits.structure):
        k = int(left[:, j].argmax())
        figure, detail = (
            float(left[k, j]),
            f"{MOLECULES[k]}, Moran's I {excess[k, j]:.2f} above noise, {z[k, j]:.0f} sds",
        )
        severity = min(1.0, (figure - limits.structure) / (1 - limits.structure))
        yield Finding(names[j], KINETICS, figure, limits.structure, REMEDIES[KINETICS], severity, detail)


def _beyond_noise(residuals: Array, adata: AnnData, fit: Fit) -> Moran:
    """Moran's I less that of noise, and how many sds this is."""
    graph: Any = adata.obsp["distances"]
    found = morans_i(residuals, graph)
    if fit.data.layers != (keys.MS, keys.MU) or "connectivities" not in adata.obsp or fit.data.cells.counts is not None:
        return Moran(found.i + 1 / (len(residuals) - 1), found.z)
    white = np.random.default_rng(0).standard_normal((len(residuals), NULL_DRAWS))
    null = morans_i(averaging_weights(adata.obsp["connectivities"]) @ white, graph).i
    return Moran(found.i - null.mean(), (found.i - null.mean()) / null.std(ddof=1))


def _replicates(names: list[str], check: PredictiveCheck, limits: Limits) -> Iterator[Finding]:
    """Genes whose most extreme statistic is far from its replicates; a heavy tail alone is not far."""
    z = np.where(check.p_value < 0.05, np.abs(check.z), 0.0)
    for j in np.flatnonzero(z.max(0) > limits.sds):
        k = int(z[:, j].argmax())
        figure, detail = float(z[k, j]), check.statistics[k].replace("_", " of ")
        severity = 1 - limits.sds / figure
        yield Finding(names[j], REPLICATES, figure, limits.sds, REMEDIES[REPLICATES], severity, detail)
