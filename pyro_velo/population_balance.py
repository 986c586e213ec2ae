r"""Transitions that bring into a state the cells that pass through it.

A velocity says where a cell goes, not how many cells go each way at a fork; how many there are of each does. In a
steady population the cells that enter a state in a unit of time are those that leave it. A cell that stands for $w_i$
cells and crosses its neighbourhood with speed $|v_i|$ lets

$$m_i = w_i \frac{|v_i|}{d_i}, \qquad d_i^2 = \frac{\sum_j w_j (\hat v_i \cdot \delta_{ij})^2}{\sum_j w_j}$$

steps of a walk through in a unit of time. Of all chains whose flow out of i is $m_i$, and into j about $m_j$, the one
nearest to the velocities' in relative entropy is $P_{ij} \propto T_{ij} c_j$ with

$$c_j = (m_j / p_j)^\lambda, \qquad p_j = \sum_i m_i T_{ij} / (T c)_i,$$

found by scaling. With $\lambda < 1$ the flow into j is $m_j c_j^{1 - 1/\lambda}$: cells may be born, or come from
states that were not sampled, at a price.

This takes cells as sampled in proportion to their number, without growth or death that differs between the ways.

References: Weinreb et al. 2018, PNAS (population balance); Chizat et al. 2018 (scaling where flows are bounded softly);
Rubin 1981 (the Bayesian bootstrap, from which w is drawn).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pyro_velo.transitions import Array, Transitions

STIFFNESS = 0.95
"""Lambda: a cell that walks must favour tenfold (c = 10) still gets 11 % less than it passes on."""
TOLERANCE, ROUNDS = 0.005, 500
"""The relative change of c that ends the scaling, and the rounds of scaling at most."""


def bootstrap(n_cells: int, rng: np.random.Generator) -> Array:
    """How many cells each one stands for (cells,), one on average: which cells one might have sampled instead."""
    return rng.standard_exponential(n_cells)


def capacity(transitions: Transitions, draw: int, weights: Array) -> Array:
    """Steps through each cell in a unit of time, m (cells,); 0 for one that stands still."""
    graph, speed = transitions.graph, transitions.speeds[draw].astype(np.float64)
    along = transitions.cosines[draw].astype(np.float64) * transitions.lengths
    around = weights[graph.indices]
    spread = np.add.reduceat(around * along**2, graph.indptr[:-1]) / np.add.reduceat(around, graph.indptr[:-1])
    moves = (spread > 0) & (speed > 0)
    return weights * np.divide(speed, np.sqrt(spread), out=np.zeros_like(speed), where=moves)


def balanced(
    transitions: Transitions, draw: int, ends: NDArray[np.bool_], weights: Array | None = None
) -> sparse.csr_matrix:
    """The transition matrix of a draw under balance, (cells, cells) csr in float64; rows sum to one.

    `ends` (cells,) take in whatever comes, and nothing comes out of them; `weights` (cells,) are w, ones if None. A
    cell from which all ways are closed keeps those that its velocity has.
    """
    weights = np.ones(len(ends)) if weights is None else weights
    chain = transitions.matrix(draw, weights)
    open_to = openness(chain, capacity(transitions, draw, weights), ends)
    left = chain @ open_to
    scaled = chain.multiply(open_to[None]).multiply(_ratio(np.ones_like(left), left)[:, None])
    return sparse.csr_matrix(scaled + sparse.diags((left == 0).astype(np.float64)) @ chain)


def openness(chain: sparse.csr_matrix, passing: Array, ends: NDArray[np.bool_]) -> Array:
    """The factors c (cells,) of a chain (cells, cells) whose cells let m (cells,) steps pass; those of ends are 1."""
    back, sent, open_to = chain.T.tocsr(), np.where(ends, 0.0, passing), np.ones(len(ends))
    for _ in range(ROUNDS):
        room = _ratio(passing, back @ _ratio(sent, chain @ open_to), nothing=1.0)
        found = np.where(ends, 1.0, room**STIFFNESS)
        settled = np.allclose(found, open_to, rtol=TOLERANCE, atol=0)
        open_to = found
        if settled:
            break
    return open_to


def _ratio(a: Array, b: Array, nothing: float = 0.0) -> Array:
    """The ratio a / b, and `nothing` where b is zero."""
    return np.divide(a, b, out=np.full_like(b, nothing), where=b > 0)
