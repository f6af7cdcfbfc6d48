"""State of the estimator: initial tables, failures, callbacks, checkpoints. See also contract/."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from matrices import random_counts
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

from tpu_als import ModelFitError, TPUAlternatingLeastSquares
from tpu_als.engine import als
from tpu_als.engine.cpu.backend import Table as CpuTable
from tpu_als.engine.xla.resident import Table
from tpu_als.shards import write_shards

COUNTS = random_counts(30, 20)


def model(**changes: Any) -> TPUAlternatingLeastSquares:
    """A small exact model that is not fitted."""
    settings = dict(factors=4, regularization=0.1, use_cg=False, iterations=4, random_state=0)
    return TPUAlternatingLeastSquares(**{**settings, "num_threads": 1, **changes})


def fitted(**changes: Any) -> TPUAlternatingLeastSquares:
    """The same model, fitted to COUNTS."""
    return model(**changes).fit(COUNTS, show_progress=False)


def same(one: Any, other: Any) -> bool:
    """Whether two models have the same tables and attributes of a fit."""
    names = {name for name in vars(one) if name.endswith("_")}
    return (
        names == {name for name in vars(other) if name.endswith("_")}
        and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)
        and np.array_equal(one.user_factors, other.user_factors)
        and np.array_equal(one.item_factors, other.item_factors)
    )


class TestStart:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_initial_tables_equal_implicits(self, dtype: Any) -> None:
        rng = np.random.default_rng(7)
        start = fitted(iterations=0, random_state=7, dtype=dtype)
        for table, n_rows in ((start.user_factors, 30), (start.item_factors, 20)):
            np.testing.assert_array_equal(table, rng.random((n_rows, 4), dtype=dtype) * 0.01)
            assert table.dtype == dtype
            assert table.flags.writeable

    def test_tables_of_ials(self) -> None:
        counts = sparse.csr_matrix((500, 400))
        start = model(objective="ials", factors=25, iterations=0).fit(counts, show_progress=False)
        assert start.user_factors.std() == pytest.approx(0.1 / 5, rel=0.05)
        assert abs(start.item_factors.mean()) < 1e-3

    def test_only_missing_tables_are_drawn(self) -> None:
        start = model(iterations=0)
        start.user_factors = np.ones((30, 4), np.float32)
        start.fit(COUNTS, show_progress=False)
        expected = np.random.default_rng(0).random((20, 4), dtype=np.float32) * 0.01
        np.testing.assert_array_equal(start.item_factors, expected)
        np.testing.assert_array_equal(start.user_factors, np.ones((30, 4)))

    def test_a_loaded_model_starts_from_new_tables(self, tmp_path: Any) -> None:
        once = fitted()
        once.save(tmp_path / "model")
        again = TPUAlternatingLeastSquares.load(tmp_path / "model")
        assert same(again, once)
        assert np.array_equal(
            again.fit(COUNTS, show_progress=False).user_factors, once.user_factors
        )

    def test_a_start_of_another_shape_is_an_error(self) -> None:
        start = model()
        start.user_factors = np.ones((30, 5), np.float32)
        with pytest.raises(ValueError, match="user_factors to start from has shape"):
            start.fit(COUNTS, show_progress=False)


class TestFailure:
    def break_after(self, monkeypatch: pytest.MonkeyPatch, n: int, error: Any) -> None:
        """Let the engine run n epochs, and then fail or report rows that are not finite."""
        epoch, calls = als.epoch, []

        def broken(*args: Any) -> Any:
            calls.append(1)
            if len(calls) <= n:
                return epoch(*args)
            if error is not None:
                raise error
            return epoch(*args)[0], (0, 3)

        monkeypatch.setattr(als, "epoch", broken)

    @pytest.mark.parametrize("n", [0, 2])
    @pytest.mark.parametrize("error", [None, MemoryError("no room")])
    def test_the_model_is_unchanged(
        self, monkeypatch: pytest.MonkeyPatch, n: int, error: Any
    ) -> None:
        broken = fitted()
        before = copy.deepcopy(broken)
        self.break_after(monkeypatch, n, error)
        with pytest.raises(ModelFitError if error is None else MemoryError) as raised:
            broken.fit(random_counts(9, 8), show_progress=False, callback=lambda *_: None)
        assert error or f"3 item rows are not finite after iteration {n}" in str(raised.value)
        assert same(broken, before)

    def test_an_unfitted_model_stays_unfitted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = model()
        self.break_after(monkeypatch, 1, None)
        with pytest.raises(ModelFitError):
            broken.fit(COUNTS, show_progress=False)
        assert broken.item_factors is None
        assert vars(broken) == vars(model())

    @pytest.mark.parametrize("reads", [False, True])
    def test_an_interrupt_keeps_the_last_iteration(
        self, monkeypatch: pytest.MonkeyPatch, reads: bool
    ) -> None:
        stopped = model()
        self.break_after(monkeypatch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(
                COUNTS,
                show_progress=False,
                callback=lambda *_: reads and (stopped.user_factors, stopped.item_factors),
            )
        monkeypatch.undo()
        assert stopped.n_iter_ == 2
        np.testing.assert_array_equal(stopped.item_factors, fitted(iterations=2).item_factors)

    def test_an_interrupt_of_the_first_iteration_keeps_the_old_tables(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stopped = fitted()
        before = copy.deepcopy(stopped)
        self.break_after(monkeypatch, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(random_counts(9, 8), show_progress=False)
        assert same(stopped, before)

    def test_bad_data_changes_nothing(self) -> None:
        kept = fitted()
        before = copy.deepcopy(kept)
        bad = random_counts(5, 6)
        bad.data[0] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            kept.fit(bad, show_progress=False)
        with pytest.raises(ValueError, match="factors must be"):
            kept.set_params(factors=0).fit(COUNTS, show_progress=False)
        assert same(kept, before)


class TestCallback:
    @pytest.mark.parametrize(("table", "native"), [(Table, False), (CpuTable, True)])
    def test_tables_are_fetched_only_when_read(
        self, table: Any, native: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fetched, original = [], table.fetch

        def counted(table: Any) -> Any:
            fetched.append(1)
            return original(table)

        monkeypatch.setattr(table, "fetch", counted)
        model(use_native=native).fit(COUNTS, show_progress=False, callback=lambda *_: None)
        assert len(fetched) == 2

    def test_the_tables_are_current(self) -> None:
        seen = []
        watched = model()
        watched.fit(
            COUNTS,
            show_progress=False,
            callback=lambda i, s, v: seen.append(watched.transform(COUNTS[:2])),
        )
        for i, rows in enumerate(seen):
            np.testing.assert_array_equal(rows, fitted(iterations=i + 1).transform(COUNTS[:2]))

    def test_the_model_can_be_copied_and_saved(self, tmp_path: Any) -> None:
        watched, copies = model(), []

        def callback(iteration: int, seconds: float, loss: float | None) -> None:
            copies.append(copy.deepcopy(watched))
            watched.save(tmp_path / str(iteration))

        watched.fit(COUNTS, show_progress=False, callback=callback)
        loaded = TPUAlternatingLeastSquares.load(tmp_path / "1")
        np.testing.assert_array_equal(loaded.item_factors, copies[1].item_factors)
        assert loaded.n_iter_ == copies[1].n_iter_ == 2


class TestTables:
    def test_a_write_into_a_table_takes_effect(self) -> None:
        edited = fitted()
        users = np.arange(30)
        first, _ = edited.recommend(users, COUNTS)
        edited.similar_items(users[:20])
        edited.item_factors[first[:, 0]] = 0
        table = edited.item_factors
        again, scores = edited.recommend(users, None, filter_already_liked_items=False, N=20)
        np.testing.assert_allclose(
            scores, -np.sort(-(edited.user_factors @ table.T), axis=1), atol=1e-5
        )
        assert not np.array_equal(again[:, 0], first[:, 0])
        folded = edited.transform(COUNTS)
        table[:] = table[::-1].copy()
        assert not np.allclose(edited.transform(COUNTS), folded)

    def test_an_assigned_gramian_is_used(self) -> None:
        # Users who shard the catalogue themselves assign the gramian of the complete catalogue.
        exact = fitted()
        before = exact.recalculate_user(0, COUNTS[0])
        exact._YtY = 2 * exact.YtY
        after = exact.recalculate_user(0, COUNTS[0])
        weights = np.zeros(20) + 2.0
        weights[COUNTS[0].indices] += COUNTS[0].data - 1
        table = exact.item_factors.astype(np.float64)
        matrix = (table.T * weights) @ table + 0.1 * np.eye(4)
        expected = np.linalg.solve(matrix, table[COUNTS[0].indices].T @ COUNTS[0].data)
        np.testing.assert_allclose(after, expected, rtol=1e-3)
        exact._YtY = None
        np.testing.assert_array_equal(exact.recalculate_user(0, COUNTS[0]), before)
        exact._YtY = 3 * exact.YtY
        exact.item_factors = exact.item_factors
        np.testing.assert_allclose(exact.YtY, table.T @ table, rtol=1e-4)

    def test_assigned_items_set_the_features(self) -> None:
        given = model()
        given.item_factors = np.ones((7, 4), np.float32)
        assert given.n_features_in_ == 7
        with pytest.raises(NotFittedError):
            given.recommend(0, None, filter_already_liked_items=False)
        given.user_factors = np.ones((2, 4), np.float32)
        ids, _ = given.recommend(0, None, filter_already_liked_items=False, N=3)
        assert ids.shape == (3,)
        given.item_factors = None
        assert not hasattr(given, "n_features_in_")

    def test_tables_of_another_width_than_the_parameter(self) -> None:
        wide = fitted()
        rng = np.random.default_rng(0)
        wide.user_factors = rng.random((30, 9), dtype=np.float32)
        wide.item_factors = rng.random((20, 9), dtype=np.float32)
        assert wide.transform(COUNTS).shape == (30, 9)
        start = wide.user_factors.copy()
        wide.solver(COUNTS, wide.user_factors, wide.item_factors, 0.1, 1)
        assert not np.array_equal(start, wide.user_factors)

    def test_serving_keeps_its_device_tables(self, new_compilations: Any) -> None:
        served, name = fitted(use_native=False), "catalog for XlaBackend"
        served.recommend(np.arange(9), COUNTS[:9])
        kept = served._fitted.item._derived[name]
        with new_compilations() as count:
            served.recommend(np.arange(9, 18), COUNTS[9:18])
        assert served._fitted.item._derived[name] is kept
        assert count.programs == 0


class TestClass:
    def test_clones_and_copies_keep_device_handles(self) -> None:
        devices = jax.devices()[:2]
        model_on_devices = fitted(devices=devices)
        assert clone(model_on_devices).devices is devices
        assert copy.deepcopy(model_on_devices).devices is devices
        mesh = jax.sharding.Mesh(np.array(devices), ("d",))
        assert model(devices=mesh).__getstate__()["devices"] == 2

    def test_clone_keeps_scikit_learns_settings(self) -> None:
        asked = model().set_output(transform="pandas")
        assert clone(asked)._sklearn_output_config == {"transform": "pandas"}

    def test_loss_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="tpu_als"):
            logged = fitted(calculate_training_loss=True)
        assert f"final training loss {logged.history_['loss'][-1]:.4f}" in caplog.text

    def test_a_wider_matrix_that_is_transposed(self) -> None:
        with pytest.raises(ValueError, match="expecting 20 features"):
            fitted().transform(COUNTS.T.tocsr())

    def test_explain_takes_the_whole_matrix_or_the_users_row(self) -> None:
        known = fitted()
        of_matrix, of_row = known.explain(3, COUNTS, 1), known.explain(3, COUNTS[3], 1)
        assert of_matrix[:2] == of_row[:2]
        with pytest.raises(IndexError, match="userid 3 is not in user_items, which has 2 rows"):
            known.explain(3, COUNTS[:2], 1)

    def test_explain_without_a_ridge(self) -> None:
        rank_one = sparse.csr_matrix(np.ones((6, 5), np.float32))
        flat = model(regularization=0.0, factors=3).fit(rank_one, show_progress=False)
        total, top, weights = flat.explain(0, rank_one, 1)
        assert total == pytest.approx(1, abs=0.02)
        assert flat.explain(0, rank_one, 1, weights, N=2)[1] == top[:2]

    @pytest.mark.slow
    @pytest.mark.parametrize("use_native", [False, True])
    def test_candidates_of_a_search_compile_nothing_new(
        self, compilations: Any, use_native: bool
    ) -> None:
        with compilations() as one:
            fitted(linear_solver="cg", use_native=use_native).score(COUNTS)
        grid = {"regularization": [0.1, 1.0, 10.0], "alpha": [1.0, 5.0]}
        with compilations() as many:
            GridSearchCV(
                model(linear_solver="cg", use_native=use_native),
                grid,
                cv=[(np.arange(30),) * 2],
                refit=False,
            ).fit(COUNTS, show_progress=False)
        assert many.programs <= one.programs


class TestOverRelaxation:
    @pytest.mark.slow
    def test_fewer_iterations_reach_the_loss(self) -> None:
        counts = random_counts(200, 120, seed=1)
        settings = dict(factors=8, alpha=40.0, regularization=1.0, calculate_training_loss=True)
        plain = model(iterations=16, **settings).fit(counts, show_progress=False)
        relaxed = model(iterations=10, over_relaxation=1.5, **settings)
        losses = relaxed.fit(counts, show_progress=False).history_["loss"]
        assert losses[-1] < plain.history_["loss"][-1]
        assert all(after < before for before, after in itertools.pairwise(losses))

    def test_the_first_and_the_last_iteration_are_plain(self) -> None:
        assert same_tables(fitted(iterations=2), fitted(iterations=2, over_relaxation=1.5))
        three = fitted(iterations=3, over_relaxation=1.5)
        assert not same_tables(fitted(iterations=3), three)
        solved = three.recalculate_item(np.arange(20), COUNTS.T.tocsr())
        np.testing.assert_allclose(three.item_factors, solved, rtol=0, atol=1e-4)


def same_tables(one: Any, other: Any) -> bool:
    """Whether two models have the same tables, bit for bit."""
    return np.array_equal(one.user_factors, other.user_factors) and np.array_equal(
        one.item_factors, other.item_factors
    )


def interrupt(settings: dict[str, Any]) -> None:
    """Interrupt a fit after its third iteration."""

    def stop(iteration: int, seconds: float, loss: float | None) -> None:
        if iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model(**settings).fit(COUNTS, show_progress=False, callback=stop)


class TestCheckpoints:
    def test_an_interrupted_fit_resumes_with_equal_results(self, tmp_path: Path) -> None:
        settings = dict(iterations=5, over_relaxation=1.4, calculate_training_loss=True)
        uninterrupted = fitted(**settings)
        settings["checkpoint_dir"] = tmp_path
        interrupt(settings)
        seen = []
        resumed = model(**settings)
        resumed.fit(COUNTS, show_progress=False, callback=lambda i, s, loss: seen.append(i))
        assert seen == [3, 4] and resumed.n_iter_ == 5
        assert same_tables(uninterrupted, resumed)
        assert resumed.history_["loss"] == uninterrupted.history_["loss"]
        # the run is complete, so the fit returns its result
        again = model(**settings).fit(COUNTS, show_progress=False)
        assert same_tables(uninterrupted, again) and again.n_iter_ == 5

    @pytest.mark.parametrize("first", [True, False])
    def test_a_loss_that_only_one_fit_of_a_run_measured(self, first: bool, tmp_path: Path) -> None:
        fitted(iterations=2, calculate_training_loss=first, checkpoint_dir=tmp_path)
        settings = dict(calculate_training_loss=not first, checkpoint_dir=tmp_path)
        more = fitted(iterations=4, **settings)
        losses, uninterrupted = (
            np.array(more.history_["loss"]),
            fitted(calculate_training_loss=True),
        )
        assert np.isfinite(losses).tolist() == [first, first, not first, not first]
        expected = np.array(uninterrupted.history_["loss"][:4])
        known = np.isfinite(losses)
        np.testing.assert_allclose(losses[known], expected[known], rtol=1e-6)
        more.save(tmp_path / "model.npz")
        np.testing.assert_array_equal(
            TPUAlternatingLeastSquares.load(tmp_path / "model.npz").history_["loss"], losses
        )
        done = fitted(iterations=4, calculate_training_loss=True, checkpoint_dir=tmp_path)
        assert len(done.history_["loss"]) == 4

    @pytest.mark.parametrize(
        "make",
        [np.random.RandomState, np.random.default_rng, np.random.SeedSequence, np.atleast_1d],
    )
    def test_seeds_of_every_kind_identify_a_run(self, make: Any, tmp_path: Path) -> None:
        first, second, again = (
            fitted(iterations=1, random_state=make(seed), checkpoint_dir=tmp_path)
            for seed in (1, 2, 1)
        )
        assert same_tables(first, again) and not same_tables(first, second)

    @pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng])
    def test_a_resumed_fit_leaves_the_generator_in_the_same_state(
        self, make: Any, tmp_path: Path
    ) -> None:
        drawn = []
        for _ in range(2):
            source = make(5)
            fitted(iterations=1, random_state=source, checkpoint_dir=tmp_path)
            drawn.append(source.random(3))
        np.testing.assert_array_equal(*drawn)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import orbax.checkpoint as ocp

        def save(*args: Any, **options: Any) -> None:
            raise ValueError("OUT_OF_RANGE: Error writing\nand much more")

        monkeypatch.setattr(ocp.CheckpointManager, "save", save)
        with pytest.raises(OSError, match="could not be written to .*OUT_OF_RANGE.*disk full"):
            fitted(checkpoint_dir=tmp_path)

    def test_checkpoint_every_and_the_last_iteration(self, tmp_path: Path) -> None:
        fitted(checkpoint_dir=str(tmp_path), checkpoint_every=3, iterations=7)
        saved = sorted(path.name for path in tmp_path.glob("*/*/[0-9]*") if path.is_dir())
        assert saved == ["3", "6", "7"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "change",
        [
            {"alpha": 2.0},
            {"random_state": 1},
            {"factors": 5},
            {"iterations": 3},
            {"over_relaxation": 1.5, "iterations": 6},
            {"objective": "ials"},
            {"early_stopping": True},
        ],
        ids=str,
    )
    def test_runs_in_one_directory_are_independent(
        self, change: dict[str, Any], tmp_path: Path
    ) -> None:
        before = fitted(checkpoint_dir=tmp_path)
        other = fitted(checkpoint_dir=tmp_path, **change)
        assert same_tables(other, fitted(**change))
        assert same_tables(before, fitted(checkpoint_dir=tmp_path))

    @pytest.mark.slow
    def test_fits_on_changing_data_share_a_directory(self, tmp_path: Path) -> None:
        for factor in (1, 2, 1):
            counts = COUNTS * np.float32(factor)
            saved = model(checkpoint_dir=tmp_path).fit(counts, show_progress=False)
            assert same_tables(saved, model().fit(counts, show_progress=False))
        found = model(checkpoint_dir=tmp_path, iterations=6).fit(COUNTS, show_progress=False)
        assert same_tables(found, fitted(iterations=6))

    @pytest.mark.slow
    def test_initial_tables_are_a_part_of_the_run(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for _ in range(2):
            start = rng.normal(size=(20, 4)).astype(np.float32)
            found = []
            for options in ({"checkpoint_dir": tmp_path}, {}):
                estimator = model(**options)
                estimator.item_factors = start
                found.append(estimator.fit(COUNTS, show_progress=False))
            assert same_tables(*found)
        further = []
        for options in ({"checkpoint_dir": tmp_path}, {}):
            estimator = model(warm_start=True, **options)
            for _ in range(3):
                estimator.fit(COUNTS, show_progress=False)
            further.append(estimator)
        assert same_tables(*further)

    @pytest.mark.slow
    def test_candidates_of_a_search_share_a_directory(self, tmp_path: Path) -> None:
        grid = {"alpha": [1.0, 5.0], "iterations": [2, 4]}
        found = []
        for directory in (tmp_path, None):
            search = GridSearchCV(model(checkpoint_dir=directory), grid, cv=2, error_score="raise")
            search.fit(COUNTS, show_progress=False)
            found.append(search)
        one, other = found
        np.testing.assert_array_equal(
            one.cv_results_["mean_test_score"], other.cv_results_["mean_test_score"]
        )
        assert same_tables(one.best_estimator_, other.best_estimator_)

    def test_early_stopping_resumes(self, tmp_path: Path) -> None:
        settings = dict(iterations=30, early_stopping=True, n_iter_no_change=3)
        uninterrupted = fitted(**settings)
        assert 3 < uninterrupted.n_iter_ < 30
        settings["checkpoint_dir"] = tmp_path
        interrupt(settings)
        for _ in range(2):
            resumed = model(**settings).fit(COUNTS, show_progress=False)
            assert resumed.history_["ndcg"] == uninterrupted.history_["ndcg"]
            assert same_tables(uninterrupted, resumed)


class TestShards:
    def test_fits_a_directory_of_shards(self, tmp_path: Path) -> None:
        rows = write_shards(COUNTS, tmp_path / "counts", n_shards=3)
        settings = dict(random_state=3, iterations=40, alpha=3.0)
        found = model(**settings).fit(rows, show_progress=False)
        assert found.n_features_in_ == 20
        solved = found.transform(COUNTS)
        expected = oracle.half_epoch(
            COUNTS, found.item_factors, oracle.Objective("implicit", 0.1, 3.0)
        )
        np.testing.assert_allclose(solved, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(found.user_factors, solved, rtol=0, atol=0.03)
        again = model(**settings).fit(rows, show_progress=False)
        assert same_tables(found, again)
        other = model(**{**settings, "random_state": 4}).fit(rows, show_progress=False)
        assert not same_tables(found, other)

    def test_early_stopping_is_refused(self, tmp_path: Path) -> None:
        rows = write_shards(COUNTS, tmp_path / "counts", n_shards=1)
        with pytest.raises(ValueError, match="early_stopping=True needs a matrix in memory"):
            model(early_stopping=True).fit(rows, show_progress=False)


class TestApproximateRanking:
    def test_a_cpu_ranks_exactly(self) -> None:
        found = fitted().set_params(approximate_recall=0.9).recommend(np.arange(30), COUNTS, N=5)
        for mine, exact in zip(found, fitted().recommend(np.arange(30), COUNTS, N=5), strict=True):
            np.testing.assert_array_equal(mine, exact)

    @pytest.mark.parametrize("value", [0, 1, 1.5, "0.9"])
    def test_other_values_are_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match="approximate_recall must be None or a number between"):
            fitted(approximate_recall=value)


class TestTablesOnDevices:
    @pytest.mark.slow
    def test_tables_are_copied_to_the_host_only_when_read(self) -> None:
        settings = dict(devices=2, table_layout="sharded", alpha=3.0)
        found, expected = fitted(**settings), fitted(alpha=3.0)
        found.set_output(transform="pandas")
        folded = found.transform(COUNTS)
        assert list(folded.columns) == list(found.get_feature_names_out())
        np.testing.assert_allclose(folded, expected.transform(COUNTS), rtol=0, atol=1e-4)
        users = np.arange(8)
        for name, arguments in (
            ("recommend", (users, COUNTS[users], 5)),
            ("similar_items", (users, 5)),
            ("similar_users", (3, 5)),
        ):
            for mine, theirs in zip(
                getattr(found, name)(*arguments), getattr(expected, name)(*arguments), strict=True
            ):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(
            found.score_pairs(users, users), expected.score_pairs(users, users), atol=1e-4
        )
        assert found.score(COUNTS) == pytest.approx(expected.score(COUNTS), abs=0.01)
        explained = [m.explain(0, COUNTS, 1)[0] for m in (found, expected)]
        assert explained[0] == pytest.approx(explained[1], abs=1e-4)
        np.testing.assert_allclose(found.YtY, expected.YtY, rtol=1e-4, atol=1e-4)
        assert all(found._fitted.table(side).resident is not None for side in ("user", "item"))
        np.testing.assert_allclose(found.item_factors, expected.item_factors, rtol=0, atol=1e-4)
        assert found._fitted.item.resident is None
        assert found._fitted.user.resident is not None
