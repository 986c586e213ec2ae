r"""Which way gradients flow: what each summand of the ELBO tells each group of parameters, and how sure it is of it.

For a term $\ell_i$ and the parameters $\theta_j$ of a group (unconstrained, as they are trained), over draws r of a
minibatch and of the guide:

$$g_r = \nabla_{\theta_j}\ell_i,\qquad \mathrm{snr} = \frac{\lVert E g\rVert}{\sqrt{\mathrm{tr}\,\mathrm{Cov}\,g}}$$

Terms can pull against each other: the row `elbo` has what is left. So `spliced`, log p(s given u), takes back what
`unspliced` asked of a state that u leaves open and s rules out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_velo.batch import Data, Minibatch
from pyro_velo.doctor.decomposition import draw_terms
from pyro_velo.doctor.terms import columns, group_of, sites_of, together
from pyro_velo.errors import InputError
from pyro_velo.evidence import conditions
from pyro_velo.train import Fitted, split

Array = NDArray[np.float64]

HEADS = ("h_ind", "h_rep")
"""The outputs of the times' decoder: the scaled times of induction and of repression (seed 000)."""
TIMES, STATE_DECODER, PI_HEAD = "times", "state_decoder", "pi_head"
CORRELATIONS = "correlations"
ELBO = "elbo"
"""The row of all terms together, without penalties."""


class Part(NamedTuple):
    """A parameter, or what of it `where` picks out."""

    parameter: str
    where: tuple[Any, ...] = (...,)


Groups = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class GradientFlow:
    """The gradient of the loss per cell that each of `terms` sends to each of `groups`: arrays (terms, groups).

    `norm` is that of the mean over `draws`, `noise` the root of the summed variances of a single draw's elements, both
    in nats per cell and unit of the unconstrained parameters; `reaches` is whether any draw's gradient was not zero.
    """

    terms: tuple[str, ...]
    groups: tuple[str, ...]
    norm: Array
    noise: Array
    reaches: NDArray[np.bool_]
    draws: int

    @property
    def snr(self) -> Array:
        """Signal-to-noise ratio of one draw, without the part of the norm that noise makes up.

        Infinite where there is no noise, NaN where there is no gradient.
        """
        signal = np.sqrt(np.maximum(self.norm**2 - self.noise**2 / self.draws, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.reaches, signal / self.noise, np.nan)

    def of(self, term: str, group: str) -> tuple[float, float]:
        """(norm, snr) of one cell of the matrix."""
        place = self.terms.index(term), self.groups.index(group)
        return float(self.norm[place]), float(self.snr[place])


def gradient_flow(
    fitted: Fitted, cells: Data, *, draws: int = 20, batch_size: int | None = None, seed: int = 0
) -> GradientFlow:
    """The matrix of gradients of a fit on `cells`, where its parameters stand now.

    Each draw takes `batch_size` training cells at random (by default as many as a step of the fit) and every latent
    site once, at KL weight 1, and penalties as they are before they fade. To look at another step of a run, `restore`
    it from a state whose `best` are that step's `parameters`. The noise is the same for the same seed.

    Raises `InputError` for fewer than two draws, which have no variance, and for no cells.
    """
    size = fitted.training.settings.batch_size if batch_size is None else batch_size
    if draws < 2 or size < 1:
        raise InputError(f"Expected 2 draws and 1 cell or more; got {draws} and {size}. 20 draws tell noise by 16 %.")
    settings = fitted.training.settings
    train_index, _ = split(len(cells), settings.held_out, settings.seed)
    tally = _Tally()
    with conditions(fitted, cells, seed), torch.enable_grad():
        for _ in range(draws):
            index = train_index[torch.randperm(len(train_index))[:size]].to(cells.device)
            batch = cells.batch(index, len(train_index))
            if not tally.groups:
                tally.groups = parameter_groups(fitted, batch)
            tally.add(term_gradients(fitted, batch))
    return tally.flow(draws)


def term_gradients(fitted: Fitted, batch: Minibatch) -> dict[str, dict[str, Tensor]]:
    """Of one draw, by term and parameter: what it adds to the gradient of the loss per cell, where that is a number.

    To be called in `fitted.parameters()`, with gradients on.
    """
    with poutine.trace(param_only=True) as capture:
        terms = draw_terms(fitted, batch).grouped().terms
    leaves = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
    found: dict[str, dict[str, Tensor]] = {ELBO: {}}
    for term in terms:
        sign, own = -1 if term.kind == "reconstruction" else 1, found.setdefault(term.name, {})
        if not term.value.requires_grad:
            continue
        gradients = torch.autograd.grad(sign * term.value, list(leaves.values()), retain_graph=True, allow_unused=True)
        own |= {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        if term.kind != "penalty":
            found[ELBO] |= {name: found[ELBO][name] + g if name in found[ELBO] else g for name, g in own.items()}
    found[ELBO] = found.pop(ELBO)
    return found


def parameter_groups(fitted: Fitted, batch: Minibatch) -> Groups:
    """What the parameters of a fit are about, in the order of the program; to be called in `fitted.parameters()`.

    Networks go by the module they were registered as; of the velocity model's these are `encoder`, `pi_head`, and
    `h_ind` and `h_rep` with the `times` network below both. The parameters of an autoguide go by the sites they are
    of (`terms.group_of`), what correlates sites as `correlations`. Others go by their top-level module.
    """
    with poutine.trace(param_only=True) as capture, torch.no_grad():
        guide = poutine.trace(fitted.guide).get_trace(batch)
        program = poutine.trace(poutine.replay(fitted.program, trace=guide)).get_trace(batch)
    latent = {name: site for name, site in sites_of(program) if not site["is_observed"]}
    drawn = []
    for own, sites in together(guide, latent).items():
        where = columns(guide.nodes[own], latent, sites) if len(sites) > 1 else None
        if where is not None:
            drawn.append((guide.nodes[own]["fn"].batch_shape, guide.nodes[own]["value"].shape[-1], where))
    groups: dict[str, list[Part]] = {}
    for name, site in capture.trace.nodes.items():
        for group, part in _parts(name, site["value"].unconstrained().shape, latent, drawn):
            groups.setdefault(group, []).append(part)
    return {group: tuple(parts) for group, parts in groups.items()}


def _parts(name: str, shape: torch.Size, latent: Any, drawn: list[tuple]) -> list[tuple[str, Part]]:
    """The groups that a parameter belongs to, each with what of it does."""
    last = name.rpartition(".")[2]
    if "$$$" in name or last == "below":
        return parts_by_name(name, shape)
    if last in latent:
        return [(group_of(last), Part(name))]
    for batch_shape, size, where in drawn:
        # A vector for each gene has the sites on its last axis, one for all genes on its first.
        axis = shape[-1:] if batch_shape else shape[:1]
        if axis == (size,):
            return [(group_of(s), Part(name, (..., at) if batch_shape else (at,))) for s, at in where.items()]
    return parts_by_name(name, shape)


def parts_by_name(name: str, shape: torch.Size) -> list[tuple[str, Part]]:
    """The groups of a parameter, as far as its name and shape tell.

    A network's parameter is registered as `module$$$path`, an autoguide's as `class.kind.site` or `class.kind`.
    """
    if "$$$" in name:
        return _of_network(name, shape)
    owner, _, last = name.rpartition(".")
    if last == "below":
        return [(CORRELATIONS, Part(name))]
    known = group_of(last)
    return [(known if known != last else owner.partition(".")[0] or name, Part(name))]


def _of_network(name: str, shape: torch.Size) -> list[tuple[str, Part]]:
    """Of a network that Pyro has registered as `module$$$path`."""
    module, _, path = name.partition("$$$")
    if module == "model":
        module = path.partition(".")[0]
        if path in {f"{TIMES}.decoder.weight", f"{TIMES}.decoder.bias"} and shape[0] == len(HEADS):
            return [(head, Part(name, (i,))) for i, head in enumerate(HEADS)]
    return [(PI_HEAD if module == STATE_DECODER else module, Part(name))]


class _Tally:
    """Sums over draws, by term: of gradients by parameter, and of their squared norms by group."""

    def __init__(self) -> None:
        self.groups: Groups = {}
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.squares: dict[str, dict[str, float]] = {}

    def add(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in one draw."""
        for term, by_parameter in gradients.items():
            sums = self.sums.setdefault(term, {})
            for name, gradient in by_parameter.items():
                sums[name] = sums[name] + gradient.double() if name in sums else gradient.double()
            squares = self.squares.setdefault(term, dict.fromkeys(self.groups, 0.0))
            for group, parts in self.groups.items():
                squares[group] += _squared_norm(by_parameter, parts)

    def flow(self, draws: int) -> GradientFlow:
        """The matrix of what was taken in."""
        squares = np.array([[of[group] for group in self.groups] for of in self.squares.values()])
        sums = [[_squared_norm(of, parts) for parts in self.groups.values()] for of in self.sums.values()]
        mean = np.array(sums) / draws**2
        noise = np.maximum(squares - draws * mean, 0) / (draws - 1)
        return GradientFlow(tuple(self.sums), tuple(self.groups), np.sqrt(mean), np.sqrt(noise), squares > 0, draws)


def _squared_norm(gradients: Mapping[str, Tensor], parts: tuple[Part, ...]) -> float:
    found = (gradients[part.parameter][part.where] for part in parts if part.parameter in gradients)
    return sum(float(each.double().square().sum()) for each in found)
