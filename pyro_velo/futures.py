"""From a fit to the future of its cells: their fates, and how sure posterior and genes are of their directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyro_velo import directional as agreement
from pyro_velo import directions
from pyro_velo import fates as chains
from pyro_velo import transitions as walks
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.bridge import check_same
from pyro_velo.data.checks import check_known, checked_labels
from pyro_velo.directional import FDR, FLIPS, STEPS, Directional
from pyro_velo.directions import Uncertainty
from pyro_velo.embedding import in_units_of_range
from pyro_velo.errors import InputError
from pyro_velo.fates import Fates
from pyro_velo.fitting import Fit
from pyro_velo.macrostates import terminal_states
from pyro_velo.options import COLOR
from pyro_velo.posterior import OF_DIRECTIONS, OVER_STATES, OverStates, check_draws
from pyro_velo.transitions import SCALE, Receiver, Stream, Transitions

if TYPE_CHECKING:
    from anndata import AnnData

Terminal: TypeAlias = Mapping[str, ArrayLike] | Sequence[str] | int | None


def transitions(
    adata: AnnData,
    fit: Fit,
    *,
    draws: int = 100,
    steps: int = 1,
    scale: float = SCALE,
    over_states: OverStates = OF_DIRECTIONS,
    progress: bool | None = None,
) -> Transitions:
    """A transition matrix for each draw of a fit, on the neighbour graph `obsp['distances']`.

    See `transitions.transitions`. A walk may go to a cell's neighbours, and to those whose neighbour it is. Genes are
    in units of their range, as in `flow.units_of_range`. `steps=2` takes the neighbours' neighbours, at some ten times
    the memory. `adata` stays as it is.

    Raises `InputError` for another AnnData than was fitted, one without a neighbour graph, and fewer than two draws.
    """
    check_draws(draws)
    stream, expression, unit = _streamed(fit, draws, over_states, progress)
    graph = _graph(adata, fit)
    return walks.transitions(stream, expression, graph + graph.T, unit=unit, scale=scale, steps=steps)


def fates(
    adata: AnnData,
    source: Fit | Transitions,
    terminal: Terminal = None,
    *,
    clusters: str = COLOR,
    draws: int = 100,
    balance: bool = True,
    resample: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Fates:
    """The probability that each cell ends in each terminal state, with its 90 % interval, written into `adata`.

    `terminal`: a mask or numbers of cells for each name; or names of groups in `obs[clusters]`, all of whose cells
    count; or None, the stable macrostates of the mean chain, of which an integer gives the number
    (`macrostates.terminal_states`). Those that are found are named after the group that most of their cells are of,
    where `obs[clusters]` is there. `source` is a fit, or `transitions` of other neighbours, scale or states. `balance`
    and `resample` are explained at `fates.absorb`: how many cells take each way is read off the cells along it, which
    takes them as sampled in proportion to their number, without growth or death that differs between the ways; turn
    `balance` off where they were sorted.

    Writes obsm `fate_probabilities` (cells, states), with `_q05` and `_q95`; obs `fate_reached` and `fate_terminal`;
    and the names of the states in uns. See `fates.Fates` for what the numbers mean. CellRank goes on from
    `PrecomputedKernel(fates.matrix, adata)`.

    Raises `InputError` as `transitions` and `fates.absorption`, for names that no cell has, and for keys that are there
    already, unless `overwrite`.
    """
    _check_free(adata, {"obsm": keys.FATES_OBSM, "obs": keys.FATES_OBS}, overwrite)
    named = None if terminal is None or isinstance(terminal, int) else _named(adata, terminal, clusters)
    chain = source if isinstance(source, Transitions) else transitions(adata, source, draws=draws, progress=progress)
    if chain.graph.shape[0] != adata.n_obs:
        raise InputError(f"Expected transitions of {adata.n_obs} cells; got {chain.graph.shape[0]}. Make them anew.")
    if named is None:
        named = _found(adata, chain, terminal if isinstance(terminal, int) else None, clusters)
    found = chains.absorb(chain, named, balance=balance, resample=resample, seed=seed)
    _write(adata, found, chain, {"balance": balance, "resample": resample, "seed": seed})
    return found


def uncertainty(
    adata: AnnData,
    fit: Fit,
    *,
    draws: int = 100,
    steps: int = 1,
    scale: float = SCALE,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Uncertainty:
    """How far the draws of a fit agree on each cell's direction; see `directions.uncertainty`.

    The variance of the intrinsic cosine is the `velocity_uncertainty` that the fit has written (of the same number of
    draws); that of the extrinsic one goes to obs `velocity_uncertainty_extrinsic`. Everything else is returned.

    Raises `InputError` as `transitions`, and for a key that is there already, unless `overwrite`.
    """
    check_draws(draws)
    _check_free(adata, {"obs": (keys.VELOCITY_UNCERTAINTY_EXTRINSIC,)}, overwrite)
    graph = _graph(adata, fit)
    stream, expression, unit = _streamed(fit, draws, OVER_STATES, progress)
    found = directions.uncertainty(stream, expression, graph, unit=unit, scale=scale, steps=steps)
    adata.obs[keys.VELOCITY_UNCERTAINTY_EXTRINSIC] = found.extrinsic.variance.astype(np.float32)
    return found


def directional(
    adata: AnnData,
    fit: Fit,
    *,
    draws: int = 100,
    fdr: float = FDR,
    flips: int = FLIPS,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Directional:
    """How probable it is that each cell's velocity points somewhere: genes must agree on where, not only draws.

    Cells whose probability is above 1 - `fdr` are called directional; of those, a share `fdr` at most is expected to
    be wrong. The evidence is compared with `flips` flips of the signs of genes; see `directional.directional`. Genes
    are in units of their range, and neighbours' neighbours are looked at. The fit is drawn from twice.

    Writes obs `velocity_p_directional` and `velocity_directional_q`, the false discovery rate at which a cell would
    just be called; and in uns the threshold, the share of cells above it and the settings.

    Raises `InputError` as `transitions` and `directional.directional`, and for keys that are there already, unless
    `overwrite`.
    """
    check_draws(draws)
    _check_free(adata, {"obs": keys.DIRECTIONAL_OBS}, overwrite)
    graph = _graph(adata, fit)
    # Whether genes agree has no unit of time, and one that is not known would count as if they did not.
    stream, expression, unit = _streamed(fit.as_trained(), draws, OF_DIRECTIONS, progress)
    found = agreement.directional(stream, expression, graph, unit=unit, flips=flips, fdr=fdr, seed=seed)
    for key, values in zip(keys.DIRECTIONAL_OBS, (found.probability, found.q), strict=True):
        adata.obs[key] = values.astype(np.float32)
    about = {"threshold": found.threshold, "share": found.share, "fdr": fdr, "draws": draws, "flips": flips}
    about |= {"steps": STEPS, "seed": seed}
    adata.uns[keys.UNS] = {**adata.uns.get(keys.UNS, {}), keys.UNS_DIRECTIONAL: about}
    return found


def _streamed(
    fit: Fit, draws: int, over_states: OverStates, progress: bool | None
) -> tuple[Stream, NDArray[np.float32], NDArray[np.float64]]:
    """The velocities and the expression of the fitted genes in units of the model, and each gene's range in them."""
    expression = fit.data.resident.scaled[1].cpu().numpy()
    unit, _ = in_units_of_range(np.ones((1, expression.shape[1])), expression)

    def stream(receive: Receiver) -> None:
        def in_model_units(cells: NDArray[np.int64], velocities: NDArray[np.float32]) -> None:
            receive(cells, velocities / fit.data.scaling.s_unit)

        fit.velocities(in_model_units, draws=draws, over_states=over_states, progress=progress)

    return stream, expression, unit[0]


def _graph(adata: AnnData, fit: Fit) -> Any:
    check_same(adata, fit.data)
    if "distances" not in adata.obsp:
        raise InputError(
            "obsp['distances'] is missing; expected a neighbour graph. Run scanpy.pp.neighbors(adata) first."
        )
    return adata.obsp["distances"]


def _check_free(adata: AnnData, written: Mapping[str, Sequence[str]], overwrite: bool) -> None:
    taken = [f"{where}[{key!r}]" for where, names in written.items() for key in names if key in getattr(adata, where)]
    if taken and not overwrite:
        raise InputError(f"Expected none of these keys; got {', '.join(taken)}. Pass overwrite=True to replace them.")


def _named(adata: AnnData, terminal: Mapping[str, ArrayLike] | Sequence[str], clusters: str) -> Mapping[str, ArrayLike]:
    """The cells of each terminal state that was given."""
    if isinstance(terminal, Mapping):
        return terminal
    names = [terminal] if isinstance(terminal, str) else list(terminal)
    labels = checked_labels(adata, clusters)
    for name in names:
        check_known(str(name), sorted(set(labels)), f"obs[{clusters!r}]")
    return {str(name): labels == str(name) for name in names}


def _found(adata: AnnData, chain: Transitions, n: int | None, clusters: str) -> dict[str, NDArray[np.int64]]:
    """The terminal states of the mean chain, named after the group of most of their cells, numbered where two share it.

    Without groups they are "1", "2", ... .
    """
    states = terminal_states(chain.mean(), n)
    if clusters not in adata.obs:
        return states
    labels, named, seen = checked_labels(adata, clusters), {}, Counter[str]()
    for cells in states.values():
        name = Counter(labels[cells].tolist()).most_common(1)[0][0]
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name} {seen[name]}"] = cells
    return named


def _write(adata: AnnData, found: Fates, chain: Transitions, settings: Mapping[str, bool | int]) -> None:
    for key, values in zip(keys.FATES_OBSM, (found.mean, found.low, found.high), strict=True):
        adata.obsm[key] = values.astype(np.float32)
    codes = np.full(adata.n_obs, -1)
    for k, cells in enumerate(found.terminal.values()):
        codes[cells] = k
    adata.obs[keys.FATE_REACHED] = found.reached.astype(np.float32)
    adata.obs[keys.FATE_TERMINAL] = pd.Categorical.from_codes(codes, list(found.states))
    about = {"states": np.array(found.states, dtype=object), "draws": len(chain), "scale": chain.scale}
    about |= settings
    adata.uns[keys.UNS] = {**adata.uns.get(keys.UNS, {}), keys.UNS_FATES: about}
