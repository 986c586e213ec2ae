"""What came of a diagnosis: its findings and the figures that they come from, as table, JSON, pictures and page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from pyro_velo import plots
from pyro_velo.doctor.collapse import DEAD, Collapse, StateUse
from pyro_velo.doctor.findings import Finding, Measured
from pyro_velo.doctor.genes import Genes
from pyro_velo.doctor.tightness import Tightness
from pyro_velo.plots import diagnosis as pictures
from pyro_velo.reporting import Picture, picture, picture_of, versions
from pyro_velo.states import STATES
from pyro_velo.version import __version__

SHOWN_GENES = 15
HEALTHY = "No finding: nothing that is looked for is wrong with this fit."


@dataclass(frozen=True)
class Parts:
    """The figures of a fit by what they are of; `tightness` is None without held-out cells, `states` without states."""

    history: Mapping[str, Any]
    collapse: Collapse | None
    states: StateUse | None
    tightness: Tightness | None
    genes: Genes
    gene_names: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a fit; `print` shows it.

    `findings`, the first to be mended first, none where the fit is in order; `consequences`, those that findings bring
    about; `measured`, the figures that the rules looked at; `parts`, where these come from, None for a fit that ended
    in NaN.
    """

    findings: tuple[Finding, ...]
    consequences: tuple[Finding, ...]
    measured: Measured
    parts: Parts | None

    @property
    def codes(self) -> tuple[str, ...]:
        """The findings' codes."""
        return tuple(finding.code for finding in self.findings)

    def table(self) -> str:
        """The findings with their remedies, then their consequences, a paragraph each."""
        if not self.findings:
            return HEALTHY
        lines = []
        for each in self.findings:
            lines += [f"{each.code} ({each.severity}): {each.words}", f"  {_beyond(each)}", f"  {each.remedy}", ""]
        if self.consequences:
            lines += ["Which brings about:"]
            lines += [f"  {each.code}: {each.words}" for each in self.consequences]
        return "\n".join(lines).rstrip()

    __str__ = table

    def to_json(self) -> str:
        """Findings, consequences and figures as JSON; null for what was not measured."""
        told = {
            "version": __version__,
            "findings": [_as_json(asdict(each)) for each in self.findings],
            "consequences": [_as_json(asdict(each)) for each in self.consequences],
            "measured": _as_json(asdict(self.measured)),
        }
        return json.dumps(told, indent=2, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One self-contained page: the verdict, tables and pictures."""
        environment = Environment(loader=PackageLoader("pyro_velo"), autoescape=True, undefined=StrictUndefined)
        return environment.get_template("diagnosis.html.j2").render(
            healthy=HEALTHY,
            findings=[{"beyond": _beyond(each), **vars(each)} for each in self.findings],
            consequences=self.consequences,
            sections=list(_sections(self.parts)) if self.parts else [],
            figures=[(name.replace("_", " "), _shown(value)) for name, value in asdict(self.measured).items()],
            versions=versions(),
        )


def _beyond(each: Finding) -> str:
    """The figure and its threshold with its source."""
    figure = "" if math.isnan(each.figure) else f"{each.figure:.3g}, threshold {each.threshold:.3g}: "
    return f"{figure}{each.source}."


@dataclass(frozen=True)
class Section:
    """A part of the page: what it says, a picture, and rows of a table whose first is its head."""

    title: str
    words: str
    picture: Picture | None = None
    rows: tuple[tuple[str, ...], ...] = ()


def _sections(parts: Parts) -> Iterator[Section]:
    yield Section(
        "Training",
        "Both curves should climb, level off and stay close. The held-out one is at KL weight 1 with the same noise at "
        "every look; where it swings, the parameters do.",
        _picture(lambda ax: plots.elbo(parts.history, ax=ax), "Line chart: ELBO per cell against the epoch.", 6.4, 3.2),
    )
    if (parts.history.get("terms") or {}).get("held_out"):
        yield Section(
            "What the ELBO is made of",
            "Each summand in nats per cell, at KL weight 1: what explains the data, less what each latent site costs "
            "(KL). Penalties are no part of it.",
            picture_of(plots.elbo_terms(parts.history), "Line charts: each term of the ELBO, training and held out."),
        )
    if parts.collapse is not None:
        yield _latent(parts.collapse)
    if parts.tightness is not None:
        yield from _bounds(parts.tightness)
    yield _loss(parts)
    if parts.genes.sites or parts.states is not None:
        yield _rates(parts.genes)
    if parts.states is not None:
        yield _states(parts.states)


def _latent(found: Collapse) -> Section:
    words = (
        f"{int(found.active.sum())} of {len(found.kl)} dimensions are active: their mean varies over cells by more "
        "than 0.01 (Burda et al. 2016). An idle one costs nothing and says nothing."
    )
    if math.isfinite(found.information):
        words += (
            f" The mean KL of {found.mean_kl:.2f} nats is {found.information:.2f} nats of information on the cell (at "
            f"most {math.log(found.cells):.2f} among {found.cells} cells) and {found.gap:.2f} by which all cells "
            "together miss the prior (Hoffman & Johnson 2016)."
        )
    order = np.argsort(-(found.kl if found.apart else found.activity), kind="stable")
    rows = [("dimension", "KL, nats", "variance of its mean", "log-likelihood it carries, nats", "share")]
    rows += [
        (
            str(d),
            f"{found.kl[d]:.3f}" if found.apart else "-",
            f"{found.activity[d]:.3f}",
            _hundredths(found.use[d]),
            _hundredths(found.share_used[d]),
        )
        for d in order
    ]
    if not found.apart:
        words += " Its prior is a mixture, which leaves no dimension a KL of its own."
        return Section("The latent space", words, rows=tuple(rows))
    alt = "Bar chart: KL of each latent dimension, active ones in colour."
    drawn = _picture(lambda ax: pictures.kl_by_dimension(found.kl, found.active, ax=ax), alt)
    return Section("The latent space", words, drawn, tuple(rows))


def _bounds(found: Tightness) -> Iterator[Section]:
    words = (
        f"Over {len(found.k_hat)} held-out cells, {found.particles[-1]} importance samples gain "
        f"{found.gap.mean():.2f} nats a cell on the ELBO: it is at least so far below the evidence. One draw's ELBO "
        f"has an sd of {math.sqrt(found.variance.mean()):.2f} nats."
    )
    yield Section(
        "How tight the bound is",
        words,
        _picture(
            lambda ax: pictures.bound_by_particles(found.particles, found.bound, ax=ax),
            "Line chart: importance-weighted bound against the number of samples.",
        ),
    )
    yield Section(
        "Importance weights",
        f"k-hat is above 0.7 in {found.unreliable:.0%} of cells, where no affordable number of samples gets to the "
        f"evidence, and above 1 in {found.without_mean:.0%}, where the weights have no mean (Vehtari et al. 2024).",
        _picture(
            lambda ax: plots.k_hat_histogram(found.k_hat, ax=ax), "Histogram of the Pareto k-hat of held-out cells."
        ),
    )


def _loss(parts: Parts) -> Section:
    order = np.argsort(-parts.genes.loss_share, kind="stable")[:SHOWN_GENES]
    names, shares = [parts.gene_names[g] for g in order], parts.genes.loss_share[order]
    fair = 1 / len(parts.gene_names)
    return Section(
        "The loss by gene",
        "Each gene's share of the differences in log-likelihood between cells, which no unit changes. "
        f"Of {len(parts.gene_names)} genes that count alike each has {fair:.2%}.",
        _picture(
            lambda ax: pictures.loss_by_gene(dict(zip(names, shares, strict=True)), fair=fair, ax=ax),
            f"Bar chart: share of the loss of {', '.join(names)}.",
            5.4,
            1.0 + 0.24 * len(names),
        ),
    )


def _rates(found: Genes) -> Section:
    rows = [("site", "median distance, prior sds", "genes beyond 3", "median KL, nats")]
    rows += [
        (site.name, f"{site.median:.2f}", f"{site.far:.1%}", f"{float(np.median(site.kl)):.2f}") for site in found.sites
    ]
    words = "How far each gene-level site is from its prior, on the scale on which it is free."
    if not found.sites:
        words = "No gene-level site has a proper prior."
    elif math.isfinite(found.at_bound):
        words += f" {found.at_bound:.1%} of switching times are at 0 or 20."
    return Section("Rates and priors", words, rows=tuple(rows) if found.sites else ())


def _states(found: StateUse) -> Section:
    rows = [("state", "mean use", "genes in which it is dead")]
    dead = (found.share < DEAD).mean(1)
    rows += [(name, f"{use:.1%}", f"{d:.0%}") for name, use, d in zip(STATES, found.overall, dead, strict=True)]
    words = f"The mean use of a gene's states has an entropy of {found.entropy.mean():.2f} nats, of at most 1.39."
    return Section("Kinetic states", words, rows=tuple(rows))


def _picture(draw: Any, alt: str, width: float = 5.4, height: float = 3.0) -> Picture:
    return picture(draw, width, height, alt)


def _as_json(told: Any) -> Any:
    """The same, with null for what is not finite."""
    if isinstance(told, Mapping):
        return {name: _as_json(value) for name, value in told.items()}
    if isinstance(told, (list, tuple)):
        return [_as_json(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


def _hundredths(value: float) -> str:
    """Two decimals; nothing is less than nothing."""
    return "-" if math.isnan(value) else f"{round(float(value), 2) + 0.0:.2f}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return "-" if value in (None, "") else str(value)
