"""The commands of the command line that take one matrix of profiles, without velocities."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pyro_velo.arguments import (
    BatchSize,
    Covariates,
    MaxEpochs,
    OnDisk,
    Overwrite,
    Resume,
    Save,
    Seed,
    Threads,
    say_if_interrupted,
)
from pyro_velo.errors import FitError
from pyro_velo.options import (
    CovarianceName,
    DataSetName,
    ProfileLikelihoodName,
    SamplerName,
    SizesName,
    SweepOptions,
    VAEModelName,
    VAEOptions,
)
from pyro_velo.parsing import parse_layers, parse_sizes

HERE = Path(".")
LAYERS = ",".join("-".join(map(str, layers)) for layers in SweepOptions.hidden)
LATENTS = ",".join(map(str, SweepOptions.latents))


def vae(
    data: Annotated[Path, typer.Argument(metavar="IN", exists=True, help="Counts, or other profiles: a file.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.h5ad", help="The AnnData to write.")],
    model: Annotated[VAEModelName, typer.Option(help="Without clusters, with, or with conditions.")] = VAEOptions.model,
    likelihood: Annotated[
        ProfileLikelihoodName, typer.Option(help="Of counts, real numbers, or zeros and ones.")
    ] = VAEOptions.likelihood,
    layer: Annotated[str | None, typer.Option(metavar="L", help="Default: X.")] = None,
    depth: Annotated[bool, typer.Option(help="Take library sizes as known.")] = VAEOptions.depth,
    clusters: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Default: 1 to 10, as held-out cells have it.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Fit K clusters (default: 10) and merge those that are too many.")
    ] = False,
    sizes: Annotated[SizesName, typer.Option(help="What is known of the clusters' sizes.")] = VAEOptions.sizes,
    covariance: Annotated[
        CovarianceName, typer.Option(help="Of a cluster: along the latent dimensions, or any.")
    ] = VAEOptions.covariance,
    neighbours: Annotated[
        int, typer.Option(min=0, metavar="N", help="Start from communities of a graph of N a cell; 0: from a mixture.")
    ] = VAEOptions.neighbours,
    latent: Annotated[int, typer.Option(min=1, metavar="D", help="Latent dimensions.")] = VAEOptions.latent,
    condition_key: Annotated[str | None, typer.Option(metavar="C", help="obs: what the networks are told.")] = None,
    covariate: Covariates = None,
    label_key: Annotated[str | None, typer.Option(metavar="L", help="obs: clusters, where they are known.")] = None,
    denoised: Annotated[bool, typer.Option("--denoised", help="Write the layer vae_denoised too.")] = False,
    max_epochs: MaxEpochs = None,
    batch_size: BatchSize = None,
    seed: Seed = VAEOptions.seed,
    threads: Threads = None,
    save: Save = None,
    resume: Resume = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a report as well.")] = None,
    on_disk: OnDisk = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit an autoencoder: a latent space, and the clusters in it."""
    options = VAEOptions(
        model=model,
        likelihood=likelihood,
        layer=layer,
        depth=depth,
        clusters=clusters,
        prune=prune,
        sizes=sizes,
        covariance=covariance,
        neighbours=neighbours,
        latent=latent,
        condition_key=condition_key,
        covariates=tuple(covariate or ()),
        label_key=label_key,
        denoised=denoised,
        max_epochs=max_epochs,
        batch_size=batch_size,
        seed=seed,
        threads=threads,
        save=save,
        resume=resume,
        report=report,
        overwrite=overwrite,
        on_disk=on_disk,
    )
    from pyro_velo import autoencoding

    fitted = autoencoding.vae_file(data, output, options)
    say_if_interrupted(fitted)
    if fitted.number is not None:
        typer.echo(fitted.number.table())
    typer.echo(f"Wrote {output}" if report is None else f"Wrote {output} and {report}")


def sweep(
    data: Annotated[Path, typer.Argument(metavar="IN", exists=True, help="Counts: a file.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="TABLE.csv", help="The table to write.")],
    likelihoods: Annotated[str, typer.Option(metavar="A,B", help="Of counts.")] = ",".join(SweepOptions.likelihoods),
    hidden: Annotated[str, typer.Option(metavar="A,B-C", help="Layers from z outwards, for each choice.")] = LAYERS,
    latents: Annotated[str, typer.Option(metavar="A,B", help="Latent dimensions.")] = LATENTS,
    study: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep trials here (sqlite), and go on.")] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it as well.")] = None,
    sampler: Annotated[SamplerName, typer.Option(help="Every choice, or where it was good.")] = SweepOptions.sampler,
    trials: Annotated[int | None, typer.Option(min=1, help="Default: one for each choice.")] = None,
    prune: Annotated[bool, typer.Option(help="Give up trials below the median early.")] = SweepOptions.prune,
    layer: Annotated[str | None, typer.Option(metavar="L", help="Default: X.")] = None,
    depth: Annotated[bool, typer.Option(help="Take library sizes as known.")] = SweepOptions.depth,
    condition_key: Annotated[str | None, typer.Option(metavar="C", help="obs: what the networks are told.")] = None,
    covariate: Covariates = None,
    max_epochs: MaxEpochs = None,
    batch_size: BatchSize = None,
    seed: Seed = SweepOptions.seed,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Say which likelihood, layers and latent size explain held-out cells best."""
    options = SweepOptions(
        likelihoods=tuple(name.strip() for name in likelihoods.split(",")),
        hidden=parse_layers(hidden),
        latents=parse_sizes(latents),
        study=study,
        picture=picture,
        sampler=sampler,
        trials=trials,
        prune=prune,
        layer=layer,
        depth=depth,
        condition_key=condition_key,
        covariates=tuple(covariate or ()),
        max_epochs=max_epochs,
        batch_size=batch_size,
        seed=seed,
        threads=threads,
        overwrite=overwrite,
    )
    from pyro_velo import sweeping

    found = sweeping.sweep_file(data, output, options)
    typer.echo(found.table())
    if found.interrupted:
        kept = "" if study is None else f"; the same command with --overwrite goes on from {study}"
        print(f"pyro-velo: interrupted after {len(found.trials)} trials{kept}", file=sys.stderr)
    typer.echo(f"Wrote {output}")
    if found.best is None and not found.interrupted:
        raise FitError("Expected one trial or more that came to its end; got none, see the table.")


def download(
    name: Annotated[DataSetName, typer.Argument(metavar="NAME", help="Brain cells of mice: 20,000, or 1.3 million.")],
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where it goes.")] = HERE,
) -> None:
    """Fetch counts that others have published: mouse-brain-20k or mouse-brain (10x Genomics)."""
    from pyro_velo.data import downloads

    typer.echo(f"Wrote {downloads.download(downloads.DATA_SETS[name], folder)}")
