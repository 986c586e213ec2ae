"""What came of an audit of direction: each edge between clusters, each gene, their tables and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_velo.contributions import Array
from pyro_velo.data.checks import check_known
from pyro_velo.errors import InputError
from pyro_velo.plots import audit as pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN = 0.3
"""A gene is reversed where its agreement with the flow of the others is below minus this.

In simulations of 200 cells: of genes whose velocity is smooth but random it calls 3 in 100, 0.1 would call 13; genes
that a fit runs backwards have -0.65 or less."""
MAJORITY = 2 / 3
"""The share that must agree, of the genes that take a side, before any is called reversed: else there is no flow."""
LISTED = 6
"""How many genes a row of the table names."""
Interval = tuple[float, float]


@dataclass(frozen=True)
class EdgeAudit:
    """One edge A>B in `draws` draws, on G genes; what is of a gene is (G,).

    `cbdir` (draws,), in [-1, 1]. `p_direction`: the share of draws in which A>B goes better than B>A. `contribution`
    of each gene, which sum to CBDir: mean, 5 % and 95 % quantile over draws; `p_negative`: the share of draws in which
    it is negative. `influence`: the mean of CBDir less CBDir without that gene. `opposing`: the genes that are negative
    with a probability of 0.95 and on average, the worst first. `responsible`: of an edge that runs backwards more
    likely than not, the first of these without which the mean velocity runs forwards, or all of them where that is not
    enough. `without` (draws,): CBDir without those that are responsible, lengths taken on the genes that are left.
    `without_reversed`: that of the mean velocity without the genes that the audit calls reversed.
    """

    source: str
    target: str
    n_cells: int
    cbdir: Array
    p_direction: float
    contribution: Array
    contribution_q05: Array
    contribution_q95: Array
    p_negative: Array
    influence: Array
    opposing: tuple[str, ...]
    responsible: tuple[str, ...]
    without: Array
    without_reversed: float

    @property
    def name(self) -> str:
        """As in `score`: A>B."""
        return f"{self.source}>{self.target}"

    @property
    def mean(self) -> float:
        """Mean CBDir over draws."""
        return float(self.cbdir.mean())

    @property
    def interval(self) -> Interval:
        """The 5 % and 95 % quantile of CBDir over draws."""
        return _interval(self.cbdir)

    @property
    def p_backward(self) -> float:
        """The share of draws in which CBDir is negative."""
        return float((self.cbdir < 0).mean())


@dataclass(frozen=True)
class Audit:
    """What came of an audit; `print` shows its tables.

    Of each of the G fitted genes, (G,): `agreement` in [-1, 1] of its velocity with its change along the flow of the
    other genes (see `contributions.Agreement`), mean, 5 % and 95 % quantile over draws, each of which weighs the cells
    anew; `p_reversed`, the share of draws in which it is below -`MARGIN`; `reversed`, those that are called at `fdr`.
    `consensus`: of the genes whose mean agreement is beyond `MARGIN` or -`MARGIN`, the share that agree; below
    `MAJORITY`, as on cells that stand still, there is no flow to judge by, and none is called. `found` says that the
    edges were found in the graph and not given.

    A draw of a mean-field posterior varies little, and a wrong direction is often a mode that no draw leaves: a
    probability of 0 or 1 is that of the posterior as it was fitted. Genes are judged by the others, so a flow that most
    genes have backwards calls the right ones reversed; only known edges tell: one that stays backwards without the
    reversed genes is so by the majority. The false discoveries counted are those of an uncertain agreement; where many
    genes have no direction at all, some are called that agree or not by chance, and they are more than `fdr`.
    """

    edges: tuple[EdgeAudit, ...]
    genes: tuple[str, ...]
    agreement: Array
    agreement_q05: Array
    agreement_q95: Array
    p_reversed: Array
    reversed: NDArray[np.bool_]
    consensus: float
    fdr: float
    found: bool

    @property
    def reversed_genes(self) -> tuple[str, ...]:
        """The genes that are called reversed, the surest first."""
        order = np.lexsort((self.agreement, -self.p_reversed))
        return tuple(self.genes[g] for g in order if self.reversed[g])

    @property
    def expected_fdr(self) -> float:
        """The posterior expected share of false ones among the genes called, 0 where none is."""
        return float((1 - self.p_reversed[self.reversed]).mean()) if self.reversed.any() else 0.0

    def by_gene(self) -> pd.DataFrame:
        """A row a gene: its agreement, p_reversed and reversed, and its contribution to every edge under its name."""
        columns = ("agreement", "agreement_q05", "agreement_q95", "p_reversed", "reversed")
        told: dict[str, Any] = {name: getattr(self, name) for name in columns}
        told |= {edge.name: edge.contribution for edge in self.edges}
        return pd.DataFrame(told, index=pd.Index(self.genes, name="gene"))

    def table(self) -> str:
        """Both tables, of edges and of reversed genes, in Markdown."""
        kind = "Candidate edges of the neighbour graph, each as the posterior prefers it" if self.found else "Edges"
        lines = [f"{kind}, with 90 % intervals over draws:", "", *_marked(_of_edges(self.edges)), ""]
        called = self.reversed_genes
        if not self.consensus >= MAJORITY:
            told = "No gene is called reversed: too few agree with the flow of the others for it to be one"
            return "\n".join([*lines, f"{told} (consensus {self.consensus:.2f}, at least {MAJORITY:.2f})."])
        told = (
            f"{len(called)} of {len(self.genes)} genes run against the flow of the others (agreement below -{MARGIN})"
        )
        if not called:
            return "\n".join([*lines, f"{told}."])
        chance = f"posterior expected share of false ones {self.expected_fdr:.3f}, at most {self.fdr:g}"
        return "\n".join([*lines, f"{told}; {chance}:", "", *_marked(_of_genes(self, called))])

    __str__ = table

    def plot(
        self, edge: str | None = None, *, n_genes: int = 12, axes: tuple[Axes, Axes] | None = None
    ) -> tuple[Axes, Axes]:
        """Draw CBDir of every edge, and beside it the `n_genes` that carry or oppose one of them the most.

        By default that is the edge that most likely runs backwards. Raises `InputError` for an unknown one, or where
        there are none.
        """
        known = {each.name: each for each in self.edges}
        if not known:
            raise InputError("Expected an edge to draw; got none. Pass edges, or a lower `connected`.")
        if edge is None:
            edge = max(known, key=lambda name: (known[name].p_backward, -known[name].mean))
        check_known(edge, known, "Edge")
        shown, left, right = known[edge], *(axes or pictures.axes_for(len(known), n_genes))
        pictures.edge_directions(
            {name: (each.mean, *each.interval, each.p_backward) for name, each in known.items()}, shown=edge, ax=left
        )
        largest = np.argsort(-np.abs(shown.contribution), kind="stable")[:n_genes]
        ranked = largest[np.argsort(shown.contribution[largest], kind="stable")]
        bars = (shown.contribution, shown.contribution_q05, shown.contribution_q95)
        pictures.gene_contributions(
            {self.genes[g]: (bars[0][g], bars[1][g], bars[2][g]) for g in ranked},
            marked=self.reversed_genes, edge=edge, ax=right,
        )  # fmt: skip
        return left, right


def _of_edges(edges: Sequence[EdgeAudit]) -> list[list[str]]:
    head = [
        "edge",
        "cells",
        "CBDir",
        "P(backward)",
        "P(A>B over B>A)",
        "genes responsible",
        "without them",
        "without reversed",
    ]
    return [head] + [
        [
            each.name,
            str(each.n_cells),
            _with_interval(each.mean, each.interval),
            f"{each.p_backward:.2f}",
            f"{each.p_direction:.2f}",
            _some(each.responsible),
            _with_interval(float(each.without.mean()), _interval(each.without)) if each.responsible else "-",
            f"{each.without_reversed:.3f}",
        ]
        for each in edges
    ]


def _of_genes(found: Audit, called: Sequence[str]) -> list[list[str]]:
    numbers = [found.genes.index(name) for name in called]
    return [["gene", "agreement", "P(reversed)"]] + [
        [
            found.genes[g],
            _with_interval(found.agreement[g], (found.agreement_q05[g], found.agreement_q95[g])),
            f"{found.p_reversed[g]:.2f}",
        ]
        for g in numbers
    ]


def _marked(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a table in Markdown, the first its head."""
    head, *body = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


def _interval(draws: Array) -> Interval:
    low, high = np.quantile(draws, (0.05, 0.95))
    return float(low), float(high)


def _with_interval(mean: float, interval: Interval) -> str:
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}" if names else "-"
