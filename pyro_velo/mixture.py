"""The joint mixture over the four states: unspliced and spliced molecules of a cell and gene share one."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class Scored(TorchDistribution):
    """What was measured, its log density (...) known already; the value has `event_dim` axes more.

    It stands where a density is asked for at the measured value, and nothing else.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, log_density: Tensor, event_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.log_density = log_density
        super().__init__(log_density.shape, event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of what was measured, whatever the value."""
        return self.log_density


class ScoredMolecules(Scored):
    """Of both molecules, which can still be told apart, without a gradient: `unspliced` gives log p(u), (...)."""

    def __init__(self, log_density: Tensor, unspliced: Callable[[], Tensor]) -> None:
        self.unspliced = unspliced
        super().__init__(log_density, torch.Size([2]))

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> TorchDistribution:
        """Itself, in plates of its own shape."""
        return self if torch.Size(batch_shape) == self.batch_shape else super().expand(batch_shape, _instance)

    @torch.no_grad()
    def log_unspliced(self, value: Tensor) -> Tensor:
        """Log p(u) of what was measured, whatever the value; see `JointMixture.log_unspliced`."""
        return self.unspliced()


class JointMixture(TorchDistribution):
    r"""$p(u, s) = \sum_k w_k\, p(u \mid k)\, p(s \mid k)$: one state for both molecules.

    `log_weights` (K, ..., G), `unspliced` and `spliced` of batch shape (K, ..., G), states leading; a value is
    (..., G, 2). Weights that do not sum to one are taken as they are, so that a bound on the log-weights gives a bound
    on log p. `hard` takes the most likely state alone instead of the sum.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self, log_weights: Tensor, unspliced: TorchDistribution, spliced: TorchDistribution, hard: bool = False
    ) -> None:
        self.log_weights, self.unspliced, self.spliced, self.hard = log_weights, unspliced, spliced, hard
        shape = torch.broadcast_shapes(log_weights.shape, unspliced.batch_shape, spliced.batch_shape)
        self.copies = torch.Size()
        super().__init__(shape[1:], torch.Size([2]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The molecules' own support, for (u, s) as one event."""
        return constraints.independent(self.unspliced.support, 1)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> JointMixture:
        """The same mixture, broadcast to `batch_shape`; dimensions before its own are copies of it."""
        own = torch.Size(batch_shape)[len(batch_shape) - self.log_weights.ndim + 1 :]
        shape = self.log_weights.shape[:1] + own
        molecules = self.unspliced.expand(shape), self.spliced.expand(shape)
        wide = JointMixture(self.log_weights.expand(shape), *molecules, self.hard)
        wide.copies = torch.Size(batch_shape)[: len(batch_shape) - len(own)]
        wide._batch_shape = torch.Size(batch_shape)
        return wide

    def log_joint(self, value: Tensor) -> Tensor:
        """The terms log w_k + log p(u | k) + log p(s | k) of each state: (K, ..., G)."""
        # Dimensions of the value before the mixture's own would line up with the states, which stand there.
        before = value.ndim - self.log_weights.ndim
        u, s = value.unsqueeze(before).unbind(-1)
        return (self.log_weights + self.unspliced.log_prob(u) + self.spliced.log_prob(s)).movedim(before, 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """The mixture's log density, (..., G)."""
        return self._over_states(self.log_joint(value))

    def log_unspliced(self, value: Tensor) -> Tensor:
        r"""Log p(u), (..., G): what is left of the mixture once s is summed out, $\sum_k w_k\,p(u \mid k)$.

        The rest of `log_prob` is log p(s | u), in which s tells the states that u leaves open.
        """
        before = value.ndim - self.log_weights.ndim
        u = value[..., 0].unsqueeze(before)
        return self._over_states((self.log_weights + self.unspliced.log_prob(u)).movedim(before, 0))

    def _over_states(self, terms: Tensor) -> Tensor:
        """Their sum, or the largest, of (K, ..., G): (..., G)."""
        found = terms.amax(0) if self.hard else terms.logsumexp(0)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """A state for each cell and gene, then both molecules in that state."""
        shape = torch.Size(sample_shape) + self.copies
        weights = dist.Categorical(logits=self.log_weights.movedim(0, -1))
        state = weights.expand(self.batch_shape[len(self.copies) :]).sample(shape)
        molecules = torch.stack((self.unspliced.sample(shape), self.spliced.sample(shape)), -1)
        # The states' axis stands behind the sample's.
        pick = state.unsqueeze(len(shape)).unsqueeze(-1).expand(*shape, 1, *state.shape[len(shape) :], 2)
        return molecules.gather(len(shape), pick).squeeze(len(shape))
