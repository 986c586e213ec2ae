r"""What is believed of the rates, times, noise and states before a cell is seen.

Each entry of `Priors` is a Pyro distribution, or a function from the data-driven start values to one (empirical Bayes).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import Distribution, constraints
from torch import Tensor

from pyro_velo.errors import InputError

CENTRED = ("alpha", "beta", "gamma", "noise", "alpha_1")
"""What has a start value of its own that the data give."""

POSITIVE = ("alpha", "beta", "gamma", "switch_time", "noise", "dispersion", "alpha_1")
"""What is above 0."""

Prior: TypeAlias = Distribution | Callable[[Tensor], Distribution]
"""A distribution over one gene's value, or a function of the start values (G,) that returns one of batch shape (G,)."""


@dataclass(frozen=True)
class Centered:
    r"""$\mathrm{LogNormal}(\log x_0, \mathrm{sd})$: the start value, known up to a factor of $e^{\pm\mathrm{sd}}$."""

    sd: float = 1.0

    def __call__(self, start: Tensor) -> Distribution:
        """The prior of batch shape (G,) around the start values (G,)."""
        return dist.LogNormal(start.log(), self.sd)


class _RealMixture(dist.MixtureSameFamily):
    """A mixture whose support Pyro's autoguides know how to transform."""

    support = constraints.real


@dataclass(frozen=True)
class ScaleMixture:
    r"""Around 0, by how much is not known: $\frac{1}{K} \sum_k \mathcal{N}(0, \mathrm{sd}_k)$.

    With sds that grow by a factor the density falls about as 1/|x| between the smallest and the largest, and says next
    to nothing of the unit that x is measured in. Under a wide Normal genes that are all near 0 ask for a larger one.
    """

    sds: tuple[float, ...] = (5.0, 1.25, 0.3, 0.08, 0.02)

    def __call__(self, start: Tensor) -> Distribution:
        """The prior of batch shape (G,), whatever the start values (G,)."""
        sds = start.new_tensor(self.sds).expand(*start.shape, -1)
        return _RealMixture(dist.Categorical(logits=torch.zeros_like(sds)), dist.Normal(0.0, sds))


@dataclass(frozen=True)
class Priors:
    """The priors of the velocity model; swap one by name, as in `Priors(beta=dist.LogNormal(0.0, 0.5))`.

    `alpha`, `beta`, `gamma` in 1/time (alpha: scaled abundance/time), `switch_time` in time, as the times have it where
    it is None (`Times.switch_prior`); `noise` the sd of scaled expression, `dispersion` of negative binomials, `gate`
    the logit of the share of counts that are lost; `concentration` of the states' symmetric Dirichlet (veloVI: 0.25),
    `latent` of each coordinate of z. `alpha_1` and `ramp` of time-dependent transcription, `onset` of the time at which
    a gene comes on by a clock that all share (before 0: it was on already), `deviation` of hierarchical times,
    `batch_effect` of each experimental batch's log-factor on a gene.
    """

    alpha: Prior = field(default_factory=Centered)
    beta: Prior = field(default_factory=Centered)
    gamma: Prior = field(default_factory=Centered)
    switch_time: Prior | None = None
    noise: Prior = field(default_factory=Centered)
    dispersion: Prior = field(default_factory=lambda: dist.LogNormal(2.0, 1.5))
    gate: Prior = field(default_factory=lambda: dist.Normal(-3.0, 1.5))
    alpha_1: Prior = field(default_factory=Centered)
    ramp: Prior = field(default_factory=Centered)
    onset: Prior = field(default_factory=ScaleMixture)
    deviation: Prior = field(default_factory=lambda: dist.Normal(0.0, 0.3))
    batch_effect: Prior = field(default_factory=lambda: dist.Normal(0.0, 0.5))
    concentration: float = 0.25
    latent: Distribution = field(default_factory=lambda: dist.Normal(0.0, 1.0))

    def __post_init__(self) -> None:
        """Refuse a concentration that no Dirichlet has, what is no prior, and one below 0 of what is not."""
        if not self.concentration > 0:
            raise InputError(f"Expected a Dirichlet concentration > 0; got {self.concentration}. veloVI's is 0.25.")
        for each in fields(self):
            prior = getattr(self, each.name)
            if each.name == "concentration" or (prior is None and each.name == "switch_time"):
                continue
            if not (isinstance(prior, Distribution) or callable(prior)):
                raise InputError(
                    f"Expected the prior of {each.name} to be a distribution, or a function of start values; got "
                    f"{prior!r}. Write dist.LogNormal(-1.0, 0.5), or pv.priors.Centered(sd) around the start values."
                )
            if each.name in POSITIVE and isinstance(prior, Distribution):
                self._check_positive(each.name, prior)

    @staticmethod
    def _check_positive(name: str, prior: Distribution) -> None:
        support = prior.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        low = getattr(support, "lower_bound", -math.inf)
        if not torch.as_tensor(low).min() >= 0:
            raise InputError(
                f"Expected a prior of positive numbers of {name}; got {prior}, which may be below 0. Take a LogNormal, "
                "a Gamma or a HalfNormal."
            )

    @classmethod
    def from_data(cls, sd: float = 1.0, **others: Any) -> Priors:
        """Empirical Bayes: rates known up to a factor of e^sd around the start values read off the data."""
        centred = dict.fromkeys(CENTRED, Centered(sd))
        return cls(**(centred | others))

    @classmethod
    def weak(cls, **others: Any) -> Priors:
        """Wide priors that have not seen the data: LogNormal(log 0.3, 2), a 95 % range of 0.006 to 15.

        Without `switch_time`, switching times of a clock that genes share are an exception (`Times.switch_prior`).
        """
        return cls(**(dict.fromkeys(CENTRED, dist.LogNormal(math.log(0.3), 2.0)) | others))

    @classmethod
    def flat(cls, **others: Any) -> Priors:
        """No priors on the rates and the noise, as in veloVI: every positive number is as good as any other."""
        return cls(**(dict.fromkeys(CENTRED, dist.ImproperUniform(constraints.positive, (), ())) | others))

    def of(self, name: str, start: Mapping[str, Tensor], *, kind: str | None = None) -> Distribution:
        """The prior of the gene-level site `name` at the start values; `kind` is its entry here where names differ.

        Raises `InputError` for switching times that are left to the times; `VelocityModel.all_priors` leaves none open.
        """
        prior = getattr(self, kind or name)
        if prior is None:
            raise InputError(
                f"Expected a prior of {name}; got None, which leaves it to the times. Ask model.all_priors."
            )
        return prior if isinstance(prior, Distribution) else prior(start[name])


def priors_from_text(texts: Sequence[str]) -> Priors:
    """Priors with some swapped, each as `name=Distribution(numbers)`, or `concentration=number`.

    Nothing is evaluated: a text is a call of a distribution of Pyro's with numbers, or it is refused.
    Raises `InputError` for anything else, an unknown name, or one given twice.

    >>> priors_from_text(["beta=LogNormal(-1, 0.5)"]).beta
    LogNormal()
    """
    given: dict[str, Any] = {}
    known = [each.name for each in fields(Priors)]
    for text in texts:
        name, _, call = (part.strip() for part in text.partition("="))
        if name not in known or name in given:
            why = "is given twice" if name in given else "is no prior"
            raise InputError(f"{name!r} {why}, expected one of {', '.join(known)}, once; got {text!r}.")
        given[name] = _concentration(call) if name == "concentration" else _distribution(call)
    return Priors(**given)


def _concentration(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"The concentration is {text!r}, expected a number, such as 0.25.") from None


def _distribution(text: str) -> Distribution:
    """The distribution that a text such as `LogNormal(0, sd)` names."""
    remedy = "Write a distribution of Pyro's with numbers, such as 'alpha=LogNormal(0, 1)'."
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        raise InputError(f"{text!r} is no distribution. {remedy}") from None
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise InputError(f"{text!r} is no distribution. {remedy}")
    kind = getattr(dist, node.func.id, None)
    if not (isinstance(kind, type) and issubclass(kind, Distribution)):
        raise InputError(f"Pyro has no distribution {node.func.id!r}. {remedy}")
    try:
        # A literal is a number here, or nothing.
        numbers = [float(ast.literal_eval(each)) for each in node.args]
        named = {str(each.arg): float(ast.literal_eval(each.value)) for each in node.keywords}
        found = kind(*map(torch.tensor, numbers), **{name: torch.tensor(x) for name, x in named.items()})
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"{text!r} is no distribution ({first}). {remedy}") from None
    if found.batch_shape or found.event_shape:
        raise InputError(f"{text!r} is of shape {tuple(found.shape())}, expected a single number's. {remedy}")
    return found
