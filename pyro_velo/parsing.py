"""What the command line reads from a text: a grid of variants, sizes, and edges between clusters."""

from __future__ import annotations

from collections.abc import Sequence

from pyro_velo.errors import InputError
from pyro_velo.options import GRID


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values to try for each name, from texts such as "likelihood=nb,zinb".

    Raises `InputError` for an unknown name or value, listing the known ones, and for one given twice.

    >>> parse_grid(["likelihood=nb, zinb", "states=collapsed"])
    {'likelihood': ('nb', 'zinb'), 'states': ('collapsed',)}
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, rest = (part.strip() for part in text.partition("="))
        if name not in GRID:
            raise InputError(f"Expected a grid of {', '.join(GRID)}; got {text!r}. Write it as likelihood=nb,zinb.")
        values = tuple(value.strip() for value in rest.split(","))
        for value in values:
            if value not in GRID[name]:
                raise InputError(f"Expected {name} of {', '.join(GRID[name])}; got {value!r} in {text!r}. Name these.")
        if name in grid or len(set(values)) < len(values):
            raise InputError(f"Expected {name} once, with each value once; got {text!r}. Write it as {name}=a,b.")
        grid[name] = values
    return grid


def parse_sizes(text: str) -> tuple[int, ...]:
    """The numbers in "10,25,50", each 1 or more; raises `InputError` for anything else.

    >>> parse_sizes("10, 25")
    (10, 25)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"Expected numbers of 1 or more like 10,25,50; got {text!r}. Put commas between them.")
    return tuple(map(int, parts))


def parse_layers(text: str) -> tuple[tuple[int, ...], ...]:
    """The sizes of layers for each choice in "100,100-250"; raises `InputError` for anything else.

    >>> parse_layers("100, 100-250")
    ((100,), (100, 250))
    """
    choices = [choice.strip().split("-") for choice in text.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for sizes in choices for size in sizes):
        raise InputError(f'Expected sizes of layers like "100,100-250"; got {text!r}. Put - between layers.')
    return tuple(tuple(map(int, sizes)) for sizes in choices)


def parse_edges(text: str) -> list[tuple[str, str]]:
    """The (source, target) pairs in "A>B,C>D"; a target alone goes on from the source before it.

    Names may hold spaces, but neither `>` nor `,`. Raises `InputError` where an edge can't be read.

    >>> parse_edges("Pre-endocrine>Alpha, >Beta, Ngn3 high EP>Pre-endocrine")
    [('Pre-endocrine', 'Alpha'), ('Pre-endocrine', 'Beta'), ('Ngn3 high EP', 'Pre-endocrine')]
    """
    pairs: list[tuple[str, str]] = []
    for edge in text.split(","):
        names = [name.strip() for name in edge.split(">")]
        if len(names) != 2 or not names[1]:
            raise InputError(f'Expected edges like "A>B,C>D"; got {edge.strip()!r} in {text!r}. Write one > an edge.')
        source, target = names[0] or (pairs[-1][0] if pairs else ""), names[1]
        if not source:
            raise InputError(f'Expected a source before the first > in {text!r}. Write it out, as in "A>B,>C".')
        if source == target or (source, target) in pairs:
            raise InputError(f"Expected each edge once, between two clusters; got {source}>{target}. Leave it out.")
        pairs.append((source, target))
    return pairs
