"""The rules: figures of a run whose course is known, and each finding at its threshold and beyond."""

from __future__ import annotations

import math
import re
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small import small_cells, small_fit

from pyro_velo.doctor.course import course, encoder_moved
from pyro_velo.doctor.findings import EXPLAINS, REMEDIES, RULES, THRESHOLDS, Measured, NotFinite, verdict
from pyro_velo.schedule import Plateau
from pyro_velo.train import History, Training, TrainSettings

# The course of training


def run(held_out: np.ndarray, train: np.ndarray | None = None, **others: Any) -> Training:
    """A run that looked at the held-out cells after every epoch, the KL in from the start."""
    epochs = list(range(1, len(held_out) + 1))
    train = held_out if train is None else train
    settings = others.pop("settings", TrainSettings(max_epochs=len(held_out), drop=1.0))
    weights = [others.pop("kl_weight", 1.0)] * len(epochs)
    history = History(epochs, list(train), list(held_out), weights, objective=list(others.pop("objective", held_out)))
    return Training(settings, history=history, plateau=Plateau(finished=others.pop("ended", False)))


def test_a_line_rises_by_its_slope_and_neither_swings_nor_falls() -> None:
    looks = -100 + 0.5 * np.arange(60)
    found = course(run(looks), 100)
    assert found.looks == 60
    assert found.rise == pytest.approx(0.5 * 19) and found.rise_error < 1e-9
    assert found.swing == pytest.approx(0, abs=1e-9) and found.fall <= 0
    assert found.gap == 0


def test_noise_about_a_level_swings_by_its_sd_and_rises_by_chance(rng: np.random.Generator) -> None:
    z, swings = [], []
    for _ in range(200):
        found = course(run(rng.normal(-3, 2, 300)), 100)
        swings.append(found.swing)
        z.append(found.rise / found.rise_error)
    assert np.mean(swings) == pytest.approx(2, rel=0.05)
    # The error is the larger of two estimates, so that the ratio varies by 1 at most.
    assert abs(np.mean(z)) < 5 / 200**0.5 and 0.7 < np.std(z) < 1.1


def test_what_falls_from_its_best_while_training_goes_on_is_told() -> None:
    t = np.arange(90.0)
    held_out, train = -((t - 30) ** 2) / 900, t / 30
    found = course(run(held_out, train), 100)
    assert found.fall == pytest.approx(-held_out[60:].mean())
    assert found.train_rise == pytest.approx(train[60:].mean() - 1)
    assert found.gap == pytest.approx(train[-1] - held_out[-1])


def test_looks_while_the_kl_comes_in_and_after_the_rate_drops_are_left_out(rng: np.random.Generator) -> None:
    looks = np.concatenate([rng.normal(0, 50, 40), rng.normal(0, 1, 40), rng.normal(0, 50, 20)])
    training = run(looks, settings=TrainSettings(max_epochs=100, drop=0.8))
    training.history.kl_weight[:40] = np.linspace(0.1, 0.9, 40).tolist()
    found = course(training, 100)
    assert found.looks == 40 and found.swing == pytest.approx(1, rel=0.5)


def test_a_run_is_judged_by_what_it_climbs() -> None:
    """With beta the ELBO falls while the objective rises: that is neither overfitting nor the end of training."""
    climbed = -100 + 0.5 * np.arange(60)
    found = course(run(-climbed, climbed, objective=climbed), 100)
    assert found.rise == pytest.approx(0.5 * 19) and found.fall <= 0 and found.gap == 0


def test_too_few_looks_have_no_figures() -> None:
    found = course(run(np.array([-3.0, -2.0, -1.0])), 100)
    assert all(map(math.isnan, (found.rise, found.swing, found.fall, found.train_rise)))
    empty = course(Training(TrainSettings()), 100)
    assert empty.looks == 0 and math.isnan(empty.kl_weight)


def test_an_encoder_without_gradient_is_told_from_one_with() -> None:
    cells = small_cells()
    fitted = small_fit(cells)
    assert encoder_moved(fitted, cells) == 1.0
    still = {name: state for name, state in fitted.training.optimizer.items() if not name.startswith("encoder")}
    assert encoder_moved(replace(fitted, training=replace(fitted.training, optimizer=still)), cells) == 0.0
    with_own = copy(fitted.guide)
    with_own.own = (torch.zeros(40, 2), torch.ones(40, 2))
    assert math.isnan(encoder_moved(replace(fitted, guide=with_own), cells))
    fitted.guide.encoder.eval().requires_grad_(False)
    assert encoder_moved(fitted, cells) == 0.0


# The rules

HEALTHY = Measured(
    numbers=60, looks=30, rise=0.1, rise_error=0.2, swing=0.5, fall=0.1, train_rise=0.2, kl_weight=1.0,
    encoder_moved=1.0, noise_ratio=0.2, told_weight=1.0, told_error=0.05, dimensions=10, active=3, dead_states=0.25,
    without_mean=0.2, iw_gap=1.5, prior_site="alpha", prior_distance=0.5, far_site="beta", far_share=0.003,
    at_bound=0.0, least_noise=0.05, noise_gene="a", loss_share=0.1, loss_gene="b", input_share=0.05, input_gene="c",
    genes=30,
)  # fmt: skip

BEYOND: dict[str, list[dict[str, Any]]] = {
    "nan": [{"not_finite": NotFinite("the loss itself", 7, "Sox9", 3)}],
    "dominating-genes": [{"loss_share": 0.51}, {"input_share": 0.51}],
    "learning-rate-too-high": [{"swing": 6.1}],
    "frozen-encoder": [{"encoder_moved": 0.0}, {"encoder_moved": 0.49}],
    "not-converged": [
        {"rise": 1.3, "rise_error": 0.4, "noise_ratio": 0.9},
        {"looks": 5, "rise": math.nan, "rise_error": math.nan},
    ],
    "kl-too-strong": [{"kl_weight": 1.5}, {"told_weight": 2.2}, {"told_weight": 20.0}],
    "kl-too-weak": [{"kl_weight": 0.9}, {"told_weight": 0.3}],
    "collapsed-dimensions": [{"active": 0}, {"dimensions": 50, "active": 7}, {"dimensions": 22, "active": 10}],
    "overfitting": [{"fall": 1.6}],
    "prior-far-from-data": [{"prior_distance": 3.1}],
    "rates-at-bound": [{"at_bound": 0.11}, {"far_share": 0.11}],
    "guide-too-narrow": [{"without_mean": 0.51}],
    "dead-states": [{"dead_states": 0.51}],
    "noise-at-floor": [{"least_noise": 9e-4}],
}
WITHIN: list[dict[str, Any]] = [
    {"loss_share": 0.5, "input_share": 0.5},
    {"loss_share": 0.9, "genes": 2},
    {"swing": 6.0},
    {"encoder_moved": 0.5},
    {"rise": 1.3, "rise_error": 0.5},
    {"rise": 1.1, "rise_error": 0.01},
    {"rise": 5.0, "rise_error": 0.1, "ended": True},
    {"looks": 5, "ended": True},
    {"noise_ratio": 0.05},
    {"told_weight": 3.0, "told_error": 0.5},
    {"told_weight": 0.4, "told_error": 0.05},
    {"active": 1},
    {"dimensions": 20, "active": 10},
    {"dimensions": 40, "active": 20},
    {"fall": 1.3, "swing": 0.5},
    {"fall": 5.0, "train_rise": -0.1},
    {"prior_distance": 3.0},
    {"at_bound": 0.1, "far_share": 0.1},
    {"without_mean": 0.5},
    {"dead_states": 0.5},
    {"least_noise": 1e-3},
]


def test_a_healthy_fit_and_one_of_which_nothing_is_known_have_no_finding() -> None:
    for measured in (HEALTHY, Measured()):
        assert verdict(measured) == ((), ())


@pytest.mark.parametrize(("code", "change"), [(code, change) for code, each in BEYOND.items() for change in each])
def test_beyond_a_threshold_the_finding_is_named_alone(code: str, change: dict[str, Any]) -> None:
    found = verdict(replace(HEALTHY, **change))
    assert [each.code for each in found.findings] == [code] and not found.consequences
    (finding,) = found.findings
    assert finding.threshold == THRESHOLDS[code].value and finding.source == THRESHOLDS[code].source
    assert finding.remedy == REMEDIES[code] and finding.severity in ("error", "warning")


@pytest.mark.parametrize("change", WITHIN, ids=str)
def test_at_a_threshold_there_is_none(change: dict[str, Any]) -> None:
    assert verdict(replace(HEALTHY, **change)) == ((), ())


def test_noise_is_named_only_where_training_still_gets_somewhere() -> None:
    rising = replace(HEALTHY, rise=2.0, rise_error=0.1)
    assert [each.code for each in verdict(replace(rising, noise_ratio=0.2)).findings] == [
        "not-converged",
        "noisy-gradients",
    ]
    assert [each.code for each in verdict(replace(rising, noise_ratio=0.9)).findings] == ["not-converged"]


def test_words_hold_what_was_found() -> None:
    for change, words in (
        ({"not_finite": NotFinite("the loss itself", 7, "Sox9", 3)}, r"step 7, the loss itself, gene Sox9; .* epoch 3"),
        ({"not_finite": NotFinite("the loss itself", 7, None, None)}, r"itself; no checkpoint was kept"),
        ({"loss_share": 0.75}, "Gene b makes 75%"),
        ({"dimensions": 50, "active": 7}, "Of 50 latent dimensions 7 are active"),
        ({"told_weight": 20.0}, "weighs 20 times"),
        ({"prior_distance": 21.0}, "median gene's alpha is 21 prior sds"),
        ({"least_noise": 2e-4}, "Gene a is left with a noise of 0.0002"),
    ):
        (finding,) = verdict(replace(HEALTHY, **change)).findings
        assert re.search(words, finding.words), finding.words


def test_every_rule_has_its_threshold_its_remedy_and_a_test() -> None:
    assert set(RULES) == set(THRESHOLDS) == set(REMEDIES) == set(BEYOND) | {"noisy-gradients"}
    assert all(threshold.source for threshold in THRESHOLDS.values())


@pytest.mark.parametrize("cause", EXPLAINS)
def test_what_a_finding_brings_about_is_told_as_a_consequence(cause: str) -> None:
    for code in EXPLAINS[cause]:
        if code == "noisy-gradients":
            continue
        both = replace(HEALTHY, **{**BEYOND[code][0], **BEYOND[cause][0]})
        found = verdict(both)
        told = {each.code: each.follows_from for each in found.consequences}
        if {cause, code} <= {each.code for each in (*found.findings, *found.consequences)}:
            assert cause in told[code] and code not in [each.code for each in found.findings]


def test_causes_go_round_in_no_circle() -> None:
    order = list(RULES)
    for cause, codes in EXPLAINS.items():
        assert all(order.index(cause) < order.index(code) for code in codes), cause


def test_unrelated_faults_are_both_found() -> None:
    found = verdict(replace(HEALTHY, prior_distance=9.0, dimensions=50, active=2, least_noise=1e-5))
    assert [each.code for each in found.findings] == ["collapsed-dimensions", "prior-far-from-data", "noise-at-floor"]
