"""Random matrices, tables, parameters and filters against the dense oracle and against implicit.

Tests that are not about the fit assign tables. There are few shapes, because XLA compiles a program
for each. ``TPU_ALS_PROFILE=nightly`` runs more than 20,000 examples.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import load_class
from proof import counted, examples
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]
K = 5
SHAPES = [(7, 5), (12, 9), (1, 6), (20, 1), (9, 30)]
LEAST = -np.finfo(np.float32).max
ID_TYPES = ["i1", "u1", "i2", "i4", "u4", "i8", "u8"]


@dataclass
class World:
    """A model with tables, and interactions in the form that a caller may pass."""

    model: Any
    given: Any  # any index and value types; duplicates, stored zeros, unsorted
    matrix: sparse.csr_matrix  # the same, canonical float64
    objective: oracle.Objective
    rng: np.random.Generator

    @property
    def users(self) -> np.ndarray:
        return self.model.user_factors.astype(np.float64)

    @property
    def items(self) -> np.ndarray:
        return self.model.item_factors.astype(np.float64)

    def rows(self, ids: np.ndarray) -> Any:
        """The rows of some users, in the given format."""
        return self.given[ids]

    def columns(self, ids: np.ndarray) -> sparse.csr_matrix:
        """The columns of some items, as rows."""
        return sparse.csr_matrix(self.matrix.T)[ids]


@st.composite
def worlds(draw: Any, shapes: Any = None, canonical: bool = False, dtype: Any = None) -> World:
    shape = draw(st.sampled_from(shapes or SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    name = draw(st.sampled_from(["implicit"] if canonical else ["implicit", "ials"]))
    objective = oracle.Objective(
        name,
        draw(st.sampled_from([0.5, 1.0, 10.0])),
        draw(st.sampled_from([0.5, 1.0, 40.0])),
        1.0 if canonical else draw(st.sampled_from([1.0, 0.1, 0.0])),
        None if canonical else draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
    )
    model = TPUAlternatingLeastSquares(
        K, objective.regularization, objective.alpha, random_state=0, devices=1, num_threads=1,
        objective=name, unobserved_weight=objective.unobserved_weight,
        regularization_exponent=objective.exponent, cg_steps=4 * K,
        dtype=dtype or draw(st.sampled_from([np.float32, np.float64])),
    )  # fmt: skip
    is_tied = draw(st.booleans())
    for side, n in zip(("user", "item"), shape, strict=True):
        table = rng.integers(-2, 3, (n, K)) if is_tied else rng.standard_normal((n, K))
        table = table * (rng.random((n, 1)) > 0.1)
        setattr(model, f"{side}_factors", table.astype(model.dtype))
    given = draw(interactions(shape, rng, canonical))
    coo = sparse.coo_matrix(given)
    matrix = sparse.csr_matrix((coo.data.astype(np.float64), (coo.row, coo.col)), coo.shape)
    return World(model, given, matrix, objective, rng)


@st.composite
def interactions(draw: Any, shape: tuple[int, int], rng: np.random.Generator, canonical: bool):
    n_entries = int(draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])) * shape[0] * shape[1])
    kind = draw(st.sampled_from(["f4", "f8", "i4", "i8"] + ([] if canonical else ["u1", "?"])))
    cells = rng.choice(shape[0] * shape[1], n_entries, replace=False)
    values = rng.integers(1, 5, n_entries).astype(np.float64)
    if kind not in ("u1", "?"):
        values[rng.random(n_entries) < draw(st.sampled_from([0.0, 0.3]))] *= -1
    values[rng.random(n_entries) < draw(st.sampled_from([0.0, 0.2]))] = 0
    if not canonical and n_entries and kind != "?" and draw(st.booleans()):
        again = rng.integers(0, n_entries, n_entries // 2)
        cells, values = np.append(cells, cells[again]), np.append(values, values[again])
    rows, columns = np.divmod(cells, shape[1])
    order = np.argsort(rows, kind="stable")
    indptr = np.searchsorted(rows[order], np.arange(shape[0] + 1))
    make = sparse.csr_matrix if canonical else draw(
        st.sampled_from([sparse.csr_matrix, sparse.csr_array])
    )  # fmt: skip
    matrix = make((values[order].astype(kind), columns[order], indptr), shape=shape)
    if canonical:
        matrix.sort_indices()
    index = draw(st.sampled_from(["i4", "i8"]))
    matrix.indices, matrix.indptr = matrix.indices.astype(index), matrix.indptr.astype(index)
    return matrix


@st.composite
def id_lists(draw: Any, n: int, most: int = 4, distinct: bool = False) -> Any:
    """Ids below n in some type and container, with repeats unless `distinct`."""
    ids = draw(st.lists(st.integers(0, n - 1), max_size=min(most, n), unique=distinct))
    kind = draw(st.sampled_from([list, tuple, *ID_TYPES]))
    return np.array(ids, kind) if isinstance(kind, str) else kind(ids)


def array_of(ids: Any) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64)


def check_ranking(
    ids: np.ndarray, scores: np.ndarray, exact: np.ndarray, allowed: np.ndarray,
    chosen: np.ndarray | None, n: int,
) -> None:  # fmt: skip
    """Compare one row of a result with the exact scores of all columns.

    The allowed columns come first, in descending order; then the excluded columns; then -1.
    """
    within = np.ones(len(exact), bool)
    if chosen is not None:
        within = np.isin(np.arange(len(exact)), chosen)
        n = min(n, int(within.sum()))
    allowed = allowed & within
    k, close = min(n, int(allowed.sum())), 1e-4 * (1 + np.abs(exact).max(initial=0))
    assert ids.shape == scores.shape == (n,) and ids.dtype == np.int32
    assert allowed[ids[:k]].all() and len(set(ids[:k].tolist())) == k
    assert (np.diff(scores[:k]) <= 0).all()
    np.testing.assert_allclose(scores[:k], exact[ids[:k]], atol=close)
    np.testing.assert_allclose(scores[:k], -np.sort(-exact[allowed])[:k], atol=close)
    excluded, tail = np.flatnonzero(within & ~allowed), ids[k:]
    assert (scores[k:] <= LEAST).all()
    found = tail[tail >= 0].tolist()
    assert len(found) == len(set(found)) == min(len(excluded), n - k)
    assert set(found) <= set(excluded.tolist())
    assert (tail[len(found) :] == -1).all()


@st.composite
def filters(draw: Any, n: int) -> tuple[Any, Any]:
    """A whitelist, a blacklist or neither, of n ids."""
    kind = draw(st.sampled_from(["none", "whitelist", "blacklist"]))
    if kind == "whitelist":
        return draw(id_lists(n, 30).filter(len)), None
    return None, draw(id_lists(n, 30)) if kind == "blacklist" else None


def allowed_by(n: int, blacklist: Any) -> np.ndarray:
    allowed = np.ones(n, bool)
    if blacklist is not None:
        allowed[array_of(blacklist)] = False
    return allowed


def check_recommend(world: World, users: Any, data: Any, n: int) -> None:
    at, model = array_of(users), world.model
    n_items = world.matrix.shape[1]
    whitelist, blacklist = data.draw(filters(n_items))
    is_filtering, is_solving = data.draw(st.booleans()), data.draw(st.booleans())
    ids, scores = model.recommend(
        users, world.rows(at), N=n, filter_already_liked_items=is_filtering, items=whitelist,
        filter_items=blacklist, recalculate_user=is_solving,
    )  # fmt: skip
    factors = world.users[at]
    if is_solving:
        factors = np.reshape(model.recalculate_user(users, world.rows(at)), (-1, K))
        assert (
            oracle.backward_errors(factors, world.matrix[at], world.items, world.objective) < 2e-5
        ).all()
    for row, user in enumerate(at):
        allowed = allowed_by(n_items, blacklist)
        if is_filtering:
            allowed[world.matrix[user].indices] = False
        exact = factors[row].astype(np.float64) @ world.items.T
        check_ranking(ids[row], scores[row], exact, allowed, whitelist, n)


@given(world=worlds(), data=st.data())
@settings(max_examples=examples(80, 5000))
@counted
def test_recommend(world: World, data: Any) -> None:
    users = data.draw(id_lists(world.matrix.shape[0]))
    check_recommend(world, users, data, data.draw(st.sampled_from([0, 1, 3, 10, 40])))


@given(world=worlds(shapes=[(12, 9), (9, 30)], dtype=np.float32), data=st.data())
@settings(max_examples=examples(8, 600))
@counted
def test_recommend_to_many(world: World, data: Any) -> None:
    users = data.draw(st.permutations(range(world.matrix.shape[0])))
    check_recommend(world, users, data, data.draw(st.sampled_from([3, 40])))


@given(world=worlds(), data=st.data())
@settings(max_examples=examples(80, 3000))
@counted
def test_similar(world: World, data: Any) -> None:
    side = data.draw(st.sampled_from(["user", "item"]))
    table = world.users if side == "user" else world.items
    ids_in, n = data.draw(id_lists(len(table))), data.draw(st.sampled_from([0, 1, 4, 40]))
    whitelist, blacklist = data.draw(filters(len(table)))
    names = {f"{side}s": whitelist, f"filter_{side}s": blacklist}
    ids, scores = getattr(world.model, f"similar_{side}s")(ids_in, N=n, **names)
    lengths = np.linalg.norm(table, axis=1)
    directions = table / np.where(lengths == 0, 1e-10, lengths)[:, None]
    for row, at in enumerate(array_of(ids_in)):
        allowed = allowed_by(len(table), blacklist)
        exact = directions[at] @ directions.T
        check_ranking(ids[row], scores[row], exact, allowed, whitelist, n)


@given(world=worlds(), data=st.data())
@settings(max_examples=examples(60, 3000))
@counted
def test_recalculate_and_transform(world: World, data: Any) -> None:
    """Few rows are solved on the host, and many by compiled programs, by equation (1)."""
    model, objective = world.model, world.objective
    users = data.draw(id_lists(world.matrix.shape[0]))
    items = data.draw(id_lists(world.matrix.shape[1]))
    at = array_of(users)
    solved = model.recalculate_user(users, world.rows(at))
    assert (oracle.backward_errors(solved, world.matrix[at], world.items, objective) < 2e-5).all()
    columns = world.columns(array_of(items))
    solved = model.recalculate_item(items, columns)
    assert (oracle.backward_errors(solved, columns, world.users, objective) < 2e-5).all()
    solved = model.transform(world.given)
    assert (oracle.backward_errors(solved, world.matrix, world.items, objective) < 2e-5).all()
    assert not solved[np.diff(world.matrix.indptr) == 0].any()


@given(world=worlds(), data=st.data())
@settings(max_examples=examples(60, 2500))
@counted
def test_partial_fit(world: World, data: Any) -> None:
    """The given rows are solved, new ids extend the table, and other rows do not change."""
    side = data.draw(st.sampled_from(["user", "item"]))
    model, matrix = world.model, world.matrix if side == "user" else world.columns(slice(None))
    n = matrix.shape[0]
    ids = data.draw(st.lists(st.integers(0, n + 3), min_size=1, max_size=4, unique=True))
    rows = matrix[world.rng.integers(0, n, len(ids))]
    before, source = (world.users, world.items)[:: 1 if side == "user" else -1]
    update = model.partial_fit_users if side == "user" else model.partial_fit_items
    update(np.array(ids, data.draw(st.sampled_from(ID_TYPES))), rows)
    after = world.users if side == "user" else world.items
    assert len(after) == max(n, max(ids) + 1)
    others = np.setdiff1d(np.arange(n), ids)
    np.testing.assert_array_equal(after[others], before[others])
    assert not after[np.setdiff1d(np.arange(n, len(after)), ids)].any()
    assert (oracle.backward_errors(after[ids], rows, source, world.objective) < 2e-5).all()
    if side == "item":
        assert model.n_features_in_ == len(after)
    np.testing.assert_array_equal(world.items if side == "user" else world.users, source)
    ids_now, _ = model.recommend(0, None, N=3, filter_already_liked_items=False)
    assert ids_now.max() < len(world.items)


@given(world=worlds(), data=st.data())
@settings(max_examples=examples(30, 1000))
@counted
def test_partial_fit_with_ids_that_the_other_table_lacks(world: World, data: Any) -> None:
    """Entries of unknown ids do not affect the solve, so new users may have new items."""
    side = data.draw(st.sampled_from(["user", "item"]))
    model, matrix = world.model, world.matrix if side == "user" else world.columns(slice(None))
    source = world.items if side == "user" else world.users
    known = matrix[[int(world.rng.integers(matrix.shape[0]))]]
    extra = data.draw(st.integers(1, 3))
    wider = sparse.hstack([known, np.full((1, extra), 2.0)], format="csr")
    update = model.partial_fit_users if side == "user" else model.partial_fit_items
    new = matrix.shape[0] + data.draw(st.integers(0, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        update([new], wider)
    after = world.users if side == "user" else world.items
    padded = np.vstack([source, np.zeros((extra, K))])
    # All entries count in n_u of (2); N is the number of rows of the table.
    error = oracle.backward_errors(after[[new]], wider, padded, world.objective, len(source))[0]
    assert error < 2e-5


@given(world=worlds(), data=st.data())
@settings(max_examples=examples(60, 2000))
@counted
def test_explain(world: World, data: Any) -> None:
    n_users, n_items = world.matrix.shape
    user, item = data.draw(st.integers(0, n_users - 1)), data.draw(st.integers(0, n_items - 1))
    n = data.draw(st.sampled_from([0, 2, 10]))
    total, top, weights = world.model.explain(user, world.given, item, N=n)
    normal = oracle.systems(world.matrix[user], world.items, world.objective)[0]
    row, alpha = world.matrix[user], world.objective.alpha
    exact = np.linalg.pinv(normal, hermitian=True) @ world.items[item] @ world.items[row.indices].T
    exact = exact * np.maximum(alpha * row.data, 0)
    close = 1e-5 + 1e-6 * np.linalg.cond(normal) * np.abs(exact).max(initial=0)
    np.testing.assert_allclose(total, exact.sum(), atol=close)
    by_item = dict(zip(row.indices.tolist(), exact, strict=True))
    liked = sorted((by_item[i] for i, x in zip(row.indices, row.data, strict=True) if x >= 0))
    assert len(top) == min(n, len(liked))
    for (found, score), best in zip(top, liked[::-1], strict=False):
        np.testing.assert_allclose([score, score], [by_item[found], best], atol=close)
    again = world.model.explain(user, world.given, item, user_weights=weights, N=n)
    assert again[1] == top


@given(world=worlds(shapes=[(7, 5), (12, 9), (9, 30)]), iterations=st.integers(1, 3))
@settings(max_examples=examples(60, 3000))
@counted
def test_fit_by_many_steps_of_cg(world: World, iterations: int) -> None:
    """By compiled loops; many steps of CG are as accurate as an exact solve."""
    check_fit(world, iterations)


@given(
    world=worlds(shapes=[(12, 9)]),
    iterations=st.integers(1, 3),
)
@settings(max_examples=examples(6, 300))
@counted
def test_fit_by_compiled_programs(world: World, iterations: int) -> None:
    world.model.set_params(linear_solver="cholesky")
    check_fit(world, iterations)


def check_fit(world: World, iterations: int) -> None:
    """Each half-epoch from assigned tables solves (1); float64 tables equal the oracle's."""
    model, objective = world.model.set_params(iterations=iterations), world.objective
    start = world.users, world.items
    reports: list[float] = []
    tables = [start]
    model.set_params(calculate_training_loss=True)

    def callback(_: int, __: float, loss: float) -> None:
        reports.append(loss)
        tables.append((world.users.copy(), world.items.copy()))

    model.fit(world.given, show_progress=False, callback=callback)
    transposed = sparse.csr_matrix(world.matrix.T)
    wide = model.dtype == np.float64
    errors = oracle.backward_errors(world.items, transposed, world.users, objective, begun=start[1])
    assert (errors < (1e-9 if wide else 2e-5)).all()
    assert len(reports) == iterations == model.n_iter_
    exact = oracle.loss(world.matrix, world.users, world.items, objective)
    np.testing.assert_allclose(reports[-1], exact, rtol=1e-3, atol=1e-5)
    # Compare single iterations: over several, large weights amplify rounding errors near 0.
    for before, after in itertools.pairwise(tables) if wide else ():
        exact_tables = oracle.epoch(world.matrix, *before, objective)
        scale = max(*(np.abs(table).max() for table in exact_tables), 1e-3)
        for mine, theirs in zip(after, exact_tables, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5 * scale)


@given(world=worlds(canonical=True, dtype=np.float32), data=st.data())
@settings(max_examples=examples(50, 2500))
@counted
def test_the_same_as_implicit(world: World, data: Any) -> None:
    """For input that implicit supports: canonical CSR, known ids, N at most the candidates."""
    theirs = load_class("implicit")(
        K, world.objective.regularization, world.objective.alpha, num_threads=1
    )
    theirs.user_factors, theirs.item_factors = (
        world.model.user_factors.copy(), world.model.item_factors.copy(),
    )  # fmt: skip
    matrix = sparse.csr_matrix(world.matrix, dtype=np.float32)
    matrix.indices, matrix.indptr = matrix.indices.astype("i4"), matrix.indptr.astype("i4")
    n_users, n_items = matrix.shape
    user, n = data.draw(st.integers(0, n_users - 1)), data.draw(st.integers(1, 5))
    hidden = data.draw(st.lists(st.integers(0, n_items - 1), max_size=3, unique=True))
    assume(n <= n_items - len(np.union1d(matrix[user].indices, hidden)))
    close = dict(rtol=1e-3, atol=1e-3)
    for options in ({"filter_items": hidden or None}, {"recalculate_user": True}):
        found = [model.recommend(user, matrix[user], N=min(n, n_items), **options)[1]
                 for model in (world.model, theirs)]  # fmt: skip
        assume("filter_items" in options or np.isfinite(found[1]).all())
        np.testing.assert_allclose(*found, **close)
    for model in (world.model, theirs):
        model.partial_fit_users([user, n_users + 1], matrix[[user, 0]])
    np.testing.assert_allclose(world.model.user_factors, theirs.user_factors, **close)
    at = data.draw(st.integers(0, n_items - 1))
    similar = [model.similar_items(at, N=min(n, n_items))[1] for model in (world.model, theirs)]
    np.testing.assert_allclose(*similar, **close)
    if not len(matrix[user].indices):
        return
    totals, contributions = zip(
        *(model.explain(user, matrix, at, N=20)[:2] for model in (world.model, theirs)), strict=True
    )
    np.testing.assert_allclose(*totals, **close)
    np.testing.assert_allclose(*([score for _, score in each] for each in contributions), **close)
