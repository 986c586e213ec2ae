"""The field's recipe in full: are rates, velocities and times recovered where they are known?"""

from __future__ import annotations

import numpy as np
import pytest

import pyro_velo as pv
from pyro_velo import metrics, simulate
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.simulated import to_anndata

SEEDS = (0, 1, 2)


def scores(seed: int) -> dict[str, float]:
    """How well the defaults recover 1,000 cells x 300 genes, fitted as they stand."""
    adata = to_anndata(simulate.simulate(1000, 300, seed=seed))
    fit = pv.fit(None, None, adata, seed=seed, data=pv.velocity_data(adata, as_is=True), progress=False)
    fit.write(adata, draws=50)
    var, layers, truth = adata.var, adata.layers, adata.layers[keys.TRUE_VELOCITY]
    each = metrics.pearson(layers[keys.VELOCITY], truth)
    time = np.repeat(adata.obs[[keys.TRUE_TIME]].to_numpy(), adata.n_vars, axis=1)
    return {
        "gamma/beta": np.corrcoef(var.fit_gamma / var.fit_beta, var.true_gamma / var.true_beta)[0, 1],
        "velocity": np.nanmedian(each),
        "velocity of the worst": np.nanpercentile(each, 10),
        "time": np.nanmedian(metrics.spearman(layers[keys.FIT_T], time)),
        "coverage": metrics.coverage(truth, layers[keys.VELOCITY_Q05], layers[keys.VELOCITY_Q95]),
    }


@pytest.mark.slow
def test_the_fields_recipe_is_recovered() -> None:
    """Peers: .94, .97, - and .66. Coverage is stated, not asserted: making it right is another piece of work."""
    runs = [scores(seed) for seed in SEEDS]
    mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    print(mean)
    assert mean["gamma/beta"] >= 0.95
    assert mean["velocity"] >= 0.985 and mean["velocity of the worst"] >= 0.94
    assert mean["time"] >= 0.80
