"""Stochastic variational inference: one loop for every model and guide of the package.

The loop is `pyro.infer.SVI` with `ClippedAdam` in a param store of its own. Each epoch draws its permutation and its
noise from (seed, epoch), so that a run that goes on from a checkpoint is, to the bit, the run that was never stopped.
On several `processes`, each takes its share of every batch, and all take the same step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_velo.batch import Data, Minibatch
from pyro_velo.compiled import fusing, worth_looking, worth_recording
from pyro_velo.errors import InputError
from pyro_velo.forensics import NonFiniteError, blame
from pyro_velo.history import History as History
from pyro_velo.looks import Looks, how_taken_apart, own_noise
from pyro_velo.memory import keep_freed
from pyro_velo.models.base import Model
from pyro_velo.optimizer import step_together
from pyro_velo.processes import ALONE, Noise, Team, team
from pyro_velo.recorded import RecordedStep, can_be_recorded
from pyro_velo.schedule import LastingPenalties, Plateau, Warmup

Guide = Callable[[nn.Module], Any]
OnEvaluation = Callable[["Training"], None]


@dataclass(frozen=True)
class TrainSettings:
    """How the fit is run. The defaults stand here and nowhere else.

    Attributes:
        max_epochs: passes over the training cells; None: as many as make `max_steps` steps. max_steps: gradient steps,
        where `max_epochs` is None. batch_size: cells a step, at most; an epoch's batches are of one size, and the cells
        left over, fewer than there are batches, come in other epochs. learning_rate: of ClippedAdam, until it is
        dropped tenfold. clip: the bound on each element of the gradient of the loss per cell. warmup: the share of a
        cycle in which the weight of the KL rises. drop: the share of the epochs after which the learning rate is
        dropped, at the latest. held_out: the share of cells that are never trained on. patience: held-out evaluations
        without improvement before the learning rate drops, and again before the fit ends. evaluate_steps: steps between
        held-out evaluations, rounded to whole epochs. seed: of every random number. beta: what the weight of the KL
        rises to (Higgins et al. 2017). cycles: how often it does so, in equal parts of the run (Fu et al. 2019: 4, with
        a warmup of 0.5). free_bits: nats that each latent dimension of a cell may cost for free; 0: none
        (`schedule.FreeBits`). The held-out ELBO knows none of the three. The parameters that are kept are those of the
        look at the held-out cells with the best final objective: the ELBO with the KL at `beta`, with `free_bits` and
        with the penalties that stay (that of known labels), whatever the weight was at that look. So a look from a
        phase of low weight is kept only where it is the best at the weight that the schedule ends with.
    """

    max_epochs: int | None = None
    max_steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-2
    clip: float = 10.0
    warmup: float = 0.3
    drop: float = 0.9
    held_out: float = 0.1
    patience: int = 15
    evaluate_steps: int = 25
    seed: int = 0
    beta: float = 1.0
    cycles: int = 1
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no fit can be run with."""
        epochs = () if self.max_epochs is None else ("max_epochs",)
        for name in (*epochs, "max_steps", "batch_size", "patience", "evaluate_steps", "cycles"):
            self._require(name, "of 1 or more", getattr(self, name) >= 1)
        for name in ("learning_rate", "clip"):
            self._require(name, "above 0", getattr(self, name) > 0)
        for name in ("warmup", "drop"):
            self._require(name, "in [0, 1]", 0 <= getattr(self, name) <= 1)
        self._require("held_out", "in [0, 1)", 0 <= self.held_out < 1)
        self._require("seed", "of 0 or more", self.seed >= 0)
        self._require("beta", "above 0 and finite", 0 < self.beta < math.inf)
        self._require("free_bits", "of 0 or more and finite", 0 <= self.free_bits < math.inf)
        self._require("warmup", "above 0 with several cycles", self.warmup > 0 or self.cycles == 1)

    def _require(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise InputError(f"Expected {name} {expected}; got {getattr(self, name)}. Leave it out for the default.")


@dataclass
class Training:
    """The state of a run after a look at the held-out cells: all that a checkpoint holds."""

    settings: TrainSettings
    epoch: int = 0
    history: History = field(default_factory=History)
    plateau: Plateau = field(default_factory=Plateau)
    best: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """A trained model and guide, with the param store that is theirs alone."""

    program: Any
    guide: Any
    store: dict
    training: Training
    interrupted: bool = False

    @property
    def held_out_elbo(self) -> float:
        """The ELBO per held-out cell at KL weight 1 of the parameters that were kept; -inf before any look."""
        history = self.training.history
        return -math.inf if history.best is None else history.held_out[history.best]

    @contextmanager
    def parameters(self) -> Iterator[None]:
        """Within it, Pyro sees this fit's parameters, and no others."""
        with pyro.get_param_store().scope(self.store):
            yield


def per_cell(program: Callable, n_cells: int) -> Callable:
    """The program with its log-density divided by the number of cells, so that losses and gradients have one scale."""
    return poutine.scale(program, scale=1 / n_cells)


def split(n_cells: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out cells; two to train on at least."""
    order = torch.randperm(n_cells, generator=torch.Generator().manual_seed(seed))
    n_held = max(0, min(round(held_out * n_cells), n_cells - 2))
    return order[n_held:], order[:n_held]


def train(
    model: Model,
    guide: Guide,
    cells: Data,
    *,
    settings: TrainSettings | None = None,
    elbo: ELBO | None = None,
    resume: Training | None = None,
    on_evaluation: OnEvaluation | None = None,
    progress: bool | None = None,
) -> Fitted:
    """Fit `guide` to `model` on `cells` and return it with the best parameters that the held-out cells saw.

    `resume` goes on from a run's state, which stays as it is; `on_evaluation` is called with that state after every
    look at the held-out cells (to save it); `progress` shows a bar (None: where stderr is a terminal). Ctrl-C ends the
    fit, with the best parameters so far and the state of the last such look.

    Where several processes train together (`processes.joined`) every one of them returns the same, the first alone
    calls `on_evaluation` and shows a bar, and Ctrl-C is raised.

    Raises `NonFiniteError`, naming step, site and gene, where the loss or a gradient is not finite; with several
    processes `LostProcessError` where one of them ends, and `InputError` for what they can't share.
    """
    settings = settings or (resume.settings if resume else TrainSettings())
    with apart(cells, settings.seed) as store:
        program = model.build(cells.sample)
        loop = _Loop(program, guide(program), cells, settings, elbo or Trace_ELBO(), resume, team())
        interrupted = loop.run(on_evaluation, progress)
    return Fitted(program, loop.guide, store, loop.state, interrupted)


def restore(model: Model, guide: Guide, cells: Data, training: Training) -> Fitted:
    """What `train` returned when it left `training`, to the bit; nothing is trained.

    Raises `InputError` for the state of another model, guide or number of genes.
    """
    with apart(cells, training.settings.seed) as store:
        program = model.build(cells.sample)
        loop = _Loop(program, guide(program), cells, training.settings, Trace_ELBO(), training)
        load_parameters(training.best)
    return Fitted(program, loop.guide, store, loop.state)


@contextmanager
def apart(cells: Data, seed: int) -> Iterator[dict]:
    """A param store, random numbers from `seed` and no validation, until it ends; yields the store's state."""
    keep_freed()
    store_apart, unchecked = pyro.get_param_store().scope(), pyro.validation_enabled(False)
    with store_apart as store, own_noise(cells.device, seed), unchecked, warnings.catch_warnings():
        # Pyro warns of a NaN loss and goes on; here it is an error, which says more.
        warnings.filterwarnings("ignore", "Encountered (NaN|infinity)", UserWarning)
        yield store


class _Loop:
    """One run of SVI: what an epoch is, and what is kept of it."""

    def __init__(
        self,
        program: nn.Module,
        guide: Any,
        cells: Data,
        settings: TrainSettings,
        elbo: ELBO,
        resume: Training | None,
        team: Team = ALONE,
    ) -> None:
        self.program, self.guide, self.elbo, self.team = program, guide, elbo, team
        self.cells, self.settings = cells, settings
        self.train_index, self.held_index = split(len(cells), settings.held_out, settings.seed)
        self.n_train = len(self.train_index)
        self.n_batches = max(1, math.ceil(self.n_train / settings.batch_size))
        self.epochs = settings.max_epochs or math.ceil(settings.max_steps / self.n_batches)
        self.evaluate_every = max(1, round(settings.evaluate_steps / self.n_batches))
        self.warmup = _warmup(settings, self.epochs, self.n_batches)
        self.optimizer = ClippedAdam({"lr": settings.learning_rate, "clip_norm": settings.clip})
        self.svi = SVI(per_cell(program, self.n_train), per_cell(guide, self.n_train), self.optimizer, elbo)
        self.team.check_suits(elbo, self.n_train // self.n_batches)
        # All steps of the run, and not those that are left: going on has the bits of never having stopped.
        self.elements = self.epochs * self.n_train * self.cells.n_genes // self.team.size
        pays = worth_recording(self.epochs * self.n_batches, self.elements, cells.device)
        # Free bits are of the mean over all cells of a batch, for which processes ask one another.
        records = pays and can_be_recorded(elbo) and not (self.team.several and settings.free_bits)
        self.recorded = RecordedStep(elbo, self.svi, self.warmup) if records else None
        # A copy: the run that is gone on with may be gone on with again.
        self.state = deepcopy(resume) if resume else Training(settings, plateau=Plateau(patience=settings.patience))
        self.state.settings = settings
        self._create_parameters()

    def run(self, on_evaluation: OnEvaluation | None, progress: bool | None) -> bool:
        """Every epoch that is left; whether Ctrl-C ended it. The best parameters are in place afterwards."""
        state, kept, interrupted = self.state, deepcopy(self.state), False
        hidden = _hidden(progress) if self.team.leads else True
        bar = tqdm(total=self.epochs, initial=state.epoch, desc="fit", unit="epoch", disable=hidden)
        try:
            while state.epoch < self.epochs and not state.plateau.finished:
                with fusing(self._in_parts(), self.cells.device):
                    evaluated = self._epoch()
                bar.update()
                bar.set_postfix_str(_elbos(state.history), refresh=False)
                if evaluated:
                    kept = self._snapshot()
                    self.team.check_alike(kept.parameters)
                    if on_evaluation is not None and self.team.leads:
                        on_evaluation(kept)
        except KeyboardInterrupt:
            # It comes to each process at another step, so that they could not go on together.
            if self.team.several:
                raise
            interrupted = True
        finally:
            bar.close()
        # The last epoch is evaluated; only Ctrl-C leaves steps behind, and those are forgotten, or it could not go on.
        self.state = kept
        load_parameters(kept.best)
        self.team.check_alike(kept.best)
        return interrupted

    def _in_parts(self) -> int:
        """Cells x genes that go through what is compiled in parts: all steps, or where they are recorded the looks."""
        if self.recorded is None or not self.recorded.works:
            return self.elements
        return self._looked_at(self.looks.plain_cells)

    def _looked_at(self, cells: int) -> int:
        """Cells x genes of all looks, each at so many cells."""
        return self.epochs // self.evaluate_every * cells * self.cells.n_genes

    def _create_parameters(self) -> None:
        """Run one batch, because guides create parameters lazily; then put the parameters of a resumed run in place."""
        batch = self.cells.batch(self._on_device(self.train_index[: self.settings.batch_size]), self.n_train)
        with torch.no_grad(), LastingPenalties() as lasting:
            self.svi.loss(self.svi.model, self.svi.guide, batch)
        self.looks = Looks(
            self.svi,
            self.cells,
            self._on_device(self.train_index),
            self._on_device(self.held_index),
            self.settings.batch_size,
            self.settings.seed,
            self.warmup,
            ends_with_elbo=self.warmup.ends_with_elbo and not lasting.names,
            terms=how_taken_apart(self.elbo, self.svi, batch),
            team=self.team,
        )
        looked_at = self._looked_at(self.looks.plain_cells)
        self.looks.records = self.recorded is not None and worth_looking(looked_at, self.cells.device)
        self.team.agree("the epoch to go on from", self.state.epoch)
        store = pyro.get_param_store()
        if self.state.parameters:
            load_parameters(self.state.parameters)
            self.optimizer.set_state(deepcopy(self.state.optimizer))
            # States are taken here, where there are no gradients: a step that takes them is Pyro's own, of other bits.
            self.optimizer([store[name].unconstrained() for name in store if name in self.state.optimizer])
        else:
            self.team.start_alike({name: store[name].unconstrained() for name in store})
            self.state.best = self.state.parameters = parameters()

    def _epoch(self) -> bool:
        """Pass over the training cells, then look at the held-out ones if it is time; whether it was."""
        state, epoch = self.state, self.state.epoch
        noise = Noise(self.team, _seed(self.settings.seed, epoch), self.cells.device)
        order = self._on_device(self.cells.shuffled(self.train_index))
        # Of one size, for which a step is recorded; the few cells that are left over come in other epochs.
        size = self.n_train // self.n_batches
        parts, step, total = order[: size * self.n_batches].split(size), epoch * self.n_batches, 0.0
        shares = [self.team.share(part) for part in parts]
        for i, batch in enumerate(self.cells.read(shares, self.n_train)):
            total += self._step(batch, step + i, noise, len(shares[i]) / len(parts[i]))
        state.epoch += 1
        last = state.epoch == self.epochs
        evaluated = last or state.epoch % self.evaluate_every == 0
        looked = self._look(step + self.n_batches) if evaluated else (math.nan, math.nan)
        self._note(-total / self.n_batches, *looked, self.warmup.weight(step))
        return evaluated

    def _step(self, batch: Minibatch, step: int, noise: Noise, weight: float) -> float:
        """One gradient step, as in `SVI.step`, with a look at the gradients before they are used.

        `weight` is the batch's share of what all processes have in this step.
        """
        before = noise.position()
        recorded = None if self.recorded is None else self.recorded(batch, step, noise)
        own, values = recorded or self._loss_and_gradients(batch, step, noise)
        loss = self.team.reduce(values.values(), own, weight)
        norm = nn.utils.get_total_norm([v.grad for v in values.values() if v.grad is not None])
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            noise.back_to(before)
            with self.warmup.at(step, self.team.mean), noise:
                mine = blame(self.svi.model, self.svi.guide, batch, values)
            raise NonFiniteError(self.team.first(None if math.isfinite(own) else mine) or mine, step=step)
        step_together(self.optimizer, values.values())
        for value in values.values():
            # Not zeros, to which the next gradients would be added.
            value.grad = None
        return float(loss)

    def _loss_and_gradients(self, batch: Minibatch, step: int, noise: Noise) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the parameters by name, unconstrained, with their gradients."""
        with self.warmup.at(step, self.team.mean), poutine.trace(param_only=True) as capture, noise:
            loss = self.svi.loss_and_grads(self.svi.model, self.svi.guide, batch)
        return loss, {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}

    def _look(self, step: int) -> tuple[float, float]:
        """The ELBO per held-out cell at weight 1, and the objective that the schedule ends with."""
        elbo, objective, terms = self.looks.take(step)
        for cells, found in terms.items():
            self.state.history.note_terms(cells, found)
        return elbo, objective

    def _note(self, train_elbo: float, held_out: float, objective: float, kl_weight: float) -> None:
        """Write the epoch down, keep the parameters if they are the best, lower the learning rate when it is time."""
        state, history = self.state, self.state.history
        history.epoch.append(state.epoch)
        history.train.append(train_elbo)
        history.held_out.append(held_out)
        history.kl_weight.append(kl_weight)
        history.objective.append(objective)
        # While the KL weight rises, another bound is climbed than the one that is compared.
        warm = state.epoch * self.n_batches >= self.warmup.settled
        if not math.isnan(objective) and state.plateau.improves(objective, warm=warm):
            state.best = parameters()
        if state.plateau.lower_rate(due=state.epoch >= self.settings.drop * self.epochs):
            for optimizer in self.optimizer.optim_objs.values():
                for group in optimizer.param_groups:
                    group["lr"] = self.settings.learning_rate / 10

    def _snapshot(self) -> Training:
        """The state as it is now, which further steps leave alone."""
        state, optimizer = self.state, deepcopy(self.optimizer.get_state())
        return replace(
            state,
            history=state.history.copy(),
            plateau=replace(state.plateau),
            parameters=parameters(),
            optimizer=optimizer,
        )

    def _on_device(self, index: Tensor) -> Tensor:
        return index.to(self.cells.device)


def _warmup(settings: TrainSettings, epochs: int, n_batches: int) -> Warmup:
    """The schedule of the KL: what is set in shares of the run, in steps."""
    cycles = settings.cycles
    rise, length = round(settings.warmup * epochs / cycles) * n_batches, math.ceil(epochs * n_batches / cycles)
    return Warmup(rise, settings.beta, cycles, length, settings.free_bits)


def parameters() -> dict[str, Tensor]:
    """Copies of the unconstrained parameters in the current param store, by name."""
    store = pyro.get_param_store()
    return {name: store[name].unconstrained().detach().clone() for name in store}


def load_parameters(values: dict[str, Tensor]) -> None:
    """Write unconstrained values into the parameters of the current param store, in place."""
    store = pyro.get_param_store()
    if set(values) != set(store.keys()):
        missing, extra = sorted(set(store.keys()) - set(values)), sorted(set(values) - set(store.keys()))
        raise InputError(
            f"Expected the parameters of this model and guide; missing {missing[:3]}, unknown {extra[:3]}. "
            "Load them with the model and guide that were saved."
        )
    with torch.no_grad():
        for name, value in values.items():
            target = store[name].unconstrained()
            if target.shape != value.shape:
                raise InputError(
                    f"Expected parameter {name!r} of shape {tuple(target.shape)}; got {tuple(value.shape)}. "
                    "Load it for the genes and the network sizes that were saved."
                )
            target.copy_(value)


def _seed(seed: int, epoch: int) -> int:
    """A seed of its own for every epoch: a resumed run needs no generator state."""
    return int(torch.randint(2**62, (epoch + 1,), generator=torch.Generator().manual_seed(seed))[-1])


def _hidden(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def _elbos(history: History) -> str:
    seen = [value for value in history.held_out if not math.isnan(value)]
    held_out = f"{seen[-1]:.2f}" if seen else "-"
    return f"ELBO per cell: train {history.train[-1]:.2f}, held-out {held_out}"
