"""Permuted molecules: how much worse a gene is explained in a cell type once its molecules are exchanged there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_velo.batch import Batch, Cells
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions
from pyro_velo.posterior import CELLS_GENES_AT_ONCE, cells_of, check_draws, draw_rates
from pyro_velo.state_posterior import of_draw, state_weights
from pyro_velo.train import Fitted

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PermutationScore:
    r"""How much worse each gene is explained in each cell type once its molecules are permuted there.

    (types, genes) each: `observed` and `permuted`, the mean of $|u - \hat u| + |s - \hat s|$ in units of the gene's
    range; `t`, the mean of the cells' differences over its standard error; `nats`, the mean log-density that is lost. A
    type with a single cell holds NaN.
    """

    types: tuple[str, ...]
    observed: Array
    permuted: Array
    t: Array
    nats: Array

    @property
    def score(self) -> Array:
        """1 - observed / permuted: 0 where permuting changes nothing, 1 for a perfect fit; veloVI's is 1 less."""
        return 1 - np.divide(self.observed, self.permuted, out=np.ones_like(self.observed), where=~(self.permuted <= 0))


@torch.no_grad()
def permutation_score(
    fitted: Fitted, cells: Cells, labels: ArrayLike, *, folds: int = 0, draws: int = 10, seed: int = 0
) -> PermutationScore:
    r"""Permute each gene's u and s, each by itself, among the cells of a type: how much worse are they explained?

    $$\mathrm{score}_{cg} = 1 - \frac{\sum_{n \in c} |u - \hat u| + |s - \hat s|}
    {\sum_{n \in c} |u' - \hat u'| + |s' - \hat s'|}$$

    where $\hat u, \hat s$ are posterior means, the state taken from its posterior given the molecules. A gene that a
    type does not regulate has a score near 0 there: what it is said to do in these cells, it does not show.

    `folds=0` keeps each cell where the unpermuted genes put it: the molecules of gene g are permuted, and z is not.
    That is the limit of many genes, of which one hardly moves z. `folds=F` permutes F random sets of genes, one set
    after the other, and encodes the cells anew for each; F = genes permutes one gene at a time, which is exact, at F
    times the cost. veloVI permutes all genes at once (`folds=1`), so that z is lost with them.

    Counts keep the size factor of the cell they come from, and stay within their experimental batch. `labels` (cells,).
    Raises `InputError` for labels of other cells, and for folds below 0 or above the number of genes.

    Reference: Gayoso et al. 2023 (veloVI), methods, Permutation score; theirs is -observed / permuted.
    """
    check_draws(draws)
    names, codes = _strata(labels, cells)
    if not 0 <= folds <= cells.n_genes:
        raise InputError(f"Expected folds from 0 to the {cells.n_genes} genes; got {folds}. Use 0 to leave z alone.")
    with conditions(fitted, cells, seed):
        # The sets of genes come last, so that the number of folds changes nothing else.
        permuted, rates = _permuted(cells, codes), draw_rates(fitted, cells, draws)
        sets = torch.randperm(cells.n_genes).tensor_split(folds) if folds else ()
        sums = torch.zeros(6, len(names), cells.n_genes, dtype=torch.float64)
        for index in torch.arange(len(cells)).split(max(1, CELLS_GENES_AT_ONCE // cells.n_genes)):
            place = index.to(cells.molecules.device)
            plain, other = _Errors(fitted, rates, cells, place, seed), _moved(cells.batch(place), permuted, place)
            before = plain.of(cells.batch(place), cells.batch(place))
            after = plain.of(cells.batch(place), other) if not sets else torch.empty_like(before)
            for genes in sets:
                seen = _mixed(cells.batch(place), other, genes.to(place.device))
                after[..., genes] = plain.of(seen, other)[..., genes]
            worse = after[0] - before[0]
            each = torch.stack((torch.ones_like(worse), before[0], after[0], worse, worse**2, before[1] - after[1]))
            member = torch.nn.functional.one_hot(codes.types[index], len(names)).double()
            sums += torch.einsum("nc,kng->kcg", member, each.double().cpu())
    return _scores(names, *sums.numpy())


def _scores(
    names: tuple[str, ...], n: Array, before: Array, after: Array, worse: Array, squares: Array, nats: Array
) -> PermutationScore:
    """From sums over the cells of each type, (types, genes)."""
    n = np.where(n > 1, n, np.nan)
    variance = np.clip(squares - worse**2 / n, 0, None) / (n - 1)
    t = np.divide(worse / n, np.sqrt(variance / n), out=np.zeros_like(n), where=~(variance <= 0))
    return PermutationScore(names, before / n, after / n, t, nats / n)


class _Strata(NamedTuple):
    """The number of each cell's type, and that of the cells it is exchanged with: type and batch; (N,)."""

    types: Tensor
    within: Tensor


def _strata(labels: ArrayLike, cells: Cells) -> tuple[tuple[str, ...], _Strata]:
    """The types' names, and the strata."""
    labels = np.asarray(labels)
    if labels.shape != (len(cells),):
        raise InputError(
            f"Expected one label for each of the {len(cells)} cells; got shape {labels.shape}. Take them from obs."
        )
    names, codes = np.unique(labels.astype(str), return_inverse=True)
    types = torch.from_numpy(codes.astype(np.int64))
    within = types if cells.group is None else types * cells.n_groups + cells.group.cpu()
    return tuple(map(str, names)), _Strata(types, within)


def _permuted(cells: Cells, strata: _Strata) -> Cells:
    """The cells with both molecules of every gene permuted within strata, counts with their size factors."""
    molecules = cells.molecules.clone()
    sizes = None if cells.counts is None else cells.counts.size_factors.expand_as(molecules).clone()
    for number in strata.within.unique():
        rows = (strata.within == number).nonzero()[:, 0].to(molecules.device)
        places = torch.rand(2, len(rows), cells.n_genes, device=molecules.device).argsort(1)
        for values in (molecules, sizes):
            if values is not None:
                values[:, rows] = values[:, rows].gather(1, places)
    counts = None if cells.counts is None or sizes is None else replace(cells.counts, size_factors=sizes)
    return replace(cells, molecules=molecules, counts=counts)


def _moved(batch: Batch, permuted: Cells, index: Tensor) -> Batch:
    """The batch with the permuted molecules, all else as it is."""
    other = permuted.batch(index)
    return replace(batch, molecules=other.molecules, size_factors=other.size_factors)


def _mixed(batch: Batch, other: Batch, genes: Tensor) -> Batch:
    """The batch with the molecules of `genes` taken from the other."""
    molecules, sizes = batch.molecules.clone(), batch.size_factors
    molecules[..., genes] = other.molecules[..., genes]
    if sizes is not None and other.size_factors is not None:
        sizes = sizes.expand_as(molecules).clone()
        sizes[..., genes] = other.size_factors[..., genes]
    return replace(batch, molecules=molecules, size_factors=sizes)


class _Errors:
    """Error and log-density of molecules, where an encoder has seen these or others; the same noise each time."""

    def __init__(
        self, fitted: Fitted, rates: Sequence[dict[str, Tensor]], cells: Cells, index: Tensor, seed: int
    ) -> None:
        self.fitted, self.rates, self.seed = fitted, rates, seed + int(index[0])
        self.unit: Tensor | float = 1.0 if cells.counts is None else cells.counts.unit

    def of(self, seen: Batch, batch: Batch) -> Tensor:
        """Absolute error of the posterior mean, and mean log-density, (2, B, G)."""
        torch.manual_seed(self.seed)
        program: Any = self.fitted.program
        draw: Callable[..., dict[str, Tensor]] = cells_of(self.fitted.guide, seen, batch)
        mean, log_density = torch.zeros_like(batch.molecules), torch.zeros_like(batch.u)
        for shared in self.rates:
            values = draw(shared)
            explained = program.explain(values, batch, of_draw(program, values))
            weights, explained_density = state_weights(program, explained.log_joint)
            log_density += explained_density / len(self.rates)
            for weight, u, s in zip(weights, explained.u, explained.s, strict=True):
                both = program.likelihoods(u, s, values, batch, 1.0)
                mean += weight * torch.stack([each.mean.expand_as(weight) for each in both]) / len(self.rates)
        sizes = 1.0 if batch.size_factors is None else batch.size_factors
        return torch.stack((((batch.molecules - mean) / sizes / self.unit).abs().sum(0), log_density))
