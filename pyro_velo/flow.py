"""What a fitted velocity says of the cells together: arrows on an embedding, and one latent time for each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_velo import embedding
from pyro_velo.batch import Cells
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.checks import check_key, checked_basis
from pyro_velo.errors import InputError
from pyro_velo.initial import SteadyState
from pyro_velo.kinetics import T_MAX, Rates
from pyro_velo.options import BASIS
from pyro_velo.ordering import by_phase, improved, ranks

if TYPE_CHECKING:
    from anndata import AnnData


def project(adata: AnnData, basis: str = BASIS) -> None:
    """Write the velocity on an embedding to `obsm['velocity_<basis>']`, beside `obsm['X_<basis>']`.

    Raises InputError for an embedding, a velocity or a neighbour graph that is not there.
    """
    graph, velocity, expression = units_of_range(adata)
    transitions = embedding.transition_matrix(velocity, expression, graph)
    adata.obsm[keys.velocity_embedding(basis)] = embedding.project(transitions, checked_basis(adata, basis))


def summarise_cells(adata: AnnData, *, shared_clock: bool = False) -> None:
    """The latent time of each cell, and the velocity on every embedding, where there is a neighbour graph.

    Where genes share a clock (`shared_clock`), it is the median of their times; else it comes from the neighbours.
    """
    if shared_clock:
        adata.obs[keys.LATENT_TIME] = np.nanmedian(adata.layers[keys.FIT_T], axis=1) / T_MAX
    if "distances" not in adata.obsp:
        return
    graph, velocity, expression = units_of_range(adata)
    if not shared_clock:
        cosines = embedding.cosine_correlations(velocity, expression, graph)
        adata.obs[keys.LATENT_TIME] = embedding.potential(cosines)
    for basis in _bases(adata):
        project(adata, basis)


def order_before_a_fit(cells: Cells, graph: Any = None) -> Tensor:
    """The cells' order (N,) in [0, 1] in which a clock that all genes share starts (`ordering.improved`).

    From their phase portraits, or from the flow between neighbours in `graph` where genes' curves fit that better.
    """
    rates = SteadyState()(cells).rates
    orders = [by_phase(cells, rates)]
    if graph is not None:
        orders.append(along_flow(cells, rates, graph))
    return improved(cells, orders, rates)


def along_flow(cells: Cells, rates: Rates, graph: Any) -> Tensor:
    r"""The cells' order (N,) in [0, 1] along the flow $u - (\gamma/\beta) s$ between neighbours in `graph`.

    Velocities of the steady-state model (La Manno et al. 2018), and the potential that agrees with them best. It looks
    at all cells together, and so finds an order along branches that a cell's own phase portraits leave open. Where the
    end of a process looks like its beginning, it takes one for the other.
    """
    measured_u, s = cells.scaled
    velocity = measured_u * cells.ratio - rates.gamma / rates.beta * s
    cosines = embedding.cosine_correlations(velocity.cpu().numpy(), s.cpu().numpy(), graph, steps=1)
    return ranks(torch.from_numpy(embedding.potential(cosines)).to(s))


def units_of_range(adata: AnnData) -> tuple[Any, Any, Any]:
    """Neighbour graph, and the velocity and expression of the fitted genes in units of each gene's range."""
    if keys.VELOCITY not in adata.layers:
        raise InputError(f"Layer {keys.VELOCITY!r} is missing; expected a fit. Run pyro-velo fit first.")
    if "distances" not in adata.obsp:
        raise InputError(
            "obsp['distances'] is missing; expected a neighbour graph. Run scanpy.pp.neighbors(adata) first."
        )
    layer, _ = keys.fitted_layers(adata.uns, adata.layers.keys())
    check_key(adata, "layers", layer)
    measured = adata.layers[layer]
    dense = measured.toarray() if hasattr(measured, "toarray") else measured
    velocity, expression = embedding.in_units_of_range(adata.layers[keys.VELOCITY], dense)
    return adata.obsp["distances"], velocity, expression


def _bases(adata: AnnData) -> list[str]:
    """The embeddings that a velocity can be projected on: any two-dimensional X_... but those that the model made."""
    if "distances" not in adata.obsp:
        return []
    named = [key.removeprefix("X_") for key in adata.obsm if key.startswith("X_") and key != keys.LATENT]
    return [basis for basis in named if adata.obsm[f"X_{basis}"].shape[1] == 2]
