"""How many clusters there are: one fit for each number, judged by the bound of held-out cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pyro_velo.clustering import TRAINING, Mixed, Started
from pyro_velo.disk_profiles import AnyProfiles
from pyro_velo.errors import InputError
from pyro_velo.evidence import Evidence, evidence
from pyro_velo.models.base import Guide
from pyro_velo.stages import Stages
from pyro_velo.starts import StartSettings
from pyro_velo.train import Fitted, TrainSettings

STANDARD_ERRORS = 1.0
"""Those of a paired difference within which fewer clusters are preferred (Breiman et al. 1984, 3.4.3)."""


@dataclass(frozen=True)
class NumberOfClusters:
    """Held-out bounds against the number of clusters, in nats per cell.

    `differences` are to the best number, paired by cell: mean and standard error, 0 for the best itself. `choice` is
    the smallest number within a standard error of it.
    """

    candidates: tuple[int, ...]
    bounds: tuple[float, ...]
    differences: tuple[tuple[float, float], ...]
    choice: int
    fits: Mapping[int, Fitted] = field(repr=False)

    @property
    def fitted(self) -> Fitted:
        """The fit that was chosen."""
        return self.fits[self.choice]

    def describe(self) -> dict[str, Any]:
        """Everything but the fits, as JSON."""
        found = {"candidates": self.candidates, "bounds": self.bounds, "differences": map(list, self.differences)}
        return {name: list(value) for name, value in found.items()} | {"choice": self.choice}

    @classmethod
    def of(cls, told: Mapping[str, Any], fitted: Fitted) -> NumberOfClusters:
        """What `describe` told, with the one fit that was chosen."""
        differences = tuple((mean, error) for mean, error in told["differences"])
        return cls(
            tuple(told["candidates"]), tuple(told["bounds"]), differences, told["choice"], {told["choice"]: fitted}
        )

    def table(self) -> str:
        """The same in words."""
        rows = zip(self.candidates, self.bounds, self.differences, strict=True)
        lines = [f"{k:8d}  {bound:10.2f}  {mean:+.3f} ± {error:.3f}" for k, bound, (mean, error) in rows]
        return "\n".join(("clusters  bound/cell  to the best", *lines, f"Choice: {self.choice}"))


def choose_clusters(
    model: Mixed,
    guide: Guide | None,
    cells: AnyProfiles,
    candidates: Sequence[int] = tuple(range(1, 11)),
    *,
    settings: TrainSettings | None = None,
    start: StartSettings | None = None,
    stages: Stages | None = None,
    progress: bool | None = None,
) -> NumberOfClusters:
    """Fit `model` with each number of clusters, from one start, and judge by the importance-weighted held-out bound.

    `stages` as in `fit_profiles`.

    Raises `InputError` for no candidates, and as `evidence` for fewer than two held-out cells.
    """
    if not candidates:
        raise InputError("Expected numbers of clusters to try; got none. Pass candidates=range(1, 11).")
    settings, start = settings or TRAINING, start or StartSettings()
    begun = Started.of(model, guide, cells, settings=settings, start=start, stages=stages, progress=progress)
    fits: dict[int, Fitted] = {}
    for k in sorted(set(candidates)):
        fits[k] = begun.fit(replace(model, n_clusters=k))
        if fits[k].interrupted:
            # Whichever is chosen, others are missing.
            fits = {each: replace(fitted, interrupted=True) for each, fitted in fits.items()}
            break
    return judged(fits, {k: evidence(fitted, cells) for k, fitted in fits.items()})


def judged(fits: Mapping[int, Fitted], scores: Mapping[int, Evidence]) -> NumberOfClusters:
    """The smallest number of clusters whose bound is within a standard error of the best one's, paired by cell."""
    bounds = {k: score.iw_bound for k, score in scores.items()}
    best = max(bounds, key=lambda k: bounds[k].mean())
    gaps = {k: bound - bounds[best] for k, bound in bounds.items()}
    differences = {k: (float(g.mean()), float(g.std(ddof=1) / len(g) ** 0.5)) for k, g in gaps.items()}
    choice = min(k for k, (mean, error) in differences.items() if mean >= -STANDARD_ERRORS * error)
    return NumberOfClusters(
        tuple(fits), tuple(float(b.mean()) for b in bounds.values()), tuple(differences.values()), choice, fits
    )
