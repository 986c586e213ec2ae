r"""A step's loss and gradients, or a look's terms, recorded once as one function of tensors and compiled as a whole.

Of a step on a few hundred genes more than half is not arithmetic on cells: Pyro's handlers, hundreds of small
operations on what the genes have of their own, and autograd's way back through them (benchmarks/step.md). All of it is
the same in every step but for the parameters, the batch, the weights of the schedule and the random numbers. So the
model and the guide run once under torch's tracer, with the way back, and what they did to tensors is compiled.

The tracer watches tensors without numbers, which take no memory. Random numbers are drawn apart, by torch's own
generators as in a plain step, and handed to the function.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_identically_zero
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, fx
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from pyro_velo.batch import Minibatch
from pyro_velo.compiled import OPTIONS, recording
from pyro_velo.processes import Noise, drawn_of_cells
from pyro_velo.schedule import Warmup

IN_CACHE = 256 * 1024
"""Cells x genes of a batch up to which what several read is better kept than computed by each of them."""
KEPT: Mapping[str, Any] = {"realize_opcount_threshold": 6, "realize_reads_threshold": 2}
"""How torch is told so, which also halves the time of compiling."""


class Draw(NamedTuple):
    """Random numbers of a step: what draws them, and whether they are of cells."""

    make: Callable[[], Tensor]
    of_cells: bool


class Recorded:
    """What `compute` makes of a batch and of numbers, for batches of one size, which the first one decides.

    `compute` may not decide anything by what tensors hold. With `slopes` its only result is a loss, after which come
    the gradients of all parameters. Where it can't be recorded, or no compiler works, it says so once, of
    `what`, and `works` is False from then on.
    """

    def __init__(self, compute: Callable[..., Sequence[Tensor]], what: str, *, slopes: bool) -> None:
        self.compute, self.what, self.slopes, self.works = compute, what, slopes, True
        self.parameters: dict[str, Tensor] = {}
        self.draws: list[Draw] = []
        self.function: Callable[..., Sequence[Tensor]] | None = None
        self.size = 0

    def __call__(self, batch: Minibatch, numbers: Sequence[float], noise: Noise) -> list[Tensor] | None:
        """The results, drawn by `noise`; None where it can't, and for a batch of another size."""
        tensors = [*_tensors_of(batch).values(), *map(torch.tensor, numbers)]
        if self.works and self.function is None:
            self._record(batch, tensors, noise)
        if self.function is None or len(batch.index) != self.size:
            return None
        drawn = [noise.draw(*each) for each in self.draws]
        with torch.no_grad():
            return list(self.function(*self.parameters.values(), *tensors, *drawn))

    def _record(self, batch: Minibatch, tensors: Sequence[Tensor], noise: Noise) -> None:
        try:
            with torch.random.fork_rng(devices=()), torch.no_grad():
                graph = self._graph(batch, tensors)
                self.draws = _drawn_apart(graph)
                if not self.draws and noise.several and _drawn_in(graph):
                    raise NotImplementedError("what is drawn depends on parameters, where processes draw apart")
                inputs = [*self.parameters.values(), *tensors, *(each.make() for each in self.draws)]
                in_cache = len(batch.index) * batch.measured.shape[-1] <= IN_CACHE
                self.function = compiled_whole(graph, inputs, KEPT if in_cache and self.slopes else {})
                self.size = len(batch.index)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            warnings.warn(f"{self.what} could not be compiled as a whole, so the fit is slower: {first}", stacklevel=3)
            self.works = False

    def _graph(self, batch: Minibatch, tensors: Sequence[Tensor]) -> fx.GraphModule:
        """What is done, a function of the parameters and of a batch's tensors with the numbers."""
        names = tuple(_tensors_of(batch))
        with recording():
            with poutine.trace(param_only=True) as capture:
                self.compute(batch, *tensors[len(names) :])
            sites = capture.trace.nodes
            self.parameters = {name: site["value"].unconstrained() for name, site in sites.items()}
            values = list(self.parameters.values())

            def results(*inputs: Tensor) -> Sequence[Tensor]:
                of_batch = dict(zip(names, inputs[len(values) :], strict=False))
                numbers = inputs[len(values) + len(names) :]
                with torch.set_grad_enabled(self.slopes), _Marking():
                    found = self.compute(replace(cast(Any, batch), **of_batch), *numbers)
                    if not self.slopes:
                        return found
                    (loss,) = found
                    return [loss.detach(), *torch.autograd.grad(loss, values, materialize_grads=True)]

            graph = make_fx(results, tracing_mode="fake", _allow_non_fake_inputs=True)(*values, *tensors)
        return _of_arguments(graph, values)


class RecordedStep:
    """The loss and the gradients of one of `BOUNDS`; every site of the guide must be reparametrised."""

    def __init__(self, elbo: ELBO, svi: SVI, warmup: Warmup) -> None:
        self.loss_of, self.svi, self.warmup = BOUNDS[type(elbo)], svi, warmup
        self.recorded = Recorded(self._loss, "A step", slopes=True)

    @property
    def works(self) -> bool:
        """Whether it could be recorded, as far as is known."""
        return self.recorded.works

    def __call__(self, batch: Minibatch, step: int, noise: Noise) -> tuple[float, dict[str, Tensor]] | None:
        """The loss of `batch`, and the parameters by name, unconstrained, with their gradients; None where it can't."""
        found = self.recorded(batch, self.warmup.scales(step), noise)
        if found is None:
            return None
        loss, *gradients = found
        for value, gradient in zip(self.recorded.parameters.values(), gradients, strict=True):
            value.grad = gradient
        return loss.item(), dict(self.recorded.parameters)

    def _loss(self, batch: Minibatch, kl: Tensor, penalty: Tensor) -> Sequence[Tensor]:
        with self.warmup.scaled(kl, penalty):
            model, guide = get_importance_trace("flat", math.inf, self.svi.model, self.svi.guide, (batch,), {})
        sites = [site for site in guide.nodes.values() if site["type"] == "sample"]
        if not all(is_identically_zero(site["score_parts"].score_function) for site in sites):
            raise NotImplementedError("a site of the guide is not reparametrised")
        return [self.loss_of(model, guide)]


def can_be_recorded(elbo: ELBO) -> bool:
    """Whether it is a bound that is recorded."""
    return type(elbo) in BOUNDS and elbo.num_particles == 1


def _by_draws(model: Trace, guide: Trace) -> Tensor:
    """The loss of `Trace_ELBO`, whose `differentiable_loss` takes numbers on its way."""
    log_p = [site["log_prob_sum"] for site in model.nodes.values() if site["type"] == "sample"]
    return sum(map(_entropy, guide.nodes.values())) - reduce(torch.add, log_p)


def _in_closed_form(model: Trace, guide: Trace) -> Tensor:
    """The loss of `TraceMeanField_ELBO`, for which the same holds: KLs in closed form, where there is one."""
    cost = sum(_entropy(site) for name, site in guide.nodes.items() if name not in model.nodes)
    for name, site in model.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            cost = cost - site["log_prob_sum"]
            continue
        q = guide.nodes[name]
        try:
            kl = scale_and_mask(kl_divergence(q["fn"], site["fn"]), q["scale"], q["mask"])
            # Of masked sites Pyro gives a plain 0.
            cost = cost + (kl.sum() if isinstance(kl, Tensor) else kl * q["fn"].batch_shape.numel())
        except NotImplementedError:
            cost = cost + _entropy(q) - site["log_prob_sum"]
    return torch.as_tensor(cost)


def _entropy(site: dict[str, Any]) -> Tensor | float:
    """What a site of a guide adds to the loss."""
    if site["type"] != "sample" or is_identically_zero(term := site["score_parts"].entropy_term):
        return 0.0
    return term.sum()


BOUNDS: dict[type[ELBO], Callable[[Trace, Trace], Tensor]] = {
    Trace_ELBO: _by_draws,
    TraceMeanField_ELBO: _in_closed_form,
}
"""The bounds that are recorded, and how their loss is read off traces of model and guide."""


def compiled_whole(
    graph: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]
) -> Callable[..., Sequence[Tensor]]:
    """`graph` compiled for tensors like `inputs`. It was traced, so that nobody need read its Python once more."""
    # What is drawn inside, as it depends on parameters, are torch's own numbers, too.
    patches = {**OPTIONS, "fallback_random": True, **options}
    return torch._inductor.standalone_compile(
        graph, list(inputs), dynamic_shapes="from_example_inputs", options={"config_patches": patches}
    )


def _of_arguments(module: fx.GraphModule, values: Sequence[Tensor]) -> fx.GraphModule:
    """The graph with its first arguments in place of these tensors, which it has as they are from where programs do."""
    arguments = module.graph.find_nodes(op="placeholder")
    of_value = {id(value): node for value, node in zip(values, arguments, strict=False)}
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target)
        argument = of_value.get(id(value))
        if argument is None and value.requires_grad:
            raise NotImplementedError("something is trained that is no parameter of Pyro's")
        if argument is not None:
            node.replace_all_uses_with(argument)
            module.graph.erase_node(node)
    module.recompile()
    return module


class _Marking(Messenger):
    """Marks, in the graph that is recorded, what is done to draw sites of cells."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        self.before = len(_recorded_now().nodes)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if drawn_of_cells(msg):
            for node in islice(_recorded_now().nodes, self.before, None):
                node.meta["of_cells"] = True


def _recorded_now() -> fx.Graph:
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer.graph


def _drawn_apart(module: fx.GraphModule) -> list[Draw]:
    """Take what is drawn out of the graph, and make arguments of it; nothing where some of it depends on the others."""
    drawn = _drawn_in(module)
    if not all(map(_needs_nothing, drawn)):
        return []
    draws = [Draw(_by_itself(node, module), node.meta.get("of_cells", False)) for node in drawn]
    last = module.graph.find_nodes(op="placeholder")[-1]
    for node in drawn:
        with module.graph.inserting_after(last):
            last = module.graph.placeholder(f"of_{node.name}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return draws


def _drawn_in(module: fx.GraphModule) -> list[fx.Node]:
    calls = (node for node in module.graph.nodes if node.op == "call_function")
    return [node for node in calls if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]


def _needs_nothing(node: fx.Node) -> bool:
    return node.op == "call_function" and all(map(_needs_nothing, node.all_input_nodes))


def _by_itself(node: fx.Node, module: fx.GraphModule) -> Callable[[], Tensor]:
    """What computes `node`, which needs no argument."""

    def copied(each: fx.Node) -> fx.Node:
        return graph.node_copy(each, copied)

    graph = fx.Graph()
    graph.output(copied(node))
    return fx.GraphModule(module, graph)


def _tensors_of(batch: Minibatch) -> dict[str, Tensor]:
    """What is in a batch, by its name."""
    return {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}
