"""A simulation as an AnnData, its truth beside the layers that a fit reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from pyro_velo.data.anndata_keys import (
    SPLICED,
    TRUE_ALPHA,
    TRUE_BETA,
    TRUE_GAMMA,
    TRUE_LIBRARY,
    TRUE_S,
    TRUE_SWITCH,
    TRUE_TIME,
    TRUE_U,
    TRUE_VELOCITY,
    UNSPLICED,
)
from pyro_velo.data.results import NewCSR, new_file, write_tables
from pyro_velo.errors import InputError
from pyro_velo.simulate import Batches, ClusterSimulation, Simulation

LINEAGE, BATCH, SIMULATION = "lineage", "batch", "simulation"
COUNTS, TRUE_LOG_MEAN = "counts", "true_log_mean"
TRUE_ONSET, TRUE_GATE = "true_onset", "true_gate"
TRUE_CAPTURE_U, TRUE_CAPTURE_S = "true_capture_u", "true_capture_s"


def to_anndata(simulation: Simulation) -> AnnData:
    """The simulation as N cells x G genes, `X` and the layer `spliced` holding the measured spliced values.

    layers: `spliced`, `unspliced`, int32 CSR where they are counts, else dense float32; `true_u`, `true_s` and
    `true_velocity`, float32, in abundance (per unit of time) whatever the library size; `true_t` where genes have
    times of their own.
    obs: `true_t`, the cell's time in [0, 20]; `true_library`, counts per unit of abundance; `lineage` where there are
    several; `batch` where settings have any.
    var: `true_alpha`, `true_beta`, `true_gamma`, and `true_t_`, which is NaN where lineages differ: varm `true_onset`
    and `true_t_` (genes, lineages) hold the times then. `true_onset` where genes of one path come on after its start,
    as in a cycle; `true_gate`, the probability that a count is lost, where any is.
    varm: `true_capture_u`, `true_capture_s` (genes, batches), by which the truth is to be multiplied for what a batch's
    cells show of it.
    uns: `simulation`, the settings and the seed.
    """
    adata = _known(simulation)
    adata.X = _measured(simulation.spliced)
    for name, values in _layers(simulation).items():
        adata.layers[name] = values
    return adata


def _known(simulation: Simulation) -> AnnData:
    """What is known of cells and genes, without a matrix."""
    obs = pd.DataFrame(
        {TRUE_TIME: simulation.true_t, TRUE_LIBRARY: simulation.library},
        index=[f"cell_{number}" for number in range(len(simulation.true_t))],
    )
    switch = simulation.true_switch
    var = pd.DataFrame(
        {
            TRUE_ALPHA: simulation.true_alpha,
            TRUE_BETA: simulation.true_beta,
            TRUE_GAMMA: simulation.true_gamma,
            TRUE_SWITCH: np.where((switch == switch[0]).all(axis=0), switch[0], np.nan),
        },
        index=[f"gene_{number}" for number in range(len(simulation.true_alpha))],
    )
    adata = AnnData(obs=obs, var=var)
    adata.uns[SIMULATION] = {"settings": _plain(simulation.settings), "seed": simulation.seed}
    if (simulation.true_gate > 0).any():
        adata.var[TRUE_GATE] = simulation.true_gate
    if simulation.settings.batches != Batches():
        adata.obs[BATCH] = pd.Categorical(simulation.batch)
        adata.varm[TRUE_CAPTURE_U], adata.varm[TRUE_CAPTURE_S] = (
            simulation.true_capture_u.T,
            simulation.true_capture_s.T,
        )
    if len(switch) > 1:
        adata.obs[LINEAGE] = pd.Categorical(simulation.lineage)
        adata.varm[TRUE_ONSET], adata.varm[TRUE_SWITCH] = simulation.true_onset.T, switch.T
    elif (simulation.true_onset > 0).any():
        adata.var[TRUE_ONSET] = simulation.true_onset[0]
    return adata


def write_blocks(blocks: Iterable[Simulation], path: str | Path, overwrite: bool = False) -> None:
    """Write simulated counts, block by block, to an `.h5ad` or `.zarr` file: what `to_anndata` says but true layers.

    Memory: that of a block. Raises `InputError` for abundances, which are dense, and as `data.results.new_file` does.
    """
    with new_file(path, overwrite) as into:
        obs: list[pd.DataFrame] = []
        grown: dict[str, NewCSR] = {}
        for block in blocks:
            if not np.issubdtype(block.spliced.dtype, np.integer):
                raise InputError("Expected counts to write block by block; got abundances. Choose a noise of counts.")
            adata = _known(block)
            obs.append(adata.obs)
            for name, counts in ((SPLICED, block.spliced), (UNSPLICED, block.unspliced)):
                if name not in grown:
                    grown[name] = NewCSR(into["layers"], name, adata.n_vars, np.int32)
                grown[name].append(_measured(counts))
        for matrix in grown.values():
            matrix.close()
        cells = pd.concat(obs, ignore_index=True)
        cells.index = pd.Index([f"cell_{number}" for number in range(len(cells))])
        write_tables(into, cells, adata.var, dict(adata.uns))


def clusters_to_anndata(simulation: ClusterSimulation) -> AnnData:
    """The simulation as N cells x G genes, its counts in `X` and in the layer `counts`, int32 CSR.

    obs: `cluster` and `condition`, categories; `true_library`. varm: `true_log_mean` (genes, clusters x conditions), a
    cluster's conditions side by side. uns: `simulation`, the settings and the seed.
    """
    obs = pd.DataFrame(
        {
            "cluster": pd.Categorical([f"cluster_{k}" for k in simulation.label]),
            "condition": pd.Categorical([f"condition_{c}" for c in simulation.condition]),
            TRUE_LIBRARY: simulation.library,
        },
        index=[f"cell_{number}" for number in range(len(simulation.label))],
    )
    n_genes = simulation.counts.shape[1]
    var = pd.DataFrame(index=[f"gene_{number}" for number in range(n_genes)])
    counts = _measured(simulation.counts)
    adata = AnnData(counts, obs=obs, var=var, layers={COUNTS: counts.copy()})
    adata.varm[TRUE_LOG_MEAN] = simulation.log_mean.reshape(-1, n_genes).T
    adata.uns[SIMULATION] = {"settings": _plain(simulation.settings), "seed": simulation.seed}
    return adata


def _layers(simulation: Simulation) -> dict[str, Any]:
    layers = {SPLICED: _measured(simulation.spliced), UNSPLICED: _measured(simulation.unspliced)}
    truth = {TRUE_U: simulation.true_u, TRUE_S: simulation.true_s, TRUE_VELOCITY: simulation.true_velocity}
    if simulation.true_gene_t is not None:
        truth[TRUE_TIME] = simulation.true_gene_t
    return layers | {name: values.astype(np.float32) for name, values in truth.items()}


def _measured(values: NDArray[Any]) -> Any:
    return csr_matrix(values.astype(np.int32)) if np.issubdtype(values.dtype, np.integer) else values.astype(np.float32)


def _plain(part: Any) -> Any:
    """Settings as dictionaries, arrays and scalars, which every AnnData file format can hold."""
    if is_dataclass(part):
        return {"name": type(part).__name__} | {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
    return np.array(part) if isinstance(part, tuple) else part
