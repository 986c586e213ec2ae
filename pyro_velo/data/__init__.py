"""Files and AnnData: reading them, checking them, writing them whole.

The only package that imports anndata, and it does so on first use: `import pyro_velo.data` is as light as the standard
library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_velo.data.checks import Layers as Layers
    from pyro_velo.data.checks import check_adata as check_adata
    from pyro_velo.data.checks import check_key as check_key
    from pyro_velo.data.checks import check_known as check_known
    from pyro_velo.data.checks import check_neighbors as check_neighbors
    from pyro_velo.data.checks import check_output_keys as check_output_keys
    from pyro_velo.data.checks import checked_basis as checked_basis
    from pyro_velo.data.checks import checked_labels as checked_labels
    from pyro_velo.data.checks import checked_layers as checked_layers
    from pyro_velo.data.checks import expressed_genes as expressed_genes
    from pyro_velo.data.output import check_output as check_output
    from pyro_velo.data.output import check_writable as check_writable
    from pyro_velo.data.output import whole as whole
    from pyro_velo.data.output import write_whole as write_whole
    from pyro_velo.data.readers import read as read
    from pyro_velo.data.simulated import to_anndata as to_anndata

_HOME = {
    "read": "readers",
    "Layers": "checks",
    "check_adata": "checks",
    "check_key": "checks",
    "check_known": "checks",
    "check_neighbors": "checks",
    "check_output_keys": "checks",
    "checked_basis": "checks",
    "checked_labels": "checks",
    "checked_layers": "checks",
    "expressed_genes": "checks",
    "to_anndata": "simulated",
    "check_output": "output",
    "check_writable": "output",
    "whole": "output",
    "write_whole": "output",
}


def __getattr__(name: str) -> object:
    """The public name, from the module that defines it, imported now (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(_HOME)
