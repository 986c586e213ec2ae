"""Laws of the priors: what is believed is what was said, and what cannot be believed is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from tolerances import assert_close, assert_mean

import pyro_velo as pv
from pyro_velo.errors import InputError
from pyro_velo.kinetics import T_MAX
from pyro_velo.priors import Centered, Priors, ScaleMixture, priors_from_text

START = {
    "alpha": torch.tensor([0.2, 1.0, 30.0]),
    "noise_unspliced": torch.tensor([0.1, 0.2, 0.3]),
    "switch_time": torch.tensor([1.0, 5.0, 12.0]),
}


@pytest.mark.parametrize("sd", [0.1, 1.0, 2.0])
def test_centered_is_log_normal_around_the_start(sd: float, double: None) -> None:
    start = START["alpha"].double()
    prior = Centered(sd)(start)
    assert prior.batch_shape == (3,)
    assert_close(prior.cdf(start), 0.5)
    one_sd = dist.Normal(0.0, 1.0).cdf(torch.tensor(1.0))
    assert_close(prior.cdf(start * torch.tensor(sd).exp()), one_sd)
    assert_mean(prior.sample((20_000,)).log(), start.log())


def test_centered_is_the_same_belief_in_any_unit(double: None) -> None:
    start, value, unit = START["alpha"].double(), torch.rand(3), 1000.0
    # A density changes by the unit's Jacobian, and by nothing else.
    assert_close(Centered()(unit * start).log_prob(unit * value), Centered()(start).log_prob(value) - unit_log(unit))


def unit_log(unit: float) -> torch.Tensor:
    return torch.tensor(unit).log()


@pytest.mark.parametrize("concentration", [0.0, -1.0, float("nan")])
def test_a_concentration_that_no_dirichlet_has_is_refused(concentration: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected a Dirichlet concentration.*got {concentration}.*0\.25"):
        Priors(concentration=concentration)


def test_what_is_no_prior_or_may_be_negative_is_refused() -> None:
    for told, says in (
        ({"beta": 0.5}, "prior of beta to be a distribution"),
        ({"switch_time": "Uniform"}, "prior of switch_time"),
        ({"beta": dist.Normal(0.0, 1.0)}, "positive numbers of beta.*LogNormal"),
        ({"gamma": dist.Uniform(-1.0, 2.0)}, "positive numbers of gamma"),
    ):
        with pytest.raises(InputError, match=says):
            Priors(**told)
    positive = (dist.Gamma(1.0, 1.0), dist.HalfNormal(1.0), dist.Uniform(0.0, 1.0), dist.LogNormal(0.0, 1.0))
    assert all(Priors(beta=prior).beta is prior for prior in positive)


def test_a_distribution_is_taken_as_it_is_and_a_function_is_given_the_start() -> None:
    fixed, seen = dist.LogNormal(0.0, 0.5), []

    def of_start(start: torch.Tensor) -> dist.Distribution:
        seen.append(start)
        return dist.Gamma(2.0, 2 / start)

    priors = Priors(beta=fixed, alpha=of_start)
    assert priors.of("beta", {}) is fixed
    assert_close(priors.of("alpha", START).mean, START["alpha"])
    assert seen[0] is START["alpha"]


def test_both_molecules_share_one_kind_of_prior_around_their_own_start() -> None:
    prior = Priors(noise=Centered(0.3)).of("noise_unspliced", START, kind="noise")
    assert_close(prior.base_dist.loc, START["noise_unspliced"].log())
    assert_close(prior.base_dist.scale, 0.3)


def test_a_misspelt_prior_is_refused() -> None:
    with pytest.raises(TypeError, match="betta"):
        Priors(betta=dist.LogNormal(0.0, 1.0))


def test_the_switch_may_be_at_any_time_or_near_its_start_where_a_clock_is_shared() -> None:
    model = pv.VelocityModel()
    switch = model.all_priors.of("switch_time", START)
    assert (switch.low, switch.high) == (0.0, T_MAX)
    for times in (pv.times.Shared(), pv.times.Hierarchical()):
        switch = replace(model, times=times).all_priors.of("switch_time", START)
        assert_close(switch.base_dist.loc.exp(), START["switch_time"])
    with pytest.raises(InputError, match=r"prior of switch_time; got None.*model\.all_priors"):
        Priors().of("switch_time", START)
    own = dist.LogNormal(0.0, 1.0)
    assert replace(model, priors=Priors(switch_time=own)).all_priors.switch_time is own


def test_a_shared_clocks_genes_have_no_say_in_the_unit_of_time() -> None:
    """Stretched with time, the density of log switching times is stationary at their start; uniform ones want more."""
    stretch = torch.zeros((), dtype=torch.float64, requires_grad=True)
    start = {"switch_time": START["switch_time"].double()}
    for times, slope in ((pv.times.Shared(), 0.0), (pv.times.PerGene(), float(len(start["switch_time"])))):
        switch = start["switch_time"] * stretch.exp()
        prior = pv.VelocityModel(times=times).all_priors.of("switch_time", start)
        (found,) = torch.autograd.grad((prior.log_prob(switch) + switch.log()).sum(), stretch)
        assert float(found) == pytest.approx(slope, abs=1e-9)


def test_a_scale_mixture_is_a_density_that_knows_no_unit() -> None:
    prior = ScaleMixture()(torch.zeros(2, dtype=torch.float64))
    x = torch.cat([side * torch.logspace(-6, 2, 200_001, dtype=torch.float64) for side in (-1, 1)]).sort().values
    density = prior.log_prob(x[:, None]).exp()
    assert density.shape == (len(x), 2)
    assert float(torch.trapezoid(density[:, 0], x)) == pytest.approx(1, abs=1e-4)
    # x p(x) is level over two decades, where that of a Normal of sd 5 grows forty times.
    middle = (x > 0.03) & (x < 3)
    level = (x * density[:, 0])[middle]
    normal = (x * dist.Normal(0.0, 5.0).log_prob(x).exp())[middle]
    assert level.max() / level.min() < 2.5 < 40 < normal.max() / normal.min()
    torch.manual_seed(0)
    assert_mean(prior.sample(torch.Size([20_000])) ** 2, (torch.tensor(ScaleMixture().sds).double() ** 2).mean())


def test_priors_are_values() -> None:
    one = Priors()
    assert replace(one, concentration=1.0).concentration == 1.0 and one.concentration == 0.25
    with pytest.raises(AttributeError):
        one.concentration = 2.0


READY = {"from_data": Priors.from_data, "weak": Priors.weak, "flat": Priors.flat}


@pytest.mark.parametrize("name", READY)
def test_ready_made_priors_take_swaps_and_support_every_start(name: str) -> None:
    own = dist.LogNormal(0.0, 0.1)
    priors = READY[name](beta=own, concentration=1.0)
    assert priors.beta is own and priors.concentration == 1.0
    alpha = priors.of("alpha", START)
    assert alpha.support.check(START["alpha"]).all()


def test_flat_priors_prefer_nothing_and_data_driven_ones_the_start() -> None:
    flat, centred = Priors.flat().of("alpha", START), Priors.from_data().of("alpha", START)
    at = torch.tensor([0.01, 1.0, 100.0])
    assert_close(flat.expand([3]).log_prob(at), torch.zeros(3))
    assert (centred.log_prob(START["alpha"]) > centred.log_prob(10 * START["alpha"])).all()


def test_a_prior_can_be_written() -> None:
    priors = priors_from_text(["alpha=LogNormal(0, 1)", " beta = Gamma(2, rate=3.5)", "concentration=0.5"])
    assert_close(
        priors.of("alpha", START).log_prob(torch.tensor(2.0)), dist.LogNormal(0.0, 1.0).log_prob(torch.tensor(2.0))
    )
    assert_close(priors.of("beta", START).mean, torch.tensor(2 / 3.5))
    assert priors.concentration == 0.5 and priors.gamma == Priors().gamma


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rate=LogNormal(0, 1)", "'rate' is no prior, expected one of alpha, beta"),
        ("alpha", "is no distribution"),
        ("alpha=LogNormal", "is no distribution"),
        ("alpha=Lognormal(0, 1)", "no distribution 'Lognormal'"),
        ("alpha=LogNormal(0, __import__('os').getpid())", "is no distribution"),
        ("alpha=__import__('os')", "no distribution '__import__'"),
        ("alpha=torch.ones(3)", "is no distribution"),
        ("alpha=LogNormal(0, -1)", "is no distribution"),
        ("alpha=LogNormal(0)", "is no distribution"),
        ("alpha=Normal([0, 0], [1, 1])", "is no distribution"),
        ("concentration=much", "expected a number"),
    ],
)
def test_what_is_no_prior_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as error:
        priors_from_text([text])
    assert "\n" not in str(error.value)


def test_a_prior_is_given_once() -> None:
    with pytest.raises(InputError, match="given twice"):
        priors_from_text(["alpha=LogNormal(0, 1)", "alpha=LogNormal(0, 2)"])
