"""The fitted curve of one gene in the plane of spliced and unspliced RNA, and its credible band, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.kinetics import T_MAX, Rates, trajectory

from .intervals import lognormal
from .lookup import Annotated, gene_position, per_gene

Array = NDArray[np.float64]
DRAWS = 400
RELAXED = 20 * T_MAX
"""By then repression has all but reached the origin, also where it had not at time 20."""


@dataclass(frozen=True)
class GeneFit:
    """Posterior means and sds of (alpha, beta, gamma, t_s), each (4,), and where the layers (s, u) start, (2,)."""

    mean: Array
    sd: Array
    offset: Array

    @property
    def median(self) -> Array:
        """Medians of LogNormals with these means and sds, (4,), whose products have no unit of time; t_s in [0, 20]."""
        median = np.exp(lognormal(self.mean, self.sd)[0])
        return np.append(median[:3], np.clip(median[3], 0, T_MAX))

    @property
    def of_shape(self) -> Array:
        """Sds of the logarithms (4,) without that of the unit of time, which all share and no curve shows.

        The rate that is known best is taken for it.
        """
        sigma = lognormal(self.mean, self.sd)[1]
        return np.sqrt((sigma**2 - sigma[:3].min() ** 2).clip(0))


def gene_fit(adata: Annotated, gene: str) -> GeneFit:
    """What was fitted for one gene; an InputError if it was not."""
    position = gene_position(adata, gene)

    def take(names: tuple[str, ...]) -> Array:
        return np.array([per_gene(adata, name)[position] for name in names])

    fit = GeneFit(take(keys.RATES), take(keys.RATES_SD), take((keys.FIT_S0, keys.FIT_U0)))
    if not (np.isfinite(fit.mean).all() and (fit.mean > 0).all()):
        found = ", ".join(f"{name} {value:g}" for name, value in zip(keys.RATES, fit.mean, strict=True))
        raise InputError(
            f"Expected positive fitted rates for gene {gene!r}, found {found}. "
            "Genes without dynamics are not fitted: choose one with adata.var['velocity_genes']."
        )
    return fit


def phase_times(switch: Array, n: int, end: float = T_MAX) -> Array:
    """Times of the two branches, (..., 2, n): 0 to the switch, the switch to `end`; denser where the curve is fast."""
    share = np.linspace(0, 1, n) ** 2
    switch = np.asarray(switch)[..., None]
    return np.stack([switch * share, switch + (end - switch) * share], axis=-2)


def branches(parameters: Array, n: int = 100, end: float = T_MAX) -> Array:
    """Induction and repression as (..., 2, n, 2), the last axis (s, u) above the offset; parameters (..., 4)."""
    t = phase_times(parameters[..., 3], n, end)
    rates = Rates(*(torch.as_tensor(parameters[..., i, None, None]) for i in range(4)))
    u, s = trajectory(rates, torch.as_tensor(t))
    return np.stack([s.numpy(), u.numpy()], axis=-1)


def fitted_curve(fit: GeneFit, n: int = 200) -> Array:
    """The curve at the posterior median rates in the units of Ms and Mu: (2 branches, n, (s, u))."""
    return branches(fit.median, n) + fit.offset


def steady_state(fit: GeneFit) -> Array:
    """Where induction leads to in the end, (s, u) = (alpha/gamma, alpha/beta), at the posterior median rates.

    Cells whose gene is in the state "induction, steady" stand there, which may be far from where the curve turns.
    """
    alpha, beta, gamma, _ = fit.median
    return np.array([alpha / gamma, alpha / beta]) + fit.offset


def inside_probability(fit: GeneFit, s: Array, u: Array, seed: int = 0) -> Array:
    """Share of drawn curves that enclose each point of the grid s (S,) x u (U,), in units of Ms and Mu; returns (U, S).

    Rates are drawn independently from LogNormals around the posterior's medians, with the sds `of_shape`. Induction and
    repression bound a region of the plane: a point lies in it if it is below the one, u <= u_ind(s), and left of the
    other, s <= s_rep(u).
    Where the share is between .05 and .95, the curve passes with 90 % probability: this band needs no choice of a
    direction, and its two branches join at the switch. NaN beyond the end of the fitted curve at time 20, and below the
    offset, where no curve goes.
    """
    draws = np.exp(np.log(fit.median) + fit.of_shape * np.random.default_rng(seed).standard_normal((DRAWS, 4)))
    draws[:, 3] = draws[:, 3].clip(0, T_MAX)
    s, u = s - fit.offset[0], u - fit.offset[1]
    inside = np.zeros((len(u), len(s)))
    for induced, repressed in branches(draws, end=RELAXED):
        below = u[:, None] <= np.interp(s, *induced.T)
        left = s <= np.interp(u, *repressed[::-1, ::-1].T)[:, None]
        inside += below & left
    s_end, u_end = branches(fit.median)[1, -1]
    beyond = (u[:, None] < u_end) & (u[:, None] * s_end < s * u_end)
    beyond |= (u[:, None] < 0) | (s < 0)
    return np.where(beyond, np.nan, inside / DRAWS)
