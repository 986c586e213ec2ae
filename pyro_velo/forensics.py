"""A number that is not finite stops the run; this says where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_velo.batch import Minibatch
from pyro_velo.compiled import unfused
from pyro_velo.errors import FitError


class Culprit(NamedTuple):
    """A site or parameter, and the gene (its position among the fitted ones) where it is first not finite, if any."""

    what: str
    gene: int | None


class NonFiniteError(FitError):
    """The loss or a gradient is NaN or infinite; says at which step, site and gene."""

    def __init__(self, culprit: Culprit, *, step: int, gene_name: str | None = None) -> None:
        self.culprit, self.step, self.gene_name = culprit, step, gene_name
        gene = "" if culprit.gene is None else f", gene {self.gene_or_number}"
        super().__init__(
            f"Expected finite numbers; got NaN or infinity at step {step}, {culprit.what}{gene}. "
            "Look at that gene's layers, or lower the learning rate."
        )

    @property
    def gene_or_number(self) -> str | None:
        """The gene's name, or where that is not known its position; None where no gene is to blame."""
        return self.gene_name or (None if self.culprit.gene is None else f"number {self.culprit.gene}")

    def named(self, gene_names: list[str]) -> NonFiniteError:
        """The same error with the gene's name."""
        gene = self.culprit.gene
        return NonFiniteError(self.culprit, step=self.step, gene_name=None if gene is None else gene_names[gene])


def blame(model: Callable, guide: Callable, batch: Minibatch, values: Mapping[str, Tensor]) -> Culprit:
    """The data, else the first site, in the order of the programs, that is not finite; else the first such gradient."""
    measured = batch.measured
    n_genes = measured.shape[-1]
    # An encoder spreads one bad gene over the whole cell, so the data is looked at before any site.
    if not torch.isfinite(measured).all():
        return Culprit(f"the data (site {batch.site!r})", _gene(measured, n_genes))
    with torch.no_grad(), unfused():
        guide_trace = poutine.trace(guide).get_trace(batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(batch)
        for part, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
                    continue
                for what, number in (("value", site["value"]), ("log-density", site["fn"].log_prob(site["value"]))):
                    if torch.is_tensor(number) and not torch.isfinite(number).all():
                        return Culprit(f"{what} of site {name!r} in the {part}", _gene(number, n_genes))
    for name, value in values.items():
        if value.grad is not None and not torch.isfinite(value.grad).all():
            return Culprit(f"gradient of parameter {name!r}", _gene(value.grad, n_genes))
    return Culprit("the loss itself", None)


def _gene(number: Tensor, n_genes: int) -> int | None:
    """The position of the first non-finite entry on the gene axis (the last one of size G), if there is one."""
    axes = [axis for axis, size in enumerate(number.shape) if size == n_genes]
    if not axes:
        return None
    others = [axis for axis in range(number.ndim) if axis != axes[-1]]
    bad = ~torch.isfinite(number)
    return int((bad.any(dim=others) if others else bad).nonzero()[0])
