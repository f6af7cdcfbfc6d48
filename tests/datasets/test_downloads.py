"""Downloads from a local server, and files in the formats of their publishers."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_als import DataWarning, Recommender, TPUAlternatingLeastSquares
from tpu_als.datasets import (
    downloads,
    fetch_lastfm_360k,
    fetch_movielens,
    fetch_webgraph,
    lastfm,
    movielens,
    tfrecords,
    webgraph,
)
from tpu_als.storage.lock import FileLock


class Server:
    """Files by path, requests so far, and paths whose answer breaks off or does not end."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: set[str] = set()
        self.endless: set[str] = set()
        self._closed = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                server.requests.append(name)
                if name not in server.files:
                    self.send_error(404)
                    return
                content = server.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                whole = name not in server.broken | server.endless
                self.wfile.write(content if whole else content[: len(content) // 2])
                if name in server.endless:
                    server._closed.wait()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        # The argument is the time that `close` waits for.
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class TestDownloads:
    @pytest.fixture
    def file(self, server: Server) -> downloads.RemoteFile:
        server.files["data.bin"] = b"some data" * 1000
        checksum = f"md5:{md5(server.files['data.bin'])}"
        return downloads.RemoteFile("sub/data.bin", server.url + "data.bin", checksum)

    def test_once(self, server: Server, file: downloads.RemoteFile, tmp_path: Path) -> None:
        for _ in range(2):
            path = downloads.fetched(file, tmp_path)
            assert path == tmp_path / "sub" / "data.bin"
            assert path.read_bytes() == server.files["data.bin"]
        assert server.requests == ["data.bin"]
        assert downloads.fetched(file, tmp_path, download_if_missing=False) == path

    def test_a_damaged_file_is_replaced(
        self, server: Server, file: downloads.RemoteFile, tmp_path: Path
    ) -> None:
        path = downloads.fetched(file, tmp_path)
        path.write_bytes(b"damaged")
        with pytest.raises(OSError, match="is damaged: its checksum is not md5:"):
            downloads.fetched(file, tmp_path, download_if_missing=False)
        assert downloads.fetched(file, tmp_path).read_bytes() == server.files["data.bin"]

    @pytest.mark.parametrize("fault", ["missing", "broken", "other contents", "no server"])
    def test_a_failure_leaves_nothing(
        self, server: Server, file: downloads.RemoteFile, tmp_path: Path, fault: str
    ) -> None:
        if fault == "missing":
            server.files.clear()
        elif fault == "broken":
            server.broken.add("data.bin")
        elif fault == "other contents":
            server.files["data.bin"] = b"a page that asks for a password"
        else:
            server.close()
        with pytest.raises(OSError, match=r"cannot download http.*put it at .*data\.bin"):
            downloads.fetched(file, tmp_path, n_retries=0)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_damaged_file_that_cannot_be_replaced(
        self, server: Server, file: downloads.RemoteFile, tmp_path: Path
    ) -> None:
        path = downloads.fetched(file, tmp_path)
        path.write_bytes(b"damaged")
        server.files.clear()
        with pytest.raises(OSError, match=r"The file that is at .*data\.bin has another checksum"):
            downloads.fetched(file, tmp_path, n_retries=0)

    @pytest.mark.parametrize("n_retries", [0, 1, 2])
    def test_further_attempts(
        self,
        server: Server,
        file: downloads.RemoteFile,
        n_retries: int,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """The server is well after two failures."""
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                server.broken.clear()

        monkeypatch.setattr(downloads, "time", types.SimpleNamespace(sleep=pause))
        server.broken.add("data.bin")
        if n_retries < 2:
            with pytest.raises(OSError, match="cannot download"):
                downloads.fetched(file, tmp_path, n_retries=n_retries)
        else:
            path = downloads.fetched(file, tmp_path, n_retries=n_retries)
            assert path.read_bytes() == server.files["data.bin"]
        assert server.requests == ["data.bin"] * (n_retries + 1)
        assert pauses == [1, 2][:n_retries]

    @pytest.mark.parametrize("fails", [False, True])
    def test_prints_only_with_a_bar(
        self,
        server: Server,
        file: downloads.RemoteFile,
        fails: bool,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(downloads, "time", types.SimpleNamespace(sleep=lambda _: None))
        if fails:
            server.broken.add("data.bin")
            with pytest.raises(OSError):
                downloads.fetched(file, tmp_path, show_progress=False, n_retries=1)
        else:
            downloads.fetched(file, tmp_path, show_progress=False)
        assert capfd.readouterr() == ("", "")
        if not fails:
            downloads.fetched(file, tmp_path / "other", show_progress=True)
            out, shown = capfd.readouterr()
            assert out == "" and "100%" in shown

    @pytest.mark.skipif(os.name != "posix", reason="this system has no SIGTERM")
    def test_the_part_of_a_killed_process_is_removed(
        self, server: Server, file: downloads.RemoteFile, tmp_path: Path
    ) -> None:
        server.endless.add("data.bin")
        code = f"""
from pathlib import Path
from tpu_als.datasets import downloads
downloads.fetched(downloads.{file!r}, Path({str(tmp_path)!r}))
"""
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 60
        try:
            while not [*tmp_path.rglob("*.tmp")] or not server.requests:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.terminate()
        assert process.wait(60) == -signal.SIGTERM
        assert len([*tmp_path.rglob("*.tmp")]) == 1
        server.endless.clear()
        path = downloads.fetched(file, tmp_path)
        assert path.read_bytes() == server.files["data.bin"]
        assert [*path.parent.iterdir()] == [path]

    def test_not_allowed(self, server: Server, file: downloads.RemoteFile, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"download_if_missing is False.*put the file"):
            downloads.fetched(file, tmp_path, download_if_missing=False)
        assert server.requests == []
        for n_retries in (-1, 1.5, "3"):
            with pytest.raises(ValueError, match="n_retries must be an integer of at least 0"):
                downloads.fetched(file, tmp_path, n_retries=n_retries)  # type: ignore[arg-type]

    def test_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("TPU_ALS_DATA_HOME", raising=False)
        assert downloads.data_home().name == "tpu_als"
        monkeypatch.setenv("TPU_ALS_DATA_HOME", str(tmp_path))
        assert downloads.data_home() == tmp_path
        assert downloads.data_home("~/other") == Path.home() / "other"
        monkeypatch.chdir(tmp_path)
        assert downloads.data_home("other") == tmp_path / "other"
        with pytest.raises(TypeError, match="data_home must be a path or None, got int"):
            downloads.data_home(3)  # type: ignore[arg-type]
        for wrong in ("", "~nobody of this name/x"):
            with pytest.raises(ValueError, match="data_home"):
                downloads.data_home(wrong)
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match=r"data_home must be a folder, and .*file"):
            downloads.data_home(tmp_path / "file")

    def test_without_pooch(
        self,
        server: Server,
        file: downloads.RemoteFile,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        path = downloads.fetched(file, tmp_path)
        monkeypatch.setitem(sys.modules, "pooch", None)
        assert downloads.fetched(file, tmp_path) == path
        with pytest.raises(ImportError, match=r"pip install 'tpu-als\[fetch\]'"):
            fetch_movielens(data_home=tmp_path)


def zipped(files: dict[str, str], encoding: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text.encode(encoding))
    return stream.getvalue()


_GENRES = ["unknown", "Action", "Comedy"]
_SMALL = {
    "100k": zipped(
        {
            "ml-100k/u.data": "1\t2\t5\t874965758\n3\t1\t1\t881250949\n1\t1\t4\t874965759\n",
            "ml-100k/u.genre": "".join(f"{name}|{at}\n" for at, name in enumerate(_GENRES)),
            "ml-100k/u.item": "1|Léon (1994)|01-Jan-1994||http://a|0|1|1\n2|unknown||||1|0|0\n",
            "ml-100k/u.user": "1|24|M|technician|08512\n3|53|F|other|T8H1N\n",
        },
        "latin-1",
    ),
    "1m": zipped(
        {
            "ml-1m/ratings.dat": "1::2::5::874965758\n3::1::1::881250949\n1::1::4::874965759\n",
            "ml-1m/movies.dat": '1::Léon (1994)::Action|Comedy\n2::"Quoted" (1990)::unknown\n',
            "ml-1m/users.dat": "1::M::25::12::08512\n3::F::56::1::T8H1N\n",
        },
        "latin-1",
    ),
    "20m": zipped(
        {
            "ml-20m/ratings.csv": "userId,movieId,rating,timestamp\n"
            "1,2,4.5,874965758\n3,1,0.5,881250949\n1,1,4.0,874965759\n",
            "ml-20m/movies.csv": "movieId,title,genres\n1,Léon (1994),Action|Comedy\n"
            '2,"Bride, The (1990)",unknown\n',
        },
        "utf-8",
    ),
}
_SMALL["32m"] = zipped(
    {
        name.replace("20m", "32m"): zipfile.ZipFile(io.BytesIO(_SMALL["20m"])).read(name).decode()
        for name in ("ml-20m/ratings.csv", "ml-20m/movies.csv")
    },
    "utf-8",
)


class TestMovieLens:
    @pytest.mark.parametrize("variant", [*_SMALL])
    def test_formats(
        self, server: Server, variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(movielens, "_ADDRESS", server.url)
        about = movielens._VARIANTS[variant]._replace(md5=md5(_SMALL[variant]))
        monkeypatch.setitem(movielens._VARIANTS, variant, about)
        server.files[f"ml-{variant}.zip"] = _SMALL[variant]
        data = fetch_movielens(variant, data_home=tmp_path, show_progress=False)
        frame = data.frame
        assert frame.columns.tolist() == ["user", "item", "rating", "timestamp"]
        assert frame["user"].tolist() == [1, 3, 1] and frame["item"].tolist() == [2, 1, 1]
        half = variant in ("20m", "32m")
        assert frame["rating"].tolist() == ([4.5, 0.5, 4.0] if half else [5.0, 1.0, 4.0])
        assert frame["timestamp"][0] == pd.Timestamp("1997-09-22 22:02:38")
        assert data.item_frame["title"][1] == "Léon (1994)"
        assert data.item_frame["genres"].tolist() == ["Action|Comedy", "unknown"]
        assert data.item_frame.index.tolist() == [1, 2] and data.item_frame.index.name == "item"
        if half:
            assert data.user_frame is None and data.item_frame["title"][2] == "Bride, The (1990)"
        else:
            assert data.user_frame["zip"].tolist() == ["08512", "T8H1N"]
            assert data.user_frame["gender"][3] == "F"
        assert variant in data.DESCR and data.path == tmp_path / f"ml-{variant}.zip"

    def test_other_contents(self, tmp_path: Path) -> None:
        (tmp_path / "a.zip").write_bytes(_SMALL["20m"])
        with pytest.raises(ValueError, match="is not the archive of MovieLens 1m"):
            movielens.read_movielens(tmp_path / "a.zip", "1m")

    def test_another_number_of_columns(self, tmp_path: Path) -> None:
        """A line with five fields must not move values to other columns."""
        ratings = "1::2::5::874965758::9\n"
        files = {"ml-1m/ratings.dat": ratings, "ml-1m/movies.dat": "", "ml-1m/users.dat": ""}
        (tmp_path / "a.zip").write_bytes(zipped(files, "latin-1"))
        with pytest.raises(ValueError, match="another number of columns"):
            movielens.read_movielens(tmp_path / "a.zip", "1m")

    def test_unknown_variant(self) -> None:
        with pytest.raises(ValueError, match="variant must be one of"):
            fetch_movielens(["1m"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"variant must be one of \['100k', .*got '10m'"):
            fetch_movielens("10m")

    def test_into_a_recommender(self, tmp_path: Path) -> None:
        (tmp_path / "a.zip").write_bytes(_SMALL["100k"])
        films = movielens.read_movielens(tmp_path / "a.zip", "100k")
        model = TPUAlternatingLeastSquares(factors=2, iterations=1, random_state=0)
        rec = Recommender(value="rating", timestamp="timestamp", model=model).fit(films.frame)
        assert rec.recommend([3])["item"].tolist() == [2]


_PLAYS = (
    "00a\tmbid-1\tBjörk\t10\n"
    '00a\t\t"Quoted" & sons\t7\n'
    "00b\tmbid-1\tBjörk \t3\n"
    "00b\tmbid-3\t\t5\n"
    "00b\tmbid-4\tsome artist\tmany\n"
    "00c\tmbid-5\tNA\t0\n"
    "00c\tmbid-6\tplayed too often\t3000000000\n"
)
_PROFILES = "00a\tf\t22\tGermany\tFeb 1, 2007\n00b\t\t\tCanada\tDec 4, 2007\n00c\tm\t\t\t\n"


class TestLastFm:
    def archive(self, names: tuple[str, ...] = (lastfm._PLAYS, lastfm._PROFILES)) -> bytes:
        stream = io.BytesIO()
        texts = {lastfm._PLAYS: _PLAYS, lastfm._PROFILES: _PROFILES}
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for name in names:
                content = texts[name].encode()
                info = tarfile.TarInfo(f"lastfm-dataset-360K/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return stream.getvalue()

    @pytest.mark.parametrize("rows_at_once", [2, 1 << 20])
    def test_format(
        self, server: Server, rows_at_once: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(lastfm, "_ROWS_AT_ONCE", rows_at_once)
        content = server.files["a.tar.gz"] = self.archive()
        remote = downloads.RemoteFile("a.tar.gz", f"{server.url}a.tar.gz", f"md5:{md5(content)}")
        monkeypatch.setattr(lastfm, "_ARCHIVE", remote)
        with pytest.warns(DataWarning, match="3 of 7 lines were left out"):
            data = fetch_lastfm_360k(data_home=tmp_path)
        assert data.frame.astype(object).to_numpy().tolist() == [
            ["00a", "Björk", 10],
            ["00a", '"Quoted" & sons', 7],
            ["00b", "Björk", 3],
            ["00c", "NA", 0],
        ]
        assert data.frame["item"].dtype == "category" and data.frame["plays"].dtype == "int32"
        assert data.user_frame.loc["00b"].tolist() == ["", "", "Canada", "Dec 4, 2007"]

    def test_another_number_of_columns(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("00a\tmbid-1\tBjörk\t10\tm\n", encoding="utf-8")
        with pytest.raises(ValueError, match="another number of columns"):
            lastfm._plays((tmp_path / "a.tsv").open("rb"))

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
            info = tarfile.TarInfo(f"lastfm-dataset-360K/{lastfm._PLAYS}")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
        with pytest.raises(ValueError, match="is not the archive of Last.fm"):
            lastfm.read_lastfm_360k(tmp_path / "a.tar.gz")

    def test_other_contents(self, tmp_path: Path) -> None:
        (tmp_path / "a.tar.gz").write_bytes(self.archive((lastfm._PROFILES,)))
        with pytest.raises(ValueError, match=r"it has no \['usersha1-artmbid"):
            lastfm.read_lastfm_360k(tmp_path / "a.tar.gz")


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def message(number: int, content: bytes) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: dict[str, list[int]], packed: bool = True) -> bytes:
    entries = b""
    for name, values in features.items():
        if packed:
            integers = message(1, b"".join(map(varint, values)))
        else:
            integers = b"".join(varint(1 << 3) + varint(value) for value in values)
        entries += message(1, message(1, name.encode()) + message(2, message(3, integers)))
    return message(1, entries)


def record(content: bytes) -> bytes:
    def checksum(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

    length = len(content).to_bytes(8, "little")
    return length + checksum(length) + content + checksum(content)


class TestRecords:
    @given(st.lists(st.integers(0, 2**63 - 1), max_size=20), st.booleans())
    def test_integers(self, values: list[int], packed: bool) -> None:
        parts = dict(tfrecords._features(memoryview(example({"a": values, "b": [1]}, packed))))
        assert parts["a"].tolist() == values and parts["b"].tolist() == [1]

    def test_other_types_are_left_out(self) -> None:
        text = message(1, message(1, message(1, b"x") + message(2, message(1, message(1, b"y")))))
        assert dict(tfrecords._features(memoryview(text))) == {}

    def test_damage(self, tmp_path: Path) -> None:
        """Each flipped byte and each cut of a file is an error, or a whole number of records."""
        content = record(example({"row_tag": [1], "col_tag": [2, 300]})) * 2
        path = tmp_path / "a.tfr"
        path.write_bytes(content)
        assert len(list(tfrecords.read_examples(path))) == 2
        for at in range(len(content)):
            damaged = bytearray(content)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"record [01] of .*a\.tfr"):
                list(tfrecords.read_examples(path))
        for end in range(1, len(content)):
            path.write_bytes(content[:end])
            if end == len(content) // 2:
                assert len(list(tfrecords.read_examples(path))) == 1
            else:
                with pytest.raises(ValueError, match="record"):
                    list(tfrecords.read_examples(path))

    def test_not_an_example(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tfr"
        path.write_bytes(record(b"\xff" * 30))
        with pytest.raises(ValueError, match="record 0 of .* is not an Example"):
            list(tfrecords.read_examples(path))


class TestWebGraph:
    """Four nodes with links, and two test nodes, in two files for each split."""

    links = {0: [1, 2], 1: [0], 2: [0, 5], 5: [1]}  # noqa: RUF012
    test = {3: ([0, 1], [2]), 4: ([5], [0, 2])}  # noqa: RUF012

    @pytest.fixture
    def files(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
        monkeypatch.setattr(webgraph, "_ADDRESS", server.url)
        monkeypatch.setitem(webgraph._VARIANTS, "in-dense", webgraph._Variant("small", 2))
        back: dict[int, list[int]] = {}
        for node, others in self.links.items():
            for other in others:
                back.setdefault(other, []).append(node)
        splits = {
            "train": [{"row_tag": [a], "col_tag": b} for a, b in self.links.items()],
            "train.transpose": [{"row_tag": [a], "col_tag": b} for a, b in back.items()],
            "test": [
                {"row_tag": [a], "col_tag": b, "gt_tag": c} for a, (b, c) in self.test.items()
            ],
        }
        for split, rows in splits.items():
            for at in range(2):
                content = b"".join(record(example(row)) for row in rows[at::2])
                server.files[f"small/{split}.tfr-{at:05d}-of-00002"] = content
        return server.files

    def check(self, data: Any) -> None:
        dense = np.zeros((6, 6))
        for node, others in self.links.items():
            dense[node, others] = 1
        np.testing.assert_array_equal(data.train.to_csr().toarray(), dense)
        rows, held_out = data.test.held_out()
        assert data.test.nnz == 3
        for row, entries in zip(rows, held_out.toarray(), strict=True):
            assert np.flatnonzero(entries).tolist() == self.test[int(row)][1]

    def test_becomes_shards(self, server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
        fetch = functools.partial(fetch_webgraph, "in-dense", data_home=tmp_path)
        data = fetch()
        self.check(data)
        assert not [*tmp_path.rglob("*.tfr*")]  # converted files are removed
        n_requests = len(server.requests)
        assert n_requests == 6
        self.check(fetch(download_if_missing=False))
        assert len(server.requests) == n_requests
        tables = []
        for links in (data.train, data.train.to_csr()):
            model = TPUAlternatingLeastSquares(factors=2, iterations=2)
            model.user_factors, model.item_factors = np.random.default_rng(0).random((2, 6, 2))
            tables.append(model.fit(links, show_progress=False).item_factors)
        np.testing.assert_allclose(tables[0], tables[1], atol=1e-5)

    def test_continues_after_a_failure(
        self, server: Server, files: dict[str, bytes], tmp_path: Path
    ) -> None:
        missing = "small/test.tfr-00001-of-00002"
        content = files.pop(missing)
        with pytest.raises(OSError, match=f"cannot download .*{missing}"):
            fetch_webgraph("in-dense", data_home=tmp_path, n_retries=0)
        folder = tmp_path / "webgraph-in-dense"
        assert not [*folder.rglob("totals.json")]
        assert len(json.loads((folder / "_parts.json").read_text())) == 5
        with pytest.raises(FileNotFoundError, match="has no complete data"):
            fetch_webgraph("in-dense", data_home=tmp_path, download_if_missing=False)
        files[missing] = content
        server.requests.clear()
        self.check(fetch_webgraph("in-dense", data_home=tmp_path))
        assert server.requests == [missing]

    def test_damaged_files_are_not_kept(
        self, server: Server, files: dict[str, bytes], tmp_path: Path
    ) -> None:
        name = "small/train.tfr-00000-of-00002"
        files[name] = files[name][:-1] + b"\0"
        with pytest.raises(ValueError, match="wrong checksum"):
            fetch_webgraph("in-dense", data_home=tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["webgraph-in-dense.lock"]

    def test_one_process_at_a_time(
        self, server: Server, files: dict[str, bytes], tmp_path: Path
    ) -> None:
        lock = FileLock(tmp_path / "webgraph-in-dense.lock")
        assert lock.acquire()
        lock.sign()
        with pytest.raises(OSError, match=r"another process \(host .*, process \d+"):
            fetch_webgraph("in-dense", data_home=tmp_path)
        assert not server.requests
        lock.release()
        self.check(fetch_webgraph("in-dense", data_home=tmp_path))

    def test_other_records(self, server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
        files["small/train.tfr-00000-of-00002"] = record(example({"label": [1]}))
        with pytest.raises(ValueError, match=r"a record without one row_tag .*\['label'\]"):
            fetch_webgraph("in-dense", data_home=tmp_path)
        with pytest.raises(ValueError, match="variant must be one of"):
            fetch_webgraph("de")
