"""The architecture, as code: what may import what, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pyro_velo"

LAYERS: dict[int, set[str]] = {
    0: {
        "errors",
        "options",
        "version",
        "kinetics",
        "special",
        "densities",
        "batch",
        "profiles",
        "nn",
        "compiled",
        "memory",
        "moments",
        "quantiles",
        "quadrature",
        "data.anndata_keys",
    },
    1: {
        *("priors", "likelihoods", "states", "initial", "ordering", "mixture", "times", "transcription", "library"),
        *("optimizer", "processes"),
        *("disk", "disk_profiles"),
        *("emission", "gaussian_mixture", "cluster_sizes", "assignments", "communities", "starts"),
    },
    2: {"models", "rates", "guides", "encoders"},
    3: {
        *("train", "schedule", "recorded", "looks", "forensics", "checkpoint"),
        *("posterior", "state_posterior", "refinement", "evidence", "nuts"),
        *("coupling", "coupled_rates", "cell_scores"),
        *("consensus", "curve_information", "rescaled_rates", "time_units"),
        *("history", "doctor", "doctor.terms"),
        *("simulate", "preprocess", "preparing", "embedding", "metrics", "data"),
        *("transitions", "population_balance", "macrostates", "fates", "directions", "directional", "contributions"),
        *("criticism", "tallies", "calibration", "truth", "prior_draws"),
        *("last_layer", "latent", "clustering", "cluster_number", "merging", "agreement", "parts", "stages", "studies"),
    },
    4: {
        "writing",
        *("plots", "reporting", "flow", "fitting", "api", "verdict", "comparison", "comparing", "cli", "parsing"),
        *("arguments", "profile_commands"),
        *("autoencoding", "profile_report", "sweeping"),
        *("futures", "audits", "auditing", "checking", "calibrating", "diagnosis", "diagnosing"),
        *("__init__", "__main__"),
    },
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}
"""An entry covers the modules below it too, where they have no entry of their own."""

SIDEWAYS = {
    # What data sets in memory share.
    ("profiles", "batch"),
    ("densities", "special"),
    ("densities", "compiled"),
    ("special", "compiled"),
    ("nn", "compiled"),
    ("kinetics", "compiled"),
    ("disk_profiles", "disk"),
    ("emission", "likelihoods"),
    ("times", "priors"),
    ("ordering", "initial"),
    ("assignments", "gaussian_mixture"),
    ("assignments", "states"),
    ("guides", "models"),
    ("encoders", "models"),
    ("guides", "rates"),
    ("train", "forensics"),
    ("train", "history"),
    # What a bound is made of, which every fit writes down; the rest of the doctor looks at fits.
    ("looks", "doctor.terms"),
    ("looks", "forensics"),
    ("looks", "recorded"),
    ("looks", "schedule"),
    ("train", "looks"),
    ("doctor.terms", "schedule"),
    ("doctor", "checkpoint"),
    ("doctor", "doctor.terms"),
    ("doctor", "evidence"),
    ("doctor", "schedule"),
    ("doctor", "train"),
    ("train", "schedule"),
    ("train", "recorded"),
    ("recorded", "schedule"),
    ("checkpoint", "forensics"),
    ("checkpoint", "schedule"),
    ("checkpoint", "train"),
    ("posterior", "state_posterior"),
    ("posterior", "train"),
    ("coupling", "coupled_rates"),
    ("coupling", "cell_scores"),
    ("cell_scores", "coupled_rates"),
    ("cell_scores", "state_posterior"),
    ("coupling", "state_posterior"),
    ("coupling", "train"),
    # The unit of genes' own times.
    ("curve_information", "consensus"),
    ("curve_information", "state_posterior"),
    ("curve_information", "train"),
    ("time_units", "consensus"),
    ("time_units", "curve_information"),
    ("time_units", "rescaled_rates"),
    ("time_units", "train"),
    ("refinement", "schedule"),
    ("refinement", "train"),
    ("nuts", "schedule"),
    ("nuts", "train"),
    ("evidence", "forensics"),
    ("evidence", "schedule"),
    ("evidence", "train"),
    # Where cells go, and which genes say so.
    ("transitions", "embedding"),
    ("transitions", "metrics"),
    ("macrostates", "metrics"),
    ("macrostates", "transitions"),
    ("population_balance", "transitions"),
    ("fates", "metrics"),
    ("fates", "population_balance"),
    ("fates", "transitions"),
    ("directions", "metrics"),
    ("directions", "transitions"),
    ("directional", "metrics"),
    ("directional", "transitions"),
    ("contributions", "embedding"),
    ("contributions", "metrics"),
    # What a fit fails to reproduce, and whether its posterior keeps its word.
    ("criticism", "evidence"),
    ("criticism", "posterior"),
    ("criticism", "state_posterior"),
    ("criticism", "train"),
    # What is wrong with a fit.
    ("doctor", "criticism"),
    ("doctor", "state_posterior"),
    ("tallies", "metrics"),
    ("calibration", "tallies"),
    ("truth", "calibration"),
    ("truth", "data"),
    ("truth", "posterior"),
    ("truth", "tallies"),
    ("truth", "train"),
    ("prior_draws", "data"),
    ("prior_draws", "truth"),
    ("preprocess", "data"),
    ("preparing", "data"),
    ("preparing", "preprocess"),
    # Autoencoders: what a fit says of cells, and fits with clusters.
    ("last_layer", "train"),
    ("latent", "last_layer"),
    ("latent", "train"),
    ("starts", "communities"),
    ("cluster_number", "clustering"),
    ("cluster_number", "evidence"),
    ("cluster_number", "stages"),
    ("cluster_number", "train"),
    ("clustering", "latent"),
    ("clustering", "stages"),
    ("merging", "cluster_number"),
    ("merging", "clustering"),
    ("merging", "evidence"),
    ("merging", "latent"),
    ("merging", "stages"),
    ("merging", "train"),
    ("stages", "checkpoint"),
    ("stages", "train"),
    ("clustering", "train"),
    ("data", "simulate"),
    ("reporting", "plots"),
    ("api", "fitting"),
    ("api", "flow"),
    ("fitting", "flow"),
    ("fitting", "writing"),
    ("__init__", "flow"),
    ("api", "reporting"),
    ("verdict", "reporting"),
    ("comparison", "plots"),
    ("comparison", "reporting"),
    ("comparison", "verdict"),
    ("comparing", "api"),
    ("comparing", "comparison"),
    ("comparing", "fitting"),
    ("comparing", "verdict"),
    ("futures", "fitting"),
    ("checking", "fitting"),
    ("audits", "plots"),
    ("auditing", "audits"),
    ("auditing", "api"),
    ("auditing", "fitting"),
    ("diagnosis", "plots"),
    ("diagnosis", "reporting"),
    ("diagnosing", "api"),
    ("diagnosing", "autoencoding"),
    ("diagnosing", "diagnosis"),
    ("diagnosing", "fitting"),
    ("calibrating", "api"),
    ("calibrating", "fitting"),
    ("calibrating", "plots"),
    ("autoencoding", "fitting"),
    ("autoencoding", "profile_report"),
    ("profile_report", "plots"),
    ("profile_report", "reporting"),
    ("profile_commands", "arguments"),
    ("profile_commands", "autoencoding"),
    ("profile_commands", "parsing"),
    ("profile_commands", "sweeping"),
    ("__init__", "sweeping"),
    ("sweeping", "plots"),
    ("__init__", "autoencoding"),
    ("cli", "api"),
    ("cli", "arguments"),
    ("cli", "profile_commands"),
    ("cli", "auditing"),
    ("cli", "calibrating"),
    ("cli", "comparing"),
    ("cli", "diagnosing"),
    ("cli", "parsing"),
    ("__main__", "cli"),
    # The public names, loaded lazily.
    ("__init__", "api"),
    ("__init__", "auditing"),
    ("__init__", "audits"),
    ("__init__", "calibrating"),
    ("__init__", "checking"),
    ("__init__", "comparing"),
    ("__init__", "comparison"),
    ("__init__", "diagnosing"),
    ("__init__", "diagnosis"),
    ("__init__", "fitting"),
    ("__init__", "futures"),
    ("__init__", "plots"),
    ("__init__", "reporting"),
}
"""The arrows that are allowed within a layer; those within one entry's own modules are, too."""

FOR_TYPES = {("data", "posterior"), ("arguments", "autoencoding"), ("arguments", "fitting")}
"""Those that are allowed under TYPE_CHECKING alone."""

PEERS = {"scvelo", "cellrank", "scvi"}
HEAVY = {"torch", "pyro", "scanpy", "anndata", "matplotlib", "pandas", "h5py", "zarr", "scipy", "numba"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name in it; a package goes by its name, the top one by `__init__`."""
    base = ROOT / PACKAGE
    paths = {path.relative_to(base).with_suffix("").parts: path for path in sorted(base.rglob("*.py"))}
    return {".".join(p[:-1] if p[-1] == "__init__" and len(p) > 1 else p): path for p, path in paths.items()}


def entry(module: str) -> str | None:
    """The table's entry for a module: its own name, or the nearest package above it that has one."""
    while module not in LAYER and "." in module:
        module = module.rpartition(".")[0]
    return module if module in LAYER else None


def imports(module: str, source: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import, in functions and under TYPE_CHECKING too; one for each name imported."""
    here = [PACKAGE, *(module.split(".") if module != "__init__" else [])]
    package = here if is_package or module == "__init__" else here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def typing_lines(source: str) -> set[int]:
    """The lines under `if TYPE_CHECKING:`, which only a type checker runs."""
    blocks = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If))
    typing = (node for node in blocks if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    return {line for node in typing for line in range(node.body[0].lineno, node.body[-1].end_lineno + 1)}


def within(name: str) -> str | None:
    """The name in our package that an absolute name reaches for, `__init__` where it names nothing in the table."""
    top, _, rest = name.partition(".")
    if top != PACKAGE:
        return None
    return rest if rest and entry(rest) else "__init__"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module imports and may not."""
    own = entry(module)
    if own is None:
        return [f"{module} is in no layer; enter it in LAYERS of tests/test_layers.py"]
    found, for_types = [], typing_lines(source)
    for line, name in imports(module, source, is_package):
        where, top = f"{module}:{line}", name.partition(".")[0]
        if top in PEERS:
            found.append(f"{where} imports {top}, a peer; the AnnData's keys are all that we share")
        if top == "anndata" and module.partition(".")[0] != "data" and line not in for_types:
            found.append(f"{where} imports anndata, which only {PACKAGE}.data does")
        if (target := within(name)) and (theirs := entry(target)):
            allowed = SIDEWAYS | FOR_TYPES if line in for_types else SIDEWAYS
            sideways = LAYER[own] == LAYER[theirs] and (own == theirs or (own, theirs) in allowed)
            if not (LAYER[theirs] < LAYER[own] or sideways):
                found.append(f"{where} imports {theirs}: layer {LAYER[own]} -> layer {LAYER[theirs]}")
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    names = (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "") for node in calls)
    # A package may load its public names lazily, by name.
    if module != "__init__" and not is_package and not {"import_module", "__import__"}.isdisjoint(names):
        found.append(f"{module} imports by a string, which hides the arrow")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_run_down(module: str) -> None:
    path = modules()[module]
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


def test_imports_go_round_in_no_circle() -> None:
    known = modules()
    graph = {}
    for module, path in known.items():
        names = (within(name) for _, name in imports(module, path.read_text(), path.name == "__init__.py"))
        targets = {n if n in known else n.rpartition(".")[0] for n in names if n}
        graph[module] = targets & known.keys() - {module}
    assert set(TopologicalSorter(graph).static_order()) == known.keys()


def test_every_entry_of_the_table_is_there() -> None:
    assert LAYER.keys() <= {entry(module) for module in modules()}
    assert {module for arrow in SIDEWAYS | FOR_TYPES for module in arrow} <= LAYER.keys()


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("kinetics", "from pyro_velo.priors import Priors", "kinetics:1 imports priors: layer 0 -> layer 1"),
        ("kinetics", "def f():\n    import pyro_velo.train", "kinetics:2 imports train: layer 0 -> layer 3"),
        ("priors", "from . import guides", "priors:1 imports guides: layer 1 -> layer 2"),
        ("priors", "from .states import STATES", "priors:1 imports states: layer 1 -> layer 1"),
        ("models.velocity", "from ..guides import Amortized", "models.velocity:1 imports guides: layer 2 -> layer 2"),
        ("train", "import pyro_velo as pv", "train:1 imports __init__: layer 3 -> layer 4"),
        ("train", "from pyro_velo import fit", "train:1 imports __init__: layer 3 -> layer 4"),
        ("metrics", "from pyro_velo.data.readers import read", "metrics:1 imports data: layer 3 -> layer 3"),
        ("data.bridge", "from pyro_velo.posterior import Posterior", "data.bridge:1 imports posterior: layer 3"),
        ("posterior", "from pyro_velo.data.bridge import VelocityData", "posterior:1 imports data: layer 3"),
        ("checkpoint", "from pyro_velo.posterior import Posterior", "checkpoint:1 imports posterior: layer 3"),
        (
            "plots.phase",
            "from pyro_velo.reporting import render",
            "plots.phase:1 imports reporting: layer 4 -> layer 4",
        ),
        ("preprocess", "from anndata import AnnData", "preprocess:1 imports anndata, which only pyro_velo.data does"),
        ("data.readers", "import scvelo as scv", "data.readers:1 imports scvelo, a peer"),
        ("nn", "from importlib import import_module\nimport_module('pyro_velo.api')", "nn imports by a string"),
        ("utils", "", "utils is in no layer"),
    ],
)
def test_the_checker_catches(module: str, source: str, complaint: str) -> None:
    (found,) = violations(module, source)
    assert found.startswith(complaint)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train", "from pyro_velo.models.base import Model"),
        ("models.velocity", "from .base import Model"),
        ("metrics", "from pyro_velo.data import anndata_keys"),
        ("embedding", "from pyro_velo.data.anndata_keys import MS"),
        ("data.readers", "import anndata\nfrom . import checks"),
        ("data.bridge", "if TYPE_CHECKING:\n    from pyro_velo.posterior import Posterior"),
        ("cli", "def f():\n    from pyro_velo import api"),
        ("fitting", "if TYPE_CHECKING:\n    from anndata import AnnData"),
    ],
)
def test_the_checker_lets_through(module: str, source: str) -> None:
    assert violations(module, source) == []


EXTRAS = {"download", "sweep"}
"""Of which users have to ask for: what these bring is imported in functions alone."""


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = {name for extra in EXTRAS for name in project["optional-dependencies"][extra]}
    declared = {requirement.split(">")[0] for requirement in {*project["dependencies"], *optional}}
    used = {name.partition(".")[0] for m, path in modules().items() for _, name in imports(m, path.read_text())}
    third_party = used - sys.stdlib_module_names - {PACKAGE}
    providers = packages_distributions()
    assert {name for name in third_party if declared.isdisjoint(map(str.lower, providers[name]))} == set()


def test_extras_are_imported_on_first_use() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = {name.split(">")[0] for extra in EXTRAS for name in project["optional-dependencies"][extra]}
    for module, path in modules().items():
        source = path.read_text()
        inside = typing_lines(source) | {
            line
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        outside = {name.partition(".")[0] for line, name in imports(module, source) if line not in inside}
        assert not outside & optional, module


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in the repository."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def loaded(*arguments: str) -> set[str]:
    """The top-level packages that a Python process imports."""
    lines = run_python("-X", "importtime", *arguments).stderr.splitlines()
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert PACKAGE in names
    return names


def test_the_package_loads_nothing_heavy() -> None:
    assert loaded("-c", f"import {PACKAGE}") & HEAVY == set()


@pytest.mark.parametrize(
    "command", [(), ("fit",), ("score",), ("calibrate",), ("audit",), ("diagnose",), ("vae",), ("sweep",)]
)
def test_help_loads_nothing_heavy(command: tuple[str, ...]) -> None:
    assert loaded("-m", PACKAGE, *command, "--help") & (HEAVY | {"numpy", "rich"}) == set()


STATE = """
import importlib, logging, pkgutil, random, warnings
# What our modules import may change such state itself; that is not ours to answer for.
import anndata, h5py, jinja2, matplotlib.pyplot, numpy, pandas, pyro, safetensors.torch, scanpy.plotting, torch
import tqdm, zarr, pyro.infer.autoguide, pyro.optim, scipy.io, scipy.stats, sklearn.neighbors, typer
import pyro.distributions as dist

def state():
    return {
        "torch dtype": torch.get_default_dtype(),
        "torch device": torch.get_default_device(),
        "torch threads": torch.get_num_threads(),
        "torch gradients": torch.is_grad_enabled(),
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": str(numpy.random.get_state()),
        "numpy errors": numpy.geterr(),
        "python random state": random.getstate(),
        "pyro parameters": sorted(pyro.get_param_store().keys()),
        "pyro validation": (dist.is_validation_enabled(), torch.distributions.Distribution._validate_args),
        "matplotlib rcParams": dict(matplotlib.rcParams),
        "matplotlib backend": matplotlib.get_backend(),
        "scanpy settings": (scanpy.settings.verbosity, scanpy.settings.n_jobs),
        "warning filters": list(warnings.filters),
        "root logger": (logging.root.level, list(logging.root.handlers)),
    }

before = state()
import pyro_velo
names = [m.name for m in pkgutil.walk_packages(pyro_velo.__path__, "pyro_velo.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
after = state()
assert len(names) > 10, names
assert {key for key in before if before[key] != after[key]} == set()
"""


def test_importing_every_module_changes_no_global_state() -> None:
    run_python("-c", STATE)


def test_no_module_hides_a_public_function() -> None:
    """A submodule becomes an attribute of the package once it is imported, and would stand before the function."""
    from pyro_velo import _MODULES, _NAMES

    names = set(modules()) - {"__init__"}
    assert not names & (set(_NAMES) - set(_MODULES))
