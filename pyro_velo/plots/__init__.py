"""Pictures of a fit: each function draws on the `ax` it is given (or on one it makes) and returns it."""

from __future__ import annotations

from .audit import edge_directions, gene_contributions
from .calibration import calibration_panels, coverage, crps, ranks
from .criticism import k_hat, permutation, predictive_check, predictive_checks
from .diagnosis import bound_by_particles, k_hat_histogram, kl_by_dimension, loss_by_gene
from .elbo import elbo
from .embedding import arrows, grid, latent_time, stream, uncertainty
from .fates import fate_probabilities, fate_probability, fate_shares
from .genes import best_genes, gene_ranking
from .phase import phase_portrait
from .rates import rates

__all__ = [
    "arrows",
    "best_genes",
    "bound_by_particles",
    "calibration_panels",
    "coverage",
    "crps",
    "edge_directions",
    "elbo",
    "fate_probabilities",
    "fate_probability",
    "fate_shares",
    "gene_contributions",
    "gene_ranking",
    "grid",
    "k_hat",
    "k_hat_histogram",
    "kl_by_dimension",
    "latent_time",
    "loss_by_gene",
    "permutation",
    "phase_portrait",
    "predictive_check",
    "predictive_checks",
    "ranks",
    "rates",
    "stream",
    "uncertainty",
]
