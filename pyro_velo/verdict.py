"""A choice among variants that were scored on the same cells, and its reason in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pyro_velo.evidence import Array, Evidence
from pyro_velo.reporting import plus_minus

CLOSE = 2.0
"""Standard errors of a paired difference within which a simpler variant is preferred."""


@dataclass(frozen=True)
class Row:
    """What came of one variant; `evidence` is None where there is no fit, and `warnings` then say why."""

    name: str
    evidence: Evidence | None = None
    ms_per_step: float = math.nan
    """Wall time of the whole fit by its gradient steps, so the looks at the held-out cells are in it."""
    epochs: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """The variants that are scored on the same numbers, and what is made of them.

    `criterion` is the measure by which they are judged. `differences` of it to the best variant, paired by cell: mean
    and standard error in nats per cell, 0 for the best itself. `choice` is None where every fit failed.
    """

    scored: str
    rows: tuple[Row, ...]
    criterion: str
    differences: dict[str, tuple[float, float]]
    choice: str | None
    reason: str


def judge(scored: str, rows: Sequence[Row]) -> Group:
    """The differences to the best row, and the choice among those that are close to it."""
    found = {row.name: row.evidence for row in rows if row.evidence is not None}
    criterion = "density" if any(each.no_kl for each in found.values()) else "iw_bound"
    if not found:
        return Group(scored, tuple(rows), criterion, {}, None, "No choice: every fit failed.")
    values: dict[str, Array] = {name: getattr(each, criterion) for name, each in found.items()}
    best = max(values, key=lambda name: values[name].mean())
    differences = {name: mean_and_error(each - values[best]) for name, each in values.items()}
    close = [name for name, (mean, error) in differences.items() if name == best or mean >= -CLOSE * error]
    # The first of the simplest: `min` keeps the order in which they were listed.
    choice = min(close, key=lambda name: len(found[name].sites))
    return Group(
        scored, tuple(rows), criterion, differences, choice, _reason(found, criterion, differences, best, choice)
    )


def _reason(
    found: Mapping[str, Evidence],
    criterion: str,
    differences: Mapping[str, tuple[float, float]],
    best: str,
    choice: str,
) -> str:
    """The choice in one sentence, with its figures."""
    what = "bound" if criterion == "iw_bound" else "predictive density"
    others = [name for name in differences if name != best]
    if not others:
        return f"Choice: {choice}, the only one that was fitted."
    next_best = max(others, key=lambda name: differences[name][0])
    other = next_best if choice == best else choice
    mean, error = differences[other]
    gap = f"{plus_minus((-mean, error))} nats per cell"
    if choice != best:
        sites, more = len(found[choice].sites), len(found[best].sites)
        why = f"simpler, with {sites} gene-level sites against {more}" if sites < more else "listed before it"
        return f"Choice: {choice}, {gap} below the best {what}, that of {best}: within 2 standard errors, and {why}."
    near = ", which is within 2 standard errors but not simpler" if mean >= -CLOSE * error else ""
    return f"Choice: {choice}, whose {what} is the best: {gap} above the next, that of {other}{near}."


def mean_and_error(values: Array) -> tuple[float, float]:
    """Mean over cells, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
