"""What came of a calibration: the counts of every fit, and their table of coverage, sharpness and ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any

import numpy as np
import pandas as pd

from pyro_velo.errors import InputError
from pyro_velo.tallies import LEVELS, Ecdf, Tally, ecdf

SHARP = 0.9
"""The level whose mean width stands in the table."""


@dataclass(frozen=True)
class Record:
    """One fit: the tally of each quantity, and the rank of one of its values, chosen at random."""

    tallies: dict[str, Tally]
    ranks: dict[str, int]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"tallies": {name: each.to_plain() for name, each in self.tallies.items()}, "ranks": self.ranks}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Record:
        """Back again, to the bit."""
        return cls({name: Tally.from_plain(each) for name, each in plain["tallies"].items()}, dict(plain["ranks"]))


@dataclass(frozen=True)
class Calibration:
    """Fits of simulated cells held against the truth; `print` shows the table.

    `units` says what each quantity is measured in; coverage and ranks need none. `failed` has a line for each fit that
    went astray, which is no part of any number here. `interrupted`: Ctrl-C ended it before the last fit.
    """

    records: tuple[Record, ...]
    draws: int
    units: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    interrupted: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no number."""
        if not self.records:
            raise InputError("Expected one fit or more that succeeds; got none. Look at `failed`, or fit for longer.")

    @cached_property
    def totals(self) -> dict[str, Tally]:
        """Each quantity's tally over all fits, those with no value left out."""
        names = dict.fromkeys(name for record in self.records for name in record.tallies)
        found = {name: reduce(add, self._of(name)) for name in names}
        return {name: total for name, total in found.items() if total.n}

    def coverage(self, name: str, level: float = SHARP) -> tuple[float, float]:
        """The share of a quantity's truths that their central interval of `level` covers, and its standard error.

        The error is that between fits, because cells and genes of one fit err together; NaN where there is one fit.
        """
        return _mean_and_error([each.coverage[level] for each in self._of(name) if each.n])

    def crps(self, name: str) -> tuple[float, float]:
        """A quantity's mean CRPS in units of the truths' sd, with its error between fits (`Tally.skill`)."""
        sd = self.totals[name].sd
        return _mean_and_error([each.mean_crps / sd if sd else math.nan for each in self._of(name) if each.n])

    def ecdf(self, name: str) -> Ecdf:
        """The ECDF of one rank a fit, which are independent, with the band."""
        self._of(name)
        chosen = [record.ranks[name] for record in self.records if name in record.ranks]
        return ecdf(np.bincount(chosen, minlength=self.draws + 1))

    def frame(self) -> pd.DataFrame:
        """A row for each quantity.

        Coverage and its standard error; the mean width of the 90 % interval and the CRPS in `unit`; mean and root mean
        square of the z-scores; the shrinkage; whether the ranks stay within their band.
        """
        rows = {}
        for name, total in self.totals.items():
            shares = {level: self.coverage(name, level) for level in LEVELS}
            rows[name] = {
                **{f"{level:.0%}": share for level, (share, _) in shares.items()},
                **{f"{level:.0%} error": error for level, (_, error) in shares.items()},
                f"width {SHARP:.0%}": total.widths[SHARP],
                "CRPS": total.mean_crps,
                "z mean": total.bias,
                "z rms": total.overconfidence,
                "shrinkage": total.shrinkage,
                "ranks": "inside" if self.ecdf(name).inside else "outside",
                "unit": self.units.get(name, ""),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def table(self) -> str:
        """The table as aligned text: of each interval the share that it covers, ± the standard error between fits."""
        frame = self.frame()
        shown = pd.DataFrame(index=frame.index)
        for level in LEVELS:
            name = f"{level:.0%}"
            pairs = zip(frame[name], frame[f"{name} error"], strict=True)
            shown[name] = [f"{share:.3f}" + ("" if math.isnan(e) else f" ± {e:.3f}") for share, e in pairs]
        for name in frame.columns[2 * len(LEVELS) : -2]:
            shown[name] = [f"{value:.3g}" for value in frame[name]]
        shown[["ranks", "unit"]] = frame[["ranks", "unit"]]
        return "\n".join([f"{self.title}:", "", shown.to_string(), "", *self._notes()]).rstrip()

    __str__ = table

    @property
    def title(self) -> str:
        """What it is about."""
        n = len(self.records)
        return f"Coverage of central intervals, {n} fit{'s' if n > 1 else ''} with {self.draws} draws"

    def to_json(self) -> str:
        """Everything as JSON: the table by quantity (null for no number), and how it was made."""
        rows = self.frame().to_dict(orient="index")
        plain = {
            name: {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in row.items()}
            for name, row in rows.items()
        }
        told = {"fits": len(self.records), "draws": self.draws, "failed": list(self.failed)}
        told |= {"interrupted": self.interrupted, "about": dict(self.about), "quantities": plain}
        return json.dumps(told, indent=2, allow_nan=False) + "\n"

    def _of(self, name: str) -> list[Tally]:
        found = [record.tallies[name] for record in self.records if name in record.tallies]
        if not found:
            known = ", ".join(dict.fromkeys(name for record in self.records for name in record.tallies))
            raise InputError(f"Expected a quantity among {known}; got {name!r}. Name one of them.")
        return found

    def _notes(self) -> list[str]:
        notes = ["Interrupted before the last fit."] if self.interrupted else []
        return notes + [f"Left out, because it failed: {line}" for line in self.failed]


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error
