r"""A step's loss and gradients, recorded once as one function of tensors and compiled as a whole.

Of a step on a few hundred genes more than half is not arithmetic on cells: Pyro's handlers, hundreds of small
operations on what the genes have of their own, and autograd's way back through them (benchmarks/step.md). All of it is
the same in every step but for the parameters, the batch, the weights of the schedule and the random numbers. So the
model and the guide run once under torch's tracer, with the way back, and what they did to tensors is compiled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_identically_zero
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_velo.batch import Minibatch
from pyro_velo.compiled import OPERATIONS_AT_ONCE, recording
from pyro_velo.schedule import Warmup

Options = dict[str, str | int | bool | Callable[..., Any]]

# Random numbers are torch's own: the same seed has the same noise as a plain step.
OPTIONS: Options = {"max_fusion_size": OPERATIONS_AT_ONCE, "fallback_random": True}
IN_CACHE = 256 * 1024
"""Cells x genes of a batch up to which what several read is better kept than computed by each of them."""
KEPT: Options = {"realize_opcount_threshold": 6, "realize_reads_threshold": 2}
"""How torch is told so, which also halves the time of compiling."""


class RecordedStep:
    """The loss and the gradients of `Trace_ELBO` for batches of one size, which the first one decides.

    The model and the guide may not decide anything by what their tensors hold, and every site of the guide must be
    reparametrised. Where that is not so, or no compiler works, it says so once, and `works` is False from then on.
    """

    def __init__(self, svi: SVI, warmup: Warmup) -> None:
        self.svi, self.warmup, self.works = svi, warmup, True
        self.parameters: dict[str, Tensor] = {}
        self.function: Callable[..., Sequence[Tensor]] | None = None

    def __call__(self, batch: Minibatch, step: int) -> tuple[float, dict[str, Tensor]] | None:
        """The loss of `batch`, and the parameters by name, unconstrained, with their gradients; None where it can't."""
        if not self.works:
            return None
        tensors = [*_tensors_of(batch).values(), *map(torch.tensor, self.warmup.scales(step))]
        if self.function is not None:
            return self._noted(self.function(*self.parameters.values(), *tensors))
        try:
            self.function = self._recorded(batch, tensors)
            return self._noted(self.function(*self.parameters.values(), *tensors))
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            warnings.warn(f"A step could not be compiled as a whole, so the fit is slower: {first}", stacklevel=2)
            self.works = False
            return None

    def _noted(self, found: Sequence[Tensor]) -> tuple[float, dict[str, Tensor]]:
        loss, *gradients = found
        for value, gradient in zip(self.parameters.values(), gradients, strict=True):
            value.grad = gradient
        return loss.item(), dict(self.parameters)

    def _recorded(self, batch: Minibatch, tensors: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The function of the parameters and of a batch's tensors with the scales, compiled when it is called."""
        names = tuple(_tensors_of(batch))
        with torch.random.fork_rng(devices=()), recording():
            with poutine.trace(param_only=True) as capture, torch.no_grad():
                self._loss(batch, *tensors[-2:])
            sites = capture.trace.nodes
            self.parameters = {name: site["value"].unconstrained() for name, site in sites.items()}
            values = list(self.parameters.values())

            def gradients(*inputs: Tensor) -> Sequence[Tensor]:
                *of_batch, kl, penalty = inputs[len(values) :]
                with torch.enable_grad():
                    loss = self._loss(replace(cast(Any, batch), **dict(zip(names, of_batch, strict=True))), kl, penalty)
                    return [loss.detach(), *torch.autograd.grad(loss, values, materialize_grads=True)]

            # By their identity: the tracer knows a parameter again, wherever the programs have it from.
            graph = make_fx(gradients, tracing_mode="real")(*values, *tensors)
        options = OPTIONS | (KEPT if len(batch.index) * batch.measured.shape[-1] <= IN_CACHE else {})
        return torch.no_grad()(torch.compile(graph, dynamic=False, options=options))

    def _loss(self, batch: Minibatch, kl: Tensor, penalty: Tensor) -> Tensor:
        """The loss of the bound, of which `Trace_ELBO.differentiable_loss` takes numbers on its way."""
        with self.warmup.scaled(kl, penalty):
            model, guide = get_importance_trace("flat", math.inf, self.svi.model, self.svi.guide, (batch,), {})
        of_model = [site["log_prob_sum"] for site in model.nodes.values() if site["type"] == "sample"]
        of_guide = [site["score_parts"] for site in guide.nodes.values() if site["type"] == "sample"]
        if not all(is_identically_zero(parts.score_function) for parts in of_guide):
            raise NotImplementedError("a site of the guide is not reparametrised")
        entropies = [parts.entropy_term.sum() for parts in of_guide if not is_identically_zero(parts.entropy_term)]
        return reduce(torch.add, entropies) - reduce(torch.add, of_model)


def can_be_recorded(elbo: ELBO) -> bool:
    """Whether it is the bound that is recorded."""
    return type(elbo) is Trace_ELBO and elbo.num_particles == 1


def _tensors_of(batch: Minibatch) -> dict[str, Tensor]:
    """What is in a batch, by its name."""
    return {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
