"""The summands of the ELBO: they add up to it, each is what it says, and a fit keeps them without being changed."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal
from small import differing, settings, small_cells, small_fit
from tolerances import STANDARD_ERRORS, assert_close, assert_mean, standard_error
from torch import Tensor
from toys import some_cells

import pyro_velo as pv
from pyro_velo import checkpoint, simulate
from pyro_velo.batch import Cells
from pyro_velo.data.simulated import to_anndata
from pyro_velo.doctor.decomposition import decompose, draw_terms
from pyro_velo.doctor.terms import CELLS, DIMENSIONS, GENES, MOLECULES, Terms
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions
from pyro_velo.likelihoods import LIKELIHOODS
from pyro_velo.mixture import JointMixture
from pyro_velo.rates import RATE_GUIDES, Auto, RateGuide, unit_lower
from pyro_velo.schedule import Warmup
from pyro_velo.states import STATE_FAMILIES
from pyro_velo.times import TIMES
from pyro_velo.train import Fitted, Training, TrainSettings, load_parameters, per_cell, split

exact = pytest.mark.usefixtures("double")
DRAWS = 40
OTHERS = ("low-rank", "multivariate")

N, G = 24, 4
OTHER_GUIDES = {
    "multivariate": lambda: Auto(AutoMultivariateNormal, init_scale=0.1),
    "flow": lambda: Auto(AutoIAFNormal, num_transforms=1),
}
PARTS: dict[str, dict[str, Any]] = {
    **{f"states {name}": {"states": make()} for name, make in STATE_FAMILIES.items()},
    **{f"likelihood {name}": {"likelihood": make()} for name, make in LIKELIHOODS.items()},
    **{f"times {name}": {"times": make()} for name, make in TIMES.items()},
    **{f"rates {name}": {"rates": make()} for name, make in (RATE_GUIDES | OTHER_GUIDES).items()},
    "transcription": {"transcription": pv.transcription.TimeDependent()},
    "flat priors": {"priors": pv.Priors.flat},
    "all at once": {
        "states": pv.states.LogisticNormal(),
        "likelihood": pv.likelihoods.ZINB(),
        "times": pv.times.Hierarchical(),
        "rates": pv.rates.PerGene(),
    },
}


def in_double(cells: Cells) -> Cells:
    counts = cells.counts
    if counts is not None:
        counts = replace(counts, **{name: value.double() for name, value in vars(counts).items()})
    return replace(
        cells, molecules=cells.molecules.double(), ratio=torch.as_tensor(cells.ratio).double(), counts=counts
    )


def counted() -> Cells:
    kinetics = simulate.LogNormalRates(drop=0)
    plan = simulate.Settings(noise=simulate.NegativeBinomial(), kinetics=kinetics)
    adata = to_anndata(simulate.simulate(60, G + 4, settings=plan, seed=1))
    return in_double(pv.velocity_data(adata, counts=True, as_is=True).cells)


def world(rates: RateGuide | None = None, cells: Cells | None = None, **parts: Any) -> tuple[Fitted, Cells]:
    """A program and its guide with parameters that are not where they start, as a fit; and their cells."""
    if callable(parts.get("priors")):
        # Made now, in double precision.
        parts["priors"] = parts["priors"]()
    model = pv.VelocityModel(**({"n_latent": 3, "hidden": (6,)} | parts))
    if cells is None:
        cells = counted() if model.likelihood.counts else some_cells(N, G)
    with pyro.get_param_store().scope() as store, torch.random.fork_rng():
        torch.manual_seed(1)
        program = model.build(cells)
        guide = pv.guides.Amortized(rates=rates or pv.rates.MeanField(), hidden=(6,), hidden_states=(6,))(program)
        with torch.no_grad():
            Trace_ELBO().loss(program, guide, cells.batch(torch.arange(len(cells))))
            # Anew: how much noise that took is not the same for all parts.
            torch.manual_seed(2)
            for value in pyro.get_param_store().values():
                free = value.unconstrained()
                free += 0.2 * torch.randn_like(free)
    return Fitted(program, guide, store, Training(TrainSettings(held_out=0.25, batch_size=N))), cells


def some_batch(cells: Cells):
    """A part of the cells, that stands for more of them."""
    return cells.batch(torch.arange(1, 8), len(cells) - 3)


SCHEDULES = {
    "elbo": Warmup(0),
    "beta": Warmup(0, beta=4.0),
    "free bits": Warmup(0, free_bits=0.5),
    "light, free bits": Warmup(0, beta=0.3, free_bits=2.0),
}
WITH_SCHEDULES = ("states collapsed", "rates per-gene", "likelihood nb", "all at once")
"""The parts that are put under every schedule; the others under the ELBO alone."""


def one_draw(fitted: Fitted, cells: Cells, schedule: Warmup | None = None) -> tuple[Terms, float]:
    """The terms of a batch, and the loss per cell of `Trace_ELBO` at the same draw."""
    batch = some_batch(cells)
    objective = schedule.settled_at if schedule else nullcontext
    with conditions(fitted, cells, 5), torch.no_grad(), objective():
        terms = draw_terms(fitted, batch)
    with conditions(fitted, cells, 5), torch.no_grad(), objective():
        parts = [per_cell(part, batch.n_cells) for part in (fitted.program, fitted.guide)]
        return terms, Trace_ELBO().loss(*parts, batch)


@exact
@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, each) for name in PARTS for each in SCHEDULES if each == "elbo" or name in WITH_SCHEDULES],
)
def test_the_terms_add_up_to_the_elbo_of_the_same_draw(name: str, schedule: str) -> None:
    fitted, cells = world(**PARTS[name])
    terms, loss = one_draw(fitted, cells, SCHEDULES[schedule])
    assert float(terms.total) == pytest.approx(-loss, rel=1e-9)
    grouped = terms.grouped()
    assert_close(grouped.total, terms.total)
    assert {"unspliced", "spliced", "kl_z", "kl_pi"} <= set(grouped.names)
    # Each term's shares are those of its genes, cells and dimensions.
    for term in (*terms.terms, *grouped.terms):
        for axis in (CELLS, GENES, DIMENSIONS):
            share = term.by(axis)
            if share is not None:
                assert_close(share.mean() if axis == CELLS else share.sum(), term.value)
                assert len(share) == {CELLS: 7, GENES: cells.n_genes, DIMENSIONS: 3}[axis]


@pytest.mark.parametrize("changes", [{}, {"beta": 4.0}, {"free_bits": 0.5}, {"beta": 0.3, "free_bits": 2.0}], ids=str)
def test_they_add_up_in_single_precision_too(changes: dict[str, float]) -> None:
    """Of a fit under a schedule: the objective that it climbed, and the ELBO of the same draw."""
    cells = small_cells()
    fitted = small_fit(cells, settings=settings(max_epochs=2, **changes))
    for schedule in (Warmup(0, **changes), SCHEDULES["elbo"]):
        terms, loss = one_draw(fitted, cells, schedule)
        assert float(terms.total) == pytest.approx(-loss, rel=1e-5)


@exact
@pytest.mark.parametrize(
    "name", ["mean-field", "per-gene", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_the_kl_of_a_rate_is_on_average_that_of_two_normals(name: str) -> None:
    """Rates are LogNormal in prior and guide: the KL of the marginals has a closed form on the log scale."""
    fitted, cells = world(rates=(RATE_GUIDES | OTHER_GUIDES)[name](), n_latent=1)
    batch, sites = some_batch(cells), ("alpha", "beta", "gamma", "noise_spliced")
    with conditions(fitted, cells, 0), torch.no_grad():
        draws = [draw_terms(fitted, batch) for _ in range(DRAWS)]
        levels = torch.special.ndtr(torch.tensor([0.0, 1.0])).tolist()
        fifty, upper = (
            {site: q[i] for site, q in fitted.guide.rates.quantiles(levels, batch).items()} for i in range(2)
        )
    for site in sites:
        q = dist.Normal(fifty[site].log(), (upper[site] / fifty[site]).log())
        p = dist.Normal(fitted.program.start.sites()[site].log(), 1.0)
        expected = torch.distributions.kl_divergence(q, p).sum() / batch.n_cells
        assert_mean(torch.stack([terms.of(f"kl_{site}").value for terms in draws]), expected)


@exact
@pytest.mark.parametrize("name", ["per-gene", "multivariate"])
def test_what_is_left_of_correlated_rates_is_their_total_correlation(name: str) -> None:
    fitted, cells = world(rates=(RATE_GUIDES | OTHER_GUIDES)[name]())
    with conditions(fitted, cells, 0), torch.no_grad():
        draws = torch.stack([draw_terms(fitted, some_batch(cells)).of("kl_correlation").value for _ in range(DRAWS)])
        rates = fitted.guide.rates
        if name == "per-gene":
            root = unit_lower(rates.below, rates.loc.shape[-1]) * rates.scale.unsqueeze(-2)
        else:
            root = rates.get_posterior().scale_tril
    covariance = root @ root.mT
    # -log det of the correlation matrix / 2.
    together = (covariance.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(covariance)).sum() / 2
    assert_mean(draws, together / (len(cells) - 3))
    assert together > 0


@exact
def test_a_flow_leaves_one_kl_for_all_that_it_draws() -> None:
    fitted, cells = world(rates=OTHER_GUIDES["flow"]())
    terms, _ = one_draw(fitted, cells)
    assert set(terms.of("kl_genes").sites) == set(fitted.program.start.sites())


@exact
def test_the_kl_of_z_is_on_average_its_closed_form_in_each_dimension() -> None:
    fitted, cells = world()
    batch = some_batch(cells)
    with conditions(fitted, cells, 0), torch.no_grad():
        found = [draw_terms(fitted, batch).of("kl_z") for _ in range(DRAWS)]
        loc, scale = fitted.guide.encoder(fitted.guide.standardised(batch.seen))
    expected = ((loc**2 + scale**2 - 1) / 2 - scale.log()).mean(0)
    assert_close(found[0].expected, expected)
    assert_mean(torch.stack([term.by(DIMENSIONS) for term in found]), expected)


@exact
def test_the_closed_form_of_the_states_is_the_mean_of_the_sampled_one() -> None:
    """`Collapsed` and `Dirichlet` have the same posterior: the KL of one is the other's on average."""
    collapsed, cells = world(n_latent=2)
    sampled, _ = world(cells=cells, n_latent=2, states=pv.states.Dirichlet())
    batch = some_batch(cells)

    def of(fitted: Fitted) -> Tensor:
        with conditions(fitted, cells, 0), torch.no_grad():
            return torch.stack([draw_terms(fitted, batch).of("kl_pi").value for _ in range(DRAWS // 2)])

    one, other = of(collapsed), of(sampled)
    # Both means have an error.
    error = torch.hypot(standard_error(one), standard_error(other))
    assert abs(other.mean() - one.mean()) < STANDARD_ERRORS * error and (one > 0).all()


@exact
def test_a_point_under_flat_priors_costs_nothing_and_under_others_its_prior() -> None:
    flat, cells = world(rates=pv.rates.Point(), priors=pv.Priors.flat(switch_time=dist.Uniform(0.0, 20.0)))
    terms, _ = one_draw(flat, cells)
    assert [float(terms.of(f"kl_{name}").value) for name in ("alpha", "beta", "gamma")] == [0, 0, 0]
    assert float(terms.grouped().of("kl_noise").value) == 0
    told, _ = world(cells=cells, rates=pv.rates.Point())
    terms, _ = one_draw(told, cells)
    with told.parameters():
        beta = told.guide.rates.median()["beta"]
    prior = dist.LogNormal(told.program.start.sites()["beta"].log(), 1.0)
    assert_close(terms.of("kl_beta").value, -prior.log_prob(beta).sum() / (len(cells) - 3))


@exact
def test_a_penalty_stands_apart() -> None:
    fitted, cells = world()
    heavy, _ = world(cells=cells, penalty=pv.SwitchPenalty(weight=7.0))
    found = [one_draw(each, cells)[0] for each in (fitted, heavy)]
    assert_close(found[0].total, found[1].total)
    light, weighed = (float(terms.of("switch_penalty").value) for terms in found)
    assert weighed == pytest.approx(35 * light) and light > 0
    # Its formula (seed 000): the squares of what (u, s) at the switch miss.
    with conditions(fitted, cells, 5), torch.no_grad():
        nodes = pyro.poutine.trace(fitted.guide).get_trace(some_batch(cells)).nodes
    start, rates = fitted.program.start, [nodes[name]["value"] for name in ("alpha", "beta", "gamma", "switch_time")]
    u, s = pv.kinetics.induction(*rates)
    miss = ((u - start.switch_unspliced) / cells.ratio) ** 2 + (s - start.switch_spliced) ** 2
    assert light == pytest.approx(0.2 * float(miss.sum()))


# The molecules


def mixture(hard: bool = False) -> JointMixture:
    log_weights = torch.randn(4, 2, 3).log_softmax(0)
    normals = (dist.Normal(torch.randn(4, 2, 3), 0.3 + torch.rand(4, 2, 3)) for _ in MOLECULES)
    return JointMixture(log_weights, *normals, hard=hard)


@exact
@pytest.mark.parametrize("hard", [False, True])
def test_the_density_of_unspliced_knows_nothing_of_spliced(hard: bool) -> None:
    found, value = mixture(hard), torch.randn(2, 3, 2)
    log_u = found.log_unspliced(value)
    moved = value.clone()
    moved[..., 1] += 1
    assert_close(found.log_unspliced(moved), log_u)
    # A second molecule that says the same of every state adds its own density, and nothing to that of the first.
    mute = JointMixture(found.log_weights, found.unspliced, dist.Normal(0.0, 1.0).expand([4, 2, 3]), hard)
    assert_close(mute.log_prob(value), log_u + dist.Normal(0.0, 1.0).log_prob(value[..., 1]))


@exact
def test_the_density_of_unspliced_is_the_mixtures_with_spliced_integrated_out() -> None:
    found, u = mixture(), torch.randn(2, 3)
    grid = torch.linspace(-12, 12, 801)
    values = torch.stack((u.expand(801, 2, 3), grid[:, None, None].expand(801, 2, 3)), -1)
    whole = torch.trapezoid(found.log_prob(values).exp(), grid, dim=0)
    assert_close(found.log_unspliced(values[0]), whole.log(), slack=100)


# Of a fit


@exact
def test_cells_draws_and_batches_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, cells = world()
    one = decompose(fitted, cells, index=torch.arange(10), draws=3)
    parts = [one.of(name) for name in ("unspliced", "spliced", "kl_z", "kl_pi")]
    assert all(len(part.by(CELLS)) == 10 for part in parts)
    # In batches of 4, 4 and 2 cells the mean of the closed form is what it was: it has no noise.
    training = Training(replace(fitted.training.settings, batch_size=4))
    other = decompose(replace(fitted, training=training), cells, index=torch.arange(10), draws=3)
    assert_close(other.of("kl_z").expected, one.of("kl_z").expected)
    assert_close(other.of("kl_z").by(CELLS).mean(), other.of("kl_z").value)
    with pytest.raises(InputError, match="Expected 1 draw and 1 cell or more; got 0 and 10"):
        decompose(fitted, cells, index=torch.arange(10), draws=0)


@exact
def test_the_same_seed_gives_the_same_terms_and_leaves_the_generator_alone() -> None:
    fitted, cells = world()
    before = torch.get_rng_state()
    totals = [float(decompose(fitted, cells, seed=seed).total) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert totals[0] == totals[1] != totals[2]


def elbo_of(terms: dict[str, list[float]]) -> np.ndarray:
    signs = {name: 0 if name.endswith("_penalty") else -1 if name.startswith("kl_") else 1 for name in terms}
    return np.sum([signs[name] * np.array(values) for name, values in terms.items()], axis=0)


@pytest.mark.parametrize(
    ("share", "changes"), [(0.4, {}), (0.0, {}), (0.4, {"beta": 4.0}), (0.4, {"beta": 0.3, "free_bits": 2.0})]
)
def test_what_a_fit_keeps_adds_up_to_its_held_out_elbo(share: float, changes: dict[str, float]) -> None:
    """Whatever the schedule is: terms and ELBO are at weight 1."""
    cells, plan = small_cells(), settings(held_out=share, evaluate_steps=6, max_epochs=4, **changes)
    history = small_fit(cells, settings=plan).training.history
    assert_allclose(elbo_of(history.terms["held_out"]), history.held_out, rtol=1e-5)
    assert {"unspliced", "spliced", "kl_z", "kl_pi", "kl_rates", "kl_noise", "kl_switch_times"} <= set(
        history.terms["held_out"]
    )
    # NaN where nobody looked, as in the ELBO itself.
    columns = [column for of in history.terms.values() for column in of.values()]
    assert all(np.array_equal(np.isnan(column), np.isnan(history.held_out)) for column in columns)
    if share == 0:
        assert differing_columns(history.terms["train"], history.terms["held_out"]) == []


def differing_columns(one: dict[str, list[float]], other: dict[str, list[float]]) -> list[str]:
    return [name for name in one.keys() | other.keys() if not np.array_equal(one[name], other[name], equal_nan=True)]


def test_the_training_cells_are_as_many_and_have_the_same_noise() -> None:
    cells, plan = small_cells(), settings(held_out=0.3, max_epochs=3)
    kept: list[Training] = []
    fitted = small_fit(cells, settings=plan, on_evaluation=kept.append)
    train_index, held = split(len(cells), 0.3, plan.seed)
    last = replace(kept[-1], best=kept[-1].parameters)
    again = Fitted(fitted.program, fitted.guide, fitted.store, last)
    with fitted.parameters():
        load_parameters(last.parameters)
    for name, index in (("train", train_index[: len(held)]), ("held_out", held)):
        found = decompose(again, cells, index=index, seed=plan.seed).grouped()
        for term in found.terms:
            assert float(term.value) == pytest.approx(
                kept[-1].history.terms[name][term.name][-1], rel=1e-5, abs=1e-6
            ), term.name


def test_to_keep_them_changes_no_bit_of_the_fit() -> None:
    """A subclass of the ELBO is another one as far as the loop knows, so it keeps no terms."""

    class Same(Trace_ELBO):
        pass

    plan = settings(max_epochs=3)
    with_terms, without = (small_fit(settings=plan, elbo=elbo).training for elbo in (Trace_ELBO(), Same()))
    assert without.history.terms == {} != with_terms.history.terms
    history = replace(with_terms.history, terms={})
    assert differing(replace(with_terms, history=history), without) == []


def test_what_is_no_sum_of_them_keeps_none() -> None:
    assert small_fit(elbo=Trace_ELBO(num_particles=2), settings=settings(max_epochs=1)).training.history.terms == {}
    # Its guide draws rates together, whose KL has no closed form by site.
    assert small_fit(elbo=TraceMeanField_ELBO(), settings=settings(max_epochs=1)).training.history.terms == {}


def test_a_checkpoint_holds_them_and_one_without_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Training] = []
    whole = small_fit(settings=settings(max_epochs=4), on_evaluation=kept.append).training
    checkpoint.save(kept[1], tmp_path)
    loaded, _ = checkpoint.load(tmp_path)
    assert differing(loaded, kept[1]) == [] and loaded.history.terms["train"]["kl_z"]
    assert differing(small_fit(resume=loaded, settings=None).training, whole) == []
    # As an older version wrote it: no terms, no schedules; looks were compared by the ELBO.
    monkeypatch.setattr(checkpoint, "json", Older)
    checkpoint.save(kept[1], tmp_path)
    monkeypatch.undo()
    old, _ = checkpoint.load(tmp_path)
    assert old.history.terms == {} and old.settings == kept[1].settings
    assert old.history.objective == kept[1].history.held_out
    resumed = small_fit(resume=old, settings=None).training
    assert math.isnan(resumed.history.terms["train"]["kl_z"][1])
    assert resumed.history.terms["train"]["kl_z"][2:] == whole.history.terms["train"]["kl_z"][2:]
    assert differing(replace(resumed, history=whole.history), whole) == []


class Older:
    """`json` that leaves out what has come since."""

    @staticmethod
    def dumps(header: dict[str, Any], **options: Any) -> str:
        history = {name: column for name, column in header["history"].items() if name not in {"terms", "objective"}}
        plan = {name: x for name, x in header["settings"].items() if name not in {"beta", "cycles", "free_bits"}}
        return json.dumps(header | {"history": history, "settings": plan}, **options)


@exact
def test_any_program_is_taken_apart() -> None:
    """One with no genes and no mixture, and a guide whose z is correlated: no dimensions, but the same sum."""

    class Program(torch.nn.Module):
        def forward(self, batch):
            w = pyro.sample("w", dist.Gamma(2.0, 1.0))
            with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                pyro.sample("x", dist.Normal(w * z.sum(-1, keepdim=True), 1.0).to_event(1), obs=batch.u)

    class Guide(torch.nn.Module):
        def forward(self, batch):
            pyro.sample("w", dist.LogNormal(0.0, 0.3))
            with pyro.plate("cells", batch.n_cells, subsample=batch.index, dim=-1):
                root = torch.tensor([[1.0, 0.0], [0.5, 0.8]])
                pyro.sample("z", dist.MultivariateNormal(batch.u[:, :2], scale_tril=root))

    with pyro.get_param_store().scope() as store:
        pass
    cells = some_cells(9, 3)
    terms, loss = one_draw(Fitted(Program(), Guide(), store, Training(TrainSettings())), cells)
    assert terms.names == ("kl_w", "kl_z", "x") and float(terms.total) == pytest.approx(-loss)
    assert terms.of("kl_z").by(DIMENSIONS) is None and terms.of("kl_w").by(GENES) is None
    assert_close(terms.of("x").by(CELLS).mean(), terms.of("x").value)
