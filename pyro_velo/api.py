"""What each command does, from file to file."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_velo import checkpoint, embedding, metrics, preprocess, simulate
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data import (
    check_known,
    check_output,
    check_output_keys,
    check_writable,
    checked_basis,
    checked_labels,
    read,
    to_anndata,
    whole,
    write_whole,
)
from pyro_velo.data.bridge import velocity_data
from pyro_velo.data.checks import MAX_UNSPLICED_RATIO, NO_LIMIT
from pyro_velo.data.covariates import design
from pyro_velo.data.on_disk import velocity_data_on_disk
from pyro_velo.data.results import check_results
from pyro_velo.data.stored import is_large, stored
from pyro_velo.errors import InputError
from pyro_velo.fitting import Fit, fit, load
from pyro_velo.flow import units_of_range
from pyro_velo.guides import Amortized
from pyro_velo.library import LIBRARIES
from pyro_velo.likelihoods import LIKELIHOODS
from pyro_velo.models.velocity import VelocityModel
from pyro_velo.options import BASIS, COLOR, GRID, PARTS, Depth, FitOptions
from pyro_velo.posterior import check_draws
from pyro_velo.preparing import prepare_file
from pyro_velo.priors import priors_from_text
from pyro_velo.processes import dismiss, team
from pyro_velo.rates import RATE_GUIDES
from pyro_velo.reporting import report
from pyro_velo.states import STATE_FAMILIES
from pyro_velo.times import TIMES
from pyro_velo.train import TrainSettings
from pyro_velo.transcription import TRANSCRIPTIONS

if TYPE_CHECKING:
    from anndata import AnnData

DEMO_CELLS, DEMO_GENES = 600, 80
PARTS_FILE = "parts.json"


def fit_file(path: Path, output: Path, options: FitOptions) -> Fit:
    """Read, prepare, fit, and write the AnnData and the report; every check that can be made is made before the fit.

    Ctrl-C during the training ends it, and the best parameters so far are written: see `Fit.interrupted`.
    """
    check_draws(options.draws)
    training_of(options)
    check_output(output, options.overwrite, source=path)
    if options.report is not None:
        check_output(options.report, options.overwrite, source=path, formats=(".html",))
    if options.save is not None:
        goes_on = checkpoint.is_same(options.save, options.resume)
        checkpoint.check_folder(options.save, overwrite=options.overwrite or goes_on)
    device = _device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.on_disk or (options.on_disk is None and is_large(path)):
        return fit_on_disk(path, output, options, device)
    adata = read(path)
    check_output_keys(adata, overwrite=options.overwrite)
    check_writable(adata)
    fitted = fit_adata(adata, options, device)
    write_whole(adata, output, options.overwrite)
    if options.report is not None:
        report(adata, options.report)
    return fitted


def fit_on_disk(path: Path, output: Path, options: FitOptions, device: str = "cpu") -> Fit:
    """As `fit_file`, of a file whose cells stay on the disk, beside `output` while they are fitted.

    A file that holds `Ms` and `Mu` is taken as prepared; any other is prepared beside `output`.

    Raises `InputError` for a report, which looks at all cells at once.
    """
    if options.report is not None:
        raise InputError(
            f"Expected no report of cells that stay on the disk; got {options.report}. Leave it out, or pass "
            "--in-memory."
        )
    model, guide = recipes(options)
    training, folder = training_of(options), output.absolute().parent
    names = (options.spliced_layer or keys.SPLICED, options.unspliced_layer or keys.UNSPLICED)
    with stored(path) as file:
        check_results(file, overwrite=options.overwrite)
        design(file.tables(), options.batch_key, options.covariates)
        prepared = options.as_is or {keys.MS, keys.MU} <= set(file.layers)
    with TemporaryDirectory(prefix=f".{output.name}.", suffix=".prepared", dir=folder) as beside:
        if not prepared:
            prepare_file(path, Path(beside) / "prepared.h5ad", prepare_settings(options), layers=names)
            path = Path(beside) / "prepared.h5ad"
        data = velocity_data_on_disk(
            path,
            as_is=options.as_is,
            counts=model.likelihood.counts,
            layers=names if options.as_is else None,
            batch_key=options.batch_key,
            covariates=options.covariates,
            device=device,
            scratch=folder,
            seed=options.seed,
        )
        with _parts_noted(options):
            fitted = fit(
                model,
                guide,
                path,
                seed=options.seed,
                settings=training,
                data=data,
                save=options.save,
                resume=options.resume,
            )
        dismiss()
        fitted.write(output, draws=options.draws, overwrite=options.overwrite)
    return fitted


def prepare_settings(options: FitOptions) -> preprocess.PrepareSettings:
    """How the options prepare counts."""
    limit = NO_LIMIT if options.nuclei else MAX_UNSPLICED_RATIO
    depth = options.depth or depth_for(options.likelihood)
    return preprocess.PrepareSettings(seed=options.seed, max_unspliced_ratio=limit, depth=depth)


def fit_adata(adata: AnnData, options: FitOptions, device: str = "cpu") -> Fit:
    """Prepare `adata` (unless as it is), fit what the options name, and write velocities, times and rates into it."""
    model, guide = recipes(options)
    training = training_of(options)
    # Once before the preprocessing, which takes a while, so that what is wrong with a column is said at once.
    design(adata, options.batch_key, options.covariates)
    if not options.as_is:
        _rename_layers(adata, options)
        preprocess.prepare(adata, prepare_settings(options))
    data = velocity_data(
        adata,
        as_is=options.as_is,
        counts=model.likelihood.counts,
        # Preprocessing has renamed them.
        spliced=options.spliced_layer if options.as_is else None,
        unspliced=options.unspliced_layer if options.as_is else None,
        batch_key=options.batch_key,
        covariates=options.covariates,
        device=device,
    )
    with _parts_noted(options):
        fitted = fit(
            model, guide, adata, seed=options.seed, settings=training, data=data,
            save=options.save, resume=options.resume,
        )  # fmt: skip
    dismiss()
    fitted.write(adata, draws=options.draws, overwrite=options.overwrite)
    return fitted


def training_of(options: FitOptions) -> TrainSettings:
    """The settings of the training that the options name; raises `InputError` for those that no fit can be run with."""
    given: dict[str, Any] = {"max_epochs": options.max_epochs, "batch_size": options.batch_size, "beta": options.beta}
    given |= {"cycles": options.kl_cycles, "free_bits": options.free_bits}
    return replace(TrainSettings(), **{name: value for name, value in given.items() if value is not None})


@contextmanager
def _parts_noted(options: FitOptions) -> Iterator[None]:
    """Around a fit: its parts are written down where it is kept, of one that goes on once it was taken for the same."""
    folder = options.save if team().leads else None
    goes_on = checkpoint.is_same(folder, options.resume)
    if folder is not None and not goes_on:
        note_parts(folder, options)
    yield
    if folder is not None and goes_on:
        note_parts(folder, options)


def note_parts(folder: Path, options: FitOptions) -> None:
    """Write down in `folder` what a fit is made of, for `kept_parts`."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: getattr(options, name) for name in PARTS}
    (folder / PARTS_FILE).write_text(json_format.dumps(told, indent=1) + "\n")


def kept_parts(folder: Path) -> dict[str, Any]:
    """The options that name the parts of the fit in `folder`, as `fit --save` noted them; none where it did not.

    Raises `InputError` for a file that holds anything else.
    """
    path = folder / PARTS_FILE
    if not path.is_file():
        return {}
    try:
        told = json_format.loads(path.read_text())
    except (json_format.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}). Remove it, and name the fit's parts.") from error
    if not isinstance(told, dict) or set(told) != set(PARTS) or any(told[x] not in GRID[x] for x in GRID):
        raise InputError(f"Expected {', '.join(PARTS)} in {path}; got {told!r}. Remove it, and name the fit's parts.")
    return told | {name: tuple(told[name]) for name in ("covariates", "priors")}


def kept_fit(folder: Path, path: Path, options: FitOptions) -> tuple[Fit, AnnData]:
    """The fit that `pyro-velo fit --save` left in `folder`, with the AnnData that it wrote to `path`.

    That one has the layers and the genes of the fit; `options` name its parts. Raises `InputError` as `fitting.load`.
    """
    adata = read(path)
    model, guide = recipes(options)
    spliced, unspliced = keys.fitted_layers(adata.uns, adata.layers.keys())
    # Counts are of the raw layers, whether or not preprocessing has smoothed them for the start values.
    as_is = spliced != keys.MS and not (model.likelihood.counts and keys.MS in adata.layers)
    given = {"batch_key": options.batch_key, "covariates": options.covariates}
    return load(folder, model, guide, adata, as_is=as_is, spliced=spliced, unspliced=unspliced, **given), adata


def depth_for(*likelihoods: str) -> Depth:
    """What cells are scaled to unless it is said: counts keep what cells around hold, layers follow the field."""
    return "neighbours" if any(LIKELIHOODS[name]().counts for name in likelihoods) else "total"


def recipes(options: FitOptions) -> tuple[VelocityModel, Amortized]:
    """The model and the guide that the options name; raises `InputError` for a prior that is not one."""
    model = VelocityModel(
        likelihood=LIKELIHOODS[options.likelihood](),
        states=STATE_FAMILIES[options.states](),
        times=TIMES[options.times](),
        transcription=TRANSCRIPTIONS[options.transcription](),
        library=LIBRARIES[options.library](),
        priors=priors_from_text(options.priors),
    )
    return model, Amortized(rates=RATE_GUIDES[options.rates]())


def simulate_file(
    output: Path, *, cells: int, genes: int, seed: int, likelihood: str, stationary: bool, overwrite: bool
) -> None:
    """Simulate and write the AnnData, the truth in it."""
    check_output(output, overwrite)
    settings = simulate.Settings(noise=simulate.NOISES[likelihood](), stationary=stationary)
    write_whole(to_anndata(simulate.simulate(cells, genes, settings=settings, seed=seed)), output, overwrite)


def report_file(path: Path, output: Path, *, basis: str, color: str, overwrite: bool) -> None:
    """Write the report of a fit that is in an AnnData."""
    check_output(output, overwrite, source=path, formats=(".html",))
    adata = read(path)
    report(adata, output, basis=basis, color=None if color == COLOR and color not in adata.obs else color)


def score_file(
    path: Path,
    clusters: str,
    edges: list[tuple[str, str]],
    *,
    basis: str = BASIS,
    json: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """CBDir on the embedding and in Ms space, ICCoh and confidence of a fit; written to `json` too, if given."""
    if json is not None:
        check_output(json, overwrite, source=path, formats=())
    scores = score(read(path), clusters, edges, basis=basis)
    if json is not None:
        with whole(json, overwrite, formats=()) as partial:
            partial.write_text(json_format.dumps(scores, indent=2) + "\n")
    return scores


def score(adata: AnnData, clusters: str, edges: list[tuple[str, str]], *, basis: str = BASIS) -> dict[str, Any]:
    """The scores of `adata`'s velocity against known transitions between the clusters in `obs[clusters]`.

    Ms space and coherence are taken with each gene in units of its range, as the peers' figures are; see `metrics` for
    the definitions. An edge without cells at its boundary is null and not part of the mean.
    """
    labels = checked_labels(adata, clusters)
    for name in {name for edge in edges for name in edge}:
        check_known(name, sorted(set(labels)), f"obs[{clusters!r}]")
    graph, velocity, expression = units_of_range(adata)
    positions = checked_basis(adata, basis)
    arrows = adata.obsm.get(keys.velocity_embedding(basis))
    if arrows is None:
        arrows = embedding.project(embedding.transition_matrix(velocity, expression, graph), positions)
    on_basis = metrics.cross_boundary_direction(arrows, positions, graph, labels, edges)
    in_ms = metrics.cross_boundary_direction(velocity, expression, graph, labels, edges)
    return {
        f"cbdir_{basis}": _number(on_basis.mean),
        "cbdir_ms": _number(in_ms.mean),
        "iccoh": _number(metrics.in_cluster_coherence(velocity, graph, labels).mean),
        "confidence": _number(float(np.nanmean(metrics.confidence(velocity, graph)))),
        "edges": [
            {
                "from": a,
                "to": b,
                f"cbdir_{basis}": _number(on_basis.each[f"{a}>{b}"]),
                "cbdir_ms": _number(in_ms.each[f"{a}>{b}"]),
            }
            for a, b in edges
        ],
    }


def demo(folder: Path) -> Fit:
    """Simulate, fit and report in `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    source, output, page = (folder / name for name in ("simulated.h5ad", "fitted.h5ad", "report.html"))
    noise = simulate.NOISES["poisson"]()
    settings = simulate.Settings(noise=noise, lineages=simulate.Lineages(count=2))
    simulation = simulate.simulate(DEMO_CELLS, DEMO_GENES, settings=settings, seed=0)
    adata = to_anndata(simulation)
    adata.obs[COLOR] = adata.obs["lineage"]
    write_whole(adata, source, overwrite=True)
    return fit_file(source, output, FitOptions(report=page, overwrite=True))


def _rename_layers(adata: AnnData, options: FitOptions) -> None:
    """Put the named layers where preprocessing looks for them."""
    names = {keys.SPLICED: options.spliced_layer, keys.UNSPLICED: options.unspliced_layer}
    chosen = {name: layer for name, layer in names.items() if layer not in (None, name)}
    for layer in chosen.values():
        check_known(str(layer), list(adata.layers), "Layer")
    # Both are looked up before either is put in place, so that they can be exchanged.
    adata.layers.update({name: adata.layers[layer] for name, layer in chosen.items()})


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("Expected a CUDA device; torch sees none. Use --device cpu, or install a CUDA build of torch.")
    return name
