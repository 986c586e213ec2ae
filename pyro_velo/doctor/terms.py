r"""The summands of the ELBO at one draw, read off the traces of a guide and of its program.

$$\mathrm{ELBO} = \sum_x \log p(x \mid \cdot) - \sum_z \log\frac{q(z \mid \cdot)}{p(z \mid \cdot)}$$

| term | what it is |
|---|---|
| `unspliced`, `spliced` | log p(u) and log p(s given u) of a joint mixture; another observed site goes by its name |
| `kl_z`, `kl_pi`, `kl_alpha`, ... | of each latent site by the ELBO's own draw; of a site marked `kl` in closed form |
| `kl_correlation` | what correlated rates cost beside their marginals: log q(x) - sum of log q(x_k) on average |
| `switch_penalty`, `order_penalty`, `label_penalty` | what a penalty costs at weight 1; no part of the ELBO |

Sites, plates and what an autoguide draws together are found in the traces, so any program with the plates `cells` and
`genes`, or one of them, is taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import MultivariateNormal, biject_to, kl_divergence

from pyro_velo.mixture import JointMixture, ScoredMolecules
from pyro_velo.rates import Correlate
from pyro_velo.schedule import normal_kl

Site = dict[str, Any]
Kind = Literal["reconstruction", "kl", "penalty"]

CELLS, GENES, DIMENSIONS = "cells", "genes", "dimensions"
PENALTY = "_penalty"
MOLECULES = ("unspliced", "spliced")
CORRELATION, TOGETHER = "correlation", "genes"
"""The terms of latent sites that are drawn together, where their marginals are known and where they are not."""
GROUPS = {
    "rates": ("alpha", "beta", "gamma", "alpha_1", "ramp"),
    "switch_times": ("switch_time", "onset"),
    "deviations": ("deviation",),
}
"""The gene-level sites of the velocity model, by what they are about; those of each molecule are in `group_of`."""


def group_of(site: str) -> str:
    """What a latent site is about: a likelihood's parameter of either molecule is `noise`, an unknown one itself.

    >>> [group_of(site) for site in ("gamma", "dispersion_spliced", "batch_effect_spliced", "z")]
    ['rates', 'noise', 'batch_effects', 'z']
    """
    for group, sites in GROUPS.items():
        if site in sites:
            return group
    if site.endswith(tuple(f"_{molecule}" for molecule in MOLECULES)):
        return "batch_effects" if site.startswith("batch_effect_") else "noise"
    return site


@dataclass(frozen=True)
class Term:
    """One summand, in nats per cell: of the ELBO itself (`reconstruction`), or of what is taken off it.

    `parts` are its own summands, an axis each for those of `cells`, `genes`, `dimensions` that are in `axes`;
    `expected` (d,) is the mean KL of each latent dimension in closed form, where q and p are independent Normals.
    """

    name: str
    kind: Kind
    sites: tuple[str, ...]
    parts: Tensor
    axes: tuple[str, ...]
    expected: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The sum of its parts, (), in float64."""
        return self.parts.sum(dtype=torch.float64)

    @property
    def group(self) -> str:
        """The name that it shares with the other KLs of sites that are about the same (`group_of`)."""
        about = {group_of(site) for site in self.sites} if self.kind == "kl" else set()
        return f"kl_{about.pop()}" if len(about) == 1 else self.name

    @property
    def sign(self) -> int:
        """What it counts in the ELBO."""
        return {"reconstruction": 1, "kl": -1, "penalty": 0}[self.kind]

    def by(self, axis: str) -> Tensor | None:
        """Its share of each gene or dimension, which add up to `value`, or the nats of each cell, whose mean it is.

        None where it has no such axis: cells share their rates, and a KL that is no sum has no dimensions.
        """
        if axis not in self.axes:
            return None
        others = [i for i, name in enumerate(self.axes) if name != axis]
        share = self.parts.sum(others, dtype=torch.float64) if others else self.parts.double()
        return share * len(share) if axis == CELLS else share


class Terms(NamedTuple):
    """The summands of an ELBO per cell, at KL weight 1."""

    terms: tuple[Term, ...]

    @property
    def total(self) -> Tensor:
        """The ELBO per cell, (): reconstruction less KL, without penalties."""
        return sum((term.sign * term.value for term in self.terms), torch.zeros((), dtype=torch.float64))

    @property
    def names(self) -> tuple[str, ...]:
        """The terms' names, in the order of the program."""
        return tuple(term.name for term in self.terms)

    def of(self, name: str) -> Term:
        """The term of that name."""
        return self.terms[self.names.index(name)]

    def grouped(self) -> Terms:
        """One KL for all sites that are about the same (`group_of`): rates, switching times, noise."""
        groups: dict[str, list[Term]] = {}
        for term in self.terms:
            groups.setdefault(term.group, []).append(term)
        return Terms(tuple(_merged(name, found) for name, found in groups.items()))


def terms_of(guide: Trace, program: Trace, *, closed: bool = False) -> Terms:
    """The summands at the draw of these traces, of which the program's is replayed against the guide's.

    Both must have been scaled per cell (`train.per_cell`); handlers that were in force count, but for masks on
    penalties. Gradients flow through the parts where they were traced. `closed` takes the KL of a site in closed form
    where there is one: the summands of `TraceMeanField_ELBO`, unless the guide `draws_together`.
    """
    latent = {name: site for name, site in sites_of(program) if not site["is_observed"]}
    drawn = _drawn(guide, latent)
    found: list[Term] = []
    for name, site in sites_of(program):
        if "penalty" in site["infer"]:
            cost = -site["fn"].log_prob(site["value"]) * site["scale"]
            found.append(_term(f"{name.removesuffix(PENALTY)}{PENALTY}", "penalty", (name,), site, cost))
        elif site["infer"].get("kl"):
            found.append(
                _term(f"kl_{name.removesuffix('_kl')}", "kl", (name.removesuffix("_kl"),), site, -_density(site))
            )
        elif site["is_observed"]:
            found.extend(_reconstruction(name, site))
        else:
            known = _closed(name, site, guide.nodes.get(name)) if closed else None
            found.append(known or _kl(name, site, guide.nodes.get(name), drawn.shares.get(name)))
    rest = (
        _term(f"kl_{_called(part.sites, part.name)}", "kl", part.sites, part.site, part.density) for part in drawn.left
    )
    return Terms((*_same_name_merged(found), *rest))


def combined(parts: Sequence[Terms], weights: Sequence[float], *, apart: bool) -> Terms:
    """The weighted sum of what several batches or draws gave; batches are `apart`, and their cells put in a row."""
    rows = zip(*(each.terms for each in parts), strict=True)
    return Terms(tuple(_weighted(terms, weights, apart) for terms in rows))


def _weighted(terms: Sequence[Term], weights: Sequence[float], apart: bool) -> Term:
    scaled = [weight * term.parts for weight, term in zip(weights, terms, strict=True)]
    in_a_row = apart and CELLS in terms[0].axes
    total = torch.cat(scaled, terms[0].axes.index(CELLS)) if in_a_row else torch.stack(scaled).sum(0)
    expected = [
        weight * term.expected for weight, term in zip(weights, terms, strict=True) if term.expected is not None
    ]
    return replace(terms[0], parts=total, expected=torch.stack(expected).sum(0) if expected else None)


def _merged(name: str, terms: Sequence[Term]) -> Term:
    """Several terms as one, by the axes that all of them have."""
    if len(terms) == 1:
        return replace(terms[0], name=name)
    shared = [axis for axis in terms[0].axes if all(axis in term.axes for term in terms)]
    parts = [
        term.parts.sum([i for i, axis in enumerate(term.axes) if axis not in shared])
        if set(term.axes) - set(shared)
        else term.parts
        for term in terms
    ]
    sites = tuple(dict.fromkeys(site for term in terms for site in term.sites))
    return Term(name, terms[0].kind, sites, torch.stack(parts).sum(0), tuple(shared))


def _same_name_merged(terms: Sequence[Term]) -> list[Term]:
    """A site and its KL in closed form are one term."""
    names: dict[str, list[Term]] = {}
    for term in terms:
        names.setdefault(term.name, []).append(term)
    return [_merged(name, found) for name, found in names.items()]


# One site


def sites_of(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Every sample site, but not the plates' own."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield name, site


def _density(site: Site) -> Tensor:
    """The scaled log-density of a site's value, which its trace may have already."""
    if "log_prob" in site:
        return site["log_prob"]
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def _term(name: str, kind: Kind, sites: tuple[str, ...], site: Site, density: Tensor) -> Term:
    parts, axes = _on_plates(site, density)
    return Term(name, kind, sites, parts, axes)


def _on_plates(site: Site, density: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """A log-density with an axis for each plate, cells before genes, and every other axis summed over."""
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    kept = [(name, dims[name]) for name in (CELLS, GENES) if name in dims and -dims[name] <= density.ndim]
    moved = density.movedim([dim for _, dim in kept], list(range(len(kept)))) if kept else density
    rest = list(range(len(kept), moved.ndim))
    return moved.sum(rest) if rest else moved, tuple(name for name, _ in kept)


def _reconstruction(name: str, site: Site) -> list[Term]:
    """Of a joint mixture that of unspliced molecules, and of spliced ones given them; of any other site itself."""
    both = _density(site)
    if not isinstance(site["fn"], (JointMixture, ScoredMolecules)):
        return [_term(name, "reconstruction", (name,), site, both)]
    unspliced = scale_and_mask(site["fn"].log_unspliced(site["value"]), site["scale"], site["mask"])
    pairs = zip(MOLECULES, (unspliced, both - unspliced), strict=True)
    return [_term(molecule, "reconstruction", (name,), site, density) for molecule, density in pairs]


def _kl(name: str, prior: Site, guide: Site | None, share: Tensor | None) -> Term:
    """Log q - log p of a latent site; `share` is what an autoguide's own variable adds to log q."""
    if guide is not None and share is None and [f.name for f in prior["cond_indep_stack"]] == [CELLS]:
        expected = normal_kl(guide["fn"], prior["fn"])
        if expected is not None and guide["mask"] is None and prior["mask"] is None:
            return _kl_of_normals(name, prior, guide, expected)
    p, axes = _on_plates(prior, _density(prior))
    if guide is None:
        return Term(f"kl_{name}", "kl", (name,), -p, axes)
    q, q_axes = _on_plates(guide, _density(guide))
    if share is not None:
        q = q + share
    if q_axes != axes:
        q, p, axes = q.sum(), p.sum(), ()
    return Term(f"kl_{name}", "kl", (name,), q - p, axes)


def _closed(name: str, prior: Site, guide: Site | None) -> Term | None:
    """KL(q || p) of a latent site in closed form; None where there is none."""
    if guide is None:
        return None
    expected = normal_kl(guide["fn"], prior["fn"])
    if expected is not None and {f.name for f in prior["cond_indep_stack"]} == {CELLS} and guide["mask"] is None:
        parts = (expected * guide["scale"]).reshape(-1, expected.shape[-1])
        return Term(f"kl_{name}", "kl", (name,), parts, (CELLS, DIMENSIONS), parts.sum(0))
    try:
        cost = scale_and_mask(kl_divergence(guide["fn"], prior["fn"]), guide["scale"], guide["mask"])
    except NotImplementedError:
        return None
    # Of masked sites Pyro gives a plain 0.
    return _term(f"kl_{name}", "kl", (name,), prior, torch.as_tensor(cost))


def _kl_of_normals(name: str, prior: Site, guide: Site, expected: Tensor) -> Term:
    """By cell and dimension, where both are independent Normals over d dimensions."""
    q, p = (site["fn"].base_dist.log_prob(site["value"]) * site["scale"] for site in (guide, prior))
    parts = (q - p).reshape(-1, q.shape[-1])
    mean = (expected * guide["scale"]).reshape(-1, q.shape[-1]).sum(0)
    return Term(f"kl_{name}", "kl", (name,), parts, (CELLS, DIMENSIONS), mean)


# What an autoguide draws together


class _Left(NamedTuple):
    """Log-density of an autoguide's own variable that is no single site's."""

    name: str
    site: Site
    sites: tuple[str, ...]
    density: Tensor


class _Drawn(NamedTuple):
    """Log q of autoguides' own variables: what sites have of it, and what is left."""

    shares: dict[str, Tensor]
    left: list[_Left]


def draws_together(guide: Callable[..., Any], program: Callable[..., Any], batch: Any) -> bool:
    """Whether a guide draws variables of its own, from which it computes the program's latent sites."""
    drawn = poutine.trace(guide).get_trace(batch)
    names = {name for name, _ in sites_of(poutine.trace(poutine.replay(program, trace=drawn)).get_trace(batch))}
    return any(name not in names for name, _ in sites_of(drawn))


def together(guide: Trace, latent: Any) -> dict[str, list[str]]:
    """The guide's own variables, each with the latent sites that are computed from it, which follow it as points."""
    found: dict[str, list[str]] = {}
    own, own_of_cells = None, False
    for name, site in sites_of(guide):
        of_cells = CELLS in {frame.name for frame in site["cond_indep_stack"]}
        if name not in latent:
            own, own_of_cells = found.setdefault(name, []), of_cells
        elif own is not None and isinstance(site["fn"], dist.Delta) and of_cells <= own_of_cells:
            own.append(name)
    return found


def columns(own: Site, latent: dict[str, Site], sites: Sequence[str]) -> dict[str, slice] | None:
    """Where each site stands on the last axis of an autoguide's own variable; None where they don't fill it."""
    batch, found, start = own["fn"].batch_shape.numel(), dict[str, slice](), 0
    for name in sites:
        site = latent[name]
        size = biject_to(site["fn"].support).inverse_shape(site["value"].shape).numel() // batch
        found[name] = slice(start, start + size)
        start += size
    return found if start == own["value"].shape[-1:].numel() else None


def _drawn(guide: Trace, latent: dict[str, Site]) -> _Drawn:
    r"""Log q of the guide's own variables, handed out to the sites as far as it can be told apart.

    A variable of one site is that site's. Of several that are Normal together each has its marginal's, and what is
    left is the correlation's: $E_q[\log q(x) - \sum_k \log q(x_k)]$, the total correlation. Others are left whole.
    """
    shares, left = dict[str, Tensor](), list[_Left]()
    for name, sites in together(guide, latent).items():
        own = guide.nodes[name]
        density = _density(own)
        if len(sites) == 1:
            shares[sites[0]] = _on_plates(own, density)[0]
            continue
        marginal, where = _marginals(own["fn"]), columns(own, latent, sites)
        if marginal is None or where is None:
            left.append(_Left(name, own, tuple(sites), density))
            continue
        each = marginal.log_prob(own["value"]) * own["scale"]
        for site, place in where.items():
            n_genes = latent[site]["fn"].batch_shape.numel()
            shares[site] = each[..., place].reshape(n_genes, -1).sum(-1)
        left.append(_Left(CORRELATION, own, tuple(sites), density - each.sum(-1)))
    return _Drawn(shares, left)


def _called(sites: Sequence[str], name: str) -> str:
    return name if name == CORRELATION or not sites else TOGETHER


def _marginals(fn: Any) -> dist.Normal | None:
    """The Normals that the entries of a vector have by themselves, if it is Normal as a whole."""
    if isinstance(fn, (MultivariateNormal, torch.distributions.LowRankMultivariateNormal)):
        return dist.Normal(fn.loc, fn.variance.sqrt())
    transforms: list[Any] = getattr(fn, "transforms", [])
    if len(transforms) == 1 and isinstance(transforms[0], Correlate):
        return dist.Normal(transforms[0].loc, transforms[0].sd)
    return None
