"""One self-contained HTML file about an autoencoder: how training went, where cells lie, and their clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes

from pyro_velo import plots
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data import whole
from pyro_velo.data.checks import check_key
from pyro_velo.plots.lookup import Annotated
from pyro_velo.plots.profiles import clusters_by_number, latent_plane
from pyro_velo.reporting import Picture, flattened, picture, picture_of, versions


def profile_report(adata: Any, path: Path) -> None:
    """Write the report of what `vae` wrote into `adata`; raises `InputError` where it wrote nothing."""
    text = render_profiles(adata)
    with whole(path, overwrite=True, formats=()) as partial:
        partial.write_text(text, encoding="utf-8")


def render_profiles(adata: Any) -> str:
    """The page as text."""
    check_key(adata, "uns", keys.UNS_VAE)
    about = adata.uns[keys.UNS_VAE]
    environment = Environment(loader=PackageLoader("pyro_velo"), undefined=StrictUndefined, autoescape=True)
    rest = {name: value for name, value in about.items() if name not in ("elbo_history", "number_of_clusters")}
    return environment.get_template("profiles.html.j2").render(
        n_cells=adata.n_obs,
        n_genes=adata.n_vars,
        held_out=f"{about['held_out_elbo']:.2f}",
        elbo=_elbo(about),
        terms=_terms(about),
        plane=_plane(adata),
        clusters=_clusters(adata),
        number=_number(about),
        choice=about.get("number_of_clusters", {}).get("choice"),
        settings=dict(flattened(rest)),
        versions=versions(),
    )


def _elbo(about: dict[str, Any]) -> Picture:
    return picture(
        lambda ax: plots.elbo(about["elbo_history"], ax=ax), 6, 3.4, "The ELBO per cell by epoch, trained and held out."
    )


def _terms(about: dict[str, Any]) -> Picture | None:
    """What the ELBO was made of, where the fit kept it."""
    history = about["elbo_history"]
    if not history.get("terms"):
        return None
    return picture_of(plots.elbo_terms(history), "Line charts: each term of the ELBO, trained and held out.")


def _plane(adata: Annotated) -> Picture:
    def draw(ax: Axes) -> Axes:
        labels = adata.obs.get(keys.VAE_CLUSTER)
        return latent_plane(adata.obsm[keys.VAE], labels, ax=ax)

    return picture(draw, 5.2, 4.4, "The first two principal components of the latent means, cells by cluster.")


def _number(about: dict[str, Any]) -> Picture | None:
    """Bounds against the number of clusters, where it was chosen among several."""
    found = about.get("number_of_clusters")
    if found is None:
        return None
    candidates, bounds = (np.asarray(found[name], float) for name in ("candidates", "bounds"))
    return picture(
        lambda ax: clusters_by_number(candidates, bounds, found["choice"], ax=ax), 5.2, 3.2,
        "The held-out bound per cell by the number of clusters.",
    )  # fmt: skip


def _clusters(adata: Annotated) -> list[tuple[str, str, str]]:
    """Name, cells and mean probability of each cluster."""
    if keys.VAE_CLUSTER not in adata.obs:
        return []
    named = adata.obs[keys.VAE_CLUSTER].cat
    probabilities = np.asarray(adata.obsm[keys.VAE_PROBABILITIES])
    codes = named.codes.to_numpy()
    rows = []
    for k, name in enumerate(named.categories):
        own = codes == k
        sure = f"{probabilities[own, k].mean():.3f}" if own.any() else "-"
        rows.append((str(name), f"{int(own.sum()):,}", sure))
    return rows
