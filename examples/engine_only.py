"""The engine without the estimator: mesh, layout, ALS and ranking as plain functions and values.

Four CPU devices share the work. With `table_layout="sharded"` each keeps a quarter of each table.
The data are users and items of a few groups, so it is known which items should be recommended.
"""

from __future__ import annotations

import time

import jax
import numpy as np
from scipy import sparse

from tpu_als.engine import als
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, fold_in, ranking
from tpu_als.engine.xla.mesh import device_mesh

GROUPS, N_USERS, N_ITEMS, PER_USER = 8, 4000, 1600, 30


def grouped(rng: np.random.Generator) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """A matrix of users who choose mostly items of their group; groups of users and of items."""
    users, items = rng.integers(GROUPS, size=N_USERS), np.arange(N_ITEMS) % GROUPS
    in_group = rng.integers(N_ITEMS // GROUPS, size=(N_USERS, PER_USER)) * GROUPS + users[:, None]
    other = rng.integers(N_ITEMS, size=in_group.shape)
    chosen = np.where(rng.random(in_group.shape) < 0.9, in_group, other)
    rows = np.repeat(np.arange(N_USERS), PER_USER)
    counts = np.ones(chosen.size, np.float32)
    matrix = sparse.csr_matrix((counts, (rows, chosen.ravel())), shape=(N_USERS, N_ITEMS))
    matrix.sum_duplicates()
    return matrix, users, items


def main() -> None:
    """Lay out, iterate, rank, fold in."""
    jax.config.update("jax_num_cpu_devices", 4)  # before the first computation
    rng = np.random.default_rng(0)
    user_items, user_groups, item_groups = grouped(rng)

    mesh = device_mesh(table_layout="sharded")
    params = AlsParams(factors=16)
    objective = Objective.of("implicit", regularization=1.0, alpha=10.0)
    data = backend.place(user_items, params, mesh)
    print(f"{len(mesh.devices)} {mesh.platform} devices, {user_items.nnz:,} entries")
    for name, side in (("users", data.users), ("items", data.items)):
        rungs = ", ".join(f"{rung.rows} x {rung.length}" for rung in side.rows.rungs)
        cells = side.rows.n_shards * side.rows.n_cells
        print(f"  {name}: chunks of {rungs}; {cells / user_items.nnz:.2f} cells per entry")

    state = als.start(
        data,
        rng.random((N_USERS, params.factors), dtype=np.float32) * 0.01,
        rng.random((N_ITEMS, params.factors), dtype=np.float32) * 0.01,
    )
    for iteration in range(8):
        started = time.perf_counter()
        state, failed = als.epoch(state, data, objective)
        seconds = time.perf_counter() - started
        loss = als.loss(state, data, objective)
        print(f"iteration {iteration}: {seconds:.3f} s, loss {loss:.6f}, failed rows {failed}")

    users, items = als.user_factors(state, data), als.item_factors(state, data)
    catalog = ranking.catalog(items, mesh)
    ids, _ = catalog.top_k(users[:1000], 10, seen=user_items[:1000])
    hits = item_groups[ids] == user_groups[:1000, None]
    print(f"unseen items recommended from the user's own group: {hits.mean():.1%}")

    new_user = sparse.csr_matrix((np.ones(3, np.float32), [3, 11, 19], [0, 3]), shape=(1, N_ITEMS))
    exact = AlsParams(factors=16, linear_solver="cholesky")
    rows = fold_in.source(items, exact, mesh).solve(new_user, objective)
    ids, _ = catalog.top_k(rows, 5, seen=new_user)
    print(f"a new user with three items of group 3 gets items of groups {item_groups[ids[0]]}")


if __name__ == "__main__":
    main()
