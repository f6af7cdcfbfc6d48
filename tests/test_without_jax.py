"""A process that fits and serves on a CPU does not import JAX, and may be forked."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The calls of a training job and of a service, in one process.
MODEL = """
import sys, tempfile
import numpy as np
from scipy import sparse
import tpu_als
from tpu_als import TPUAlternatingLeastSquares
counts = sparse.random(60, 40, 0.2, "csr", np.float32, random_state=0)
counts.data[:] = 1 + np.arange(counts.nnz) % 5
model = TPUAlternatingLeastSquares(4, iterations=2, random_state=0, calculate_training_loss=True)
model.fit(counts, show_progress=False)
"""
OTHER_FITS = """
TPUAlternatingLeastSquares(4, iterations=2, use_cg=False).fit(counts, show_progress=False)
TPUAlternatingLeastSquares(4, iterations=2, dtype="bfloat16").fit(counts, show_progress=False)
for settings in ({"linear_solver": "cholesky"}, {"regularization": 0, "unobserved_weight": 0}):
    TPUAlternatingLeastSquares(4, iterations=2, objective="ials", **settings).fit(
        counts, show_progress=False
    )
"""
SERVE = """
model.recommend(3, counts[3], N=5)
model.recommend(np.arange(60), counts, N=5)
model.similar_items(np.arange(40), N=5)
model.recalculate_user(np.arange(9), counts[:9])
model.partial_fit_users([3, 61], counts[:2])
model.explain(3, counts, 5)
model.transform(counts)
model.score(counts)
model.solver(counts, np.ones((60, 4), np.float32), model.item_factors, 0.1)
with tempfile.TemporaryDirectory() as folder:
    model.save(folder + "/model.npz")
    TPUAlternatingLeastSquares.load(folder + "/model.npz").recommend(3, counts[3])
"""


def run(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter in which no platform is chosen for JAX."""
    names = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_little() -> None:
    heavy = "{'jax', 'numba', 'numpy', 'sklearn'}"
    code = f"import sys, tpu_als; print(sorted({heavy} & set(sys.modules)))"
    assert run(code).strip() == "[]"
    assert run("import tpu_als; print(tpu_als.evaluation.METRICS[0] is not None)").strip() == "True"


def test_fit_and_serving_do_not_import_jax() -> None:
    check = "print([name for name in ('jax', 'jaxlib') if name in sys.modules])"
    assert run(f"{MODEL}{OTHER_FITS}{SERVE}{check}").strip() == "[]"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a model, saved by another process."""
    path = tmp_path_factory.mktemp("saved") / "model.npz"
    run(f"{MODEL}model.save({str(path)!r})")
    return path


def test_serving_a_loaded_model_does_not_import_numba(path: Path) -> None:
    code = f"""
import sys
from tpu_als import TPUAlternatingLeastSquares
TPUAlternatingLeastSquares.load({str(path)!r}).recommend(3, None, filter_already_liked_items=False)
print([name for name in ("jax", "numba") if name in sys.modules])
"""
    assert run(code).strip() == "[]"


def test_a_served_model_imports_numba_only_to_fold_in(path: Path) -> None:
    code = f"""
import sys
import numpy as np
from scipy import sparse
from tpu_als import ServedModel
model, one = ServedModel.load({str(path)!r}), sparse.csr_matrix(np.ones((9, 40), np.float32))
model.recommend(3, one[0], N=5)
model.recommend(np.arange(9), one, N=5)
model.similar_items(np.arange(9))
names = ("jax", "numba", "sklearn", "pandas")
print([name for name in names if name in sys.modules])
model.recommend(np.arange(9), one, N=5, recalculate_user=True)
model.partial_fit_users([3, 61], one[:2])
print([name for name in names if name in sys.modules])
"""
    assert run(code).split("\n")[:2] == ["[]", "['numba']"]


def test_a_grid_search_does_not_import_jax() -> None:
    code = """
from sklearn.model_selection import GridSearchCV
GridSearchCV(model, {"alpha": [1.0, 4.0]}, cv=2, n_jobs=2).fit(counts)
print("jax" in sys.modules)
"""
    assert run(MODEL + code).strip() == "False"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_processes_fit_and_rank() -> None:
    code = """
import multiprocessing
everyone = np.arange(60)
expected = model.recommend(everyone, counts, N=5)[0]

def work(seed):
    found = model.recommend(everyone, counts, N=5)[0]
    other = TPUAlternatingLeastSquares(4, iterations=2, random_state=seed)
    other.fit(counts, show_progress=False)
    return found, other.item_factors.shape

with multiprocessing.get_context("fork").Pool(2) as pool:
    for found, shape in pool.map(work, range(4)):
        np.testing.assert_array_equal(found, expected)
        assert shape == (40, 4)
print("done")
"""
    assert run(MODEL + OTHER_FITS + code).strip() == "done"


def _get(path: Path) -> str:
    """Return the body of the response of a server on a socket."""
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(os.fspath(path))
    connection.request("GET", "/")
    return connection.getresponse().read().decode()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_gunicorn_may_preload_a_model(tmp_path: Path) -> None:
    """The master process fits and ranks, and its forked workers respond."""
    pytest.importorskip("gunicorn")
    app = """
import os
everyone = np.arange(60)
first = model.recommend(everyone, counts, N=5)[0]
master = os.getpid()

def application(environ, start_response):
    same = np.array_equal(model.recommend(everyone, counts, N=5)[0], first)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{same} {os.getpid() != master}".encode()]
"""
    (tmp_path / "service.py").write_text(MODEL + app, encoding="utf-8")
    path = tmp_path / "socket"
    command = ["-m", "gunicorn", "--preload", "--workers", "2", "--bind", f"unix:{path}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    server = subprocess.Popen(
        [sys.executable, *command, "service:application"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not path.exists() and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.poll() is None, server.stderr and server.stderr.read()
        assert {_get(path) for _ in range(8)} == {"True True"}
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.mark.slow
def test_a_fork_waits_for_the_compilation_in_the_background():
    """A child that is forked while loops are compiled must not wait for their locks forever."""
    code = """
import multiprocessing, numpy as np, os, tempfile
os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp()  # so that the compilation takes a while
from scipy import sparse
from tpu_als import TPUAlternatingLeastSquares as Model
rows = sparse.random(30, 20, 0.3, "csr", np.float32, np.random.default_rng(0))
Model(4, iterations=0).fit(rows, show_progress=False)
child = multiprocessing.get_context("fork").Process(
    target=lambda: Model(4, iterations=2).fit(rows, show_progress=False)
)
child.start()
child.join(120)
print(child.exitcode)
"""
    assert run(code).split() == ["0"]
