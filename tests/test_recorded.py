"""A step that was recorded as a whole is the step that was recorded, for other parameters, batches and weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from small import GUIDE, differing, settings, small_cells, small_fit
from test_fusing import VELOCITY, abundances, counted
from torch import Tensor, nn

import pyro_velo as pv
from pyro_velo import compiled, recorded, train
from pyro_velo.compiled import compiling, fuses, recording, worth_recording
from pyro_velo.encoders import Encoder
from pyro_velo.forensics import NonFiniteError
from pyro_velo.models.vae import VAE
from pyro_velo.processes import ALONE, Noise, Team
from pyro_velo.profiles import Profiles
from pyro_velo.recorded import RecordedStep, can_be_recorded
from pyro_velo.schedule import Warmup
from pyro_velo.states import Dirichlet
from pyro_velo.train import Training, apart, per_cell

pytestmark = [
    pytest.mark.skipif(compiled.shutil.which("g++") is None, reason="no g++, without which nothing is recorded"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture
def as_it_is(monkeypatch) -> None:
    """What is recorded is run operation by operation, and not compiled, which takes long.

    A copy, as what is compiled is: a parameter that it had as a number would stay what it is.
    """
    monkeypatch.setattr(recorded, "compiled_whole", lambda graph, *_: deepcopy(graph))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def always(monkeypatch) -> None:
    """Every fit is recorded, however small."""
    monkeypatch.setattr(compiled, "WORTH_FUSING", 1)
    monkeypatch.setattr(compiled, "WORTH_RECORDING", 1)


def noise(seed: int = 0, team: Team = ALONE) -> Noise:
    """The random numbers of a process."""
    return Noise(team, seed, torch.device("cpu"))


SECOND = Team(1, 2)


def assert_the_same(
    cells: Any,
    model: Any,
    guide: Any,
    tolerance: float,
    warmup: Warmup | None = None,
    team: Team = ALONE,
    elbo: ELBO | None = None,
) -> RecordedStep:
    """Over three steps with other batches, weights and parameters, of which the first is recorded."""
    warmup, elbo = warmup or Warmup(3), elbo or Trace_ELBO()
    with apart(cells, 0):
        program = model.build(cells)
        svi = SVI(*(per_cell(part, len(cells)) for part in (program, guide(program))), ClippedAdam({}), elbo)
        batches = [cells.batch(torch.arange(i, len(cells), 3)[:9], len(cells)) for i in range(3)]
        svi.loss(svi.model, svi.guide, batches[0])
        whole = RecordedStep(elbo, svi, warmup)
        for step, batch in enumerate(batches):
            drawn = noise(step, team)
            start = drawn.position()
            with warmup.at(step), poutine.trace(param_only=True) as capture, drawn:
                loss = svi.loss_and_grads(svi.model, svi.guide, batch)
            values = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
            expected = {name: value.grad for name, value in values.items()}
            for value in values.values():
                value.grad = None
            ended = drawn.position()
            drawn.back_to(start)
            told = whole(batch, step, drawn)
            assert_positions(drawn.position(), ended)
            assert told is not None and told[0] == pytest.approx(loss, rel=tolerance)
            assert list(told[1]) == list(expected) and all(told[1][name] is value for name, value in values.items())
            for name, value in values.items():
                wanted = torch.zeros_like(value) if expected[name] is None else expected[name]
                assert value.grad is not None
                assert (value.grad - wanted).abs().max() <= tolerance * wanted.abs().max(), name
                value.data.sub_(0.01 * value.grad.clamp(-1, 1))
                value.grad = None
        return whole


def assert_positions(found: Any, expected: Any) -> None:
    """All generators stand where they stood."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


ALWAYS = ("tobit", "library")
PARTS = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in VELOCITY]


@pytest.mark.parametrize("name", PARTS)
def test_a_recorded_step_of_velocity_is_the_plain_one(name, double, as_it_is):
    made = {part: make() for part, make in VELOCITY[name].items()}
    model = pv.VelocityModel(n_latent=2, hidden=(8,), **made)
    assert_the_same((counted if model.likelihood.counts else abundances)(torch.float64), model, GUIDE, 1e-9)


def test_one_of_several_processes_draws_of_cells_what_is_its_own(double, as_it_is):
    model = pv.VelocityModel(n_latent=2, hidden=(8,))
    step = assert_the_same(abundances(torch.float64), model, GUIDE, 1e-9, team=SECOND)
    assert [draw.of_cells for draw in step.recorded.draws].count(True) == 1, "z, and the sites of genes are shared"
    assert len(step.recorded.draws) > 1


def test_a_batch_of_another_size_is_left_to_plain_steps(as_it_is):
    cells = abundances(torch.float32)
    with apart(cells, 0):
        program = pv.VelocityModel(n_latent=2, hidden=(8,)).build(cells)
        step = RecordedStep(Trace_ELBO(), SVI(program, GUIDE(program), ClippedAdam({}), Trace_ELBO()), Warmup(0))
        sizes = [step(cells.batch(torch.arange(n)), 0, noise()) is None for n in (9, 8, 9)]
    assert sizes == [False, True, False] and step.works


SAMPLED = {"n_latent": 2, "hidden": (8,), "states": Dirichlet()}


def test_what_is_drawn_by_parameters_is_drawn_inside(double, as_it_is):
    step = assert_the_same(abundances(torch.float64), pv.VelocityModel(**SAMPLED), GUIDE, 1e-9)
    assert step.recorded.draws == []


def test_what_several_processes_cannot_draw_apart_is_left_to_plain_steps(double, as_it_is):
    cells = abundances(torch.float64)
    with apart(cells, 0):
        program = pv.VelocityModel(**SAMPLED).build(cells)
        step = RecordedStep(Trace_ELBO(), SVI(program, GUIDE(program), ClippedAdam({}), Trace_ELBO()), Warmup(0))
        drawn = noise(0, SECOND)
        start = drawn.position()
        with pytest.warns(UserWarning, match="is slower: what is drawn depends on parameters, where processes"):
            assert step(cells.batch(torch.arange(5)), 0, drawn) is None
        assert_positions(drawn.position(), start)


@pytest.mark.parametrize(
    "warmup", [Warmup(0, beta=2.0), Warmup(2, cycles=2, length=2), Warmup(4, free_bits=0.3)], ids=str
)
def test_the_schedule_is_given_to_it_and_not_recorded(warmup, double, as_it_is):
    assert_the_same(abundances(torch.float64), pv.VelocityModel(n_latent=2, hidden=(8,)), GUIDE, 1e-9, warmup)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda elbo: type(elbo).__name__)
@pytest.mark.parametrize("warmup", [Warmup(3), Warmup(4, free_bits=0.3)], ids=str)
def test_a_recorded_step_of_an_autoencoder_is_the_plain_one(elbo, warmup, double, as_it_is):
    assert_the_same(profiles(), VAE(pv.likelihoods.NB(), 2, (8,)), Encoder((8,)), 1e-9, warmup, elbo=elbo)


def test_a_recorded_step_with_clusters_is_the_plain_one(double, as_it_is):
    """Of a prior that is no single Normal, whose KL has no closed form."""
    model = pv.GMVAE(n_clusters=2, n_latent=2, hidden=(8,))
    assert_the_same(profiles(), model, Encoder((8,)), 1e-9, elbo=TraceMeanField_ELBO())


def test_a_recorded_step_of_velocity_takes_kls_in_closed_form_too(double, as_it_is):
    model, guide = pv.VelocityModel(n_latent=2, hidden=(8,)), pv.guides.Amortized(rates=pv.rates.PerGene(), hidden=(8,))
    assert_the_same(abundances(torch.float64), model, guide, 1e-9, elbo=TraceMeanField_ELBO())


def profiles() -> Profiles:
    """Counts of 30 cells x 7 genes."""
    return Profiles.of_counts(torch.poisson(torch.linspace(0.1, 30, 30 * 7)).reshape(30, 7).double())


@pytest.mark.slow
def test_compiled_it_is_the_plain_one_to_rounding(double):
    assert_the_same(abundances(torch.float64), pv.VelocityModel(n_latent=2, hidden=(8,)), GUIDE, 1e-9)


class Picking(nn.Module):
    """A guide of a site that no gradient goes through, or, with `decides`, one that looks at what it drew."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        self.decides, self.logit = decides, nn.Parameter(torch.zeros(()))

    def forward(self, batch: Any) -> None:
        pyro.module("picking", self)
        if self.decides:
            drawn = pyro.sample("on", dist.Normal(self.logit, 1.0))
            if drawn > 0:
                pyro.sample("more", dist.Normal(self.logit, 1.0))
        else:
            pyro.sample("on", dist.Bernoulli(logits=self.logit))


def picked(batch: Any) -> None:
    pyro.sample("on", dist.Bernoulli(0.5))


def looked(batch: Any) -> None:
    if pyro.sample("on", dist.Normal(0.0, 1.0)) > 0:
        pyro.sample("more", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(("model", "decides"), [(picked, False), (looked, True)])
def test_what_cannot_be_recorded_is_said_once_and_left_to_plain_steps(model, decides, as_it_is):
    with apart(small_cells(), 0):
        step = RecordedStep(Trace_ELBO(), SVI(model, Picking(decides), ClippedAdam({}), Trace_ELBO()), Warmup(0))
        drawn = noise()
        state = torch.get_rng_state()
        with pytest.warns(UserWarning, match="could not be compiled as a whole, so the fit is slower"):
            assert step(small_cells().batch(torch.arange(5)), 0, drawn) is None
        assert not step.works and step(small_cells().batch(torch.arange(5)), 1, drawn) is None
        assert torch.equal(torch.get_rng_state(), state), "the plain step draws what it would have drawn"


def test_a_fit_that_is_recorded_finds_what_the_plain_one_finds(as_it_is, always, monkeypatch):
    cells, kept = small_cells(), list[Training]()
    whole = small_fit(cells, on_evaluation=kept.append).training
    assert differing(small_fit(cells).training, whole) == []
    assert differing(small_fit(cells, resume=kept[3]).training, whole) == []
    monkeypatch.setattr(compiled, "WORTH_RECORDING", 10**6)
    monkeypatch.setattr(compiled, "WORTH_FUSING", 10**12)
    plain = small_fit(cells).training
    assert plain.history.train == pytest.approx(whole.history.train, rel=1e-3)
    assert plain.history.held_out == pytest.approx(whole.history.held_out, rel=1e-3)


def test_a_fit_that_cannot_be_compiled_goes_on_as_it_would_have(always, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(recorded, "make_fx", refuse)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.warns(UserWarning, match="slower: no compiler here"):
        found = small_fit(settings=settings(max_epochs=1)).training
    monkeypatch.setattr(compiled, "WORTH_RECORDING", 10**6)
    assert differing(small_fit(settings=settings(max_epochs=1)).training, found) == []


def test_a_gene_is_blamed_by_name_where_a_recorded_step_has_no_number(as_it_is, always, monkeypatch):
    def poisoned(self: RecordedStep, batch: Any, step: int, noise: Noise) -> Any:
        if step == 7:
            with torch.no_grad():
                next(value for name, value in self.recorded.parameters.items() if name.endswith("locs.alpha"))[2] = (
                    torch.nan
                )
        return original(self, batch, step, noise)

    original: Callable[..., Any] = RecordedStep.__call__
    monkeypatch.setattr(RecordedStep, "__call__", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 7\b.*alpha"):
        small_fit()


def test_it_is_recorded_where_it_pays_and_for_the_bound_it_knows():
    cpu, much = torch.device("cpu"), compiled.WORTH_FUSING
    assert worth_recording(compiled.WORTH_RECORDING, much, cpu)
    assert not worth_recording(compiled.WORTH_RECORDING - 1, much, cpu)
    assert not worth_recording(compiled.WORTH_RECORDING, much - 1, cpu)
    assert not worth_recording(compiled.WORTH_RECORDING, much, torch.device("cuda"))
    assert can_be_recorded(Trace_ELBO())
    assert can_be_recorded(TraceMeanField_ELBO())
    assert not can_be_recorded(Trace_ELBO(num_particles=2)) and not can_be_recorded(RenyiELBO())


def test_what_is_compiled_for_a_cell_is_recorded_in_that_form():
    assert not compiling() and not fuses()
    with recording():
        assert compiling() and fuses()
        x: Tensor = torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()
        assert compiled.spread(torch.ones(3), x).shape == x.shape
    assert not compiling() and not fuses()


def test_every_batch_of_an_epoch_has_one_size(monkeypatch):
    sizes = list[int]()
    original = train._Loop._step
    monkeypatch.setattr(train._Loop, "_step", lambda self, b, *a: sizes.append(len(b.index)) or original(self, b, *a))
    small_fit(small_cells(43), settings=settings(max_epochs=2, held_out=0.0))
    assert sizes == [10] * 8  # 43 cells make 4 batches of 13 at most, and 3 cells wait
