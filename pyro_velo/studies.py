"""Trials of a search, by optuna: which to run next, which to give up early, and all of them in one sqlite file.

Optuna is an extra: nothing here is needed before a search is opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_velo.errors import FitError, InputError
from pyro_velo.options import SamplerName

if TYPE_CHECKING:
    import optuna

Choices = Mapping[str, Sequence[str | int]]
Report = Callable[[float, int], None]
NAME = "pyro_velo"
NUMBER, SECONDS, ABOUT = "number", "seconds", "about"


@dataclass(frozen=True)
class Score:
    """What a trial found: its `value`, the greater the better, and what else is to be kept of it, as JSON."""

    value: float
    more: Mapping[str, Any]


Objective = Callable[[int, Mapping[str, Any], Report], Score]


@dataclass(frozen=True)
class Trial:
    """A trial that is done: its `choice`, its `score` (None where it was given up), what became of it, and how long."""

    number: int
    choice: Mapping[str, Any]
    score: Score | None
    state: str
    seconds: float


@dataclass(frozen=True)
class Search:
    """Which trials there are, and how they are chosen.

    Attributes:
        choices: the values of each parameter. seed: of the order of the grid, and of each trial. sampler: "grid" tries
        every combination once, in an order drawn from the seed; "tpe" goes where earlier trials were good (Bergstra et
        al. 2011). trials: how many; None: as many as there are combinations. prune: whether a trial whose best look is
        below the median of earlier ones at that step is given up. startup: trials before that. warmup: steps before
        that.
    """

    choices: Choices
    seed: int = 0
    sampler: SamplerName = "grid"
    trials: int | None = None
    prune: bool = True
    startup: int = 5
    warmup: int = 0

    @property
    def grid(self) -> list[dict[str, str | int]]:
        """Every combination, in an order drawn from the seed."""
        found = [dict(zip(self.choices, each, strict=True)) for each in product(*self.choices.values())]
        return [found[i] for i in np.random.default_rng(self.seed).permutation(len(found))]

    @property
    def n_trials(self) -> int:
        """How many are run; no grid has more than its combinations."""
        size = len(self.grid)
        if self.trials is None:
            return size
        return min(self.trials, size) if self.sampler == "grid" else self.trials

    def seed_of(self, number: int) -> int:
        """The seed of a trial, whenever it is run."""
        return int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])


def run(
    search: Search,
    objective: Objective,
    *,
    about: Mapping[str, Any],
    path: Path | None = None,
) -> tuple[list[Trial], bool]:
    """Run the trials that are left, and return all that are done, by number; and whether Ctrl-C ended it.

    `objective` is called with a trial's number, its choice, and a function that takes the looks of the trial, (value,
    step); where that one gives the trial up it raises. A `FitError` makes the trial a failed one. `path` is a sqlite
    file that holds the trials, in which those that are done are found again: the same run, stopped and gone on with,
    makes the same trials. One process at a time may use it. `about` is JSON that runs of one file must share.

    Raises `InputError` without optuna, and for a file that is none of its, or of another search.
    """
    _require()
    import optuna

    with _quiet(optuna):
        study = _open(optuna, search, {**about, "choices": {k: list(v) for k, v in search.choices.items()}}, path)
        interrupted = False
        for number in range(search.n_trials):
            if number in _done(study):
                continue
            try:
                _try(optuna, study, search, number, objective)
            except KeyboardInterrupt:
                interrupted = True
                break
        return [trial for _, trial in sorted(_done(study).items())], interrupted


def _try(optuna: Any, study: optuna.Study, search: Search, number: int, objective: Objective) -> None:
    """Run one trial, and tell the study what became of it; of one that ends in another error nothing is kept."""
    trial, began = _asked(optuna, study, search, number), time.perf_counter()
    states = optuna.trial.TrialState
    state, value, told = states.FAIL, None, dict[str, Any]()
    try:
        score = objective(number, trial.params, _reporter(optuna, trial, search.prune))
        state, value, told = states.COMPLETE, score.value, {"more": dict(score.more)}
    except optuna.TrialPruned:
        state = states.PRUNED
    except FitError as error:
        told = {"failed": " ".join(str(error).split())}
    finally:
        for name, each in {**told, SECONDS: time.perf_counter() - began}.items():
            trial.set_user_attr(name, each)
        study.tell(trial, value, state)


def _require() -> None:
    if find_spec("optuna") is None:
        raise InputError("Expected optuna, which searches; it is not installed. Run: pip install 'pyro-velo[sweep]'.")


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without a line on stderr for each trial; afterwards optuna is as it was."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _open(optuna: Any, search: Search, about: dict[str, Any], path: Path | None) -> optuna.Study:
    """The study, new or as it was left; trials that were cut off are told to have failed."""
    pruner = optuna.pruners.NopPruner()
    if search.prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=search.startup, n_warmup_steps=search.warmup)
    try:
        storage = None if path is None else optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        study = optuna.create_study(
            storage=storage, study_name=NAME, direction="maximize", pruner=pruner, load_if_exists=True
        )
    # Whatever a file that is none of optuna's makes it, or its database, raise.
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is no study that can be gone on with ({reason}); name another file.") from error
    words = {**about, "seed": search.seed, "sampler": search.sampler, "prune": search.prune, "startup": search.startup}
    words["warmup"] = search.warmup
    known = study.user_attrs.get(ABOUT)
    if known is None:
        study.set_user_attr(ABOUT, words)
    elif differing := [name for name in words if known.get(name) != words[name]]:
        name = differing[0]
        raise InputError(
            f"Expected {name} as in the search that {path} holds, {known.get(name)}; got {words[name]}. "
            "Give the same data, choices, settings and seed, or name another file."
        )
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _asked(optuna: Any, study: optuna.Study, search: Search, number: int) -> optuna.Trial:
    """A new trial with its choice."""
    values = {name: optuna.distributions.CategoricalDistribution(list(each)) for name, each in search.choices.items()}
    # A sampler of its own for each trial: what it draws hangs on the trials before it, and on nothing else.
    if search.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=search.seed_of(number))
    else:
        study.sampler = optuna.samplers.RandomSampler(seed=search.seed_of(number))
        if not study.get_trials(states=(optuna.trial.TrialState.WAITING,)):
            study.enqueue_trial(search.grid[number])
    trial = study.ask(values)
    trial.set_user_attr(NUMBER, number)
    return trial


def _reporter(optuna: Any, trial: optuna.Trial, prune: bool) -> Report:
    def report(value: float, step: int) -> None:
        trial.report(value, step)
        if prune and trial.should_prune():
            raise optuna.TrialPruned

    return report


def _done(study: optuna.Study) -> dict[int, Trial]:
    """The trials that need not be run again, by our number."""
    found = {}
    for trial in study.get_trials(deepcopy=False):
        told, last = trial.user_attrs, trial.last_step
        if trial.state.name == "COMPLETE":
            score, state = Score(float(trial.value or 0.0), told["more"]), "complete"
        elif trial.state.name == "PRUNED":
            score, state = None, f"pruned at {last}"
        elif trial.state.name == "FAIL" and "failed" in told:
            score, state = None, f"failed: {told['failed']}"
        else:
            continue
        found[told[NUMBER]] = Trial(told[NUMBER], dict(trial.params), score, state, told[SECONDS])
    return found
