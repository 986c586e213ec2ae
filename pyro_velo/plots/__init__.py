"""Pictures of a fit: each function draws on the `ax` it is given (or on one it makes) and returns it."""

from __future__ import annotations

from .audit import edge_directions, gene_contributions
from .calibration import calibration_panels, coverage, crps, ranks
from .criticism import k_hat, permutation, predictive_check, predictive_checks
from .diagnosis import bound_by_particles, k_hat_histogram, kl_by_dimension, loss_by_gene
from .directional import directional_null, p_directional
from .doctor import elbo_term, elbo_terms, gradient_flow, gradient_record, range_test
from .elbo import elbo
from .embedding import arrows, grid, latent_time, stream, uncertainty
from .fates import fate_probabilities, fate_probability, fate_shares
from .genes import best_genes, gene_ranking
from .phase import phase_portrait
from .rates import rates
from .sweep import sweep_bounds

__all__ = [
    "arrows",
    "best_genes",
    "bound_by_particles",
    "calibration_panels",
    "coverage",
    "crps",
    "directional_null",
    "edge_directions",
    "elbo",
    "elbo_term",
    "elbo_terms",
    "fate_probabilities",
    "fate_probability",
    "fate_shares",
    "gene_contributions",
    "gene_ranking",
    "gradient_flow",
    "gradient_record",
    "grid",
    "k_hat",
    "k_hat_histogram",
    "kl_by_dimension",
    "latent_time",
    "loss_by_gene",
    "p_directional",
    "permutation",
    "phase_portrait",
    "predictive_check",
    "predictive_checks",
    "range_test",
    "ranks",
    "rates",
    "stream",
    "sweep_bounds",
    "uncertainty",
]
