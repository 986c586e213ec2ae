"""Pictures of a fit: each function draws on the `ax` it is given (or on one it makes) and returns it."""

from __future__ import annotations

from .elbo import elbo
from .embedding import arrows, grid, latent_time, stream, uncertainty
from .genes import best_genes, gene_ranking
from .phase import phase_portrait
from .rates import rates

__all__ = [
    "arrows",
    "best_genes",
    "elbo",
    "gene_ranking",
    "grid",
    "latent_time",
    "phase_portrait",
    "rates",
    "stream",
    "uncertainty",
]
