"""What came of a comparison: a table, a picture, JSON and a page of their own, and the choice with its reason."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes

from pyro_velo.errors import InputError
from pyro_velo.evidence import PARTICLES
from pyro_velo.plots.comparison import comparison as picture_of
from pyro_velo.reporting import Picture, flattened, picture, plus_minus, versions
from pyro_velo.train import TrainSettings
from pyro_velo.verdict import Group, Row, mean_and_error
from pyro_velo.version import __version__

MEASURES = {"elbo": "held-out ELBO", "iw_bound": f"bound, K = {PARTICLES}", "density": "density"}
APART = (
    "Scaled layers and raw counts are different numbers on different scales, so the two tables are not ranked against "
    "each other."
)
SCALED, CENSORED, COUNTS = "scaled layers", "scaled layers, zeros censored", "raw counts"


@dataclass(frozen=True)
class Comparison:
    """The variants' scores on the same held-out cells; `print` shows the table."""

    groups: tuple[Group, ...]
    settings: TrainSettings
    n_train: int
    n_held_out: int

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every variant, group by group."""
        return tuple(row for group in self.groups for row in group.rows)

    @property
    def choice(self) -> dict[str, str | None]:
        """The variant to take, for each kind of data."""
        return {group.scored: group.choice for group in self.groups}

    @property
    def reason(self) -> dict[str, str]:
        """Why, for each kind of data."""
        return {group.scored: group.reason for group in self.groups}

    def table(self, *, markdown: bool = False) -> str:
        """The table as aligned text, or as Markdown."""
        lines = []
        for group in self.groups:
            lines += [f"{self.title(group)}:", ""]
            lines += _marked(columns(group)) if markdown else _aligned(columns(group))
            lines += ["", group.reason, ""]
        return "\n".join([*lines, *([APART] if len(self.groups) > 1 else [])]).rstrip()

    __str__ = table

    def title(self, group: Group) -> str:
        """What a table is about."""
        return f"{group.scored.capitalize()}, {self.n_held_out} held-out cells, nats per cell (± standard error)"

    def to_json(self) -> str:
        """Everything as JSON: each measure's mean and standard error, null where there is none."""
        told = {
            "version": __version__,
            "settings": asdict(self.settings),
            "cells": {"train": self.n_train, "held_out": self.n_held_out},
            "unit": "nats per cell",
            "particles": PARTICLES,
            "groups": [_group_as_json(group) for group in self.groups],
        }
        return json.dumps(told, indent=2, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One self-contained page: tables, pictures, and how to read them."""
        environment = Environment(loader=PackageLoader("pyro_velo"), autoescape=True, undefined=StrictUndefined)
        sections = [
            {"title": self.title(group), "columns": columns(group), "reason": group.reason, "picture": _picture(group)}
            for group in self.groups
        ]
        return environment.get_template("comparison.html.j2").render(
            sections=sections,
            apart=APART if len(sections) > 1 else "",
            particles=PARTICLES,
            n_train=self.n_train,
            settings=list(flattened(asdict(self.settings))),
            versions=versions(),
        )

    def plot(self, scored: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Draw the differences to the best variant with bars of 2 standard errors, for one kind of data.

        Raises `InputError` unless `scored` names one, or there is but one.
        """
        known = {group.scored: group for group in self.groups}
        if scored is None and len(known) == 1:
            scored = next(iter(known))
        if scored not in known:
            raise InputError(f"Expected scored to be one of {', '.join(known)}; got {scored!r}. Name one.")
        return _draw(known[scored], ax)


def columns(group: Group) -> dict[str, list[str]]:
    """The table, column by column, as text."""
    rows = group.rows
    table = {"variant": [row.name for row in rows]}
    for name, title in MEASURES.items():
        table[title] = [
            "-" if row.evidence is None else plus_minus(mean_and_error(getattr(row.evidence, name))) for row in rows
        ]
    table[f"{MEASURES[group.criterion].partition(',')[0]} to the best"] = [_difference(group, row.name) for row in rows]
    table["ms/step"] = ["-" if math.isnan(row.ms_per_step) else f"{row.ms_per_step:.1f}" for row in rows]
    table["epochs"] = ["-" if row.evidence is None else str(row.epochs) for row in rows]
    table["warnings"] = ["; ".join(row.warnings) for row in rows]
    return table


def _difference(group: Group, name: str) -> str:
    pair = group.differences.get(name)
    if pair is None:
        return "-"
    return "best" if pair == (0.0, 0.0) else plus_minus(pair)


def _aligned(table: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns side by side: words to the left, numbers to the right."""
    made = []
    for title, cells in table.items():
        width = max(map(len, (title, *cells)))
        made.append(
            [f"{cell:<{width}}" if title in ("variant", "warnings") else f"{cell:>{width}}" for cell in (title, *cells)]
        )
    return ["  ".join(line).rstrip() for line in zip(*made, strict=True)]


def _marked(table: Mapping[str, Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in (title, *cells)] for title, cells in table.items()]
    head, *body = (f"| {' | '.join(line)} |" for line in zip(*escaped, strict=True))
    return [head, "|" + "---|" * len(escaped), *body]


def _group_as_json(group: Group) -> dict[str, Any]:
    return {
        "scored": group.scored,
        "criterion": group.criterion,
        "choice": group.choice,
        "reason": group.reason,
        "variants": [_row_as_json(row, group.differences.get(row.name)) for row in group.rows],
    }


def _row_as_json(row: Row, difference: tuple[float, float] | None) -> dict[str, Any]:
    found = row.evidence
    measures = {
        name: None if found is None else _pair_as_json(mean_and_error(getattr(found, name))) for name in MEASURES
    }
    return {
        "name": row.name,
        **measures,
        "to_the_best": None if difference is None else _pair_as_json(difference),
        "ms_per_step": None if math.isnan(row.ms_per_step) else row.ms_per_step,
        "epochs": row.epochs,
        "gene_sites": None if found is None else list(found.sites),
        "warnings": list(row.warnings),
    }


def _pair_as_json(pair: tuple[float, float]) -> dict[str, float]:
    return {"mean": pair[0], "se": pair[1]}


def _draw(group: Group, ax: Axes | None) -> Axes:
    differences = {row.name: group.differences.get(row.name) for row in group.rows}
    what = MEASURES[group.criterion]
    return picture_of(differences, chosen=group.choice, label=f"{what}: nats per cell to the best", ax=ax)


def _picture(group: Group) -> Picture | None:
    """The picture of a group, if there is anything to compare in it."""
    if len(group.differences) < 2:
        return None
    names = ", ".join(row.name for row in group.rows)
    alt = f"Differences to the best variant with bars of 2 standard errors, for {names}."
    return picture(lambda ax: _draw(group, ax), 5.2, 0.8 + 0.36 * len(group.rows), alt)
