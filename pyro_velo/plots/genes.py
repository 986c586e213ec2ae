"""Which genes the model explains best."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError

from .canvas import INK, PALE, canvas, open_frame
from .lookup import FIT, Annotated, per_gene

LABELS = {
    keys.FIT_R2: "variance explained (R², the lower of unspliced and spliced)",
    keys.FIT_LIKELIHOOD: "density of a cell's scaled molecule under the fit (geometric mean over cells)",
}


def best_genes(adata: Annotated, n: int, *, by: str = keys.FIT_R2) -> list[str]:
    """The names of the `n` fitted genes with the highest `by` (a column of `var`), best first."""
    values = per_gene(adata, by)
    fitted = np.isfinite(values) & np.isfinite(per_gene(adata, keys.FIT_ALPHA))
    if not fitted.any():
        raise InputError(f"Expected fitted genes with a number in adata.var[{by!r}], found none. {FIT}")
    order = np.argsort(-np.where(fitted, values, -np.inf), kind="stable")
    return [str(name) for name in adata.var_names[order[: min(n, int(fitted.sum()))]]]


def gene_ranking(adata: Annotated, n: int = 20, *, by: str = keys.FIT_R2, ax: Axes | None = None) -> Axes:
    """Draws the `n` fitted genes with the highest `by` (a column of `var`), best on top.

    `fit_r2` is the lower of the two molecules' R2. `fit_likelihood` is exp(mean over cells of log p(u, s) / 2): the
    geometric mean density of a molecule on the scaled data. A density may exceed 1, and is highest for genes that most
    cells lack.

    Raises InputError if the column is missing or no gene was fitted.
    """
    genes = best_genes(adata, n, by=by)
    values = dict(zip(map(str, adata.var_names), per_gene(adata, by), strict=True))
    ax = canvas(ax, 4.5, 1.0 + 0.22 * len(genes))
    ax.hlines(range(len(genes)), 0, 1, transform=ax.get_yaxis_transform(), color=PALE, lw=0.6, zorder=0)
    ax.plot([values[gene] for gene in genes], range(len(genes)), "o", ms=5, color=INK)
    ax.set_yticks(range(len(genes)), genes, parse_math=False)
    ax.set_ylim(len(genes) - 0.4, -0.6)
    ax.set_xlabel(LABELS.get(by, by), fontsize=9)
    open_frame(ax)
    ax.tick_params(axis="y", length=0)
    return ax
