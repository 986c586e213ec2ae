"""A small problem that trains in a moment, and what two runs of it can be compared by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from anndata import AnnData
from torch import Tensor

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.batch import Cells
from pyro_velo.data.simulated import to_anndata
from pyro_velo.train import Fitted, Training, TrainSettings, train

MODEL = pv.VelocityModel(n_latent=2, hidden=(8,))
GUIDE = pv.guides.Amortized(hidden=(8,), hidden_states=(8,))


def small_adata(n_cells: int = 40, n_genes: int = 5, seed: int = 0) -> AnnData:
    """Simulated abundances of known kinetics, in the layers `spliced` and `unspliced`."""
    settings = simulate.Settings(kinetics=simulate.LogNormalRates(drop=0))
    return to_anndata(simulate.simulate(n_cells, n_genes, settings=settings, seed=seed))


def small_cells(n_cells: int = 40, n_genes: int = 5) -> Cells:
    """The same, as tensors."""
    return pv.velocity_data(small_adata(n_cells, n_genes), as_is=True).cells


def settings(**changes: Any) -> TrainSettings:
    """Eight epochs of three steps, with a look at the held-out cells after every one."""
    return TrainSettings(**({"max_epochs": 8, "batch_size": 13, "evaluate_steps": 1} | changes))


def small_fit(cells: Cells | None = None, **options: Any) -> Fitted:
    """A fit of the small model; `settings` are those above unless given."""
    options = {"settings": settings(), "progress": False} | options
    return train(MODEL, GUIDE, small_cells() if cells is None else cells, **options)


def differing(one: Training, other: Training) -> list[str]:
    """What two runs' states do not share to the bit, all of it by name."""
    left, right = dict(leaves(vars(one), "")), dict(leaves(vars(other), ""))
    return sorted(
        {*left.keys() ^ right.keys(), *(n for n in left.keys() & right.keys() if not _same(left[n], right[n]))}
    )


def leaves(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every value in nested dataclasses, dicts and lists, by its path."""
    if hasattr(node, "__dataclass_fields__"):
        node = vars(node)
    if isinstance(node, (dict, list, tuple)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, node


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)
