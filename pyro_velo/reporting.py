"""A fit told in one HTML file: what was done, how training went, where the cells go, and how sure that is."""

from __future__ import annotations

import base64
import os
import platform
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyro_velo import plots
from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.options import BASIS, COLOR
from pyro_velo.plots.canvas import STATE_COLORS, STATES, categories_of
from pyro_velo.plots.curves import gene_fit
from pyro_velo.plots.elbo import best_epoch, elbo_history
from pyro_velo.plots.lookup import Annotated, bare_name, embedding_key, missing, per_cell, per_gene, shown_name
from pyro_velo.version import __version__

PORTRAITS, RATES, RANKED, TABLED = 9, 10, 25, 20
DOTS_PER_INCH = 144
PACKAGES = {"torch": "torch", "pyro": "pyro-ppl", "anndata": "anndata", "scanpy": "scanpy", "numpy": "numpy"}


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, its size in CSS pixels, and what it shows in words."""

    source: str
    width: int
    height: int
    alt: str


def report(
    adata: Annotated, path: str | Path, *, basis: str = BASIS, color: str | None = None, title: str | None = None
) -> Path:
    """Writes what a fit left in an AnnData as one self-contained HTML file, whole or not at all, and returns its path.

    Pictures are inlined and nothing is loaded from elsewhere. `basis` names the embedding: without the default one,
    the report says why its pictures are absent. `color` is the column of `obs` that names the clusters, by default
    "clusters" if that is there. A file that stands at `path` is replaced.

    Raises InputError for a key that is not there, and where `path` can't be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(
            f"Expected a folder at {str(path.parent)!r} for the report, found none. Make it, or name another."
        )
    _write_whole(path, render(adata, basis=basis, color=color, title=title))
    return path


def render(adata: Annotated, *, basis: str = BASIS, color: str | None = None, title: str | None = None) -> str:
    """The report as HTML text; see `report`."""
    if color is not None and color not in adata.obs:
        raise missing("obs", color, adata.obs.columns, "Name one of these columns, or leave color out.")
    if color is None and COLOR in adata.obs:
        color = COLOR
    environment = Environment(loader=PackageLoader("pyro_velo"), autoescape=True, undefined=StrictUndefined)
    environment.filters["pm"] = plus_minus
    return environment.get_template("report.html.j2").render(
        title=title or "RNA velocity, with its uncertainty",
        today=date.today().isoformat(),
        brief=_brief(adata),
        training=_training(adata),
        embedding=_embedding(adata, basis, color),
        clusters=_clusters(adata, color),
        color=color,
        genes=_genes(adata),
        states=list(zip(STATES, STATE_COLORS, strict=True)),
        settings=list(flattened(_settings(adata))),
        versions=versions(),
    )


def _brief(adata: Annotated) -> dict[str, Any]:
    fitted = np.isfinite(per_gene(adata, keys.FIT_ALPHA))
    uncertainty = np.asarray(per_cell(adata, keys.VELOCITY_UNCERTAINTY), dtype=np.float64)
    per_cell(adata, keys.LATENT_TIME)
    return {
        "cells": len(adata.obs),
        "genes": len(fitted),
        "fitted": int(fitted.sum()),
        "unfitted": int((~fitted).sum()),
        "uncertainty": float(np.nanmedian(uncertainty)),
    }


def _training(adata: Annotated) -> dict[str, Any]:
    history = elbo_history(adata)
    chart = picture(lambda ax: plots.elbo(history, ax=ax), 6.4, 3.2, "Line chart: ELBO per cell against the epoch.")
    epoch, train = (np.asarray(history[name], dtype=np.float64) for name in ("epoch", "train"))
    best = best_epoch(history)
    told: dict[str, Any] = {"picture": chart, "epochs": f"{epoch[-1]:g}" if len(epoch) else "0", "best": None}
    # A fit by another ELBO than Pyro's own has none.
    terms = (history.get("terms") or {}).get("held_out")
    told["terms"] = picture_of(plots.elbo_terms(history), "Line charts: each term of the ELBO.") if terms else None
    if best is not None:
        seen = epoch[np.isfinite(np.asarray(history["held_out"], dtype=np.float64))]
        at_best = float(np.interp(best[0], epoch, train))
        told |= {"best": f"{best[0]:g}", "held_out": best[1], "gap": at_best - best[1], "rising": best[0] == seen[-1]}
    return told


def _embedding(adata: Annotated, basis: str, color: str | None) -> dict[str, Any]:
    """The pictures on the embedding, or None and the reason for each that can't be drawn."""
    cells, velocity = embedding_key(basis), keys.velocity_embedding(basis)
    name = shown_name(basis)
    told: dict[str, Any] = dict.fromkeys(("stream", "arrows", "time", "uncertainty"), None)
    told |= {"name": name, "reason": None, "stream_reason": None}
    if cells not in adata.obsm:
        error = missing(
            "obsm", cells, adata.obsm.keys(), "Compute it (scanpy: sc.tl.umap(adata)), fit, and report again."
        )
        if bare_name(basis) != BASIS:
            raise error
        return told | {"reason": str(error)}
    coloured = f", cells coloured by {color}" if color else ""
    unsure = keys.VELOCITY_UNCERTAINTY
    told["time"] = picture(
        lambda ax: plots.latent_time(adata, basis, ax=ax),
        6,
        5,
        f"Cells on the {name} embedding, coloured by latent time.",
    )
    told["uncertainty"] = picture(
        lambda ax: plots.uncertainty(adata, basis, ax=ax),
        6,
        5,
        f"Cells on the {name} embedding, coloured by uncertainty.",
    )
    if velocity not in adata.obsm:
        return told | {
            "stream_reason": str(missing("obsm", velocity, adata.obsm.keys(), "Fit with the embedding in place."))
        }
    told["stream"] = picture(
        lambda ax: plots.stream(adata, basis, color=color, ax=ax),
        7.5,
        6,
        f"Velocity as stream lines on {name}{coloured}.",
    )
    told["arrows"] = picture(
        lambda ax: plots.grid(adata, basis, shade=unsure, ax=ax),
        6,
        5,
        f"Velocity arrows on {name}, paler where uncertain.",
    )
    return told


def _clusters(adata: Annotated, color: str | None) -> list[dict[str, Any]]:
    """Cells, median latent time and median uncertainty of each cluster, earliest first; none without clusters."""
    groups = None if color is None else categories_of(adata.obs[color])
    if groups is None:
        return []
    time, unsure = (
        np.asarray(adata.obs[name], dtype=np.float64) for name in (keys.LATENT_TIME, keys.VELOCITY_UNCERTAINTY)
    )
    rows = []
    for code, name in enumerate(groups.categories):
        own = groups.codes == code
        if own.any():
            rows.append(
                {"name": name, "cells": int(own.sum()), "time": np.median(time[own]), "unsure": np.median(unsure[own])}
            )
    return sorted(rows, key=lambda row: float(row["time"]))


def _genes(adata: Annotated) -> dict[str, Any]:
    ranked = plots.best_genes(adata, RANKED)
    explained = dict(zip(map(str, adata.var_names), per_gene(adata, keys.FIT_R2), strict=True))
    fits = {gene: gene_fit(adata, gene) for gene in ranked[:TABLED]}
    table = [
        {"name": gene, "explained": explained[gene], "rates": list(zip(fit.mean, fit.sd, strict=True))}
        for gene, fit in fits.items()
    ]
    few = ranked[:RATES]
    return {
        "portraits": [_portrait(adata, gene) for gene in ranked[:PORTRAITS]],
        "rates": picture(
            lambda ax: plots.rates(adata, few, ax=ax), 6.6, 1.4 + 0.42 * len(few),
            f"Rates and switching times with 90 % intervals, of {', '.join(few)}.",
        ),
        "ranking": picture(
            lambda ax: plots.gene_ranking(adata, RANKED, ax=ax), 5.4, 1.0 + 0.21 * len(ranked),
            f"Genes by variance explained, best first: {', '.join(ranked)}.",
        ),
        "table": table,
    }  # fmt: skip


def _portrait(adata: Annotated, gene: str) -> Picture:
    return picture(
        lambda ax: plots.phase_portrait(adata, gene, key=False, ax=ax), 4.2, 3.4,
        f"Phase portrait of {gene}: unspliced against spliced RNA, cells coloured by state, with the fitted curve.",
    )  # fmt: skip


def picture(draw: Callable[[Axes], Axes], width: float, height: float, alt: str) -> Picture:
    """What `draw` draws on an ax of `width` x `height` inches, on a figure of which pyplot knows nothing."""
    figure = Figure(figsize=(width, height))
    draw(figure.add_axes((0, 0, 1, 1)))  # labels and legends lie outside, and saving makes room for them
    return picture_of(figure, alt)


def picture_of(figure: Figure, alt: str) -> Picture:
    """A figure as it is."""
    FigureCanvasAgg(figure)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.05, facecolor="white")
    png = file.getvalue()
    pixels = struct.unpack(">II", png[16:24])  # a PNG's header holds its size there
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    across, down = (round(count * 96 / DOTS_PER_INCH) for count in pixels)
    return Picture(source, across, down, alt)


def plus_minus(pair: tuple[float, float]) -> str:
    """Mean and sd, to two significant digits of the sd.

    >>> plus_minus((0.53217, 0.0412)), plus_minus((12.3, 0.0))
    ('0.532 ± 0.041', '12.3')
    """
    mean, sd = map(float, pair)
    if not (np.isfinite(sd) and sd > 0):
        return f"{mean:.3g}"
    digits = int(np.clip(1 - np.floor(np.log10(sd)), 0, 6))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def versions() -> dict[str, str]:
    """What the report was made with."""
    found = {"pyro_velo": __version__}
    for name, package in PACKAGES.items():
        try:
            found[name] = installed(package)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": platform.python_version(), "platform": platform.platform()}


def _settings(adata: Annotated) -> dict[str, Any]:
    return {name: value for name, value in adata.uns[keys.UNS].items() if name != "elbo_history"}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, text); long arrays by their shape.

    >>> list(flattened({"seed": 0, "train": {"lr": 0.01}}))
    [('seed', '0'), ('train.lr', '0.01')]
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, np.ndarray) and value.size > 8:
            yield f"{prefix}{name}", f"array of shape {value.shape}"
        else:
            yield f"{prefix}{name}", str(value)


def _write_whole(path: Path, text: str) -> None:
    """Under another name first, then renamed: a reader, or a crash, never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"Expected to write the report to {str(path)!r}: {error.strerror}. Name another path."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
