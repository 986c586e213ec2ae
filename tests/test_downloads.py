"""What is fetched is whole and right, or not there; and 10x Genomics' files, of both layouts, hold what was written."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy.sparse import csc_matrix
from test_autoencoding import command

import pyro_velo as pv
from pyro_velo.data import downloads
from pyro_velo.data.downloads import DATA_SETS, Remote, download
from pyro_velo.errors import InputError
from pyro_velo.options import DataSetName

GENES, IDS = ["Sox9", "Ins1", "Pou5f1", "Pou5f1"], ["E1", "E2", "E3", "E4"]


def counts(n_cells: int = 30) -> np.ndarray:
    """Genes x cells, as 10x stores them."""
    return np.random.default_rng(0).poisson(1.5, size=(len(GENES), n_cells)).astype(np.int32)


def write_10x(path: Path, matrix: np.ndarray, *, genomes: tuple[str, ...] = ("mm10",), new: bool = False) -> Path:
    """The layout of Cell Ranger before 3 (a group a genome), or since (`matrix` and its features)."""
    stored = csc_matrix(matrix)
    with h5py.File(path, "w") as file:
        for name in ("matrix",) if new else genomes:
            group = file.create_group(name)
            group["barcodes"] = [f"AAAC{cell}-1".encode() for cell in range(matrix.shape[1])]
            group["data"], group["shape"] = stored.data, np.array(matrix.shape, np.int32)
            group["indices"], group["indptr"] = stored.indices.astype(np.int64), stored.indptr.astype(np.int64)
            if new:
                features = group.create_group("features")
                features["name"], features["id"] = ([each.encode() for each in names] for names in (GENES, IDS))
                features["feature_type"] = [b"Gene Expression"] * 3 + [b"Antibody Capture"]
                features["genome"] = [b"mm10"] * 4
            else:
                group["gene_names"], group["genes"] = ([each.encode() for each in names] for names in (GENES, IDS))
    return path


class Handler(BaseHTTPRequestHandler):
    """Serves what the server holds; counts the requests; may hang up half-way."""

    def do_GET(self) -> None:
        server = self.server
        server.asked += 1
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: server.cut])

    def log_message(self, *arguments) -> None:
        """Say nothing."""


@contextmanager
def serving(**files: bytes) -> Iterator[ThreadingHTTPServer]:
    """A server on this machine, with an address of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.cut = {f"/{name}": content for name, content in files.items()}, 0, None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def remote(server: ThreadingHTTPServer, name: str, content: bytes) -> Remote:
    return Remote(f"http://127.0.0.1:{server.server_port}/{name}", hashlib.md5(content).hexdigest())


CONTENT = b"counts" * 5000


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """With one file."""
    with serving(file=CONTENT) as found:
        yield found


def test_a_file_is_fetched_once_and_again_only_where_it_is_damaged(server, tmp_path: Path, capfd) -> None:
    there = remote(server, "file", CONTENT)
    path = download(there, tmp_path / "new")
    assert path == tmp_path / "new" / "file" and path.read_bytes() == CONTENT
    assert download(there, tmp_path / "new") == path and server.asked == 1
    path.write_bytes(CONTENT[:100])
    assert download(there, tmp_path / "new").read_bytes() == CONTENT and server.asked == 2
    assert capfd.readouterr().err == "" and [each.name for each in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("cut", [0, 1, 9999])
def test_a_connection_that_breaks_leaves_nothing(server, tmp_path: Path, cut: int) -> None:
    server.cut = cut
    with pytest.raises(InputError, match=r"can't be fetched \(.*\), expected a connection") as told:
        download(remote(server, "file", CONTENT), tmp_path)
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []


def test_what_is_not_the_file_is_not_kept(server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Expected a file of the MD5 0+ at .*; got another"):
        download(replace(remote(server, "file", CONTENT), md5="0" * 32), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"before")
    server.files["/file"] = b"changed"
    with pytest.raises(InputError, match="got another"):
        download(remote(server, "file", CONTENT), tmp_path)
    assert (tmp_path / "file").read_bytes() == b"before"


def test_ctrl_c_leaves_nothing(server, tmp_path: Path, monkeypatch) -> None:
    import requests

    def stopped(self, chunk_size):
        yield CONTENT[:10]
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Response, "iter_content", stopped)
    with pytest.raises(KeyboardInterrupt):
        download(remote(server, "file", CONTENT), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_a_file_or_pooch_it_says_so(server, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"can't be fetched \(404 .*put the file at .*nothing by other means"):
        download(remote(server, "nothing", b""), tmp_path)
    with serving() as gone:
        pass
    with pytest.raises(InputError, match="can't be fetched"):
        download(remote(gone, "file", CONTENT), tmp_path)
    monkeypatch.setattr(downloads, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Expected pooch.*pip install 'pyro-velo\[download\]'"):
        download(remote(server, "file", CONTENT), tmp_path)


def test_the_mouse_brain_is_read_from_where_it_is(tmp_path: Path, monkeypatch) -> None:
    content = write_10x(tmp_path / "made.h5", counts()).read_bytes()
    with serving(**{"brain.h5": content}) as server:
        for name in ("MOUSE_BRAIN_20K", "MOUSE_BRAIN"):
            monkeypatch.setattr(downloads, name, remote(server, "brain.h5", content))
        adata = pv.mouse_brain(folder=tmp_path / "cache", progress=False)
        assert_array_equal(adata.X.toarray(), counts().T)
        pv.mouse_brain(every=True, folder=tmp_path / "cache", progress=False)
        assert server.asked == 1
        # The command too, and what it fetched is fitted.
        monkeypatch.setitem(DATA_SETS, "mouse-brain-20k", remote(server, "brain.h5", content))
        code, out, err = command("download", "mouse-brain-20k", "-o", tmp_path)
        assert code == 0 and out == f"Wrote {tmp_path / 'brain.h5'}\n", err
    arguments = ("vae", tmp_path / "brain.h5", "-o", tmp_path / "out.h5ad", "--model", "vae", "--latent", 2)
    code, _, err = command(*arguments, "--max-epochs", 1)
    assert code == 0, err
    assert pv.read(tmp_path / "out.h5ad").obsm["X_vae"].shape == (30, 2)


def test_the_files_are_10x_genomics() -> None:
    assert list(DataSetName.__args__) == list(DATA_SETS)
    for each in DATA_SETS.values():
        assert each.url.startswith("https://cf.10xgenomics.com/samples/cell-exp/1.3.0/1M_neurons/1M_neurons_")
        assert each.name.endswith(".h5") and len(bytes.fromhex(each.md5)) == 16


# The format


@pytest.mark.parametrize("new", [False, True])
def test_a_10x_file_holds_what_was_written(tmp_path: Path, new: bool) -> None:
    adata = pv.read(write_10x(tmp_path / "in.h5", counts(), new=new))
    n = 3 if new else 4
    assert_array_equal(adata.X.toarray(), counts()[:n].T)
    assert adata.var["gene_ids"].tolist() == IDS[:n]
    assert adata.var_names.tolist() == (
        ["Sox9", "Ins1", "Pou5f1"] if new else ["Sox9", "Ins1", "Pou5f1_E3", "Pou5f1_E4"]
    )
    assert adata.obs_names[0] == "AAAC0-1" and adata.obs_names.is_unique


def test_what_is_no_10x_file_is_refused(tmp_path: Path) -> None:
    write_10x(tmp_path / "two.h5", counts(), genomes=("hg19", "mm10"))
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["x"] = [1]
    (tmp_path / "text.h5").write_text("counts")
    whole = write_10x(tmp_path / "cut.h5", counts()).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    write_10x(tmp_path / "short.h5", counts())
    with h5py.File(tmp_path / "short.h5", "a") as file:
        del file["mm10/indptr"]
        file["mm10/indptr"] = [0, 1]
    for name, match in (
        ("two", "isn't a 10x matrix: 2 of its groups"),
        ("none", "isn't a 10x matrix: 0 of its groups"),
        ("text", "isn't an HDF5 file"),
        ("cut", "can't be read as HDF5"),
        ("short", "can't be read as a 10x matrix"),
    ):
        with pytest.raises(InputError, match=match):
            pv.read(tmp_path / f"{name}.h5")
