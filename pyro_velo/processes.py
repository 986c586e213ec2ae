r"""One training on several processes, which `torchrun` starts: each takes its share of every batch.

The loss of a process's $B_r$ cells stands for the whole data set, as that of all $B = \sum_r B_r$ cells of the batch
does, so that the loss of the batch and its gradient are

$$L = \sum_r \frac{B_r}{B} L_r, \qquad \nabla L = \sum_r \frac{B_r}{B} \nabla L_r$$

whatever the sizes of the shares: terms of genes weigh one in the sum, and each cell's what they weigh in one process.
(A plain mean over processes is that of another objective where shares are uneven.) What is drawn of genes is the same
in all processes, as it is one draw in one process; what is drawn of cells, each draws for its own.

Reference: Li et al. 2020, PyTorch Distributed, for how gradients are averaged where shares are even.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_processes
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pyro_velo.errors import FitError, InputError

Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for one that has not ended and is not heard of; one that ends is noticed at once."""

SUMS_OVER_CELLS = (Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO)
"""The bounds that are sums over cells, so that those of shares add up to that of the batch."""


class LostProcessError(FitError):
    """Another process of the training ended, or was not heard of for `TIMEOUT`."""


@dataclass(frozen=True)
class Team:
    """The processes of a training: `size` of them, this one's number `rank`. Alone, it asks nobody and changes nothing.

    `store` is where processes leave each other notes, outside of trainings; None where there is but one.
    """

    rank: int = 0
    size: int = 1
    store: Any = None

    @property
    def several(self) -> bool:
        """Whether there is another process."""
        return self.size > 1

    @property
    def leads(self) -> bool:
        """Whether it is this process that writes files and shows progress."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a batch, of which shares differ by one cell at most."""
        return index.tensor_split(self.size)[self.rank]

    def turns(self, n: int) -> range:
        """Which of n pieces of work are this process's."""
        return range(self.rank, n, self.size)

    def check_suits(self, elbo: ELBO, smallest: int) -> None:
        """Raises `InputError` for a bound that is no sum over cells, and for a `smallest` batch of too few cells."""
        if self.several and not isinstance(elbo, SUMS_OVER_CELLS):
            names = ", ".join(kind.__name__ for kind in SUMS_OVER_CELLS)
            raise InputError(
                f"Expected one of {names} with several processes, as these are sums over cells; got "
                f"{type(elbo).__name__}. Use one of them, or one process."
            )
        if smallest < self.size:
            raise InputError(
                f"Expected a cell or more of every batch for each of {self.size} processes; got batches of {smallest}. "
                "Use larger batches, or fewer processes."
            )

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` (B_r, ...) over all cells of the batch; its gradient is that of the cells here.

        Where no gradients are asked for, as in a search for NaN that each process makes by itself, of the cells here.
        """
        mean = values.mean(0)
        if not self.several or not torch.is_grad_enabled():
            return mean
        sums = torch.cat((values.detach().sum(0).flatten(), values.new_tensor([len(values)])))
        with _heard():
            torch_processes.all_reduce(sums)
        return mean + ((sums[:-1] / sums[-1]).view_as(mean) - mean).detach()

    def reduce(self, parameters: Iterable[Tensor], loss: float, weight: float) -> float:
        """Put the sum of `weight` x gradient over all processes in place of each gradient; returns that of losses.

        One message for all of them. Where a process has no gradient, it counts as zero.
        """
        if not self.several:
            return loss
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        message = torch.cat([*(each.flatten() for each in gradients), gradients[0].new_tensor([loss])]).mul_(weight)
        with _heard():
            torch_processes.all_reduce(message)
        *parts, total = message.split([*(each.numel() for each in gradients), 1])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return total.item()

    def gathered(self, mine: Value) -> list[Value]:
        """What each process has, in their order: small things that can be pickled."""
        if not self.several:
            return [mine]
        found: list[Any] = [None] * self.size
        with _heard():
            torch_processes.all_gather_object(found, mine)
        return found

    def first(self, mine: Value | None) -> Value | None:
        """What the first process says that has something to say."""
        return next((each for each in self.gathered(mine) if each is not None), None)

    def start_alike(self, parameters: Mapping[str, Tensor]) -> None:
        """Give every process the first one's parameters, in place.

        Raises `FitError` where theirs are not of the same names and shapes: they would train different things.
        """
        if not self.several:
            return
        self.agree("what is trained", [(name, tuple(value.shape)) for name, value in parameters.items()])
        with torch.no_grad(), _heard():
            for value in parameters.values():
                # A copy: what is broadcast must be contiguous.
                message = value.detach().contiguous()
                torch_processes.broadcast(message, 0)
                value.copy_(message)

    def check_alike(self, parameters: Mapping[str, Tensor]) -> None:
        """Raises `FitError` where parameters, by name, are not the same in all processes to the bit.

        It waits for all of them, so that none ends while another still listens to it.
        """
        if self.several:
            digest = hashlib.sha256()
            for value in parameters.values():
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            self.agree("parameters", digest.hexdigest())

    def agree(self, what: str, mine: Any) -> None:
        """Raises `FitError` where processes do not have the same."""
        found = self.gathered(mine)
        others = [str(rank) for rank, theirs in enumerate(found) if theirs != found[0]]
        if others:
            raise FitError(
                f"Expected {what} to be the same in all {self.size} processes; got something else than in the first in "
                f"number {', '.join(others)}. Give all of them the same file and options, on machines of one kind."
            )

    def tells_first(self) -> bool:
        """Whether no other process has told the user yet why the run ends, as far as can be known."""
        try:
            return self.store is None or self.store.add("told", 1) == 1
        except RuntimeError:
            return True


ALONE = Team()

_TEAM: ContextVar[Team] = ContextVar("team", default=ALONE)


def team() -> Team:
    """The processes that train together here: those of the `joined` that is open, else this one alone."""
    return _TEAM.get()


@contextmanager
def joined() -> Iterator[Team]:
    """Within it, every training is one of all processes that `torchrun` started; without `torchrun`, of this one alone.

    All must do the same in it, with the same data; each takes its share of the steps. They talk by NCCL where each has
    a GPU of its own, else by gloo. Raises `LostProcessError` where another one ends.

    >>> with joined() as team:
    ...     team.several
    False
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch_processes.is_torchelastic_launched():
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    with _heard():
        store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        torch_processes.init_process_group(_backend(), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    token = _TEAM.set(Team(rank, size, store))
    try:
        yield _TEAM.get()
    finally:
        _TEAM.reset(token)
        _part()


def dismiss() -> None:
    """End the work together: all processes but the first end here, by `SystemExit`, and the first goes on alone.

    For programs whose every process is done when all trainings are, as those of the command line.
    """
    group = team()
    if not group.several:
        return
    _part()
    _TEAM.set(Team(store=group.store))
    if not group.leads:
        raise SystemExit(0)


def _part() -> None:
    if torch_processes.is_initialized():
        torch_processes.destroy_process_group()


def _backend() -> str:
    """NCCL wants a GPU for each process."""
    own_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) and torch_processes.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if own_gpu else "gloo"


@contextmanager
def _heard() -> Iterator[None]:
    """Says what it means where another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        seconds = TIMEOUT.total_seconds()
        raise LostProcessError(
            f"Expected every process to answer; one has ended, or was not heard of for {seconds:.0f} s. "
            "Look at what it said, and go on from the last checkpoint, if one was kept."
        ) from error


def drawn_of_cells(msg: dict[str, Any]) -> bool:
    """Whether a site is drawn, and of cells: it is in the plate `cells`."""
    return any(frame.name == "cells" for frame in msg["cond_indep_stack"]) and not msg["is_observed"]


class Noise(Messenger):
    """The random numbers of an epoch: those from `seed`, the same in all processes, and for cells this process's own.

    Alone, all of them are those from `seed`. Cells' are drawn where a site is in the plate `cells`.
    """

    def __init__(self, team: Team, seed: int, device: torch.device) -> None:
        super().__init__()
        self.device, self.own = device, None
        if team.several:
            # Before the seed that all share, so that the generator is left at it.
            torch.manual_seed((seed + 1 + team.rank) % 2**63)
            self.own = self._state()
        torch.manual_seed(seed)

    @property
    def several(self) -> bool:
        """Whether it draws cells' numbers apart from the others."""
        return self.own is not None

    def draw(self, make: Callable[[], Value], of_cells: bool) -> Value:
        """What `make` draws, of cells or of what all processes share, where no site says so."""
        apart = self.several and of_cells
        if apart:
            self._swap()
        drawn = make()
        if apart:
            self._swap()
        return drawn

    def position(self) -> tuple[Tensor, Tensor | None]:
        """Where it stands, to come `back_to`."""
        return self._state(), self.own

    def back_to(self, position: tuple[Tensor, Tensor | None]) -> None:
        """Draw again what was drawn from there on."""
        self._go_on_from(position[0])
        self.own = position[1]

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if self._of_own_cells(msg):
            self._swap()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if self._of_own_cells(msg):
            self._swap()

    def _of_own_cells(self, msg: dict[str, Any]) -> bool:
        return self.several and drawn_of_cells(msg)

    def _swap(self) -> None:
        shared = self._state()
        assert self.own is not None
        self._go_on_from(self.own)
        self.own = shared

    def _state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _go_on_from(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)
