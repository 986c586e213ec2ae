"""Bayesian RNA velocity as a Pyro program.

>>> import pyro_velo as pv
>>> pv.Priors().concentration
0.25

Every name is imported on first use, so that `import pyro_velo` costs nothing and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pyro_velo.version import __version__ as __version__

if TYPE_CHECKING:
    from pyro_velo import agreement as agreement
    from pyro_velo import assignments as assignments
    from pyro_velo import cluster_sizes as cluster_sizes
    from pyro_velo import criticism as criticism
    from pyro_velo import embedding as embedding
    from pyro_velo import encoders as encoders
    from pyro_velo import fates as fates
    from pyro_velo import futures as futures
    from pyro_velo import guides as guides
    from pyro_velo import initial as initial
    from pyro_velo import kinetics as kinetics
    from pyro_velo import likelihoods as likelihoods
    from pyro_velo import macrostates as macrostates
    from pyro_velo import metrics as metrics
    from pyro_velo import plots as pl  # noqa: F401 (ruff knows only `x as x` as an export)
    from pyro_velo import preprocess as pp  # noqa: F401
    from pyro_velo import processes as processes
    from pyro_velo import rates as rates
    from pyro_velo import simulate as simulate
    from pyro_velo import states as states
    from pyro_velo.api import score as score
    from pyro_velo.auditing import audit as audit
    from pyro_velo.audits import Audit as Audit
    from pyro_velo.autoencoding import ProfileFit as ProfileFit
    from pyro_velo.autoencoding import load_vae as load_vae
    from pyro_velo.autoencoding import vae as vae
    from pyro_velo.calibrating import CalibrationSettings as CalibrationSettings
    from pyro_velo.calibrating import calibrate as calibrate
    from pyro_velo.calibrating import coverage_of as coverage_of
    from pyro_velo.calibration import Calibration as Calibration
    from pyro_velo.checking import unexplained_genes as unexplained_genes
    from pyro_velo.comparing import compare as compare
    from pyro_velo.comparison import Comparison as Comparison
    from pyro_velo.data import read as read
    from pyro_velo.data import to_anndata as to_anndata
    from pyro_velo.data.bridge import velocity_data as velocity_data
    from pyro_velo.data.digits import digits as digits
    from pyro_velo.data.downloads import mouse_brain as mouse_brain
    from pyro_velo.data.on_disk import velocity_data_on_disk as velocity_data_on_disk
    from pyro_velo.data.profile_data import profile_data as profile_data
    from pyro_velo.data.profiles_on_disk import profile_data_on_disk as profile_data_on_disk
    from pyro_velo.diagnosing import diagnose as diagnose
    from pyro_velo.diagnosis import Diagnosis as Diagnosis
    from pyro_velo.errors import InputError as InputError
    from pyro_velo.fitting import Fit as Fit
    from pyro_velo.fitting import fit as fit
    from pyro_velo.fitting import load as load
    from pyro_velo.flow import project as project
    from pyro_velo.models.cgmdvae import CGMDVAE as CGMDVAE
    from pyro_velo.models.gmvae import GMVAE as GMVAE
    from pyro_velo.models.vae import VAE as VAE
    from pyro_velo.models.velocity import SwitchPenalty as SwitchPenalty
    from pyro_velo.models.velocity import VelocityModel as VelocityModel
    from pyro_velo.preparing import prepare_file as prepare_file
    from pyro_velo.prior_draws import draw_from_prior as draw_from_prior
    from pyro_velo.priors import Centered as Centered
    from pyro_velo.priors import Priors as Priors
    from pyro_velo.priors import ScaleMixture as ScaleMixture
    from pyro_velo.reporting import report as report
    from pyro_velo.sweeping import Sweep as Sweep
    from pyro_velo.sweeping import SweepGrid as SweepGrid
    from pyro_velo.sweeping import SweepSettings as SweepSettings
    from pyro_velo.sweeping import sweep as sweep
    from pyro_velo.train import TrainSettings as TrainSettings

_MODULES = {"pl": "plots", "pp": "preprocess"} | {
    name: name
    for name in (
        "agreement",
        "assignments",
        "cluster_sizes",
        "criticism",
        "embedding",
        "encoders",
        "fates",
        "futures",
        "guides",
        "initial",
        "kinetics",
        "likelihoods",
        "macrostates",
        "metrics",
        "processes",
        "rates",
        "simulate",
        "states",
        "times",
        "library",
        "transcription",
    )
}
_NAMES = {
    "prepare_file": "preparing",
    "project": "flow",
    "score": "api",
    "audit": "auditing",
    "Audit": "audits",
    "CalibrationSettings": "calibrating",
    "calibrate": "calibrating",
    "coverage_of": "calibrating",
    "Calibration": "calibration",
    "unexplained_genes": "checking",
    "compare": "comparing",
    "Comparison": "comparison",
    "read": "data",
    "to_anndata": "data",
    "velocity_data": "data.bridge",
    "velocity_data_on_disk": "data.on_disk",
    "diagnose": "diagnosing",
    "Diagnosis": "diagnosis",
    "digits": "data.digits",
    "mouse_brain": "data.downloads",
    "profile_data": "data.profile_data",
    "profile_data_on_disk": "data.profiles_on_disk",
    "InputError": "errors",
    "Fit": "fitting",
    "fit": "fitting",
    "load": "fitting",
    "ProfileFit": "autoencoding",
    "load_vae": "autoencoding",
    "vae": "autoencoding",
    "VAE": "models.vae",
    "GMVAE": "models.gmvae",
    "CGMDVAE": "models.cgmdvae",
    "SwitchPenalty": "models.velocity",
    "VelocityModel": "models.velocity",
    "Centered": "priors",
    "ScaleMixture": "priors",
    "Priors": "priors",
    "draw_from_prior": "prior_draws",
    "report": "reporting",
    "Sweep": "sweeping",
    "SweepGrid": "sweeping",
    "SweepSettings": "sweeping",
    "sweep": "sweeping",
    "TrainSettings": "train",
}


def __getattr__(name: str) -> object:
    """A public name, from the module that defines it, imported now (PEP 562)."""
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    if name in _NAMES:
        value = getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
        # Importing a module sets it as an attribute here, which must not shadow the function of the same name.
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({"__version__", *_MODULES, *_NAMES})
