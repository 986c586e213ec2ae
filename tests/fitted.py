"""An AnnData as a fit leaves it, made from known kinetics: for tests of what reads a fit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from pyro_velo import kinetics
from pyro_velo.data import anndata_keys as keys

CLUSTERS = ("early", "middle", "late")


def fitted_adata(n_cells: int = 300, n_genes: int = 12, seed: int = 0, noise: float = 0.05) -> AnnData:
    """Cells on an arc, in three clusters, with every output key of a fit; the last gene was not fitted (NaN).

    All genes share one time in [0, 20]; rates, times and velocities are the truth, their sds made up.
    """
    rng = np.random.default_rng(seed)
    t = np.sort(rng.uniform(0, kinetics.T_MAX, n_cells))
    adata = _cells(rng, t, n_genes)
    rates = _rates(rng, n_genes)
    _genes(adata, rates, rng)
    _layers(adata, rates, t, rng, noise)
    epoch = np.arange(1.0, 61)
    train = -40.0 + 60 * (1 - np.exp(-epoch / 8)) + rng.normal(0, 0.3, 60)
    held_out = np.where(epoch % 2 == 0, train - 1 - 0.002 * np.square(np.maximum(epoch - 40, 0)), np.nan)
    adata.uns[keys.UNS] = {
        "version": "0.1.0",
        "seed": seed,
        "settings": {"likelihood": "Normal", "draws": 100, "max_epochs": 60, "learning_rate": 0.01},
        "elbo_history": {"epoch": epoch, "train": train, "held_out": held_out},
    }
    return adata


def _cells(rng: np.random.Generator, t: np.ndarray, n_genes: int) -> AnnData:
    share, n = t / kinetics.T_MAX, len(t)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n)])
    obs["clusters"] = pd.Categorical([CLUSTERS[k] for k in (share * 3).astype(int).clip(0, 2)], CLUSTERS)
    obs[keys.LATENT_TIME] = share
    obs[keys.VELOCITY_UNCERTAINTY] = rng.gamma(2, 0.02 + 0.1 * share)
    adata = AnnData(np.zeros((n, n_genes), np.float32), obs=obs)
    adata.var_names = [f"Gene{j}" for j in range(n_genes)]
    angle = np.pi * (1 - share)
    adata.obsm["X_umap"] = np.column_stack([6 * np.cos(angle), 4 * np.sin(angle)]) + rng.normal(0, 0.35, (n, 2))
    along = np.column_stack([6 * np.sin(angle), -4 * np.cos(angle)]) / 6
    adata.obsm[keys.velocity_embedding("umap")] = (along + rng.normal(0, 0.15, (n, 2))).astype(np.float32)
    adata.obsm[keys.LATENT] = rng.normal(size=(n, 3)).astype(np.float32)
    return adata


def _rates(rng: np.random.Generator, n_genes: int) -> kinetics.Rates:
    beta, gamma = np.exp(rng.normal(np.log(0.5), 0.3, n_genes)), np.exp(rng.normal(np.log(0.3), 0.3, n_genes))
    unit = rng.uniform(2, 9, n_genes)
    values = (unit * beta * rng.uniform(0.8, 1.2, n_genes), beta, gamma, rng.uniform(4, 12, n_genes))
    return kinetics.Rates(*(torch.as_tensor(value) for value in values))


def _genes(adata: AnnData, rates: kinetics.Rates, rng: np.random.Generator) -> None:
    n = adata.n_vars
    columns = {name: value.numpy().copy() for name, value in zip(keys.RATES, rates, strict=True)}
    columns |= {name: columns[name[:-3]] * rng.uniform(0.03, 0.15, n) for name in keys.RATES_SD}
    columns |= {keys.FIT_STD_U: np.full(n, 0.1), keys.FIT_STD_S: np.full(n, 0.1)}
    columns |= {keys.FIT_LIKELIHOOD: rng.uniform(0.5, 3, n), keys.FIT_R2: rng.uniform(0.1, 0.95, n)}
    columns |= {keys.FIT_U0: rng.uniform(0, 0.5, n), keys.FIT_S0: rng.uniform(0, 0.5, n)}
    for name, values in columns.items():
        values[-1] = np.nan
        adata.var[name] = values
    adata.var[keys.VELOCITY_GENES] = np.arange(n) < n - 1


def _layers(adata: AnnData, rates: kinetics.Rates, t: np.ndarray, rng: np.random.Generator, noise: float) -> None:
    times = torch.as_tensor(np.repeat(t[:, None], adata.n_vars, axis=1))
    u, s = kinetics.trajectory(rates, times)
    u0, s0 = (np.nan_to_num(adata.var[name].to_numpy()) for name in (keys.FIT_U0, keys.FIT_S0))
    velocity = kinetics.velocity(rates, u, s).numpy()
    unit = (rates.alpha / rates.beta).numpy()
    for name, start, clean in ((keys.MU, u0, u.numpy()), (keys.MS, s0, s.numpy())):
        adata.layers[name] = (start + np.abs(clean + unit * rng.normal(0, noise, clean.shape))).astype(np.float32)
    out = {
        keys.VELOCITY: velocity,
        keys.FIT_T: times.numpy(),
        keys.FIT_U: u.numpy() + u0,
        keys.FIT_S: s.numpy() + s0,
    }
    sd = 0.1 * np.abs(velocity) + 0.01
    out |= {keys.VELOCITY_SD: sd, keys.VELOCITY_Q05: velocity - 1.64 * sd, keys.VELOCITY_Q95: velocity + 1.64 * sd}
    out |= {keys.FIT_T_SD: np.full(times.shape, 0.5)}
    for name, values in out.items():
        values = values.astype(np.float32)
        values[:, -1] = np.nan
        adata.layers[name] = values
    off = t[:, None] > rates.switch_time.numpy()
    flat = np.abs(velocity) < 0.05 * np.abs(velocity).max(axis=0)
    states = (2 * off + flat).astype(np.uint8)
    states[:, -1] = 255
    adata.layers[keys.FIT_STATE] = states
