"""Guides of the gene-level sites: the rates, the switching times and the likelihood's parameters.

Each maps the model's program to a Pyro autoguide over its sites in the plate `genes`, found by tracing, that starts at
the data-driven values (`program.start`). A new one is one class with one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value


class RateGuide(ABC):
    """The posterior of what a gene has of its own."""

    @abstractmethod
    def __call__(self, program: Any) -> AutoGuide:
        """An autoguide over the program's gene-level sites."""


def is_gene_level(message: dict) -> bool:
    """Whether a message is a latent site that belongs to genes, and not to cells."""
    plates = {frame.name for frame in message["cond_indep_stack"]}
    return message["type"] == "sample" and not message["is_observed"] and plates == {"genes"}


def gene_sites(program: Any) -> poutine.block:
    """The program with every other site hidden."""
    return poutine.block(program, expose_fn=lambda message: message["type"] == "sample" and is_gene_level(message))


@dataclass(frozen=True)
class Point(RateGuide):
    """The most probable value (MAP): the seed's point estimate, pulled by the priors."""

    def __call__(self, program: Any) -> AutoGuide:
        """AutoDelta, from the start values."""
        return AutoDelta(gene_sites(program), init_loc_fn=init_to_value(values=program.start.sites()))


@dataclass(frozen=True)
class MeanField(RateGuide):
    """Independent Normals on the unconstrained scale: LogNormal rates, logit-Normal switching times."""

    sd: float = 0.01

    def __call__(self, program: Any) -> AutoGuide:
        """AutoNormal, from the start values, with start sd `sd` on the unconstrained scale."""
        start = init_to_value(values=program.start.sites())
        return AutoNormal(gene_sites(program), init_loc_fn=start, init_scale=self.sd)


RATE_GUIDES: dict[str, type[RateGuide]] = {"point": Point, "mean-field": MeanField}
"""What the command line calls them."""

__all__ = ["RATE_GUIDES", "MeanField", "Point", "RateGuide", "gene_sites"]
