"""What a model and a guide are to the training loop: recipes that a data set turns into Pyro programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class Model(ABC):
    """A recipe for a generative program. It holds choices, not parameters, so one recipe serves any number of fits."""

    @abstractmethod
    def build(self, cells: Any) -> nn.Module:
        """The program for these cells' genes: a module that takes a minibatch and makes `pyro.sample` statements.

        `cells` is the kind of `batch.Data` that the model explains.
        """


class Guide(ABC):
    """A recipe for a guide. Pyro's autoguides fit the same place: they too are called with the model's program."""

    @abstractmethod
    def __call__(self, program: nn.Module) -> nn.Module:
        """The guide of `program`: a module that is called with the same minibatch."""
