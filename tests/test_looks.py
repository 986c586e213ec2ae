"""Looks at held-out cells: what is recorded says what is said plain, of every cell once."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from small import GUIDE, settings
from test_fusing import VELOCITY, abundances, counted

import pyro_velo as pv
from pyro_velo import compiled, recorded
from pyro_velo.compiled import worth_looking
from pyro_velo.doctor.terms import CELLS, terms_of
from pyro_velo.encoders import Encoder
from pyro_velo.looks import Look, Looks, Part, TakenApart, own_noise
from pyro_velo.profiles import Profiles
from pyro_velo.train import _Loop, apart


@pytest.fixture
def as_it_is(monkeypatch) -> None:
    """What is recorded is run operation by operation, and not compiled, which takes long."""
    monkeypatch.setattr(recorded, "compiled_whole", lambda graph, *_: deepcopy(graph))


def looks_of(model: Any, guide: Any, cells: Any, elbo: ELBO | None = None, **options: Any) -> Looks:
    """Those of a training that has not begun."""
    program = model.build(cells)
    plan = settings(held_out=0.4, batch_size=10, **options)
    return _Loop(program, guide(program), cells, plan, elbo or Trace_ELBO(), None).looks


ALWAYS = ("tobit", "library", "hierarchical times")
PARTS = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in VELOCITY]


@pytest.mark.parametrize("name", PARTS)
def test_a_recorded_look_says_what_a_plain_one_says(name, double, as_it_is):
    model = pv.VelocityModel(n_latent=2, hidden=(8,), **{part: make() for part, make in VELOCITY[name].items()})
    cells = (counted if model.likelihood.counts else abundances)(torch.float64)
    with apart(cells, 0):
        looks = looks_of(model, GUIDE, cells)
        assert looks.terms is TakenApart.DRAWN and not looks.records and looks.plain_cells == 2 * len(looks.held)
        plain = looks.take(0)
        looks.records = True
        assert looks.plain_cells == 0
        # 12 cells in parts of 6, as parts of one size have the same noise.
        assert_the_same(looks.take(0), plain)
        assert looks.recorded.works


def assert_the_same(found: Look, expected: Look) -> None:
    # A plain bound sums log-densities of the uniform prior of switching times, which is float32, in float32.
    assert found.elbo == pytest.approx(expected.elbo, rel=1e-8)
    assert found.objective == pytest.approx(expected.objective, rel=1e-8)
    assert found.terms.keys() == expected.terms.keys() == {"held_out", "train"}
    for cells, terms in expected.terms.items():
        assert found.terms[cells] == pytest.approx(terms, rel=1e-9), cells


def test_a_cell_that_a_part_is_filled_up_with_does_not_count(double, as_it_is):
    cells = abundances(torch.float64)
    with apart(cells, 0):
        looks = looks_of(pv.VelocityModel(n_latent=2, hidden=(8,)), GUIDE, cells)
        looks.records = True
        index = torch.tensor([3, 1, 4, 4, 4])
        part, terms = Part(cells.batch(index, len(looks.train)), 3), dict[str, float]()
        with looks.warmup.done(), own_noise(cells.device, looks.seed):
            loss = looks._loss(0, part, terms, 1.0)
        with looks.warmup.done(), own_noise(cells.device, looks.seed), torch.no_grad():
            found = terms_of(*looks._traces(part.batch))
    expected = {term.group: 0.0 for term in found.terms}
    for term in found.terms:
        by_cell = term.by(CELLS)
        expected[term.group] += float(term.value if by_cell is None else by_cell[:3].mean())
    assert terms == pytest.approx(expected, rel=1e-9)
    signs = {term.group: term.sign for term in found.terms}
    assert loss == pytest.approx(-sum(signs[name] * value for name, value in expected.items()), rel=1e-9)


def test_parts_are_read_whole_where_looks_are_recorded_and_hold_no_cell_twice_where_not(as_it_is):
    cells = abundances(torch.float32)
    with apart(cells, 0):
        looks = looks_of(pv.VelocityModel(n_latent=2, hidden=(8,)), GUIDE, cells)
        index = torch.arange(23)
        plain = [(part.batch.index.tolist(), part.n) for _, part in looks._turns(index)]
        looks.records = True
        whole = [(part.batch.index.tolist(), part.n) for _, part in looks._turns(index)]
    assert plain == [([*range(8)], 8), ([*range(8, 16)], 8), ([*range(16, 23)], 7)]
    assert whole == [*plain[:2], ([*range(16, 23), 22], 7)]


def test_what_cannot_be_recorded_is_looked_at_plain(double, monkeypatch):
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(recorded, "compiled_whole", refuse)
    cells = abundances(torch.float64)
    with apart(cells, 0):
        looks = looks_of(pv.VelocityModel(n_latent=2, hidden=(8,)), GUIDE, cells)
        plain = looks.take(0)
        looks.records = True
        with pytest.warns(UserWarning, match="A look could not be compiled as a whole, .*: no compiler here"):
            assert_the_same(looks.take(0), plain)
        assert looks.plain_cells == 2 * len(looks.held)


def test_a_bound_without_terms_is_not_recorded(as_it_is):
    cells = abundances(torch.float32)
    with apart(cells, 0):
        looks = looks_of(pv.VelocityModel(n_latent=2, hidden=(8,)), GUIDE, cells, RenyiELBO(num_particles=2))
        looks.records = True
        assert looks.terms is TakenApart.NOT and looks.take(0).terms == {}
        assert looks.recorded.function is None


def test_kls_in_closed_form_are_recorded_too(double, as_it_is):
    cells = Profiles.of_counts(torch.poisson(torch.linspace(0.1, 30, 50 * 7)).reshape(50, 7).double())
    with apart(cells, 0):
        looks = looks_of(pv.VAE(n_latent=2, hidden=(8,)), Encoder((8,)), cells, TraceMeanField_ELBO())
        assert looks.terms is TakenApart.CLOSED
        plain = looks.take(0)
        looks.records = True
        assert_the_same(looks.take(0), plain)


def test_looks_are_recorded_where_it_pays(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda _: "g++")
    cpu = torch.device("cpu")
    assert worth_looking(compiled.WORTH_LOOKING, cpu) and not worth_looking(compiled.WORTH_LOOKING - 1, cpu)
    assert not worth_looking(compiled.WORTH_LOOKING, torch.device("cuda"))
