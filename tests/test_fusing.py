"""What is compiled for a fit says what it said before, and nothing is compiled where it doesn't pay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from small import GUIDE, MODEL, differing, settings, small_cells, small_fit
from tolerances import assert_close
from torch import Tensor

import pyro_velo as pv
from pyro_velo import compiled as module
from pyro_velo.batch import Cells, Counts
from pyro_velo.compiled import fuses, fusible, fusing, spread
from pyro_velo.densities import _CensoredNormalLogDensity, _FusedCensoredNormalLogDensity
from pyro_velo.encoders import Encoder, PerCluster
from pyro_velo.forensics import blame
from pyro_velo.library import Inferred
from pyro_velo.likelihoods import LIKELIHOODS, PROFILE_LIKELIHOODS
from pyro_velo.models.vae import VAE
from pyro_velo.profiles import Profiles
from pyro_velo.special import softplus
from pyro_velo.states import STATE_FAMILIES, Hard
from pyro_velo.times import TIMES
from pyro_velo.train import Training, TrainSettings, _Loop, apart, per_cell
from pyro_velo.transcription import TRANSCRIPTIONS

pytestmark = [
    pytest.mark.skipif(module.shutil.which("g++") is None, reason="no g++, without which nothing is compiled"),
    # What torch says of itself when its compiler is loaded is its own affair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
CPU, MUCH = torch.device("cpu"), module.WORTH_FUSING


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """The names of the functions that torch was asked to compile."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: asked.append(function.__name__) or function)
    return asked


def test_nothing_is_compiled_where_it_does_not_pay_or_no_gradient_flows(compilations, monkeypatch):
    @fusible
    def double(x):
        return 2 * x

    x = torch.ones(2, 3)
    with fusing(MUCH - 1, CPU):
        assert not fuses() and (double(x) == 2).all()
    with fusing(MUCH, torch.device("cuda")):
        assert not fuses()
    with fusing(MUCH, CPU), torch.no_grad():
        assert not fuses() and (double(x) == 2).all()
    assert compilations == [] and not fuses()
    with fusing(MUCH, CPU):
        assert fuses() and (double(x) == 2).all() and (double(x) == 2).all()
        with fusing(0, CPU):
            assert not fuses()
        assert fuses()
    assert compilations == ["double"]
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    with fusing(MUCH, CPU):
        assert not fuses()


def test_a_fused_function_gives_its_values_and_gradients_for_any_number_of_cells():
    @fusible
    def density(x, by_gene):
        scale = spread(by_gene["scale"], x)
        return -(((x - by_gene["loc"]) / scale) ** 2) / 2 - scale.log()

    results, graphs = [], torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for much in (MUCH, 0):
        for n_cells in (5, 6, 9):
            x = torch.linspace(-2, 2, n_cells * 11, dtype=torch.float64).reshape(n_cells, 11).requires_grad_()
            scale = torch.linspace(1, 3, 11, dtype=torch.float64).requires_grad_()
            with fusing(much, CPU):
                value = density(x, {"scale": scale, "loc": torch.full((11,), 0.5, dtype=torch.float64)})
            weights = torch.linspace(0, 1, n_cells * 11, dtype=torch.float64).reshape(n_cells, 11)
            results.append((value, *torch.autograd.grad((weights * value).sum(), (x, scale))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 1
    for fused, plain in zip(results[:3], results[3:], strict=True):
        for one, other in zip(fused, plain, strict=True):
            assert_close(one, other)


def test_a_censored_density_is_the_same_without_picking_zeros(double):
    x = torch.tensor([0.0, 0.0, 0.3, 2.0, 0.0])[:, None].expand(5, 3)
    results = []
    for function in (_CensoredNormalLogDensity, _FusedCensoredNormalLogDensity):
        mean = torch.linspace(0, 3, 30).reshape(2, 5, 3).requires_grad_()
        scale = torch.tensor([0.1, 0.5, 2.0]).requires_grad_()
        value = function.apply(x, mean, scale)
        results.append((value, *torch.autograd.grad((torch.arange(30).reshape(2, 5, 3) * value).sum(), (mean, scale))))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


# Every part, in the programs


def gradients(cells, model, guide, much: int, elbo: Callable[[], ELBO] = Trace_ELBO) -> dict[str, Tensor]:
    """The loss and its gradient by each parameter, at one batch and one draw."""
    with apart(cells, 0):
        program = model.build(cells)
        parts = [per_cell(part, len(cells)) for part in (program, guide(program))]
        batch = cells.batch(torch.arange(0, len(cells), 2), len(cells))
        elbo().loss(*parts, batch)
        torch.manual_seed(1)
        with poutine.trace(param_only=True) as capture, fusing(much, CPU):
            loss = elbo().loss_and_grads(*parts, batch)
        values = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
        found = {name: value.grad for name, value in values.items() if value.grad is not None}
        return found | {"loss": torch.tensor(loss, dtype=torch.float64)}


def assert_the_same(cells, model, guide, tolerance: float, elbo: Callable[[], ELBO] = Trace_ELBO) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain, fused = (gradients(cells, model, guide, much, elbo) for much in (0, MUCH))
    assert not counters["graph_break"], "compiled in pieces"
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        assert (fused[name] - value).abs().max() <= tolerance * value.abs().max(), name


def abundances(dtype: torch.dtype) -> Cells:
    """30 cells x 7 genes, a tenth of them zeros: a number of genes that fills no vector of the processor."""
    cells = small_cells(30, 7)
    molecules = cells.molecules.clamp_min(cells.molecules.quantile(0.1)).to(dtype)
    return Cells(molecules - molecules.min(), torch.as_tensor(cells.ratio).to(dtype))


def counted(dtype: torch.dtype) -> Cells:
    scaled = abundances(dtype).molecules
    factors = torch.linspace(0.5, 2, 60, dtype=dtype).reshape(2, 30, 1)
    unit = torch.linspace(2, 40, 14, dtype=dtype).reshape(2, 1, 7)
    counts = Counts(factors, torch.full_like(unit, 0.1), unit, scaled)
    return Cells((factors * unit * scaled).round(), counts=counts)


VELOCITY = {
    **{name: {"likelihood": make} for name, make in LIKELIHOODS.items()},
    **{f"{name} times": {"times": make} for name, make in TIMES.items()},
    "time-dependent": {"transcription": TRANSCRIPTIONS["time-dependent"]},
    "library": {"likelihood": LIKELIHOODS["nb"], "library": Inferred},
    "hard": {"states": Hard},
}
"""Parts to be made where they are used, in its precision."""


@pytest.mark.slow
@pytest.mark.parametrize("parts", VELOCITY.values(), ids=VELOCITY.keys())
def test_a_fused_step_of_velocity_has_the_gradients_of_a_plain_one(parts, double):
    made = {name: make() for name, make in parts.items()}
    model = pv.VelocityModel(n_latent=2, hidden=(8,), **made)
    data = counted if model.likelihood.counts else abundances
    assert_the_same(data(torch.float64), model, GUIDE, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROFILE_LIKELIHOODS)
def test_a_fused_step_of_an_autoencoder_has_the_gradients_of_a_plain_one(name, double):
    counts = torch.poisson(torch.linspace(0.1, 30, 300 * 7)).reshape(300, 7).double()
    likelihood = PROFILE_LIKELIHOODS[name]()
    if likelihood.binary:
        cells = Profiles((counts > 5).double())
    else:
        cells = Profiles.of_counts(counts) if likelihood.counts else Profiles(counts)
    decoded = likelihood.parameters[-1:] if name == "zinb" else ()
    assert_the_same(cells, VAE(likelihood, 2, (8,), decoded), Encoder((8,)), 1e-10)


@pytest.mark.slow
def test_a_fused_step_sums_over_every_cluster_as_a_plain_one_does(double):
    cells = Profiles.of_counts(torch.poisson(torch.linspace(0.1, 30, 300 * 7)).reshape(300, 7).double())
    model = pv.GMVAE(3, n_latent=2, hidden=(8,), enumerated=True)
    elbo = partial(TraceEnum_ELBO, max_plate_nesting=2)
    assert_the_same(cells, model, PerCluster((8,), (8,)), 1e-10, elbo)


def test_a_gene_is_blamed_by_name_although_a_fused_step_knows_of_cells_alone(compilations):
    cells = Profiles.of_counts(torch.poisson(torch.linspace(0.1, 30, 20 * 7)).reshape(20, 7))
    with apart(cells, 0), fusing(MUCH, CPU):
        program = VAE(n_latent=2, hidden=(8,)).build(cells)
        with torch.no_grad():
            program.decoding.emission.start["dispersion"][4] = torch.nan
        culprit = blame(program, Encoder((8,))(program), cells.batch(torch.arange(20)), {})
    assert "site 'x'" in culprit.what and culprit.gene == 4 and compilations == []


@pytest.mark.parametrize("states", STATE_FAMILIES.values(), ids=STATE_FAMILIES.keys())
def test_the_weights_of_what_is_certain_are_those_of_its_site(states, double):
    outputs = torch.linspace(-12, 25, 4 * 30 * 7).reshape(7, 30, 4).permute(2, 1, 0)
    family = states()
    if not family.certain:
        with pytest.raises(NotImplementedError, match="draws its weights"):
            family.weights_of(outputs)
        return
    drawn = poutine.trace(family.posterior).get_trace(outputs).nodes["pi"]["value"]
    assert_close(torch.stack(family.weights_of(outputs)), family.expected_weights(drawn))


LOOKS = ["normal", "hard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nb", "shared times"))]


@pytest.mark.parametrize("name", LOOKS)
def test_a_fused_look_tells_the_terms_of_a_plain_one_apart(name, double):
    made = {part: make() for part, make in VELOCITY[name].items()}
    model = pv.VelocityModel(n_latent=2, hidden=(8,), **made)
    cells = (counted if model.likelihood.counts else abundances)(torch.float64)
    with apart(cells, 0):
        program = model.build(cells)
        loop = _Loop(program, GUIDE(program), cells, TrainSettings(held_out=0.3), Trace_ELBO(), None)
        found = []
        for much in (0, MUCH):
            with fusing(much, CPU):
                found.append((torch.tensor(loop._look(0), dtype=torch.float64), loop.state.history.terms))
            loop.state.history.terms = {}
    (plain, terms), (fused, fused_terms) = found
    assert_close(fused, plain)
    assert terms.keys() == fused_terms.keys()
    for which, values in terms.items():
        assert {"unspliced", "spliced", "kl_z"} <= values.keys() == fused_terms[which].keys()
        for term, value in values.items():
            assert fused_terms[which][term] == pytest.approx(value, rel=1e-10), term


def test_a_compiled_softplus_is_torchs_to_rounding():
    x = torch.cat((torch.linspace(-80, 80, 3001), torch.linspace(-1, 1, 3000)))
    found = torch.compile(softplus, dynamic=False)(x)
    exact = torch.nn.functional.softplus(x.double())
    assert ((found - exact).abs() <= 3e-7 * exact).all()


@pytest.mark.slow
def test_in_single_precision_they_agree_to_its_rounding():
    assert_the_same(abundances(torch.float32), MODEL, GUIDE, 1e-4)


@pytest.mark.slow
def test_a_fused_fit_is_as_good_has_the_same_bits_each_time_and_goes_on_to_the_bit(monkeypatch):
    cells, plan = small_cells(300, 60), settings(max_epochs=60, batch_size=100)
    plain = small_fit(cells, settings=plan).training
    monkeypatch.setattr(module, "WORTH_FUSING", 1)
    kept: list[Training] = []
    fused = small_fit(cells, settings=plan, on_evaluation=kept.append).training
    assert differing(small_fit(cells, settings=plan).training, fused) == []
    assert differing(small_fit(cells, settings=plan, resume=kept[20]).training, fused) == []
    assert differing(plain, fused) != []
    assert max(fused.history.held_out) == pytest.approx(max(plain.history.held_out), rel=5e-3)
