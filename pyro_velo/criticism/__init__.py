"""What a fit fails to reproduce: statistics of replicated data, tails of importance weights, permuted molecules."""

from __future__ import annotations

from .permuting import PermutationScore, permutation_score
from .psis import UNRELIABLE, Reliability, generalised_pareto, importance, leave_one_out, pareto_smoothed
from .replicates import STATISTICS, ZEROS, PredictiveCheck, predictive_check

__all__ = [
    "STATISTICS",
    "UNRELIABLE",
    "ZEROS",
    "PermutationScore",
    "PredictiveCheck",
    "Reliability",
    "generalised_pareto",
    "importance",
    "leave_one_out",
    "pareto_smoothed",
    "permutation_score",
    "predictive_check",
]
