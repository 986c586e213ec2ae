"""The training loop: its seeds, its bounds, its end, and what it leaves of the state that everybody shares."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from small import GUIDE, MODEL, differing, settings, small_cells, small_fit
from torch import nn

import pyro_velo as pv
from pyro_velo.batch import Batch, Cells, equal_parts
from pyro_velo.doctor.decomposition import draw_terms
from pyro_velo.errors import FitError, InputError
from pyro_velo.forensics import NonFiniteError
from pyro_velo.models.base import Model
from pyro_velo.schedule import WithoutPenalties
from pyro_velo.train import Training, TrainSettings, load_parameters, per_cell, restore, split, train


@pytest.fixture(scope="module")
def fitted():
    return small_fit()


def test_the_same_seed_gives_the_same_bits(fitted):
    assert differing(fitted.training, small_fit().training) == []


def test_the_callers_random_state_does_not_matter(fitted):
    torch.manual_seed(123)
    assert differing(fitted.training, small_fit().training) == []


def test_another_seed_gives_another_fit(fitted):
    other = small_fit(settings=settings(seed=1)).training
    assert not any(torch.equal(value, other.parameters[name]) for name, value in fitted.training.parameters.items())


def test_two_fits_never_share_parameters(fitted):
    other = small_fit(settings=settings(seed=1))
    storages = [{p.data_ptr() for p in fit.store["params"].values()} for fit in (fitted, other)]
    assert fitted.store["params"].keys() == other.store["params"].keys()
    assert storages[0].isdisjoint(storages[1])
    with fitted.parameters():
        before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    with other.parameters(), torch.no_grad():
        for value in pyro.get_param_store().values():
            value.fill_(0.5)
    with fitted.parameters():
        assert all(torch.equal(value, before[name]) for name, value in pyro.get_param_store().items())


def test_a_fit_leaves_what_everybody_shares_as_it_was():
    def shared():
        store = {name: value.clone() for name, value in pyro.get_param_store().items()}
        flags = dist.is_validation_enabled(), torch.distributions.Distribution._validate_args
        return store, torch.get_rng_state(), np.random.get_state()[1].copy(), flags, torch.is_grad_enabled()

    pyro.clear_param_store()
    pyro.param("mine", torch.tensor(3.0))
    for options in ({}, {"on_evaluation": interrupt_at(2)}):
        (store, *before), _ = shared(), small_fit(**options)
        after_store, *after = shared()
        assert store == after_store == {"mine": torch.tensor(3.0)}
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(NonFiniteError):
        small_fit(cells=with_nan(2))
    assert list(pyro.get_param_store().keys()) == ["mine"]
    pyro.clear_param_store()


# Going on


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_resumed_run_is_the_run_that_was_never_stopped(fitted, stop):
    kept: list[Training] = []
    small_fit(on_evaluation=kept.append)
    assert differing(small_fit(resume=kept[stop - 1]).training, fitted.training) == []


def test_resuming_leaves_the_state_it_went_on_from_as_it_was():
    kept: list[Training] = []
    small_fit(on_evaluation=kept.append)
    first = small_fit(resume=kept[2]).training
    assert kept[2].epoch == 3 and len(kept[2].history.epoch) == 3
    assert differing(small_fit(resume=kept[2]).training, first) == []


def test_a_resumed_run_knows_how_long_it_has_waited():
    # A learning rate this high never improves on its first looks, so the plateau is counted through the stop.
    hard = settings(max_epochs=40, learning_rate=0.5, patience=3, warmup=0.0)
    kept: list[Training] = []
    whole = small_fit(settings=hard, on_evaluation=kept.append).training
    assert whole.plateau.finished and whole.epoch < 40
    waiting = next(state for state in kept if state.plateau.lowered and state.plateau.waited == 1)
    assert differing(small_fit(settings=hard, resume=waiting).training, whole) == []


def test_restoring_gives_the_best_parameters_and_trains_nothing(fitted):
    again = restore(MODEL, GUIDE, small_cells(), fitted.training)
    assert differing(again.training, fitted.training) == []
    with fitted.parameters():
        values = {name: value.clone() for name, value in pyro.get_param_store().items()}
    with again.parameters():
        assert all(torch.equal(value, values[name]) for name, value in pyro.get_param_store().items())


def test_parameters_of_another_model_or_other_genes_are_refused(fitted):
    with pytest.raises(InputError, match=r"parameter .* of shape .*got .*genes and the network sizes"):
        restore(MODEL, GUIDE, small_cells(n_genes=6), fitted.training)
    with pytest.raises(InputError, match=r"missing \['AutoDelta.* unknown \['AutoNormal.* that were saved"):
        restore(MODEL, replace(GUIDE, rates=pv.rates.Point()), small_cells(), fitted.training)
    with pytest.raises(InputError, match="Expected the parameters of this model"):
        load_parameters({"nothing": torch.zeros(1)})


# The best parameters


def held_out_elbo(fit, cells, plan):
    """The ELBO per held-out cell at KL weight 1 and without penalties, from its definition."""
    train_index, held = split(len(cells), plan.held_out, plan.seed)
    total = 0.0
    with fit.parameters(), torch.random.fork_rng(), torch.no_grad(), WithoutPenalties():
        for i, batch in enumerate(looked_at(cells, held, plan.batch_size, len(train_index))):
            torch.manual_seed(plan.seed + i)
            total -= Trace_ELBO().loss(fit.program, fit.guide, batch) / len(train_index) * len(batch.index)
    return total / len(held)


@pytest.mark.parametrize("changes", [{}, {"max_epochs": 40, "learning_rate": 0.3, "patience": 3}, {"warmup": 1.0}])
def test_the_result_has_the_best_held_out_elbo(changes):
    cells, plan = small_cells(), settings(held_out=0.4, **changes)
    fit = small_fit(cells, settings=plan)
    state = fit.training
    assert state.plateau.best == np.nanmax(state.history.held_out)
    assert held_out_elbo(fit, cells, plan) == pytest.approx(state.plateau.best, rel=1e-6)
    with fit.parameters():
        now = {name: param.unconstrained() for name, param in pyro.get_param_store().items()}
    assert all(torch.equal(now[name], value) for name, value in state.best.items())


def looked_at(cells, held, size, n_train):
    """The held-out cells in parts of equal size, but for the last."""
    for places, n in equal_parts(len(held), size):
        yield cells.batch(held[places[:n]], n_train)


SCHEDULES = {
    "beta": {"beta": 30.0, "warmup": 0.7},
    "cycles": {"beta": 30.0, "cycles": 3, "warmup": 0.8},
    "free bits": {"beta": 5.0, "free_bits": 0.5, "warmup": 0.5},
}


def objective_of(fit, parameters, cells, plan):
    """E log p(x | z), and the same - KL(genes) - beta KL(cells), with free bits, by their definitions."""
    train_index, held = split(len(cells), plan.held_out, plan.seed)
    reconstruction = total = 0.0
    with fit.parameters(), torch.random.fork_rng(), torch.no_grad(), WithoutPenalties():
        load_parameters(parameters)
        for i, batch in enumerate(looked_at(cells, held, plan.batch_size, len(train_index))):
            torch.manual_seed(plan.seed + i)
            terms = draw_terms(fit, batch)
            share = len(batch.index) / len(held)
            own = terms.of("kl_z").value
            if plan.free_bits:
                own = terms.of("kl_z").expected.clamp_min(plan.free_bits).sum()
            own = own + terms.of("kl_pi").value
            shared = sum(x.value for x in terms.terms if x.kind == "kl" and x.name not in ("kl_z", "kl_pi"))
            explained = sum(x.value for x in terms.terms if x.kind == "reconstruction")
            reconstruction += share * float(explained)
            total += share * float(explained - shared - plan.beta * own)
    return reconstruction, total


@pytest.mark.parametrize("changes", SCHEDULES.values(), ids=SCHEDULES)
def test_looks_are_compared_by_what_the_schedule_ends_with(changes):
    """A phase of low weight has the better reconstruction, and another look the better ELBO: neither is kept."""
    cells, plan = small_cells(), settings(held_out=0.4, max_epochs=14, learning_rate=0.05, patience=99, **changes)
    states: list[Training] = []
    fit = small_fit(cells, settings=plan, on_evaluation=states.append)
    history = fit.training.history
    looked = [objective_of(fit, state.parameters, cells, plan) for state in states]
    explained, objective = np.array(looked).T
    np.testing.assert_allclose(history.objective, objective, rtol=1e-5)
    kept = int(objective.argmax())
    assert fit.training.plateau.best == max(history.objective) and history.best == kept
    assert all(torch.equal(value, states[kept].parameters[name]) for name, value in fit.training.best.items())
    assert fit.held_out_elbo == history.held_out[kept]
    if plan.beta > 1 and not plan.free_bits:
        # Else the law would be an empty one.
        assert kept not in (explained.argmax(), np.argmax(history.held_out))
        assert history.kl_weight[int(explained.argmax())] < plan.beta


def test_without_beta_and_free_bits_the_objective_is_the_elbo(fitted):
    assert fitted.training.history.objective == fitted.training.history.held_out
    cycled = small_fit(settings=settings(cycles=2, warmup=0.5)).training.history
    assert cycled.objective == cycled.held_out


def test_beta_takes_the_kl_of_cells_off_the_elbo_so_many_times():
    history = small_fit(settings=settings(beta=7.0, held_out=0.4)).training.history
    terms = history.terms["held_out"]
    own = np.array(terms["kl_z"]) + np.array(terms["kl_pi"])
    np.testing.assert_allclose(history.objective, np.array(history.held_out) - 6 * own, rtol=1e-5)


@pytest.mark.parametrize("annealed", [True, False])
def test_a_penalty_that_stays_counts_in_what_is_kept_and_one_that_fades_does_not(annealed):
    heavy = replace(MODEL, penalty=pv.models.velocity.SwitchPenalty(weight=3.0, annealed=annealed))
    plan, states = settings(held_out=0.4, max_epochs=12, learning_rate=0.05, patience=99), list[Training]()
    fit = train(heavy, GUIDE, small_cells(), settings=plan, on_evaluation=states.append, progress=False)
    history = fit.training.history
    cost = np.array(history.terms["held_out"]["switch_penalty"])
    objective = np.array(history.held_out) - (0 if annealed else cost)
    np.testing.assert_allclose(history.objective, objective, rtol=1e-5)
    kept = int(objective.argmax())
    assert history.best == kept and fit.held_out_elbo == history.held_out[kept]
    assert all(torch.equal(value, states[kept].parameters[name]) for name, value in fit.training.best.items())
    # Else the law would be an empty one.
    assert (cost > 0.01).all()


def test_before_any_look_no_elbo_is_known():
    assert Training(TrainSettings()).history.best is None
    assert (
        replace(small_fit(settings=settings(max_epochs=1)), training=Training(TrainSettings())).held_out_elbo
        == -math.inf
    )


def test_a_fit_that_gets_no_better_stops_early_with_its_best():
    plan = settings(max_epochs=200, learning_rate=0.5, patience=2, warmup=0.0)
    state = small_fit(settings=plan).training
    assert state.plateau.finished and state.epoch < 200
    # One plateau lowered the rate and the next ended it; the best came before both waits.
    assert np.nanargmax(state.history.held_out) < state.epoch - 2
    rates = {group["lr"] for saved in state.optimizer.values() for group in saved["param_groups"]}
    # ClippedAdam multiplies by lrd = 1.
    assert rates == {plan.learning_rate / 10}
    assert differing_values(state.best, state.parameters)


def differing_values(one, other):
    return any(not torch.equal(value, other[name]) for name, value in one.items())


def test_the_held_out_elbo_knows_nothing_of_the_warm_up():
    """At the same parameters (no step has an effect), every weight of the warm-up gives the same held-out number."""
    still = {"learning_rate": 1e-30, "max_epochs": 4}
    warming = small_fit(settings=settings(warmup=1.0, **still)).training.history
    warm = small_fit(settings=settings(warmup=0.0, **still)).training.history
    assert warming.held_out == warm.held_out and len(set(warm.held_out)) == 1
    assert warming.kl_weight[0] < 0.1 < 1 == warm.kl_weight[0]
    heavier = replace(MODEL, penalty=pv.models.velocity.SwitchPenalty(weight=1e4, annealed=False))
    penalised = train(heavier, GUIDE, small_cells(), settings=settings(**still), progress=False).training.history
    assert penalised.held_out == warm.held_out
    assert penalised.train[0] < warm.train[0] - 10


def test_no_held_out_cell_is_trained_on(monkeypatch):
    cells, plan = small_cells(), settings()
    _, held = split(len(cells), plan.held_out, plan.seed)
    other = cells.molecules.clone()
    other[:, held] = other[:, held].flip(-1) + 0.1
    # Start values, and the units that the encoder is told of, are read off all cells, so they are held fixed.
    monkeypatch.setattr(Cells, "seen_moments", cells.seen_moments)
    fixed = replace(MODEL, initial=pv.initial.Constant(), priors=pv.Priors(alpha=dist.LogNormal(0.0, 1.0)))

    class Fixed(pv.initial.Initialisation):
        def __call__(self, _):
            return pv.initial.Constant()(cells)

    fixed = replace(fixed, initial=Fixed())
    fits = [train(fixed, GUIDE, c, settings=plan, progress=False).training for c in (cells, Cells(other, cells.ratio))]
    assert fits[0].history.train == fits[1].history.train and fits[0].history.held_out != fits[1].history.held_out


@pytest.mark.parametrize("n_cells", [1, 2, 3, 10])
def test_a_split_takes_every_cell_once_and_leaves_two_to_train_on(n_cells):
    kept, held = split(n_cells, 0.9, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(n_cells))
    assert len(kept) >= min(2, n_cells)


# Batches that are not of one size


class Line(Model):
    """A model whose loss and gradient have a closed form: x ~ N(mu, 1), mu a parameter."""

    def build(self, cells):
        return LineProgram()


class LineProgram(nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> None:
        pyro.module("line", self)
        with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
            pyro.sample("x", dist.Normal(self.mu, 1.0), obs=batch.u[:, 0])


@pytest.mark.parametrize("size", [1, 3, 7, 12])
def test_a_batch_of_any_size_gives_an_unbiased_loss_per_cell(size):
    x = torch.randn(12, dtype=torch.float64)
    cells, whole = Cells.of(x[:, None], x[:, None]), float(-dist.Normal(0.0, 1.0).log_prob(x).mean())
    with pyro.get_param_store().scope():
        program = LineProgram()
        model, guide = per_cell(program, 12), per_cell(lambda _: None, 12)
        # Batches of equal size, 12 / size of them where that is whole: their mean is the whole's loss.
        batches = [cells.batch(torch.arange(i, i + size) % 12) for i in range(12)]
        losses = [Trace_ELBO().loss(model, guide, batch) for batch in batches]
    for batch, loss in zip(batches, losses, strict=True):
        assert loss == pytest.approx(float(-dist.Normal(0.0, 1.0).log_prob(batch.u[:, 0]).mean()))
    assert np.mean(losses) == pytest.approx(whole)


def test_an_epochs_batches_differ_by_one_cell_at_most_and_cover_every_training_cell():
    seen = []

    class Seen(LineProgram):
        def forward(self, batch):
            seen.append(batch.index)
            super().forward(batch)

    class Watched(Line):
        def build(self, cells):
            return Seen()

    cells = Cells.of(torch.randn(20, 1), torch.randn(20, 1))
    train(Watched(), lambda program: lambda batch: None, cells, settings=settings(max_epochs=1), progress=False)
    # The last are training cells too, which are looked at as the held-out ones are.
    _, first, second, held, looked_at = seen
    kept, _ = split(20, 0.1, 0)
    assert [len(first), len(second), len(held)] == [9, 9, 2]
    assert looked_at.tolist() == kept[:2].tolist()
    assert sorted([*first.tolist(), *second.tolist()]) == sorted(kept.tolist())


def test_a_step_is_pyros_own_step():
    """The loop adds checks, a schedule and per-cell units to `SVI.step`, and nothing else."""
    cells = Cells.of(torch.randn(20, 1) + 2, torch.randn(20, 1))
    plan = settings(max_epochs=3, batch_size=20, held_out=0.0, drop=1.0)
    ours = train(Line(), lambda program: lambda batch: None, cells, settings=plan, progress=False).training
    with pyro.get_param_store().scope():
        optimizer = ClippedAdam({"lr": plan.learning_rate, "clip_norm": plan.clip})
        svi = SVI(per_cell(LineProgram(), 20), lambda batch: None, optimizer, Trace_ELBO())
        losses = [svi.step(cells.batch(torch.arange(20))) for _ in range(3)]
        theirs = pyro.get_param_store()["line$$$mu"].detach()
    torch.testing.assert_close(ours.parameters["line$$$mu"], theirs)
    np.testing.assert_allclose(ours.history.train, -np.array(losses), rtol=1e-5)


# Ctrl-C


def interrupt_at(epoch):
    def on_evaluation(state):
        if state.epoch == epoch:
            raise KeyboardInterrupt

    return on_evaluation


def test_ctrl_c_keeps_the_best_so_far(fitted):
    fit = small_fit(on_evaluation=interrupt_at(4))
    assert fit.interrupted and not fitted.interrupted
    state = fit.training
    assert state.epoch == 4 == len(state.history.epoch)
    assert state.history.held_out == fitted.training.history.held_out[:4]
    assert held_out_elbo(fit, small_cells(), settings()) == pytest.approx(max(state.history.held_out), rel=1e-6)
    assert differing(small_fit(resume=state).training, fitted.training) == []


def test_ctrl_c_in_the_middle_of_an_epoch_forgets_its_steps(fitted):
    """By a signal, as a terminal sends it, out of the program itself: the state is that of the last evaluation."""
    calls = 0

    class Interrupting(pv.likelihoods.Tobit):
        def __call__(self, *arguments):
            nonlocal calls
            calls += 1
            if calls == 15:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(*arguments)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = replace(MODEL, likelihood=Interrupting())
        fit = train(model, GUIDE, small_cells(), settings=settings(), progress=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert fit.interrupted and 0 < fit.training.epoch < 8
    history = vars(fit.training.history)
    columns = [column for name, column in history.items() if name != "terms"]
    columns += [column for of in history["terms"].values() for column in of.values()]
    assert {len(column) for column in columns} == {fit.training.epoch}
    assert differing(small_fit(resume=fit.training).training, fitted.training) == []


# NaN


def with_nan(gene):
    cells = small_cells()
    molecules = cells.molecules.clone()
    molecules[1, :, gene] = math.nan
    return Cells(molecules, torch.ones(5))


def test_nan_in_a_gene_of_the_data_stops_the_run():
    with pytest.raises(NonFiniteError, match=r"at step \d+, .*'molecules'.*, gene number 2\. Look at") as caught:
        small_fit(cells=with_nan(2))
    assert caught.value.culprit.gene == 2 and isinstance(caught.value, FitError)
    assert "gene Neurog3." in str(caught.value.named(["A", "B", "Neurog3", "D", "E"]))


def test_nan_in_a_genes_parameter_stops_the_run_at_that_step():
    """A rate that is NaN from the first look on is found in the next step, by site and gene."""
    kept: list[Training] = []
    small_fit(on_evaluation=kept.append)
    (name,) = (name for name in kept[1].parameters if name.endswith("locs.gamma"))
    kept[1].parameters[name][3] = math.nan
    with pytest.raises(NonFiniteError, match=r"at step 6, value of site 'gamma\w*' in the guide, gene number 3"):
        small_fit(resume=kept[1])


def test_nan_among_the_held_out_cells_stops_the_run_too():
    cells, plan = small_cells(), settings()
    _, held = split(len(cells), plan.held_out, plan.seed)
    molecules = cells.molecules.clone()
    molecules[0, held[0], 4] = math.nan
    # The start values would spread it to all cells, so they come from the clean ones.
    model = replace(MODEL, initial=OfOthers(cells))
    with pytest.raises(NonFiniteError, match=r"at step 3, .*gene number 4"):
        train(model, GUIDE, Cells(molecules, cells.ratio), settings=plan, progress=False)


class OfOthers(pv.initial.Initialisation):
    """Start values read off other cells."""

    def __init__(self, cells):
        self.cells = cells

    def __call__(self, _):
        return pv.initial.SteadyState()(self.cells)


# Settings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_epochs", 0, "of 1 or more"),
        ("max_steps", 0, "of 1 or more"),
        ("batch_size", -3, "of 1 or more"),
        ("patience", 0, "of 1 or more"),
        ("evaluate_steps", 0, "of 1 or more"),
        ("learning_rate", 0.0, "above 0"),
        ("clip", math.nan, "above 0"),
        ("warmup", 1.5, r"in \[0, 1\]"),
        ("drop", -0.1, r"in \[0, 1\]"),
        ("held_out", 1.0, r"in \[0, 1\)"),
        ("seed", -1, "of 0 or more"),
        ("beta", 0.0, "above 0 and finite"),
        ("beta", math.inf, "above 0 and finite"),
        ("cycles", 0, "of 1 or more"),
        ("free_bits", -0.1, "of 0 or more and finite"),
    ],
)
def test_settings_that_no_fit_can_be_run_with_are_refused(name, value, expected):
    with pytest.raises(InputError, match=rf"Expected {name} {expected}; got {value}\. Leave it out"):
        TrainSettings(**{name: value})


def test_cycles_need_something_to_cycle():
    with pytest.raises(InputError, match="Expected warmup above 0 with several cycles; got 0"):
        TrainSettings(cycles=2, warmup=0)


@pytest.mark.parametrize("changes", [{"beta": 30.0}, {"cycles": 4, "warmup": 0.5}, {"free_bits": 3.0}])
def test_schedules_change_what_is_climbed_and_not_what_is_reported(fitted, changes):
    """At the same parameters the held-out ELBO is the same; where steps are taken, they are other ones."""
    still = {"learning_rate": 1e-30, "max_epochs": 2, "warmup": 0.5}
    changed, plain = (small_fit(settings=settings(**still | extra)).training for extra in (changes, {}))
    assert changed.history.held_out == plain.history.held_out and changed.history.terms == plain.history.terms
    assert (changed.history.objective == plain.history.objective) == ("cycles" in changes)
    assert changed.history.train != plain.history.train
    assert differing_values(small_fit(settings=settings(**changes)).training.parameters, fitted.training.parameters)


@pytest.mark.slow
def test_a_strong_beta_leaves_no_information_in_z_and_free_bits_keep_it():
    """KL(q(z) || p(z)) in nats: the price of z rises, and a floor under each of two dimensions holds it up."""
    plan = {"max_epochs": 30, "learning_rate": 0.03, "patience": 60, "held_out": 0.3, "evaluate_steps": 90}

    def kl(**changes):
        return small_fit(settings=settings(**plan | changes)).training.history.terms["train"]["kl_z"][-1]

    plain, strong, held_up = kl(), kl(beta=30.0), kl(beta=30.0, free_bits=1.0)
    assert strong < 0.5 < 1 < held_up and strong < plain / 2


@pytest.mark.parametrize(("n_cells", "epochs", "every"), [(40, 12, 1), (400, 2, 1)])
def test_steps_become_whole_epochs(n_cells, epochs, every):
    plan = TrainSettings(
        max_steps=12 if n_cells == 40 else 50, batch_size=36 if n_cells == 40 else 13, evaluate_steps=1
    )
    history = small_fit(small_cells(n_cells), settings=plan).training.history
    assert history.epoch == list(range(1, epochs + 1))
    assert not np.isnan(history.held_out[::every]).any()


def test_between_evaluations_the_held_out_elbo_is_nan_and_the_last_epoch_is_evaluated():
    history = small_fit(settings=settings(evaluate_steps=9)).training.history
    assert np.flatnonzero(~np.isnan(history.held_out)).tolist() == [2, 5, 7]
