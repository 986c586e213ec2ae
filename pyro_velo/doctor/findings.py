"""The rules by which a fit is judged: each one turns measured figures into a finding, or into nothing.

A rule is a pure function of `Measured`. Its threshold stands in `THRESHOLDS` with its source, and what it says to do in
`REMEDIES`. A figure that was not measured is NaN, which is beyond no threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

NAN, DOMINATING, RATE, FROZEN = "nan", "dominating-genes", "learning-rate-too-high", "frozen-encoder"
SHORT, NOISY = "not-converged", "noisy-gradients"
STRONG, WEAK, COLLAPSED = "kl-too-strong", "kl-too-weak", "collapsed-dimensions"
OVERFITTING, DEAD, NARROW = "overfitting", "dead-states", "guide-too-narrow"
PRIOR, BOUND, FLOOR = "prior-far-from-data", "rates-at-bound", "noise-at-floor"

Severity = Literal["error", "warning"]
"""An error leaves nothing of the fit to be used; with a warning, part of it."""


class NotFinite(NamedTuple):
    """Where a fit met NaN: what it was, at which step, of which gene if any; the epoch of the last good checkpoint."""

    what: str
    step: int
    gene: str | None
    checkpoint_epoch: int | None


@dataclass(frozen=True)
class Measured:
    """The figures that the rules look at; what was not measured is NaN or None.

    `numbers`: measured numbers a cell (two a gene, one of a profile's), over which nats a cell are shared out. `looks`
    to `kl_weight`, `ended`: see `course.Course`. `encoder_moved`: see `course.encoder_moved`. `noise_ratio`: see
    `noise`. `told_weight`, `told_error`: the KL weight of `balance`. `active` of `dimensions`: see `collapse.Collapse`.
    `dead_states`: the mean of `StateUse.dead`. `without_mean`: the share of cells with a k-hat above 1, and `iw_gap`
    the mean gap in nats. `prior_site` is the one whose median gene is the furthest from its prior, by `prior_distance`
    prior sds; `far_site` the one with the largest share, `far_share`, of genes beyond three, among those whose median
    is not;
    `at_bound`: the share of switching times. `least_noise` in units of the range of `noise_gene`. `loss_share` and
    `input_share` are those of `loss_gene` and `input_gene`, the largest of `genes` genes. `kinetic` is whether the fit
    is of velocities, and not of profiles.
    """

    numbers: int = 1
    looks: int | None = None
    rise: float = math.nan
    rise_error: float = math.nan
    swing: float = math.nan
    fall: float = math.nan
    train_rise: float = math.nan
    kl_weight: float = math.nan
    ended: bool = False
    encoder_moved: float = math.nan
    noise_ratio: float = math.nan
    told_weight: float = math.nan
    told_error: float = math.nan
    dimensions: int = 0
    active: int = 0
    dead_states: float = math.nan
    without_mean: float = math.nan
    iw_gap: float = math.nan
    prior_site: str = ""
    prior_distance: float = math.nan
    far_site: str = ""
    far_share: float = math.nan
    at_bound: float = math.nan
    least_noise: float = math.nan
    noise_gene: str = ""
    loss_share: float = math.nan
    loss_gene: str = ""
    input_share: float = math.nan
    input_gene: str = ""
    genes: int = 0
    kinetic: bool = True
    not_finite: NotFinite | None = None


class Threshold(NamedTuple):
    """A number that a figure must not pass, and where it comes from."""

    value: float
    source: str


SURE = 3.0
"""Standard errors from which a figure is told from chance."""

THRESHOLDS: dict[str, Threshold] = {
    NAN: Threshold(0.0, "a density of NaN compares with nothing"),
    DOMINATING: Threshold(0.5, "one gene weighs more than all other genes together"),
    RATE: Threshold(0.1, "nats a measured number: between looks the density of each changes by a tenth"),
    FROZEN: Threshold(0.5, "half of the encoder's parameters never had a gradient; all have one in an encoder at work"),
    SHORT: Threshold(0.02, "nats a number, 2 % of its density, in the last third of looks at the full learning rate"),
    NOISY: Threshold(0.25, "Adam's step at parameters that stay: sqrt((1 - b) / (1 + b)) = 0.23 for noise alone, "
                           "b = 0.9 its memory (Kingma & Ba 2015), and a tenth more"),
    STRONG: Threshold(2.0, "the KL weighs 1 in the ELBO; twice that is a beta-VAE (Higgins et al. 2017)"),
    WEAK: Threshold(0.5, "the KL weighs 1 in the ELBO; at half of it the KL is not in yet"),
    COLLAPSED: Threshold(0.5, "more dimensions idle than at work (active: Burda et al. 2016), and more than 10 idle, "
                              "which is all that the default model has"),
    OVERFITTING: Threshold(0.02, "nats a measured number, 2 % of its density, lost since the best look"),
    DEAD: Threshold(0.5, "fewer than two of four states a gene: no switch is left to tell a direction by"),
    NARROW: Threshold(0.5, "the share of cells whose weights have no mean: k-hat above 1 (Vehtari et al. 2024)"),
    PRIOR: Threshold(3.0, "prior sds, beyond which 0.3 % of a Normal lie: here the median gene does"),
    BOUND: Threshold(0.1, "one gene in ten, where 0.3 % are expected beyond three prior sds"),
    FLOOR: Threshold(1e-3, "of a gene's range: no count of fewer than a million molecules is known so well"),
}  # fmt: skip

REMEDIES: dict[str, str] = {
    NAN: "Look at that gene's layers, or lower the learning rate; resume from the last good checkpoint.",
    DOMINATING: "Look at that gene's layers: give it the unit of the others, or leave it out.",
    RATE: "Lower the learning rate tenfold: TrainSettings(learning_rate=1e-2) is the default.",
    FROZEN: "Let the encoder's parameters be trained: requires_grad, and no detach between them and q(z | x).",
    SHORT: "Train longer: --max-epochs, or resume from the checkpoint with more of them.",
    NOISY: "Use a larger batch, the collapsed states, or a lower learning rate, and train longer.",
    STRONG: "Train at a KL weight of 1 to the end; beta above 1 is for disentangling, not for a posterior.",
    WEAK: "Let the KL weight rise to 1 before the end: a shorter warmup, or more epochs.",
    COLLAPSED: "Use fewer latent dimensions (n_latent), about twice as many as are active.",
    OVERFITTING: "The best parameters were kept; smaller networks (hidden) or more cells would lift them.",
    DEAD: "Look at phase portraits: genes seen on one branch only should be left out of the velocity.",
    NARROW: "Widen the guide: rates=PerGene(), a larger encoder, or fit.refined(); do not read its intervals as such.",
    PRIOR: "Centre the prior on what the data say (Priors.from_data()), or ask why the data contradict it.",
    BOUND: "Look at those genes' phase portraits: too little of the cycle is seen to place the switch or the rate.",
    FLOOR: "Look at that gene's layers: it is constant, or copied from cell to cell.",
}


OF_PROFILES: dict[str, str] = {
    RATE: "Lower the learning rate tenfold: TrainSettings(learning_rate=3e-3) is the default of autoencoders.",
    NOISY: "Use a larger batch or a lower learning rate, and train longer.",
    NARROW: "Widen the guide: a larger encoder (Encoder(hidden=...)); do not read its intervals as such.",
    SHORT: "Train longer: --max-epochs, or TrainSettings(max_steps=...).",
}
"""Remedies that are others for an autoencoder than for a velocity model."""


@dataclass(frozen=True)
class Finding:
    """What is wrong: its code, how bad it is, the figure and the threshold that it is beyond, in words, and a remedy.

    `follows_from`: the codes of findings that bring this one about.
    """

    code: str
    severity: Severity
    figure: float
    threshold: float
    source: str
    words: str
    remedy: str
    follows_from: tuple[str, ...] = ()


Rule: TypeAlias = Callable[[Measured], Finding | None]


def _found(code: str, figure: float, words: str, severity: Severity = "warning") -> Finding:
    threshold = THRESHOLDS[code]
    return Finding(code, severity, figure, threshold.value, threshold.source, words, REMEDIES[code])


def not_finite(m: Measured) -> Finding | None:
    """NaN or infinity ended the fit."""
    if m.not_finite is None:
        return None
    what, step, gene, epoch = m.not_finite
    where = "" if gene is None else f", gene {gene}"
    kept = "no checkpoint was kept" if epoch is None else f"the last good checkpoint is of epoch {epoch}"
    return _found(NAN, step, f"NaN or infinity at step {step}, {what}{where}; {kept}.", "error")


def dominating_genes(m: Measured) -> Finding | None:
    """One of several genes outweighs all others together."""
    limit = THRESHOLDS[DOMINATING].value
    if m.genes > 2 and m.loss_share > limit:
        words = f"Gene {m.loss_gene} makes {m.loss_share:.0%} of the cells' differences in log-likelihood."
        return _found(DOMINATING, m.loss_share, words, "error")
    if m.genes > 2 and m.input_share > limit:
        words = f"Gene {m.input_gene} makes {m.input_share:.0%} of what the encoder sees, and of its first gradient."
        return _found(DOMINATING, m.input_share, words, "error")
    return None


def learning_rate_too_high(m: Measured) -> Finding | None:
    """The held-out ELBO swings from look to look, with the same noise in each."""
    swing = m.swing / m.numbers
    if swing > THRESHOLDS[RATE].value:
        words = f"The held-out ELBO swings by {m.swing:.3g} nats a cell from look to look: training oscillates."
        return _found(RATE, swing, words, "error")
    return None


def frozen_encoder(m: Measured) -> Finding | None:
    """The encoder's parameters had no gradient."""
    if m.encoder_moved < THRESHOLDS[FROZEN].value:
        words = f"Only {m.encoder_moved:.0%} of the encoder's parameters ever had a gradient: cells are not placed."
        return _found(FROZEN, m.encoder_moved, words, "error")
    return None


def is_rising(m: Measured) -> bool:
    """Whether the held-out ELBO rose at the full learning rate, by more than its noise and by enough to matter."""
    return not m.ended and m.rise > SURE * m.rise_error and m.rise / m.numbers > THRESHOLDS[SHORT].value


FEWEST_LOOKS = 6
"""Looks at the held-out cells at full KL weight below which nobody can say that the ELBO has levelled off."""


def not_converged(m: Measured) -> Finding | None:
    """The held-out ELBO still rose, or was looked at too few times to tell."""
    if is_rising(m):
        when = "when training ended or its learning rate was dropped"
        words = f"The held-out ELBO still rose by {m.rise:.3g} nats a cell (± {m.rise_error:.2g}) {when}."
        return _found(SHORT, m.rise / m.numbers, words, "error")
    if m.looks is not None and m.looks < FEWEST_LOOKS and not m.ended:
        seen = f"{m.looks} looks at the held-out cells at full KL weight and learning rate"
        words = f"Training ended after {seen}; it takes {FEWEST_LOOKS}"
        return _found(SHORT, math.nan, f"{words} to see that the ELBO has levelled off.", "error")
    return None


def noisy_gradients(m: Measured) -> Finding | None:
    """Training goes on, and gradients are noise alone."""
    if is_rising(m) and m.noise_ratio < THRESHOLDS[NOISY].value:
        words = "Gradients have no direction in common from step to step, though the ELBO still rises."
        return _found(NOISY, m.noise_ratio, words)
    return None


def kl_too_strong(m: Measured) -> Finding | None:
    """The KL weighed more than 1 when training ended, or by what the fit's own optimum tells."""
    limit = THRESHOLDS[STRONG].value
    told = m.told_weight - SURE * m.told_error > limit
    if not (m.kl_weight > 1 or told):
        return None
    figure = m.told_weight if told else m.kl_weight
    how = "by the balance of its gradients" if told else "by its settings"
    return _found(STRONG, figure, f"The KL weighs {figure:.3g} times what it does in the ELBO, {how}.", "error")


def kl_too_weak(m: Measured) -> Finding | None:
    """The KL was not in when training ended, or by what the fit's own optimum tells."""
    limit = THRESHOLDS[WEAK].value
    told = m.told_weight + SURE * m.told_error < limit
    if not (m.kl_weight < 1 or told):
        return None
    figure = m.told_weight if told else m.kl_weight
    how = "by the balance of its gradients" if told else "at the end of training"
    return _found(WEAK, figure, f"The KL weighs {figure:.3g} of what it does in the ELBO, {how}.", "error")


SPARE = 10
"""Idle dimensions that a fit may have: all those of the default model."""


def collapsed_dimensions(m: Measured) -> Finding | None:
    """No dimension says anything of the cells, or far more are idle than at work."""
    idle = m.dimensions - m.active
    share = idle / m.dimensions if m.dimensions else math.nan
    if m.dimensions and not m.active:
        words = f"None of {m.dimensions} latent dimensions is active: the decoder knows nothing of the cells."
        return _found(COLLAPSED, share, words, "error")
    if share > THRESHOLDS[COLLAPSED].value and idle > SPARE:
        return _found(COLLAPSED, share, f"Of {m.dimensions} latent dimensions {m.active} are active.")
    return None


def overfitting(m: Measured) -> Finding | None:
    """The held-out ELBO fell from its best by more than it swings, while that of the training cells rose."""
    limit = max(THRESHOLDS[OVERFITTING].value * m.numbers, SURE * m.swing)
    if m.fall > limit and m.train_rise > 0:
        words = f"The held-out ELBO fell by {m.fall:.3g} nats a cell from its best, and that of training cells rose by"
        return _found(OVERFITTING, m.fall / m.numbers, f"{words} {m.train_rise:.3g}.")
    return None


def dead_states(m: Measured) -> Finding | None:
    """The mean gene is left with fewer than two of its states."""
    if m.dead_states > THRESHOLDS[DEAD].value:
        words = f"{m.dead_states:.0%} of all genes' states explain fewer than one cell in a hundred."
        return _found(DEAD, m.dead_states, words)
    return None


def guide_too_narrow(m: Measured) -> Finding | None:
    """Importance weights have no mean in most cells."""
    if m.without_mean > THRESHOLDS[NARROW].value:
        words = f"In {m.without_mean:.0%} of held-out cells q(z | x) misses so much of the posterior that importance"
        more = f"weights have no mean; 500 of them gain {m.iw_gap:.3g} nats a cell on the ELBO."
        return _found(NARROW, m.without_mean, f"{words} {more}")
    return None


def prior_far_from_data(m: Measured) -> Finding | None:
    """The median gene is far from its prior."""
    if m.prior_distance > THRESHOLDS[PRIOR].value:
        words = f"The median gene's {m.prior_site} is {m.prior_distance:.3g} prior sds from its prior's mean."
        return _found(PRIOR, m.prior_distance, words)
    return None


def rates_at_bound(m: Measured) -> Finding | None:
    """Switching times stand at 0 or 20, or single genes' rates far out in their prior."""
    limit = THRESHOLDS[BOUND].value
    if m.at_bound > limit:
        return _found(BOUND, m.at_bound, f"{m.at_bound:.0%} of switching times are within 0.2 of 0 or of 20.")
    if m.far_share > limit:
        words = f"{m.far_share:.0%} of genes have a {m.far_site} beyond three prior sds."
        return _found(BOUND, m.far_share, words)
    return None


def noise_at_floor(m: Measured) -> Finding | None:
    """A gene is fitted without error."""
    if m.least_noise < THRESHOLDS[FLOOR].value:
        words = f"Gene {m.noise_gene} is left with a noise of {m.least_noise:.2g} of its range."
        return _found(FLOOR, m.least_noise, words)
    return None


RULES: Mapping[str, Rule] = {
    NAN: not_finite,
    DOMINATING: dominating_genes,
    FROZEN: frozen_encoder,
    RATE: learning_rate_too_high,
    SHORT: not_converged,
    NOISY: noisy_gradients,
    STRONG: kl_too_strong,
    WEAK: kl_too_weak,
    COLLAPSED: collapsed_dimensions,
    OVERFITTING: overfitting,
    PRIOR: prior_far_from_data,
    BOUND: rates_at_bound,
    NARROW: guide_too_narrow,
    DEAD: dead_states,
    FLOOR: noise_at_floor,
}
"""In the order in which they are to be mended."""

_OF_AN_OPTIMUM = (STRONG, WEAK, COLLAPSED, OVERFITTING, PRIOR, BOUND, NARROW, DEAD, FLOOR)
_OF_THE_LATENT = (STRONG, WEAK, COLLAPSED, OVERFITTING, BOUND, NARROW, DEAD, FLOOR)
EXPLAINS: Mapping[str, tuple[str, ...]] = {
    NAN: tuple(code for code in RULES if code != NAN),
    DOMINATING: (RATE, SHORT, NOISY, *_OF_AN_OPTIMUM),
    FROZEN: (RATE, SHORT, NOISY, *_OF_THE_LATENT),
    RATE: (SHORT, NOISY, *_OF_AN_OPTIMUM),
    # What is judged at an optimum says nothing of a fit that has not come to one.
    SHORT: _OF_AN_OPTIMUM,
    # A heavy KL draws q(z) to its prior, past what its own cells say, and the held-out ELBO at weight 1 down.
    STRONG: (COLLAPSED, OVERFITTING, NARROW, DEAD),
    WEAK: (NARROW, OVERFITTING),
    # What the prior keeps away from the data, other sites must make up for.
    PRIOR: (BOUND, DEAD),
}
"""Which findings bring about which others: these are told as consequences, and are no verdict of their own."""


class Verdict(NamedTuple):
    """The findings that stand for themselves, and those that follow from them, each in the order of `RULES`."""

    findings: tuple[Finding, ...]
    consequences: tuple[Finding, ...]


def verdict(measured: Measured) -> Verdict:
    """Judge the figures by every rule."""
    found = {code: finding for code, rule in RULES.items() if (finding := rule(measured)) is not None}
    if not measured.kinetic:
        found = {code: replace(each, remedy=OF_PROFILES.get(code, each.remedy)) for code, each in found.items()}
    findings, consequences = [], []
    for code, finding in found.items():
        causes = tuple(cause for cause in found if code in EXPLAINS.get(cause, ()))
        if causes:
            consequences.append(replace(finding, follows_from=causes))
        else:
            findings.append(finding)
    return Verdict(tuple(findings), tuple(consequences))
