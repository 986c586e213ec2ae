r"""Statistics of replicated data: which of a gene's mean, variance, covariance and zeros a fit does not reproduce.

A replicate takes a draw of the rates, and of each cell's z and $\pi$ from the guide, the state from its posterior given
these and the molecules, and new molecules from the likelihood: all that is unknown is drawn, and the measurement alone
is repeated. Everything is streamed over batches of cells; draws x cells x genes are never held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_velo.batch import Batch, Cells, equal_parts
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions
from pyro_velo.models.velocity import C_K, MOLECULES, VelocityProgram
from pyro_velo.posterior import CELLS_GENES_AT_ONCE, cells_of, check_draws, draw_rates
from pyro_velo.state_posterior import of_draw, over, state_weights
from pyro_velo.train import Fitted

Array = NDArray[np.float64]
COVARIANCE = "covariance"
STATISTICS = (*(f"{kind}_{molecule}" for kind in ("mean", "variance") for molecule in MOLECULES), COVARIANCE)
ZEROS = tuple(f"zeros_{molecule}" for molecule in MOLECULES)


@dataclass(frozen=True)
class PredictiveCheck:
    r"""Statistics of each gene over cells, in the units that the likelihood sees: of the data, and of replicated data.

    Shapes: (statistics, genes) each. `mean`, `sd`, `low` and `high` (5 and 95 %) are of the replicates, `p_value` is
    $2 \min(\Pr(T^{rep} \ge T), \Pr(T^{rep} \le T))$, where the data count as one replicate more, so that it is at least
    2 / (draws + 1). `skipped` are statistics that are not taken: a scaled layer is zero where its scale begins.

    Such p-values are conservative: where the model is right they crowd around 1 (Gelman, Meng and Stern 1996; Robins et
    al. 2000), because the replicates have seen the data. A small one says that the model is wrong; a large one little.
    """

    statistics: tuple[str, ...]
    observed: Array
    mean: Array
    sd: Array
    low: Array
    high: Array
    p_value: Array
    draws: int
    skipped: tuple[str, ...] = ()

    @property
    def z(self) -> Array:
        """How many sds of the replicates the data are from their mean; it goes on where the p-value has its floor."""
        gap = self.observed - self.mean
        return np.divide(gap, self.sd, out=np.where(gap == 0, 0.0, np.inf * np.sign(gap)), where=self.sd > 0)

    def of(self, statistic: str) -> int:
        """The row of a statistic; raises `InputError` for one that was not taken."""
        if statistic not in self.statistics:
            raise InputError(
                f"Expected one of the statistics {', '.join(self.statistics)}; got {statistic!r}. Choose one of these."
            )
        return self.statistics.index(statistic)

    def table(self, gene_names: Sequence[str]) -> pd.DataFrame:
        """One row a gene and statistic, the most extreme first."""
        columns = {name: getattr(self, name).ravel() for name in ("observed", "mean", "low", "high", "p_value", "z")}
        rows = {"gene": np.tile(gene_names, len(self.statistics))}
        rows |= {"statistic": np.repeat(self.statistics, len(gene_names))}
        found = pd.DataFrame(rows | columns)
        return found.iloc[np.argsort(-found["z"].abs().to_numpy(), kind="stable")].reset_index(drop=True)


@torch.no_grad()
def predictive_check(
    fitted: Fitted, cells: Cells, *, draws: int = 200, seed: int = 0, against: Cells | None = None
) -> PredictiveCheck:
    r"""Compare each gene's mean, variance, covariance of unspliced with spliced, and share of zeros with replicates'.

    $$T(x) \quad\text{with}\quad T(x^{rep}_r), \qquad x^{rep}_r \sim p(x \mid \theta_r, z_r, k_r),\
    (\theta, z, k)_r \sim q(\theta)\, q(z \mid x)\, p(k \mid x, z, \theta)$$

    `against`: other molecules of the same cells, such as a technical replicate, to be compared in place of `cells`;
    then the p-values are uniform where the model is right, because the data have not been seen. Shares of zeros are
    taken of counts alone (see `skipped`). Memory: 56 bytes a draw and gene.

    Raises `InputError` for fewer than two draws, and for `against` of other cells or genes.

    References: Rubin 1984; Gelman, Meng and Stern 1996, eq. 2 and 6.
    """
    check_draws(draws)
    compared = cells if against is None else against
    if compared.molecules.shape != cells.molecules.shape:
        raise InputError(
            f"Expected molecules of the same cells and genes, {tuple(cells.molecules.shape)}; got "
            f"{tuple(compared.molecules.shape)}. Take both from one AnnData."
        )
    centre = compared.molecules.mean(1, keepdim=True, dtype=torch.float64)
    sums = torch.zeros(draws, len(STATISTICS) + len(ZEROS), cells.n_genes, dtype=torch.float64, device=centre.device)
    with conditions(fitted, cells, seed):
        rates = draw_rates(fitted, cells, draws)
        for batch, new, values in _drawn(fitted, cells, rates):
            for total, each in zip(sums, values, strict=True):
                total += _sums(_replicate(fitted.program, each, batch)[:, :new], centre)
    keep = len(STATISTICS) + (0 if cells.counts is None else len(ZEROS))
    observed = _statistics(_sums(compared.molecules, centre), centre, len(cells))[:keep]
    replicated = _statistics(sums.movedim(1, 0), centre, len(cells))[:keep]
    names = (*STATISTICS, *ZEROS)
    return _compared(names[:keep], observed, replicated, names[keep:])


def _compared(names: tuple[str, ...], observed: Array, replicated: Array, skipped: tuple[str, ...]) -> PredictiveCheck:
    """From the statistics of the data (statistics, G), and of the replicates (statistics, draws, G)."""
    draws = replicated.shape[1]
    above, below = ((each.sum(1) + 1) / (draws + 1) for each in _sides(observed[:, None], replicated))
    low, high = np.quantile(replicated, (0.05, 0.95), axis=1)
    p_value = np.minimum(1.0, 2 * np.minimum(above, below))
    mean, sd = replicated.mean(1), replicated.std(1, ddof=1)
    return PredictiveCheck(names, observed, mean, sd, low, high, p_value, draws, skipped)


def _sides(observed: Array, replicated: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Replicates that are as high, and as low, as the data; equal ones, but for rounding, are both."""
    near = 1e-9 * np.maximum(np.abs(observed), np.abs(replicated))
    return replicated >= observed - near, replicated <= observed + near


def _sums(x: Tensor, centre: Tensor) -> Tensor:
    """Sums over cells of u, s, u^2, s^2, u s, about `centre`, and the numbers of zeros: (2, B, G) to (7, G)."""
    away = x - centre
    return torch.cat((away.sum(1), away.square().sum(1), away.prod(0).sum(0, keepdim=True), (x == 0).sum(1)))


def _statistics(sums: Tensor, centre: Tensor, n: int) -> Array:
    """The `STATISTICS` and `ZEROS` of such sums, (7, ..., G)."""
    first, second, mixed, zeros = sums[:2], sums[2:4], sums[4:5], sums[5:]
    mean = first / n
    spread = (torch.cat((second, mixed)) - n * torch.cat((mean.square(), mean.prod(0, keepdim=True)))) / (n - 1)
    # The centre stands for cells (2, 1, G), and has to broadcast over draws or over nothing.
    mean = mean + centre.view(2, *(1,) * (sums.ndim - 2), -1)
    return torch.cat((mean, spread, zeros / n)).cpu().numpy()


def _drawn(
    fitted: Fitted, cells: Cells, rates: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[Batch, int, Iterator[dict[str, Tensor]]]]:
    """Each batch, how many of its cells are new, and the values of every site in each draw."""
    for index, new in equal_parts(len(cells), max(1, CELLS_GENES_AT_ONCE // cells.n_genes)):
        batch = cells.batch(index.to(cells.molecules.device))
        yield batch, new, map(cells_of(fitted.guide, batch, batch), rates)


def _replicate(program: VelocityProgram, values: dict[str, Tensor], batch: Batch) -> Tensor:
    """New molecules (2, B, G) of the same cells, each gene in a state of its posterior."""
    explained = program.explain(values, batch, of_draw(program, values))
    probability = state_weights(program, explained.log_joint)[0]
    passed = torch.stack(probability).cumsum(0) < torch.rand_like(probability[0])
    # Rounding may leave the last sum below 1.
    state = passed[:-1].sum(0)
    chosen = [(state == k).to(probability[0].dtype) for k in range(len(C_K))]
    u, s = over(chosen, explained.u), over(chosen, explained.s)
    return torch.stack([each.sample() for each in program.likelihoods(u, s, values, batch, over(chosen, C_K))])
