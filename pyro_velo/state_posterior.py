r"""Which state a gene is in, once its molecules are known: $p(k \mid u, s) \propto \pi_k\, p(u \mid k)\, p(s \mid k)$.

Exact for a draw of everything else; states are a sequence of (B, G) each, and not stacked, where a draw is one pass
over memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from pyro_velo.compiled import compiling
from pyro_velo.models.velocity import Given, VelocityProgram


def of_draw(program: VelocityProgram, values: Mapping[str, Tensor]) -> Given:
    """What `explain` takes for the probabilities of the states, where it tells of a draw and is no bound."""
    return Given(log_weights=program.recipe.states.expected_weights(values["pi"]))


def posterior_of_states(log_joint: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """p(k | u, s), and log p(u, s), from log p(k, u, s)."""
    peak = reduce(torch.maximum, log_joint)
    weights = [_exp_or_zero(each - peak) for each in log_joint]
    total = sum(weights[1:], weights[0])
    share = 1 / total
    return tuple(each * share for each in weights), total.log() + peak


def _exp_or_zero(x: Tensor) -> Tensor:
    """e^x, and 0 below -60: processors take 100 times as long for numbers that are next to nothing (denormal)."""
    return torch.where(x > -60, torch.exp(x.clamp_min(-60)), 0.0) if compiling() else torch.exp(x)


def state_weights(program: VelocityProgram, log_joint: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """p(k | u, s) by the states' own family, which may take the most likely one for certain, and log p(u, s)."""
    probability, log_likelihood = posterior_of_states(log_joint)
    return most_likely(probability) if program.recipe.states.hard else probability, log_likelihood


def most_likely(probability: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One for the most likely state, the first of several, and zero for the others."""
    best = best_state(torch.stack(tuple(probability)))
    return tuple((best == k).to(probability[0].dtype) for k in range(len(probability)))


def best_state(probability: Tensor) -> Tensor:
    """The first state that none is above, of (K, B, G); `argmax` takes six times as long where states are apart."""
    return probability.max(0).indices


def drawn_states(probability: Sequence[Tensor], place: Tensor) -> tuple[Tensor, ...]:
    """One for the state that uniform numbers `place` (B, G) fall on, and zero for the others."""
    found, below = [], torch.zeros_like(place)
    for each in probability[:-1]:
        above = below + each
        found.append(((below <= place) & (place < above)).to(place))
        below = above
    # Zero times what came before, which is zero unless it is NaN.
    return (*found, 1 - sum(found[1:], found[0]) + 0 * below)


def over(weights: Sequence[Tensor], values: Sequence[Tensor | float]) -> Tensor:
    """The expectation over states: weights (B, G) each, values that broadcast to (B, G); zeros cost nothing."""
    total = torch.zeros_like(weights[0])
    for weight, value in zip(weights, values, strict=True):
        if isinstance(value, Tensor):
            total.addcmul_(weight, value)
        elif value:
            total.add_(weight, alpha=value)
    return total
