"""Which likelihood, networks and latent size explain held-out cells best: many autoencoders, one table."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from pyro_velo.clustering import TRAINING, elbo_for
from pyro_velo.data import check_output, read, whole
from pyro_velo.data.profile_data import ProfileData, profile_data
from pyro_velo.encoders import Encoder
from pyro_velo.errors import InputError
from pyro_velo.evidence import checked_split, evidence
from pyro_velo.likelihoods import PROFILE_LIKELIHOODS, Likelihood
from pyro_velo.models.vae import VAE
from pyro_velo.options import SamplerName, SweepOptions
from pyro_velo.plots import sweep as pictures
from pyro_velo.profiles import Profiles
from pyro_velo.studies import Report, Score, Search, Trial, run
from pyro_velo.train import Fitted, Training, TrainSettings, split, train

if TYPE_CHECKING:
    from anndata import AnnData

COLUMNS = ("trial", "likelihood", "hidden", "n_latent", "bound", "error", "seconds", "epochs", "state", "chosen")


@dataclass(frozen=True)
class SweepGrid:
    """What is varied; the defaults are the grid of seed 001 (3.3), and the latent sizes of Grønbech et al. (2020).

    Attributes:
        likelihoods: of counts, so that all bounds are of the same numbers. hidden: the layers of the decoder, from z
        outwards; the encoder has them the other way round. latents: sizes of z.
    """

    likelihoods: Sequence[Likelihood] = tuple(PROFILE_LIKELIHOODS[name]() for name in SweepOptions.likelihoods)
    hidden: Sequence[Sequence[int]] = SweepOptions.hidden
    latents: Sequence[int] = SweepOptions.latents

    def __post_init__(self) -> None:
        """Refuse what can't be compared, and sizes that no network has."""
        for likelihood in self.likelihoods:
            if not likelihood.counts:
                raise InputError(
                    f"Expected likelihoods of counts ({', '.join(COUNTED)}), whose bounds are of the same numbers; got "
                    f"{likelihood!r}, whose density is of others. Leave it out, or fit it by itself."
                )
        for name, values in self.choices.items():
            if not values or len(set(values)) < len(values):
                raise InputError(f"Expected each {name} once, and one or more; got {list(values)}. Name each once.")
        sizes = [*self.latents, *(size for layers in self.hidden for size in layers)]
        if min(sizes) < 1:
            raise InputError(f"Expected sizes of 1 or more; got {min(sizes)}. Leave it out.")

    @property
    def choices(self) -> dict[str, list[str | int]]:
        """The same by name; layers as "100-250"."""
        return {
            "likelihood": [name_of(likelihood) for likelihood in self.likelihoods],
            "hidden": [layers_in_words(layers) for layers in self.hidden],
            "n_latent": list(self.latents),
        }

    def recipe(self, choice: Mapping[str, Any]) -> tuple[VAE, Encoder]:
        """The model and the guide of a choice."""
        likelihood = next(each for each in self.likelihoods if name_of(each) == choice["likelihood"])
        layers = next(each for each in self.hidden if layers_in_words(each) == choice["hidden"])
        return VAE(likelihood, choice["n_latent"], tuple(layers)), Encoder(tuple(reversed(layers)))


COUNTED = tuple(name for name, likelihood in PROFILE_LIKELIHOODS.items() if likelihood.counts)


def name_of(likelihood: Likelihood) -> str:
    """What a table calls it.

    >>> name_of(PROFILE_LIKELIHOODS["nb"]())
    'NB'
    """
    return repr(likelihood).removesuffix("()")


def layers_in_words(layers: Sequence[int]) -> str:
    """Sizes of layers in one word.

    >>> layers_in_words((100, 250)), layers_in_words(())
    ('100-250', 'linear')
    """
    return "-".join(map(str, layers)) or "linear"


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep is run: `training` holds for each trial, with a seed of its own; the others are those of `Search`."""

    training: TrainSettings = TRAINING
    sampler: SamplerName = "grid"
    trials: int | None = None
    prune: bool = True
    startup: int = 5

    def __post_init__(self) -> None:
        """Refuse what no sweep can be run with."""
        if self.trials is not None and self.trials < 1:
            raise InputError(f"Expected trials of 1 or more; got {self.trials}. Leave it out for the whole grid.")
        if self.startup < 1:
            raise InputError(f"Expected startup of 1 or more; got {self.startup}. Leave it out.")


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep; `interrupted` says whether Ctrl-C ended it before the last."""

    trials: tuple[Trial, ...]
    grid: SweepGrid = field(repr=False)
    n_held_out: int
    interrupted: bool = False

    @property
    def best(self) -> Trial | None:
        """The trial with the highest bound; None where none came to its end."""
        whole = [trial for trial in self.trials if trial.score is not None]
        return max(whole, key=lambda trial: trial.score.value if trial.score else -math.inf, default=None)

    def recipe(self) -> tuple[VAE, Encoder]:
        """The model and the guide of the best trial, to fit them by `vae`; raises `InputError` where there is none."""
        if self.best is None:
            raise InputError("Expected a trial that came to its end; got none. Look at the table for what went wrong.")
        return self.grid.recipe(self.best.choice)

    def frame(self) -> pd.DataFrame:
        """A row a trial, in the order in which they were run; nats per held-out cell."""
        rows = [self._row(trial) for trial in self.trials]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _row(self, trial: Trial) -> dict[str, Any]:
        score = trial.score
        more: Mapping[str, Any] = {} if score is None else score.more
        return {
            "trial": trial.number,
            **{name: trial.choice.get(name) for name in ("likelihood", "hidden", "n_latent")},
            "bound": math.nan if score is None else score.value,
            "error": more.get("error", math.nan),
            "seconds": round(trial.seconds, 2),
            "epochs": more.get("epochs", math.nan),
            "state": trial.state,
            "chosen": trial is self.best,
        }

    def table(self) -> str:
        """The trials in words, the best first, and the choice."""
        frame = self.frame().sort_values("bound", ascending=False, kind="stable", na_position="last")
        lines = [f"{'trial':>5}  {'likelihood':10}  {'hidden':>16}  {'latent':>6}  {'bound/cell':>11}  {'error':>7}"]
        for row in frame.itertuples():
            bound = row.state if math.isnan(row.bound) else f"{row.bound:11.2f}  {row.error:7.2f}"
            lines.append(f"{row.trial:5d}  {row.likelihood:10}  {row.hidden:>16}  {row.n_latent:6d}  {bound}")
        if self.best is not None:
            lines.append(f"Choice: {', '.join(f'{name} {value}' for name, value in self.best.choice.items())}")
        return "\n".join(lines)


def sweep(
    adata: AnnData,
    grid: SweepGrid | None = None,
    *,
    seed: int = 0,
    settings: SweepSettings | None = None,
    data: ProfileData | None = None,
    study: str | Path | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Fit a `VAE` for each choice of `grid`, and score all on the same held-out cells by the importance-weighted bound.

    Bounds are of the probability of the same counts, so those of different likelihoods can be compared; their errors
    are standard errors over cells, which trials share: differences between trials are surer than these. Trials whose
    held-out ELBO is below the median of earlier ones, once the KL is in, are given up. `study` is a sqlite file in
    which trials are kept, and found again: Ctrl-C loses the one that runs, and the same call goes on, to the bit.

    Each trial has a seed of its own, drawn from `seed` and its number. Memory: the profiles once more.

    Raises `InputError` without optuna (`pip install 'pyro-velo[sweep]'`), for bad data, fewer than two held-out cells,
    and a study of another sweep.

    >>> import pyro_velo as pv
    >>> found = pv.sweep(adata, pv.SweepGrid(latents=(5, 10)), study="sweep.sqlite")  # doctest: +SKIP
    >>> fit = pv.vae(*found.recipe(), adata)  # doctest: +SKIP
    """
    grid, settings = grid or SweepGrid(), settings or SweepSettings()
    data = data or profile_data(adata)
    training = replace(settings.training, seed=seed)
    held_out = len(checked_split(len(data.profiles), training.held_out, seed)[1])
    if data.profiles.size_factors is None:
        raise InputError("Expected counts; got profiles without size factors. Call profile_data with counts=True.")
    search = Search(
        grid.choices, seed, settings.sampler, settings.trials, settings.prune, settings.startup, _warmup(training, data)
    )

    def objective(number: int, choice: Mapping[str, Any], report: Report) -> Score:
        return _scored(grid.recipe(choice), data, training, search.seed_of(number), report, progress)

    about = {"training": asdict(training), "n_genes": data.profiles.n_genes}
    about |= {name: data.describe()[name] for name in ("n_cells", "checksum")}
    trials, interrupted = run(search, objective, about=about, path=None if study is None else Path(study))
    return Sweep(tuple(trials), grid, held_out, interrupted)


def _scored(
    recipe: tuple[VAE, Encoder],
    data: ProfileData,
    training: TrainSettings,
    seed: int,
    report: Report,
    progress: bool | None,
) -> Score:
    """One trial: a fit, whose looks are reported, and its score. Ctrl-C goes on up."""
    model, guide = recipe
    cells = arranged(data.resident, training.held_out, seed, training.seed)

    def looked(state: Training) -> None:
        report(state.history.held_out[-1], state.epoch)

    fitted: Fitted = train(
        model, guide, cells, settings=replace(training, seed=seed), elbo=elbo_for(model),
        on_evaluation=looked, progress=progress,
    )  # fmt: skip
    if fitted.interrupted:
        raise KeyboardInterrupt
    bound = evidence(fitted, cells, seed=training.seed).iw_bound
    error = float(bound.std(ddof=1) / math.sqrt(len(bound)))
    return Score(float(bound.mean()), {"error": error, "epochs": fitted.training.epoch})


def arranged(cells: Profiles, share: float, seed: int, of: int) -> Profiles:
    """The cells in an order in which a run of `seed` holds out those that a run of seed `of` holds out.

    So each trial starts from numbers of its own, and all are trained and scored on the same cells.
    """
    index = torch.empty(len(cells), dtype=torch.long)
    for places, wanted in zip(split(len(cells), share, seed), split(len(cells), share, of), strict=True):
        index[places] = wanted
    return cells.among(index.to(cells.device))


def _warmup(training: TrainSettings, data: ProfileData) -> int:
    """The epoch before which no trial is given up: until the KL is in, looks are of another optimum."""
    n_train = len(split(len(data.profiles), training.held_out, training.seed)[0])
    steps = max(1, math.ceil(n_train / training.batch_size))
    epochs = training.max_epochs or math.ceil(training.max_steps / steps)
    return round(training.warmup * epochs)


def sweep_file(path: Path, output: Path, options: SweepOptions) -> Sweep:
    """Read, sweep what the options name, and write the table and the picture; what can be checked is checked before.

    Ctrl-C ends the trial that runs, and those before it are written.
    """
    check_output(output, options.overwrite, source=path, formats=(".csv",))
    if options.picture is not None:
        check_output(options.picture, options.overwrite, source=path, formats=pictures.FORMATS)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    grid = grid_of(options)
    settings = SweepSettings(_training(options), options.sampler, options.trials, options.prune)
    data = profile_data(
        adata := read(path),
        layer=options.layer,
        depth=options.depth,
        condition_key=options.condition_key,
        covariates=options.covariates,
    )
    found = sweep(adata, grid, seed=options.seed, settings=settings, data=data, study=options.study)
    text = io.StringIO()
    found.frame().to_csv(text, index=False)
    _write(output, options, lambda partial: partial.write_text(text.getvalue(), encoding="utf-8"))
    if options.picture is not None and found.best is not None:
        _write(options.picture, options, lambda partial: _draw(found.frame(), partial))
    return found


def _draw(frame: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    pictures.sweep_bounds(frame, ax=figure.subplots())
    figure.savefig(path, dpi=144)


def grid_of(options: SweepOptions) -> SweepGrid:
    """The grid that the options name; raises `InputError` as `SweepGrid`, and for a likelihood that is none."""
    for name in options.likelihoods:
        if name not in PROFILE_LIKELIHOODS:
            raise InputError(f"Expected likelihoods of {', '.join(COUNTED)}; got {name!r}. Name these.")
    return SweepGrid([PROFILE_LIKELIHOODS[name]() for name in options.likelihoods], options.hidden, options.latents)


def _training(options: SweepOptions) -> TrainSettings:
    given = {"max_epochs": options.max_epochs, "batch_size": options.batch_size}
    return replace(TRAINING, **{name: value for name, value in given.items() if value is not None})


def _write(path: Path, options: SweepOptions, write: Callable[[Path], object]) -> None:
    with whole(path, options.overwrite, formats=()) as partial:
        write(partial)
