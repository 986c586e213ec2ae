"""The command line: options in, one call of `pyro_velo.api`, and one line on stderr where the input is at fault.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from pyro_velo.arguments import (
    Basis,
    BatchKey,
    BatchSize,
    Clusters,
    Covariates,
    Data,
    Draws,
    Fitted,
    Json,
    Kept,
    Library,
    Likelihood,
    MaxEpochs,
    OnDisk,
    Overwrite,
    PriorTexts,
    Rates,
    Result,
    Resume,
    Save,
    Seed,
    States,
    Threads,
    Times,
    Transcription,
    say_if_interrupted,
)
from pyro_velo.errors import FitError, InputError
from pyro_velo.options import (
    BASIS,
    CALIBRATION_DRAWS,
    CALIBRATION_FITS,
    COLOR,
    DEMO_FOLDER,
    GRID,
    CompareOptions,
    Counts,
    Depth,
    Device,
    FitOptions,
    LibraryName,
    LikelihoodName,
    RatesName,
    StatesName,
    TimesName,
    TranscriptionName,
)
from pyro_velo.parsing import parse_edges, parse_grid
from pyro_velo.profile_commands import download, sweep, vae
from pyro_velo.version import __version__

FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""What `torchrun` sets for each of its processes."""
TRAINING = ("fit", "vae")
"""The commands that several processes can do together."""
GO_ON = "; go on from the last checkpoint, if one was kept"
"""What is left to say where several processes are stopped: they write no result."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

AS_KEPT = "Default: that of the fit."


def version(show: bool) -> None:
    """Print the version and stop, where `--version` asks for it."""
    if show:
        typer.echo(f"pyro-velo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Bayesian RNA velocity: from spliced and unspliced counts to velocities with their uncertainty."""
    if TORCHRUN in os.environ and context.invoked_subcommand not in TRAINING:
        from pyro_velo.processes import team

        if team().several:
            raise InputError(
                f"Expected one of {', '.join(TRAINING)} with several processes; got {context.invoked_subcommand}. "
                "Run it without torchrun."
            )


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where it goes.")] = DEMO_FOLDER,
) -> None:
    """Simulate, fit and report, to see it work.

    About two minutes on two cores.
    """
    from pyro_velo import api

    say_if_interrupted(api.demo(folder))
    typer.echo(f"Wrote {folder}")


@app.command()
def simulate(
    output: Annotated[Path, typer.Argument(metavar="OUT.h5ad", help="The AnnData to write, the truth in it.")],
    cells: Annotated[int, typer.Option(min=1, help="Number of cells.")],
    genes: Annotated[int, typer.Option(min=1, help="Number of genes.")],
    seed: Seed,
    likelihood: Annotated[Counts, typer.Option(help="Noise: Normal, or counts with library sizes.")] = "normal",
    stationary: Annotated[bool, typer.Option("--stationary", help="No dynamics at all: a null.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Simulate spliced and unspliced RNA from known kinetics."""
    from pyro_velo import api

    api.simulate_file(
        output, cells=cells, genes=genes, seed=seed, likelihood=likelihood, stationary=stationary, overwrite=overwrite
    )
    typer.echo(f"Wrote {output}")


@app.command()
def fit(
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.h5ad", help="The AnnData to write.")],
    as_is: Annotated[bool, typer.Option("--as-is", help="Fit the two layers as they stand: no preprocessing.")] = False,
    spliced_layer: Annotated[str | None, typer.Option(metavar="L", help="Default: spliced, or mature.")] = None,
    unspliced_layer: Annotated[str | None, typer.Option(metavar="L", help="Default: unspliced, or nascent.")] = None,
    draws: Draws = FitOptions.draws,
    max_epochs: MaxEpochs = None,
    batch_size: BatchSize = None,
    seed: Seed = FitOptions.seed,
    threads: Threads = None,
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = FitOptions.device,
    save: Save = None,
    resume: Resume = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a report as well.")] = None,
    nuclei: Annotated[
        bool, typer.Option("--nuclei", help="Single nuclei: more unspliced than spliced is fine.")
    ] = False,
    likelihood: Likelihood = FitOptions.likelihood,
    states: States = FitOptions.states,
    rates: Rates = FitOptions.rates,
    times: Times = FitOptions.times,
    transcription: Transcription = FitOptions.transcription,
    library: Library = FitOptions.library,
    depth: Annotated[
        Depth | None, typer.Option(help="Scale cells to one total, or to cells around. Default: by the likelihood.")
    ] = None,
    batch_key: BatchKey = None,
    covariate: Covariates = None,
    prior: PriorTexts = None,
    beta: Annotated[float | None, typer.Option(metavar="B", help="What the KL weight rises to. Default: 1.")] = None,
    kl_cycles: Annotated[int | None, typer.Option(metavar="N", help="How often it rises. Default: once.")] = None,
    free_bits: Annotated[
        float | None, typer.Option(metavar="NATS", help="KL that a latent dimension has for free. Default: 0.")
    ] = None,
    on_disk: OnDisk = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit velocities, times and rates with their uncertainty."""
    from pyro_velo import api

    options = FitOptions(
        as_is=as_is,
        spliced_layer=spliced_layer,
        unspliced_layer=unspliced_layer,
        draws=draws,
        max_epochs=max_epochs,
        batch_size=batch_size,
        seed=seed,
        threads=threads,
        device=device,
        save=save,
        resume=resume,
        report=report,
        overwrite=overwrite,
        nuclei=nuclei,
        likelihood=likelihood,
        states=states,
        rates=rates,
        times=times,
        transcription=transcription,
        library=library,
        depth=depth,
        batch_key=batch_key,
        covariates=tuple(covariate or ()),
        priors=tuple(prior or ()),
        beta=beta,
        kl_cycles=kl_cycles,
        free_bits=free_bits,
        on_disk=on_disk,
    )
    fitted = api.fit_file(data, output, options)
    say_if_interrupted(fitted)
    kept = "" if fitted.data.source is None else " (cells on disk)"
    typer.echo(f"Wrote {output}{kept}" if report is None else f"Wrote {output} and {report}")


@app.command()
def report(
    result: Result,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The HTML file to write.")],
    basis: Basis = BASIS,
    color: Annotated[str, typer.Option(help="The obs column that colours the cells.")] = COLOR,
    overwrite: Overwrite = False,
) -> None:
    """Write one self-contained HTML file about a fit."""
    from pyro_velo import api

    api.report_file(result, output, basis=basis, color=color, overwrite=overwrite)
    typer.echo(f"Wrote {output}")


@app.command()
def score(
    result: Result,
    clusters: Clusters,
    edges: Annotated[str, typer.Option(metavar='"A>B,C>D"', help="What becomes what; A>B,>C is A>B,A>C.")],
    json_file: Json = None,
    basis: Basis = BASIS,
    overwrite: Overwrite = False,
) -> None:
    """Score a fit against known transitions.

    CBDir in the embedding and in Ms space, ICCoh, and confidence.
    """
    pairs = parse_edges(edges)
    from pyro_velo import api

    scores = api.score_file(result, clusters, pairs, basis=basis, json=json_file, overwrite=overwrite)
    typer.echo(json.dumps(scores, indent=2))


@app.command()
def compare(
    data: Data,
    grid: Annotated[
        list[str], typer.Option(metavar="NAME=A,B", help=f"What to vary: {', '.join(GRID)}. Repeat it for all pairs.")
    ],
    json_file: Json = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with pictures as well.")] = None,
    as_is: Annotated[bool, typer.Option("--as-is", help="Fit the two layers as they stand: no preprocessing.")] = False,
    max_epochs: MaxEpochs = None,
    batch_size: BatchSize = None,
    seed: Seed = CompareOptions.seed,
    threads: Threads = None,
    batch_key: BatchKey = None,
    overwrite: Overwrite = False,
) -> None:
    """Say which model explains held-out cells best.

    Every combination is fitted and scored on the same cells. Likelihoods of scaled layers and of raw counts are
    judged apart.
    """
    options = CompareOptions(
        grid=parse_grid(grid),
        json=json_file,
        html=html,
        as_is=as_is,
        max_epochs=max_epochs,
        batch_size=batch_size,
        seed=seed,
        threads=threads,
        batch_key=batch_key,
        overwrite=overwrite,
    )
    from pyro_velo import comparing

    found = comparing.compare_file(data, options)
    typer.echo(found.table())
    if not any(found.choice.values()):
        raise FitError("Expected one fit or more that succeeds; every one failed, see the table.")


@app.command()
def calibrate(
    cells: Annotated[int, typer.Option(min=4, help="Cells of each simulation.")],
    genes: Annotated[int, typer.Option(min=1, help="Genes of each simulation.")],
    fits: Annotated[int, typer.Option(min=1, help="Simulations, each with its fit.")] = CALIBRATION_FITS,
    seed: Seed = FitOptions.seed,
    likelihood: Likelihood = FitOptions.likelihood,
    states: States = FitOptions.states,
    rates: Rates = FitOptions.rates,
    times: Times = FitOptions.times,
    draws: Draws = CALIBRATION_DRAWS,
    max_epochs: MaxEpochs = None,
    threads: Threads = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep each fit's counts here.")] = None,
    json_file: Json = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it as well.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say how often the model's intervals cover the truth.

    Cells are drawn from the model's own prior and fitted, many times.
    """
    options = FitOptions(
        seed=seed,
        likelihood=likelihood,
        states=states,
        rates=rates,
        times=times,
        draws=draws,
        max_epochs=max_epochs,
        threads=threads,
        save=save,
        overwrite=overwrite,
    )
    from pyro_velo import calibrating

    found = calibrating.calibrate_file(options, cells=cells, genes=genes, fits=fits, json=json_file, picture=picture)
    typer.echo(found.table())


@app.command()
def audit(
    folder: Kept,
    data: Fitted,
    clusters: Clusters,
    edges: Annotated[
        str | None, typer.Option(metavar='"A>B,C>D"', help="Default: clusters that border on each other.")
    ] = None,
    draws: Draws = FitOptions.draws,
    likelihood: Likelihood = FitOptions.likelihood,
    states: States = FitOptions.states,
    rates: Rates = FitOptions.rates,
    times: Times = FitOptions.times,
    transcription: Transcription = FitOptions.transcription,
    library: Library = FitOptions.library,
    batch_key: BatchKey = None,
    covariate: Covariates = None,
    prior: PriorTexts = None,
) -> None:
    """Say which edges between clusters a fit runs backwards, and which genes make them.

    The parts are to be named as they were to fit.
    """
    pairs = None if edges is None else parse_edges(edges)
    options = FitOptions(
        draws=draws,
        likelihood=likelihood,
        states=states,
        rates=rates,
        times=times,
        transcription=transcription,
        library=library,
        batch_key=batch_key,
        covariates=tuple(covariate or ()),
        priors=tuple(prior or ()),
    )
    from pyro_velo import auditing

    typer.echo(auditing.audit_file(folder, data, clusters, pairs, options).table())


@app.command()
def diagnose(
    folder: Kept,
    data: Annotated[
        Path | None, typer.Argument(metavar="[IN]", exists=True, help="The AnnData that this fit wrote, if need be.")
    ] = None,
    json_file: Json = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with pictures as well.")] = None,
    likelihood: Annotated[LikelihoodName | None, typer.Option(help=AS_KEPT)] = None,
    states: Annotated[StatesName | None, typer.Option(help=AS_KEPT)] = None,
    rates: Annotated[RatesName | None, typer.Option(help=AS_KEPT)] = None,
    times: Annotated[TimesName | None, typer.Option(help=AS_KEPT)] = None,
    transcription: Annotated[TranscriptionName | None, typer.Option(help=AS_KEPT)] = None,
    library: Annotated[LibraryName | None, typer.Option(help=AS_KEPT)] = None,
    batch_key: BatchKey = None,
    covariate: Covariates = None,
    prior: PriorTexts = None,
    overwrite: Overwrite = False,
) -> None:
    """Say what is wrong with a fit, and what to do about it.

    `fit --save` has kept what it is made of, and the cells that are looked at. A fit that was saved otherwise needs its
    parts named, one that was stopped or whose clock is shared by genes with per-gene rates the AnnData.
    """
    parts = {
        "likelihood": likelihood,
        "states": states,
        "rates": rates,
        "times": times,
        "transcription": transcription,
        "library": library,
        "batch_key": batch_key,
        "covariates": tuple(covariate) if covariate else None,
        "priors": tuple(prior) if prior else None,
    }
    given = {name: value for name, value in parts.items() if value is not None}
    from pyro_velo import diagnosing

    found = diagnosing.diagnose_file(folder, data, given, json=json_file, html=html, overwrite=overwrite)
    typer.echo(found.table())


for command in (vae, sweep, download):
    app.command()(command)


def complain(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    say(f"error: {' '.join(message.split())}")


def say(message: str) -> None:
    """A line on stderr about how the run ends; of several processes the first that has one says it."""
    if TORCHRUN in os.environ:
        from pyro_velo.processes import team

        if team().store is not None:
            # It ends by itself, and what it has to say must not be cut off.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not team().tells_first():
            return
    print("pyro-velo:", message, file=sys.stderr)


def terminated(number: int, frame: FrameType | None) -> NoReturn:
    """What SIGTERM does to one of several processes: `torchrun` sends it where another one has ended."""
    complain(f"terminated, by the system or as another process has ended{GO_ON}")
    raise SystemExit(TERMINATED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 1 for a fit that failed, 2 for bad input, 130 for Ctrl-C.

    Ctrl-C during the training is none of these: it ends the training, and the result is written. Under `torchrun` it
    ends the run, and nothing is written but the checkpoints; all processes but the first end when they are trained.
    """
    if TORCHRUN not in os.environ:
        return run(arguments)
    from pyro_velo.processes import joined

    with joined() as team:
        if team.several:
            signal.signal(signal.SIGTERM, terminated)
        if not team.leads:
            # What the first one warns of.
            warnings.simplefilter("ignore")
        return run(arguments)


def run(arguments: Sequence[str] | None) -> int:
    """The command, in this process; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="pyro-velo", standalone_mode=False)
    except typer.TyperException as error:
        complain(f"{error.format_message()} (see pyro-velo --help)")
        return BAD_INPUT
    except (InputError, OSError, MemoryError) as error:
        complain(str(error))
        return BAD_INPUT
    except FitError as error:
        complain(str(error))
        return FAILED
    # typer turns Ctrl-C into this code, without a word.
    if code == INTERRUPTED:
        say(f"interrupted{GO_ON if TORCHRUN in os.environ else ''}")
    return code or 0
