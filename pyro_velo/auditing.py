"""Audit the direction of a fit: which edges between clusters run backwards, and which genes make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_velo import embedding
from pyro_velo.api import kept_fit
from pyro_velo.audits import MAJORITY, MARGIN, Audit, EdgeAudit
from pyro_velo.contributions import (
    Agreement,
    Array,
    Boundary,
    Contributions,
    Influences,
    Way,
    bootstrap,
    boundary,
    connectivity,
    consensus,
    contributions,
    discoveries,
    enough,
    flow_without_each,
    surely_negative,
)
from pyro_velo.data.bridge import check_same
from pyro_velo.data.checks import check_key, check_known, checked_labels
from pyro_velo.errors import InputError
from pyro_velo.fitting import Fit
from pyro_velo.options import FitOptions
from pyro_velo.posterior import OF_DIRECTIONS, check_draws

if TYPE_CHECKING:
    from anndata import AnnData

SURE = 0.95
"""The probability from which a gene is said to oppose an edge."""
FDR, CONNECTED = 0.05, 0.05


def audit(
    fit: Fit,
    adata: AnnData,
    clusters: str,
    edges: Sequence[tuple[str, str]] | None = None,
    *,
    draws: int = 100,
    fdr: float = FDR,
    connected: float = CONNECTED,
) -> Audit:
    r"""Which edges between the clusters in `obs[clusters]` the posterior runs backwards, and which genes are reversed.

    An edge is scored by CBDir in the space of the fitted layer, each gene in units of its range, as in `score`. Without
    `edges`, the pairs of clusters whose PAGA connectivity is `connected` or more are taken, each in the direction in
    which $\mathrm{CBDir}(A \to B) - \mathrm{CBDir}(B \to A)$ is positive in most draws.

    Genes are called reversed where $P(r_g < -0.3)$ is so high that the posterior expected share of false ones among
    them is `fdr` at most; $r_g$ is that of `contributions.Agreement`, along the flow of the posterior mean. Nothing is
    written.

    The draws are streamed twice; what is kept is a cells x genes array, and draws x genes for each direction of an
    edge.

    Raises `InputError` for other cells or genes than were fitted, a missing neighbour graph, an unknown cluster, an
    edge whose clusters do not border on each other, and settings out of range.

    References: Qiao & Huang 2021 (CBDir); Wolf et al. 2019 (PAGA); Newton et al. 2004 (false discoveries).
    """
    check_draws(draws)
    _check_share("fdr", fdr)
    _check_share("connected", connected)
    check_same(adata, fit.data)
    labels = checked_labels(adata, clusters)
    check_key(adata, "obsp", "distances")
    graph = adata.obsp["distances"]
    per_unit, x = _units_of_range(fit, adata)
    pairs = _candidates(graph, labels, connected) if edges is None else _checked(edges, labels, clusters)
    ways = dict.fromkeys(way for a, b in pairs for way in ((a, b), (b, a)))
    borders = {way: boundary(x, graph, labels, *way) for way in ways}
    if edges is None:
        pairs = [(a, b) for a, b in pairs if len(borders[a, b].cells) and len(borders[b, a].cells)]
    _check_borders(pairs, borders)

    first = Contributions(borders, per_unit, draws, x.shape)
    fit.velocities(first, draws=draws, over_states=OF_DIRECTIONS)
    _check_finite(first.mean, fit.data.gene_names)
    named = dict(_named(first, pair, turn=edges is None) for pair in pairs)

    weights = bootstrap(draws, graph, fit.fitted.training.settings.seed)
    agreement = Agreement(flow_without_each(first.mean, x, graph), weights)
    kept = {way: ~np.isin(np.arange(x.shape[1]), each.responsible) for way, each in named.items()}
    second = Influences({way: borders[way] for way in named}, kept, per_unit, draws, agreement)
    fit.velocities(second, draws=draws, over_states=OF_DIRECTIONS)

    names, score = tuple(fit.data.gene_names), agreement.score()
    p_reversed, agreed = (score < -MARGIN).mean(axis=0), consensus(score.mean(axis=0), MARGIN)
    called = discoveries(p_reversed, fdr) & (agreed >= MAJORITY)
    told = tuple(_told(way, each, names, first, second, called) for way, each in named.items())
    return Audit(told, names, *_summary(score), p_reversed, called, agreed, fdr=fdr, found=edges is None)


def audit_file(
    folder: Path, path: Path, clusters: str, edges: Sequence[tuple[str, str]] | None, options: FitOptions
) -> Audit:
    """Audit the fit that `pyro-velo fit --save` left in `folder`, on the AnnData that it wrote to `path`.

    That one has the layers, the genes and the neighbour graph of the fit; `options` name its parts, and the draws.
    Raises `InputError` as `audit` and `fitting.load`.
    """
    fit, adata = kept_fit(folder, path, options)
    return audit(fit, adata, clusters, edges, draws=options.draws)


class _Named(NamedTuple):
    """What the first look at the draws says of a way; both are numbers of genes, the worst first."""

    p_direction: float
    opposing: NDArray[np.int64]
    responsible: NDArray[np.int64]


def _units_of_range(fit: Fit, adata: AnnData) -> tuple[Array, Array]:
    """What turns a velocity into units of each fitted gene's range, (1, G), and the expression in them, (cells, G)."""
    layer, genes = fit.data.layers[0], fit.data.genes
    check_key(adata, "layers", layer)
    measured = adata.layers[layer][:, genes]
    dense = measured.toarray() if hasattr(measured, "toarray") else measured
    return embedding.in_units_of_range(np.ones((1, dense.shape[1])), dense)


def _checked(edges: Sequence[Way], labels: NDArray, clusters: str) -> list[Way]:
    """The edges as given, each once, of two clusters that exist."""
    known = sorted(set(labels))
    pairs: list[Way] = list(dict.fromkeys((str(a), str(b)) for a, b in edges))
    for a, b in pairs:
        for name in (a, b):
            check_known(name, known, f"obs[{clusters!r}]")
        if a == b:
            raise InputError(f"Expected an edge between two clusters; got {a}>{b}. Name two different ones.")
    if not pairs:
        raise InputError("Expected one edge or more; got none. Leave `edges` out to take them from the graph.")
    return pairs


def _candidates(graph: Any, labels: NDArray, connected: float) -> list[Way]:
    """Every pair of clusters that are connected enough, in the order of their names."""
    names, share = connectivity(graph, labels)
    return [(names[a], names[b]) for a, b in zip(*np.nonzero(np.triu(share) >= connected), strict=True)]


def _check_borders(pairs: Sequence[Way], borders: dict[Way, Boundary]) -> None:
    for a, b in pairs:
        if not len(borders[a, b].cells):
            raise InputError(
                f"Expected cells of {a!r} that border on {b!r}; got none among the neighbours. Leave out {a}>{b}, or "
                "make the graph with more neighbours."
            )


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"Expected {name} between 0 and 1; got {value}. The default is 0.05.")


def _check_finite(velocity: Array, names: Sequence[str]) -> None:
    lost = ~np.isfinite(velocity).all(axis=0)
    if lost.any():
        raise InputError(
            f"Expected finite velocities in units of each gene's range; got others for {names[int(lost.argmax())]!r}. "
            "Take the AnnData that was fitted, and look at that gene."
        )


def _named(first: Contributions, way: Way, turn: bool) -> tuple[Way, _Named]:
    """A way, turned if wanted where the posterior prefers the other, and the genes that oppose it.

    The other way counts 0 where it has no boundary, and a draw in which both are equal one half.
    """
    ahead, behind = (first.found[each].sum(axis=1) for each in (way, way[::-1]))
    share = float((1 + np.sign(ahead - behind)).mean() / 2)
    if turn and share < 0.5:
        way, share = way[::-1], 1 - share
    opposing = surely_negative(first.found[way], SURE)
    backward = (first.found[way].sum(axis=1) < 0).mean() > 0.5
    border = first.borders[way]
    count = enough(first.mean[border.cells], border, opposing) if backward else 0
    return way, _Named(share, opposing, opposing[:count])


def _told(
    way: Way, named: _Named, names: Sequence[str], first: Contributions, second: Influences, called: NDArray[np.bool_]
) -> EdgeAudit:
    """All that both looks say of an edge."""
    border, found = first.borders[way], first.found[way]
    mean, low, high = _summary(found)
    return EdgeAudit(
        *way,
        n_cells=len(border.cells),
        cbdir=found.sum(axis=1),
        p_direction=named.p_direction,
        contribution=mean,
        contribution_q05=low,
        contribution_q95=high,
        p_negative=(found < 0).mean(axis=0),
        influence=mean.sum() - second.left_out[way],
        opposing=tuple(names[g] for g in named.opposing),
        responsible=tuple(names[g] for g in named.responsible),
        without=second.without[way],
        without_reversed=float(contributions(first.mean[border.cells][:, ~called], border.toward(~called)).sum()),
    )


def _summary(draws: Array) -> tuple[Array, Array, Array]:
    """Mean, 5 % and 95 % quantile over the leading axis."""
    low, high = np.quantile(draws, (0.05, 0.95), axis=0)
    return draws.mean(axis=0), low, high
