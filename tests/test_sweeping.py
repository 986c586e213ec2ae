"""Sweeps: the same cells for every trial, the same trials after Ctrl-C, and which likelihood they prefer."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_autoencoding import command, simulated

import pyro_velo as pv
from pyro_velo import studies, sweeping
from pyro_velo.clustering import TRAINING, elbo_for
from pyro_velo.errors import FitError, InputError
from pyro_velo.evidence import evidence
from pyro_velo.likelihoods import NB, ZINB, Bernoulli, Normal, Poisson
from pyro_velo.options import SweepOptions
from pyro_velo.parsing import parse_layers, parse_sizes
from pyro_velo.plots.sweep import sweep_bounds
from pyro_velo.profiles import Profiles
from pyro_velo.studies import Score, Search, Trial, run
from pyro_velo.sweeping import SweepGrid, SweepSettings, arranged
from pyro_velo.train import split, train

CHOICES = {"a": ["x", "y"], "b": [1, 2, 3]}
GRID = SweepGrid((Poisson(), NB(), ZINB()), ((8, 12),), (2,))
QUICK = SweepSettings(replace(TRAINING, max_steps=12, evaluate_steps=4), prune=False)


def worth(number: int, choice, report) -> Score:
    """A trial that costs nothing, of which the looks rise to the value; it hangs on the choice and on the number."""
    value = CHOICES["a"].index(choice["a"]) + choice["b"] / 10 + number / 1000
    for step in (1, 2):
        report(value * step / 2, step)
    return Score(value, {"error": 0.5})


def outcomes(trials: list[Trial]) -> list:
    return [(t.number, dict(t.choice), None if t.score is None else t.score.value, t.state) for t in trials]


class Stop:
    """Ctrl-C, or what else, in the middle of one trial."""

    def __init__(self, number: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.number, self.error = number, error

    def __call__(self, number: int, choice, report) -> Score:
        if number == self.number:
            report(9.0, 1)
            raise self.error
        return worth(number, choice, report)


# Trials


def test_the_grid_tries_every_choice_once_in_an_order_of_the_seed() -> None:
    trials, interrupted = run(Search(CHOICES, seed=3, prune=False), worth, about={})
    assert not interrupted and [t.number for t in trials] == list(range(6))
    tried = [tuple(t.choice.values()) for t in trials]
    assert sorted(tried) == sorted((a, b) for a in CHOICES["a"] for b in CHOICES["b"])
    assert [dict(t.choice) for t in trials] == Search(CHOICES, seed=3).grid != Search(CHOICES, seed=4).grid
    assert {t.state for t in trials} == {"complete"} and trials[0].score.more == {"error": 0.5}
    assert [t.number for t in run(Search(CHOICES, seed=3, trials=4), worth, about={})[0]] == [0, 1, 2, 3]
    assert Search(CHOICES, trials=99).n_trials == 6 and Search(CHOICES, trials=99, sampler="tpe").n_trials == 99
    assert len({Search(CHOICES, seed=s).seed_of(k) for s in range(4) for k in range(50)}) == 200


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
@pytest.mark.parametrize("number", [3])
def test_a_search_that_is_stopped_goes_on_as_if_it_had_not(tmp_path: Path, sampler: str, number: int) -> None:
    search = Search(CHOICES, seed=1, sampler=sampler, startup=3)
    whole, _ = run(search, worth, about={"x": 1})
    done, interrupted = run(search, Stop(number), about={"x": 1}, path=tmp_path / "study")
    assert interrupted and outcomes(done) == outcomes(whole)[:number]
    again, interrupted = run(search, worth, about={"x": 1}, path=tmp_path / "study")
    assert not interrupted and outcomes(again) == outcomes(whole)
    # What is there is only read.
    assert outcomes(run(search, Stop(0, AssertionError), about={"x": 1}, path=tmp_path / "study")[0]) == outcomes(whole)


def test_a_trial_that_was_killed_is_run_again(tmp_path: Path, monkeypatch) -> None:
    """Nobody is told of kill -9: the trial still runs, as far as the file knows."""
    import optuna

    search = Search(CHOICES, seed=1)

    def killed(*arguments, **options):
        raise SystemExit

    search = replace(search, trials=2)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(optuna.Study, "tell", killed)
        run(search, worth, about={}, path=tmp_path / "study")
    assert outcomes(run(search, worth, about={}, path=tmp_path / "study")[0]) == outcomes(
        run(search, worth, about={})[0]
    )


def test_trials_below_the_median_are_given_up_once_they_may_be() -> None:
    order = [choice["b"] for choice in Search({"b": [1, 2, 3, 4, 5, 6, 7, 8]}, seed=2).grid]

    def flat(number: int, choice, report) -> Score:
        for step in range(1, 10):
            report(choice["b"], step)
        return Score(choice["b"], {})

    search = Search({"b": [1, 2, 3, 4, 5, 6, 7, 8]}, seed=2, startup=3, warmup=5)
    trials, _ = run(search, flat, about={})
    kept: list[int] = []
    for trial, value in zip(trials, order, strict=True):
        given_up = len(kept) >= 3 and value < np.median(kept)
        assert trial.state == ("pruned at 5" if given_up else "complete"), (value, kept)
        assert (trial.score is None) == given_up
        kept += [] if given_up else [value]
    assert len(kept) < 8
    assert all(t.score for t in run(replace(search, prune=False), flat, about={})[0])


def test_a_fit_that_fails_is_a_row_and_an_error_is_raised() -> None:
    search = Search(CHOICES, seed=1)
    trials, _ = run(search, Stop(2, FitError), about={})
    assert len(trials) == 6 and trials[2].score is None and trials[2].state.startswith("failed: ")
    with pytest.raises(ZeroDivisionError):
        run(search, Stop(2, ZeroDivisionError), about={})


def test_other_files_and_other_searches_are_refused(tmp_path: Path, monkeypatch) -> None:
    search = Search(CHOICES, seed=1, trials=1)
    run(search, worth, about={"x": 1}, path=tmp_path / "study")
    for other, about, match in (
        (replace(search, seed=2), {"x": 1}, "Expected seed as in the search that .*, 1; got 2"),
        (replace(search, sampler="tpe"), {"x": 1}, "Expected sampler"),
        (replace(search, choices={"a": ["x"]}), {"x": 1}, "Expected choices"),
        (search, {"x": 2}, "Expected x as in the search"),
    ):
        with pytest.raises(InputError, match=match):
            run(other, worth, about=about, path=tmp_path / "study")
    assert len(run(replace(search, trials=3), worth, about={"x": 1}, path=tmp_path / "study")[0]) == 3
    (tmp_path / "text").write_text("once upon a time " * 100)
    sqlite3.connect(tmp_path / "other").execute("create table studies (x int)").connection.commit()
    for name in ("text", "other", "no/such/folder"):
        with pytest.raises(InputError, match="is no study that can be gone on with"):
            run(search, worth, about={}, path=tmp_path / name)
    monkeypatch.setattr(studies, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Expected optuna.*pip install 'pyro-velo\[sweep\]'"):
        run(search, worth, about={})


def test_optuna_is_left_as_it_was_and_says_nothing(capfd) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    run(Search(CHOICES), worth, about={})
    assert optuna.logging.get_verbosity() == before and capfd.readouterr().err == ""


# Autoencoders


def test_whatever_a_trials_seed_the_same_cells_are_held_out() -> None:
    cells = Profiles.of_counts(torch.arange(1, 42.0)[:, None] * torch.ones(41, 3))
    train_of, held_of = (set(cells.x[index, 0].tolist()) for index in split(41, 0.2, 7))
    orders = []
    for seed in (0, 7, 123):
        found = arranged(cells, 0.2, seed, 7)
        train_index, held = split(41, 0.2, seed)
        assert set(found.x[held, 0].tolist()) == held_of and set(found.x[train_index, 0].tolist()) == train_of
        # Cell by cell, so that scores are paired; depths go with their cells.
        orders.append(found.x[held, 0].tolist())
        torch.testing.assert_close(found.size_factors[:, 0] * 21, found.x[:, 0])
    assert orders[0] == orders[1] == orders[2]
    assert torch.equal(arranged(cells, 0.2, 7, 7).x, cells.x)


@pytest.fixture(scope="module")
def adata():
    """Counts that scatter far more than Poisson's."""
    return simulated(200, noise=pv.simulate.NegativeBinomial(theta=0.5))


@pytest.fixture(scope="module")
def swept(adata, tmp_path_factory):
    """A sweep, kept in a file."""
    return pv.sweep(adata, GRID, settings=QUICK, study=tmp_path_factory.mktemp("sweep") / "study", progress=False)


def test_each_score_is_that_of_the_trial_fitted_by_itself(adata, swept) -> None:
    trial = swept.trials[1]
    model, guide = GRID.recipe(trial.choice)
    assert model.hidden == tuple(reversed(guide.hidden)) and model.n_latent == 2
    data = pv.profile_data(adata)
    seed = Search(GRID.choices).seed_of(1)
    cells = arranged(data.profiles, 0.1, seed, 0)
    alone = train(
        model, guide, cells, settings=replace(QUICK.training, seed=seed), elbo=elbo_for(model), progress=False
    )
    bound = evidence(alone, cells, seed=0).iw_bound
    assert trial.score.value == bound.mean()
    np.testing.assert_allclose(trial.score.more["error"], bound.std(ddof=1) / 20**0.5)
    assert swept.n_held_out == len(bound) == 20


def test_counts_that_scatter_more_than_poissons_prefer_the_negative_binomial(swept) -> None:
    frame = swept.frame()
    assert len(frame) == 3 and frame["chosen"].sum() == 1
    best = frame.groupby("likelihood")["bound"].max()
    assert best["NB"] > best["Poisson"] + 1
    assert frame.loc[frame["chosen"], "bound"].item() == frame["bound"].max() == swept.best.score.value
    model, guide = swept.recipe()
    assert model.likelihood != Poisson() and model.hidden == tuple(reversed(guide.hidden)) == (8, 12)
    assert swept.table().splitlines()[
        -1
    ] == f"Choice: likelihood {model.likelihood!r}, hidden 8-12, n_latent 2".replace("()", "")


def test_a_sweep_that_ctrl_c_ended_goes_on_to_the_bit(adata, swept, tmp_path: Path, monkeypatch) -> None:
    whole = train

    def stopped(model, *arguments, **options):
        if model == GRID.recipe(swept.trials[2].choice)[0]:

            def ctrl_c(state):
                raise KeyboardInterrupt

            options["on_evaluation"] = ctrl_c
        return whole(model, *arguments, **options)

    given = {"settings": QUICK, "study": tmp_path / "study", "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(sweeping, "train", stopped)
        found = pv.sweep(adata, GRID, **given)
    assert found.interrupted and len(found.trials) == 2
    again = pv.sweep(adata, GRID, **given)
    pd.testing.assert_frame_equal(again.frame().drop(columns="seconds"), swept.frame().drop(columns="seconds"))
    other = adata.copy()
    other.X = other.X * 2
    with pytest.raises(InputError, match="Expected checksum"):
        pv.sweep(other, GRID, **given)


def test_what_can_not_be_compared_is_refused(adata) -> None:
    for likelihood in (Normal(), Bernoulli()):
        with pytest.raises(InputError, match=r"Expected likelihoods of counts \(poisson, nb, zip, zinb\).*of others"):
            SweepGrid((NB(), likelihood))
    for grid, match in (
        ({"latents": ()}, "Expected each n_latent once, and one or more"),
        ({"latents": (2, 2)}, "Expected each n_latent once"),
        ({"likelihoods": (NB(), NB())}, "Expected each likelihood once"),
        ({"hidden": ((8, 0),)}, "Expected sizes of 1 or more; got 0"),
    ):
        with pytest.raises(InputError, match=match):
            SweepGrid(**grid)
    with pytest.raises(InputError, match="Expected trials of 1 or more"):
        SweepSettings(trials=0)
    with pytest.raises(InputError, match="Expected counts; got profiles"):
        pv.sweep(adata, GRID, data=pv.profile_data(adata, counts=False))
    assert SweepGrid().choices["likelihood"] == ["Poisson", "NB", "ZIP", "ZINB"]


def test_the_picture_has_a_line_for_each_choice_and_rings_the_best() -> None:
    rows = [
        {"likelihood": likelihood, "hidden": hidden, "n_latent": size, "bound": 10.0 * i + j + size / 100}
        for i, likelihood in enumerate(("NB", "ZINB"))
        for j, hidden in enumerate(("100", "100-250"))
        for size in (10, 50)
    ]
    table = pd.DataFrame(rows)
    table.loc[0, "bound"] = np.nan
    ax = sweep_bounds(table)
    *lines, ring = ax.lines
    assert [line.get_label() for line in lines] == ["NB, 100", "NB, 100-250", "ZINB, 100", "ZINB, 100-250"]
    np.testing.assert_array_equal(lines[0].get_ydata(), [np.nan, 0.5])
    np.testing.assert_array_equal(lines[3].get_ydata(), [11.1, 11.5])
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (1, 11.5)
    assert ax.get_title(loc="left") == "1 of 8 trials given up early or failed"
    with pytest.raises(InputError, match="Expected one trial or more with a bound"):
        sweep_bounds(table.assign(bound=np.nan))


# The command


def test_the_command_writes_a_table_and_a_picture(adata, tmp_path: Path) -> None:
    source, output, picture = (tmp_path / name for name in ("in.h5ad", "table.csv", "sweep.png"))
    adata[:60].copy().write_h5ad(source)
    arguments = ["sweep", source, "-o", output, "--likelihoods", "poisson,zinb", "--hidden", "4", "--latents", 2]
    arguments += ["--max-epochs", 2, "--study", tmp_path / "study", "--picture", picture]
    code, out, err = command(*arguments)
    assert (code, err.count("error")) == (0, 0), err
    table = pd.read_csv(output)
    assert list(table.columns) == list(sweeping.COLUMNS) and set(table["likelihood"]) == {"Poisson", "ZINB"}
    assert "Choice: likelihood" in out and f"Wrote {output}" in out and picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = command(*arguments)
    assert code == 2 and "exists already" in err
    code, _, _ = command(*arguments, "--overwrite")
    assert code == 0 and pd.read_csv(output).equals(table)
    for options, words in (
        (["--likelihoods", "nb,normal"], "Expected likelihoods of counts"),
        (["--likelihoods", "gamma"], "Expected likelihoods of poisson, nb, zip, zinb; got 'gamma'"),
        (["--hidden", "10-x"], "Expected sizes of layers"),
        (["--latents", "0"], "Expected numbers of 1 or more"),
    ):
        code, out, err = command("sweep", source, "-o", tmp_path / "new.csv", *options)
        assert (code, out) == (2, "") and words in err and not (tmp_path / "new.csv").exists()


def test_sizes_are_read_as_they_are_shown() -> None:
    assert parse_layers(",".join(map(sweeping.layers_in_words, SweepOptions.hidden))) == SweepOptions.hidden
    assert parse_sizes("10,25,50,100") == SweepOptions.latents
    assert SweepGrid().likelihoods == (Poisson(), NB(), pv.likelihoods.ZIP(), ZINB())
