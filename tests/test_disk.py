"""Cells on disk: the same epochs, losses and posteriors as in memory, to the bit where one window holds all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csc_matrix, csr_matrix
from small import GUIDE, MODEL, differing, leaves, settings, small_adata, small_fit

import pyro_velo as pv
from pyro_velo import disk
from pyro_velo.coupling import Search
from pyro_velo.data import on_disk
from pyro_velo.data import stored as stored_module
from pyro_velo.data.output import write_whole
from pyro_velo.disk import Rows
from pyro_velo.errors import InputError
from pyro_velo.train import train

N_CELLS = 120
SHORT = settings(max_epochs=1, batch_size=54)


@pytest.fixture(scope="module")
def adata() -> AnnData:
    return small_adata(N_CELLS, 6)


@pytest.fixture(scope="module")
def path(adata, tmp_path_factory):
    return write_whole(adata, tmp_path_factory.mktemp("disk") / "cells.h5ad")


@pytest.fixture(scope="module")
def counted() -> AnnData:
    """Counts, and made-up smoothed layers, size factors and batches."""
    rng = np.random.default_rng(1)
    counts = {name: rng.poisson(rng.gamma(2, 2, (N_CELLS, 6))) + np.eye(N_CELLS, 6, dtype=int) for name in "us"}
    layers = {"spliced": csr_matrix(counts["s"]), "unspliced": csr_matrix(counts["u"])}
    layers |= {name: rng.gamma(3, 1, (N_CELLS, 6)).astype(np.float32) for name in ("Ms", "Mu")}
    found = AnnData(layers=layers, shape=(N_CELLS, 6))
    found.obs["batch"] = np.where(rng.random(N_CELLS) < 0.5, "a", "b")
    found.obs["depth"] = rng.normal(size=N_CELLS)
    return found


def on(path, **options):
    return pv.velocity_data_on_disk(path, **{"as_is": True} | options)


def short_fit(cells, **options):
    """Three epochs of two steps."""
    return small_fit(cells, settings=settings(max_epochs=3, batch_size=54), **options)


def unlike(one, other):
    """What two fits' states do not share to the bit."""
    return differing(one.training, other.training)


def same_posterior(one, other) -> bool:
    a, b = (dict(leaves(vars(fit.posterior(draws=2)), "")) for fit in (one, other))
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def in_memory(adata):
    return short_fit(pv.velocity_data(adata, as_is=True).cells)


def test_what_is_read_is_what_was_kept_whatever_the_order(tmp_path, monkeypatch, rng):
    monkeypatch.setattr(disk, "PIECE_BYTES", 7 * 2 * 3 * 4)
    rows, values = Rows(2, 3, tmp_path), torch.from_numpy(rng.normal(size=(2, 50, 3)).astype(np.float32))
    for part in values.split(17, 1):
        rows.append(part)
    for index in (
        torch.randperm(50),
        torch.arange(50),
        torch.tensor([3, 49, 3, 0]),
        torch.tensor([], dtype=torch.int64),
    ):
        for gap in (0, 100):
            monkeypatch.setattr(disk, "GAP_BYTES", gap)
            assert torch.equal(rows.read(index), values[:, index])
    assert list(tmp_path.iterdir()) == [], "the file has no name"


@pytest.mark.parametrize("window", [1, 7, 30, 64, 108, 1000])
def test_an_epoch_holds_each_cell_once_and_is_read_as_it_is_asked_for(path, adata, window):
    cells = replace(on(path).cells, window=window)
    resident = pv.velocity_data(adata, as_is=True).cells
    train_index = torch.randperm(N_CELLS)[:108]
    order = cells.shuffled(train_index)
    assert torch.equal(order.sort().values, train_index.sort().values)
    for one, other in zip(
        cells.read(order.tensor_split(9), 108), resident.read(order.tensor_split(9), 108), strict=True
    ):
        assert torch.equal(one.molecules, other.molecules) and torch.equal(one.index, other.index)
        assert one.n_cells == other.n_cells == 108


def test_a_window_is_made_of_few_blocks_of_neighbours(path, monkeypatch):
    """So the cells that are read at once stand in few places of the file."""
    monkeypatch.setattr(disk, "BLOCKS", 3)
    first = replace(on(path).cells, window=60).shuffled(torch.arange(N_CELLS))[:60]
    assert int((first.diff() == 1).sum()) < 10, "it is shuffled"
    assert int((first.sort().values.diff() > 1).sum()) <= 2, "three blocks of twenty neighbours"


def test_with_a_window_of_all_cells_the_run_is_the_one_in_memory(path, in_memory):
    assert unlike(short_fit(on(path).cells), in_memory) == []


def test_with_the_same_permutation_the_loss_is_that_in_memory(path, adata, monkeypatch):
    cells = replace(on(path).cells, window=30)
    resident = pv.velocity_data(adata, as_is=True).cells
    monkeypatch.setattr(type(resident), "shuffled", lambda _, index: cells.shuffled(index))
    one, other = short_fit(cells), short_fit(resident)
    assert unlike(one, other) == []


def test_a_run_on_disk_goes_on_to_the_bit(path):
    cells = replace(on(path).cells, window=30)
    states = []

    def stop(state):
        states.append(state)
        if state.epoch == 2:
            raise KeyboardInterrupt

    whole = short_fit(cells)
    assert short_fit(cells, on_evaluation=stop).interrupted
    assert unlike(short_fit(cells, resume=states[-1]), whole) == []


@pytest.mark.parametrize(("store", "suffix"), [(np.asarray, ".h5ad"), (csr_matrix, ".h5ad"), (csr_matrix, ".zarr")])
def test_every_way_of_storing_gives_the_same_cells(adata, suffix, store, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_module, "BLOCK_BYTES", 4 * 6 * 32)  # several blocks
    layers = {name: store(adata.layers[name]) for name in ("spliced", "unspliced")}
    found = on(write_whole(AnnData(obs=adata.obs, var=adata.var, layers=layers), tmp_path / f"cells{suffix}"))
    resident = pv.velocity_data(adata, as_is=True)
    assert torch.equal(found.cells.batch(torch.arange(N_CELLS)).molecules, resident.cells.molecules)
    assert torch.equal(found.cells.ratio, resident.cells.ratio)
    assert found.gene_names == resident.gene_names and list(found.cell_names) == list(resident.cell_names)
    for name in ("u_zero", "u_unit", "s_zero", "s_unit"):
        assert_array_equal(getattr(found.scaling, name), getattr(resident.scaling, name))


@pytest.mark.parametrize("as_is", [True, False])
def test_counts_come_with_their_sizes_and_what_is_known_of_the_cells(counted, as_is, tmp_path):
    told = {"as_is": as_is, "counts": True, "batch_key": "batch", "covariates": ["depth"]}
    found, resident = on(write_whole(counted, tmp_path / "c.h5ad"), **told), pv.velocity_data(counted, **told)
    index = torch.randperm(N_CELLS)
    assert differing(found.cells.batch(index), resident.cells.batch(index)) == []
    assert differing(found.cells.sample, resident.cells.sample) == []


def test_ranges_are_those_of_the_sample_where_there_are_more_cells(path, adata, monkeypatch):
    monkeypatch.setattr(on_disk, "SAMPLE", 50)
    found, again, other = on(path), on(path), on(path, seed=1)
    numbers = on_disk.sampled(N_CELLS, 0)
    assert len(numbers) == len(set(numbers)) == len(found.cells.sample) == 50 and len(found.cells) == N_CELLS
    of_sample = pv.velocity_data(adata[numbers].copy(), as_is=True)
    assert torch.equal(found.cells.sample.molecules, of_sample.cells.molecules)
    assert_array_equal(found.scaling.s_unit, of_sample.scaling.s_unit)
    assert_array_equal(found.scaling.s_unit, again.scaling.s_unit)
    assert not np.array_equal(found.scaling.s_unit, other.scaling.s_unit)
    at = torch.from_numpy(numbers)
    assert torch.equal(found.cells.batch(at).molecules, found.cells.sample.molecules)
    units = found.scaling.s_unit, found.scaling.s_zero
    everywhere = found.cells.batch(torch.arange(N_CELLS)).s.numpy() * units[0] + units[1]
    genes = [adata.var_names.get_loc(gene) for gene in found.gene_names]
    assert_allclose(everywhere, adata.layers["spliced"][:, genes], rtol=1e-4, atol=1e-4)


def test_a_fit_of_prepared_layers_is_saved_and_loaded(counted, tmp_path):
    path = write_whole(counted, tmp_path / "prepared.zarr")
    fit = pv.fit(MODEL, GUIDE, str(path), settings=SHORT, save=tmp_path / "kept", progress=False)
    loaded = pv.load(tmp_path / "kept", MODEL, GUIDE, path)
    assert unlike(loaded.fitted, fit.fitted) == []
    resident = pv.fit(MODEL, GUIDE, counted, settings=SHORT, progress=False)
    assert unlike(resident.fitted, fit.fitted) == []
    assert same_posterior(loaded, fit) and same_posterior(resident, fit)


def test_another_experimental_batch_is_predicted_as_in_memory(counted, tmp_path):
    told = {"as_is": True, "batch_key": "batch"}
    data = on(write_whole(counted, tmp_path / "c.h5ad"), **told), pv.velocity_data(counted, **told)
    options = {"settings": SHORT, "progress": False}
    one, other = (pv.fit(MODEL, GUIDE, counted, data=each, **options) for each in data)
    assert_array_equal(one.posterior(draws=2, batch="a").velocity, other.posterior(draws=2, batch="a").velocity)


def bad(adata, **layers):
    found = adata.copy()
    found.layers.update(layers)
    return found


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda a: {"spliced": np.where(np.arange(N_CELLS)[:, None] == 70, np.nan, a.layers["spliced"])},
            "NaN or infinite",
        ),
        (lambda a: {"spliced": -np.ones(a.shape)}, "negative"),
        (lambda a: {"spliced": csc_matrix(a.layers["spliced"])}, "csc_matrix, expected rows that can be read alone"),
        (
            lambda a: {n: np.where(np.arange(N_CELLS)[:, None] == 70, 0, a.layers[n]) for n in a.layers},
            "no counts at all",
        ),
    ],
    ids=["nan", "negative", "csc", "empty cell"],
)
def test_layers_that_cannot_be_fitted_are_refused(adata, change, match, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "SAMPLE", 10)
    monkeypatch.setattr(stored_module, "BLOCK_BYTES", 4 * 6 * 32)
    with pytest.raises(InputError, match=match):
        on(write_whole(bad(adata, **change(adata)), tmp_path / "cells.h5ad"))


def test_counts_that_are_not_whole_are_refused(adata, tmp_path):
    with pytest.raises(InputError, match="aren't whole"):
        on(write_whole(adata, tmp_path / "cells.h5ad"), counts=True)


def test_a_file_that_is_cut_short_is_refused(path, tmp_path):
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"cut\.h5ad can't be read as HDF5"):
        on(cut)
    with pytest.raises(InputError, match="doesn't exist"):
        on(tmp_path / "none.h5ad")
    with pytest.raises(InputError, match="can't be left on the disk"):
        on(__file__)


def test_a_file_that_changes_while_it_is_read_is_refused(path, adata, tmp_path, monkeypatch):
    changing = tmp_path / "changing.h5ad"
    changing.write_bytes(path.read_bytes())
    spilled = on_disk._spilled

    def and_then(*args, **options):
        found = spilled(*args, **options)
        changing.touch()
        return found

    monkeypatch.setattr(on_disk, "_spilled", and_then)
    with pytest.raises(InputError, match="changed while it was read"):
        on(changing)


def test_rows_that_the_disk_has_lost_are_missed(path):
    cells = on(path).cells
    cells.rows._file.truncate(cells.rows.row_bytes * 100)
    assert cells.batch(torch.arange(100)).u.shape == (100, 6)
    with pytest.raises(InputError, match=r"ends before cell 11\d of 120"):
        short_fit(cells)


def test_a_disk_without_room_is_found_before_the_work(path, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="has no room for the cells"):
        on(path, scratch=tmp_path / "nowhere")


def test_what_looks_at_all_cells_says_that_they_are_on_disk(path, adata):
    data = on(path)
    with pytest.raises(InputError, match="Expected the 120 cells in memory"):
        data.resident.scaled.mean()


def test_rates_and_clock_are_coupled_as_in_memory(adata, path):
    model = replace(MODEL, times=pv.times.Shared())
    resident, cells = pv.velocity_data(adata, as_is=True).cells, on(path).cells
    fitted = train(model, replace(GUIDE, rates=pv.rates.PerGene()), resident, settings=SHORT, progress=False)
    with fitted.parameters():
        searches = [_search(fitted, each) for each in (resident, cells)]
        one, other = (search._at(search.x, search.place) for search in searches)
    assert torch.equal(searches[0].place, searches[1].place) and torch.equal(one[1], other[1])
    for name in ("rates", "cross", "warps", "gradient", "gradient_warps"):
        assert torch.equal(getattr(one[0], name), getattr(other[0], name)), name


def _search(fitted, cells) -> Search:
    """One that has looked for every cell."""
    torch.manual_seed(0)
    search = Search(fitted, cells)
    search.seek()
    return search


def test_memory_of_an_epoch_is_two_windows(path, monkeypatch):
    """However many cells there are: what has been read and not yet let go."""
    cells = replace(on(path).cells, window=20)
    held, most, read = [], [], Rows.read

    def counting(rows, index):
        held.append(len(index))
        most.append(sum(held[-2:]))
        return read(rows, index)

    monkeypatch.setattr(Rows, "read", counting)
    n = sum(len(batch.index) for batch in cells.read(cells.shuffled(torch.arange(N_CELLS)).tensor_split(24)))
    assert n == N_CELLS and max(most) <= 2 * (20 + 5)
