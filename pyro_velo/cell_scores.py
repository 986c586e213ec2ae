"""How the log-density of each cell and gene changes with the rates, and with the place of the cell on a clock."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_velo.batch import Batch
from pyro_velo.coupled_rates import Genes
from pyro_velo.guides import AmortizedProgram
from pyro_velo.state_posterior import posterior_of_states


def scores(
    program: Any, guide: AmortizedProgram, genes: Genes, x: Tensor, z: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each cell log p(u, s), (B,); of each cell and gene its gradients in x, (B, G, K), and in the place, (B, G, C).

    x (G, K), z (B, d). The place is the clock and, where it is inferred, the library size. The states' weights are
    those of the guide at z, which stay.
    """
    drawn = poutine.trace(guide.cells).get_trace(batch, dist.Delta(z[:, None], event_dim=1)).nodes["pi"]["value"]
    with torch.enable_grad():
        each = x.expand(len(z), *x.shape).clone().requires_grad_()
        values = genes.values(each)
        fixed = {name: value.detach() for name, value in values.items()}
        first = z[:, :1].clone().requires_grad_()
        own = program.times.own(batch.conditioned(torch.cat((first, program.of_kinetics(z)[:, 1:]), 1)), fixed)
        slope = _elementwise(own, first)
        time = own.detach().expand(each.shape[:2]).clone().requires_grad_()
        timed = program.times.at(time, values["switch_time"], values)
        # Of each gene its own, so that each has its gradient.
        of_genes = z[:, None].expand(*each.shape[:2], z.shape[1]).clone().requires_grad_()
        log_joint = program.explain_at(timed, values | {"pi": drawn.detach(), "z": of_genes}, batch).log_joint
        log_p = posterior_of_states(log_joint)[1]
        of = (each, time) if program.library_sd is None else (each, time, of_genes)
        in_x, in_time, *in_z = torch.autograd.grad(log_p.sum(), of)
    in_place = torch.stack([in_time * slope, *(found[..., -1] for found in in_z)], -1)
    return log_p.detach().sum(1, dtype=torch.float64), in_x, in_place


def _elementwise(values: Tensor, of: Tensor) -> Tensor:
    """The derivative of each value (B, n) in the one number (B, 1) that its row hangs on."""
    # The gradient of a gradient along v, in v.
    v = torch.ones_like(values, requires_grad=True)
    (along,) = torch.autograd.grad(values, of, v, create_graph=True)
    return torch.autograd.grad(along.sum(), v)[0]
