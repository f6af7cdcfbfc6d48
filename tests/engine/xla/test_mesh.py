"""Devices and shards of a mesh; arrays placed on it and fetched again."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import joblib
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matrices import random_counts

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.engine.xla import programs
from tpu_als.engine.xla.mesh import Collectives, _check_usable, device_mesh, precision


def test_defaults_take_all_devices() -> None:
    mesh = device_mesh()
    assert mesh.devices == tuple(jax.devices())
    assert mesh.n_shards == len(jax.devices()) == 4
    assert mesh.platform == "cpu"
    assert mesh.table_layout == "auto"


@pytest.mark.parametrize("count", [1, 2, 4, np.int64(2)])
def test_a_number_takes_the_first_devices(count: int) -> None:
    mesh = device_mesh(count, num_threads=1)
    assert mesh.devices == tuple(jax.devices()[:count])
    assert mesh.n_shards == count
    assert (mesh.jax_mesh is None) == (count == 1)


def test_devices_by_name_and_by_mesh() -> None:
    devices = jax.devices()
    assert device_mesh([devices[2], devices[1]]).devices == (devices[2], devices[1])
    assert device_mesh(iter(devices[:2])).devices == tuple(devices[:2])
    flat = Mesh(np.array(devices[:3]), ("any",))
    assert device_mesh(flat).devices == tuple(devices[:3])
    square = Mesh(np.array(devices).reshape(2, 2), ("rows", "columns"))
    assert device_mesh(square).devices == tuple(devices)
    assert device_mesh(square).n_shards == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_the_shards_of_one_device(threads: int) -> None:
    assert device_mesh(1, num_threads=threads).n_shards == threads


def test_no_number_of_threads_means_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_mesh(1).n_shards == joblib.cpu_count()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert device_mesh(1).n_shards == 1


def test_the_number_of_threads_is_limited_to_the_cores() -> None:
    most = max(16, joblib.cpu_count())
    assert device_mesh(1, num_threads=16).n_shards == 16
    mesh = device_mesh(1, num_threads=1000)
    assert mesh.n_shards == mesh.n_threads == most


def test_several_devices_have_a_shard_each() -> None:
    assert device_mesh(2, num_threads=7).n_shards == 2


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "devices=0"),
        (-1, "devices=-1"),
        (5, r"4 cpu device\(s\).*jax_num_cpu_devices"),
        ([], "devices must be"),
        (["cpu:0"], "devices must be"),
        ("cpu", "devices must be"),
        (True, "devices must be .* got True"),
        (2.0, "devices must be .* got 2.0"),
        (np.zeros((2, 2)), "devices must be"),
    ],
)
def test_wrong_devices_are_refused(devices: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        device_mesh(devices)


def test_a_device_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="devices must differ from each other"):
        device_mesh([jax.devices()[0]] * 2)


def test_devices_of_other_processes_only_are_refused() -> None:
    class Foreign(SimpleNamespace):
        __hash__ = object.__hash__

    client = SimpleNamespace(process_index=lambda: 0)
    foreign: Any = Foreign(process_index=1, platform="cpu", client=client)
    with pytest.raises(ValueError, match="devices must include one of this process, number 0"):
        _check_usable((foreign,))
    kinds: Any = (foreign, Foreign(process_index=0, platform="gpu", client=client))
    with pytest.raises(ValueError, match="of one platform.*'cpu', 'gpu'"):
        _check_usable(kinds)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="table_layout must be one of .*'everywhere'"):
        device_mesh(table_layout="everywhere")


@pytest.mark.parametrize("table_layout", ["auto", "replicated", "sharded"])
def test_known_layouts(table_layout: str) -> None:
    assert device_mesh(table_layout=table_layout).table_layout == table_layout


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs a GPU, but JAX runs on 'cpu'"):
        device_mesh(use_gpu=True)
    assert device_mesh(use_gpu=False).platform == "cpu"


def test_meshes_compare_by_value() -> None:
    assert device_mesh(2) == device_mesh(2) and hash(device_mesh(2)) == hash(device_mesh(2))
    assert device_mesh(2) != device_mesh(4)
    assert device_mesh(1, num_threads=1) != device_mesh(1, num_threads=2)


MESHES = [(1, 1), (1, 2), (2, 0), (4, 0)]


@pytest.mark.parametrize(("devices", "threads"), MESHES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int32"])
def test_placed_arrays_are_fetched_unchanged(devices: int, threads: int, dtype: str) -> None:
    mesh = device_mesh(devices, num_threads=threads)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    stacked = (100 * rng.normal(size=(mesh.n_shards, 5, 3))).astype(kind)
    with precision(dtype):
        back = mesh.get(mesh.put(stacked))
        empty = mesh.get(mesh.zeros(stacked.shape[1:], kind))
    assert back.dtype == empty.dtype == kind and back.flags.writeable
    np.testing.assert_array_equal(back, stacked)
    assert empty.shape == stacked.shape and not empty.any()


@pytest.mark.parametrize("devices", [2, 4])
def test_each_device_has_one_slice(devices: int) -> None:
    mesh = device_mesh(devices)
    assert mesh.jax_mesh is not None
    placed = mesh.put(np.arange(devices * 6, dtype=np.float32).reshape(devices, 3, 2))
    assert placed.sharding.is_equivalent_to(
        NamedSharding(mesh.jax_mesh, PartitionSpec(mesh.jax_mesh.axis_names[0])), placed.ndim
    )
    for number, shard in enumerate(placed.addressable_shards):
        assert shard.device == mesh.devices[number]
        assert shard.data.shape == (1, 3, 2)
        np.testing.assert_array_equal(shard.data[0], np.arange(6).reshape(3, 2) + 6 * number)


def test_all_shards_of_a_single_device_are_on_it() -> None:
    mesh = device_mesh(jax.devices()[1:2], num_threads=3)
    placed = mesh.put(np.zeros((3, 2, 2), np.float32))
    assert len(placed) == 3
    assert all(part.devices() == {jax.devices()[1]} for part in placed)


@pytest.mark.parametrize("n_rows", [8, 8192, 8192 + 1024, 5 * 4096])
def test_shards_are_changed_and_concatenated(n_rows: int) -> None:
    shards = [np.arange(n_rows * 2, dtype=np.float32).reshape(n_rows, 2) + i for i in range(3)]
    joined = jax.jit(lambda shards: Collectives().concatenate(shards, lambda rows: 2 * rows))
    np.testing.assert_array_equal(joined(shards), 2 * np.concatenate(shards))


@pytest.mark.parametrize(("devices", "threads"), MESHES)
def test_jobs_are_mapped_in_order(devices: int, threads: int) -> None:
    mesh = device_mesh(devices, num_threads=threads)
    assert mesh.threads(lambda job: job * job, range(7)) == [n * n for n in range(7)]
    assert mesh.threads(lambda job: job, []) == []


def test_an_error_in_a_thread_is_the_callers() -> None:
    def fail(job: int) -> None:
        raise KeyError(job)

    with pytest.raises(KeyError):
        device_mesh(1, num_threads=2).threads(fail, [1, 2, 3])


def test_after_an_error_no_thread_takes_another_job() -> None:
    begun = []

    def fail(job: int) -> None:
        begun.append(job)
        time.sleep(0.01)
        raise KeyError(job)

    with pytest.raises(KeyError):
        device_mesh(1, num_threads=2).threads(fail, range(100))
    assert len(begun) <= 2


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_threads_than_allowed(most: int) -> None:
    seen: set[int] = set()

    def work(_: int) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    device_mesh(1, num_threads=4).threads(work, range(12), most)
    assert len(seen) == most


def test_float64_is_enabled_only_inside_the_context() -> None:
    with precision("float64"):
        assert jax.numpy.asarray(np.zeros(2)).dtype == np.float64
    with precision("float32"):
        assert jax.numpy.asarray(np.zeros(2)).dtype == np.float32


@pytest.mark.slow
def test_a_later_process_reads_compiled_programs(tmp_path: Path) -> None:
    """The cache is opt-in, and fills a directory that it makes."""
    script = textwrap.dedent("""
        import sys
        import jax
        import numpy as np
        from scipy import sparse
        import tpu_als
        from tpu_als.engine.cpu import compiled

        hits = []
        jax.monitoring.register_event_listener(
            lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None
        )
        assert jax.config.jax_compilation_cache_dir is None
        tpu_als.enable_compilation_cache(sys.argv[1])
        rows = sparse.csr_matrix(np.eye(5, dtype=np.float32))
        for use_native in (False, True):
            model = tpu_als.TPUAlternatingLeastSquares(
                factors=2, iterations=1, random_state=0, use_native=use_native
            )
            model.fit(rows, show_progress=False)
        loops = compiled.loops().solve_rows
        print(len(hits), sum(loops.stats.cache_hits.values()))
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        for _ in range(2)
    ]
    (first, compiled), (second, loaded) = (output.stdout.split() for output in outputs)
    assert int(first) == 0 < int(second)
    assert (compiled, loaded) == ("0", "1")  # the loops
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are of POSIX")
def test_a_forked_process_serves_single_users_and_refuses_the_rest() -> None:
    """Before, whatever needed a device waited for ever."""
    script = textwrap.dedent("""
        import os
        import warnings
        import numpy as np
        from scipy import sparse
        from tpu_als import TPUAlternatingLeastSquares

        warnings.simplefilter("ignore")  # JAX's own, of the fork
        rows = sparse.csr_matrix(np.eye(6, dtype=np.float32) + 1)
        model = TPUAlternatingLeastSquares(2, iterations=1, random_state=0, use_native=False)
        expected = model.fit(rows, show_progress=False).recommend(0, rows[0], N=3)[0].tolist()
        child = os.fork()
        if not child:
            assert model.recommend(0, rows[0], N=3)[0].tolist() == expected
            model.partial_fit_users([2], rows[2])
            for call in (lambda: model.fit(rows), lambda: model.transform(rows)):
                try:
                    call()
                except RuntimeError as error:
                    assert "was forked from one that had started JAX" in str(error)
                else:
                    os._exit(2)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["0"], done.stderr


@pytest.mark.slow
def test_programs_of_many_shapes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.CACHE, "most", 20)
    programs.CACHE.clear()
    client, counts = jax.devices()[0].client, []
    for number in range(8):
        rows = random_counts(10 + 7 * number, 9 + 5 * number, density=0.4, seed=number)
        model = TPUAlternatingLeastSquares(2 + number, iterations=1, use_native=False, devices=1)
        model.fit(rows, show_progress=False)
        assert programs.CACHE.n_compiled() <= 20 + 6  # of the last fit
        counts.append(len(client.live_executables()))
    gc.collect()
    assert max(counts[4:]) <= max(counts[:4]) + 20
