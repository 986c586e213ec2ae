"""What an autoencoder is made of, as words that a file can hold, and back: names and numbers, never code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pyro_velo.assignments import ASSIGNMENTS
from pyro_velo.cluster_sizes import SIZES, Given
from pyro_velo.encoders import Encoder, PerCluster
from pyro_velo.errors import InputError
from pyro_velo.likelihoods import PROFILE_LIKELIHOODS
from pyro_velo.models.cgmdvae import CGMDVAE
from pyro_velo.models.gmvae import GMVAE
from pyro_velo.models.vae import VAE

KINDS: tuple[Mapping[str, type[Any]], ...] = (PROFILE_LIKELIHOODS, SIZES, ASSIGNMENTS)
RECIPES: tuple[type[Any], ...] = (VAE, GMVAE, CGMDVAE, Encoder, PerCluster, Given)
PARTS = {part.__name__: part for part in (*RECIPES, *(part for kind in KINDS for part in kind.values()))}
"""The recipes that are known by name: frozen dataclasses of names, numbers and such recipes."""


def is_known(part: Any) -> bool:
    """Whether a recipe, and all that it is made of, is among `PARTS`: one's own subclass is not."""
    if isinstance(part, (list, tuple)):
        return all(map(is_known, part))
    if part is None or isinstance(part, (str, int, float)):
        return True
    return PARTS.get(type(part).__name__) is type(part) and all(is_known(getattr(part, f.name)) for f in fields(part))


def to_words(part: Any) -> Any:
    """A recipe as JSON: its name and its fields, each as words.

    >>> to_words(Encoder(hidden=(64,)))
    {'name': 'Encoder', 'hidden': [64], 'hidden_clusters': [32]}
    """
    if isinstance(part, (list, tuple)):
        return [to_words(each) for each in part]
    if part is None or isinstance(part, (str, int, float)):
        return part
    return {"name": type(part).__name__, **{f.name: to_words(getattr(part, f.name)) for f in fields(part)}}


def from_words(words: Any) -> Any:
    """The recipe that `to_words` wrote down; raises `InputError` for a name or a field that nobody has.

    >>> from_words({"name": "NB"})
    NB()
    """
    if isinstance(words, list):
        return tuple(from_words(each) for each in words)
    if not isinstance(words, dict):
        return words
    made = {field: from_words(value) for field, value in words.items() if field != "name"}
    try:
        return PARTS[words["name"]](**made)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"Expected a recipe of this version's ({', '.join(PARTS)}); got {words}. "
            "Use the version of pyro_velo that wrote it, or pass the model and the guide."
        ) from error
