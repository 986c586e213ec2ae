"""Where things stand in the AnnData: every key that the package reads or writes, by name, once."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

SPLICED, UNSPLICED = "spliced", "unspliced"
MS, MU = "Ms", "Mu"

VELOCITY, VELOCITY_SD, VELOCITY_Q05, VELOCITY_Q95 = "velocity", "velocity_sd", "velocity_q05", "velocity_q95"
FIT_T, FIT_T_SD, FIT_S, FIT_U, FIT_STATE = "fit_t", "fit_t_sd", "fit_s", "fit_u", "fit_state"
LAYERS_OUT = (VELOCITY, VELOCITY_SD, VELOCITY_Q05, VELOCITY_Q95, FIT_T, FIT_T_SD, FIT_S, FIT_U, FIT_STATE)

NOT_FITTED = 255
"""The state of a gene that was not fitted: whole numbers have no NaN."""

FIT_ALPHA, FIT_BETA, FIT_GAMMA, FIT_SWITCH = "fit_alpha", "fit_beta", "fit_gamma", "fit_t_"
RATES = (FIT_ALPHA, FIT_BETA, FIT_GAMMA, FIT_SWITCH)
RATES_SD = tuple(f"{name}_sd" for name in RATES)
FIT_STD_U, FIT_STD_S, FIT_LIKELIHOOD, VELOCITY_GENES = "fit_std_u", "fit_std_s", "fit_likelihood", "velocity_genes"
FIT_U0, FIT_S0, FIT_R2 = "fit_u0", "fit_s0", "fit_r2"
VAR_OUT = (*RATES, *RATES_SD, FIT_STD_U, FIT_STD_S, FIT_LIKELIHOOD, FIT_R2, FIT_U0, FIT_S0)
"""What a fit adds to var; `velocity_genes` is made by preprocessing already, and is narrowed by the fit."""

LATENT_TIME, VELOCITY_UNCERTAINTY = "latent_time", "velocity_uncertainty"
OBS_OUT = (LATENT_TIME, VELOCITY_UNCERTAINTY)
LIBRARY_SIZE = "velocity_library_size"
"""What a fit adds where it infers library sizes."""
VELOCITY_UNCERTAINTY_EXTRINSIC = "velocity_uncertainty_extrinsic"
P_DIRECTIONAL, DIRECTIONAL_Q = "velocity_p_directional", "velocity_directional_q"
DIRECTIONAL_OBS = (P_DIRECTIONAL, DIRECTIONAL_Q)
"""What `futures.directional` adds."""

LATENT = "X_velocity_latent"
OBSM_OUT = (LATENT,)
UNS = "pyro_velo"
UNS_PREPARE, UNS_LAYERS, UNS_FATES, UNS_DIRECTIONAL = "prepare", "layers", "fates", "directional"

FATE_PROBABILITIES = "fate_probabilities"
FATE_PROBABILITIES_Q05, FATE_PROBABILITIES_Q95 = f"{FATE_PROBABILITIES}_q05", f"{FATE_PROBABILITIES}_q95"
FATE_REACHED, FATE_TERMINAL = "fate_reached", "fate_terminal"
FATES_OBSM = (FATE_PROBABILITIES, FATE_PROBABILITIES_Q05, FATE_PROBABILITIES_Q95)
FATES_OBS = (FATE_REACHED, FATE_TERMINAL)
"""What `futures.fates` adds."""

VAE, VAE_CLUSTER, VAE_PROBABILITIES, VAE_DENOISED = "X_vae", "vae_cluster", "vae_cluster_probs", "vae_denoised"
UNS_VAE = "pyro_velo_vae"
"""What `vae` adds: latent means, the clusters, and on request a denoised layer; how it was made."""

TRUE_ALPHA, TRUE_BETA, TRUE_GAMMA, TRUE_SWITCH = "true_alpha", "true_beta", "true_gamma", "true_t_"
TRUE_TIME, TRUE_VELOCITY, TRUE_U, TRUE_S = "true_t", "true_velocity", "true_u", "true_s"
TRUE_LIBRARY = "true_library"


def fitted_layers(uns: Mapping[str, Any], present: Container[str]) -> tuple[str, str]:
    """The names of the spliced and unspliced layers that were fitted: those noted in `uns`, else the smoothed ones.

    >>> fitted_layers({"pyro_velo": {"layers": {"spliced": "S", "unspliced": "U"}}}, present=["S", "U", "Ms", "Mu"])
    ('S', 'U')
    """
    smoothed = MS in present or SPLICED not in present
    names = {SPLICED: MS, UNSPLICED: MU} if smoothed else {SPLICED: SPLICED, UNSPLICED: UNSPLICED}
    noted = uns.get(UNS, {}).get(UNS_LAYERS, {})
    return str(noted.get(SPLICED, names[SPLICED])), str(noted.get(UNSPLICED, names[UNSPLICED]))


def of_site(site: str) -> str:
    """The var key of any other gene-level site of a model.

    >>> of_site("dispersion_spliced")
    'fit_dispersion_spliced'
    """
    return f"fit_{site}"


def size_factor(molecule: str) -> str:
    """The obs key of how deeply a molecule was sequenced in each cell.

    >>> size_factor(SPLICED)
    'size_spliced'
    """
    return f"size_{molecule}"


def velocity_embedding(basis: str) -> str:
    """The obsm key of the velocity projected on `basis`.

    >>> velocity_embedding("umap")
    'velocity_umap'
    """
    return f"velocity_{basis.removeprefix('X_')}"
