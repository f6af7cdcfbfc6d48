"""The recipes of docs/interoperation.md, run as they are against the real packages."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import DOCUMENT, MODULE, Recipe, sections
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from tpu_als import TPUAlternatingLeastSquares, compat, evaluation
from tpu_als.pipelines import RecommenderPipeline
from tpu_als.shards import open_shards
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recipe]:
    """A new module, after the first block of the document, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    yield Recipe()
    del sys.modules[MODULE]


def ours(recipe: Any, k: int = 10) -> dict[str, float]:
    return evaluation.ranking_metrics_at_k(recipe.model, recipe.train, recipe.test, K=k)


def test_the_document_lists_all_recipes() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    listed = set(re.findall(r"\[[^\]]*\]\(#([\w-]+)\)", text.split("The recipes use")[0]))
    assert listed == {h.lower().replace(" ", "-") for h in sections() if h}


class TestImplicit:
    def test_evaluation(self, recipe: Recipe) -> None:
        pytest.importorskip("implicit.evaluation")
        found = recipe.run("implicit", 0, 1)
        expected = ours(found)
        assert found.metrics == pytest.approx({name: expected[name] for name in found.metrics})

    def test_annoy(self, recipe: Recipe) -> None:
        pytest.importorskip("annoy")
        pytest.importorskip("implicit.ann.annoy")
        found = recipe.run("implicit", 1)
        self.check(found, found.wrapped)

    def test_faiss(self, recipe: Recipe) -> None:
        pytest.importorskip("faiss")
        ann = pytest.importorskip("implicit.ann.faiss")
        found = recipe.module
        wrapped = ann.FaissModel(self.model(), nlist=10, nprobe=10, use_gpu=False)
        wrapped.fit(found.train, show_progress=False)
        self.check(found, wrapped)

    def test_nmslib(self, recipe: Recipe) -> None:
        pytest.importorskip("nmslib")
        ann = pytest.importorskip("implicit.ann.nmslib")
        wrapped = ann.NMSLibModel(self.model())
        wrapped.fit(recipe.module.train, show_progress=False)
        self.check(recipe.module, wrapped)

    def model(self) -> TPUAlternatingLeastSquares:
        return TPUAlternatingLeastSquares(factors=8, iterations=5, random_state=0)

    def check(self, found: Any, wrapped: Any) -> None:
        """An approximate ranking has most of the exact one, and the model stays as it was."""
        np.testing.assert_array_equal(wrapped.model.item_factors, found.model.item_factors)
        users = np.arange(20)
        approximate = wrapped.recommend(users, found.train[users], N=10)[0]
        exact = found.model.recommend(users, found.train[users], N=10)[0]
        common = [len(np.intersect1d(a, b)) for a, b in zip(approximate, exact, strict=True)]
        assert np.mean(common) >= 8
        assert wrapped.similar_items(3, N=5)[0][0] == 3
        np.testing.assert_array_equal(wrapped.model.item_factors, found.model.item_factors)


class TestRecTools:
    def test_recommendations_are_the_models(self, recipe: Recipe) -> None:
        pytest.importorskip("rectools.models")
        found = recipe.run("RecTools", 0, 1)
        rows = found.dataset.get_user_item_matrix()  # its own order of users and items
        expected = found.model.fit(rows, show_progress=False).recommend([0, 1], rows[:2])
        ids = found.dataset.item_id_map.convert_to_internal(found.table["item_id"])
        np.testing.assert_array_equal(ids.reshape(2, 10), expected[0])
        scores = found.table["score"].to_numpy().reshape(2, 10)
        np.testing.assert_allclose(scores, expected[1], rtol=1e-5)

    def test_own_parameters_pass_the_configuration(self, recipe: Recipe) -> None:
        pytest.importorskip("rectools.models")
        found = recipe.run("RecTools")
        assert found.config["model"]["cls"] == f"{MODULE}.IALS"
        assert found.same.model.objective == "ials" and found.same.model.unobserved_weight == 0.1
        stored = found.ImplicitALSWrapperModel.loads(found.ials.dumps())
        for other in (found.same, stored):
            np.testing.assert_array_equal(other.model.item_factors, found.ials.model.item_factors)
        assert np.abs(found.ials.model.item_factors - found.model.item_factors).max() > 0.1

    def test_partial_fits_add_up(self, recipe: Recipe) -> None:
        pytest.importorskip("rectools.models")
        found = recipe.run("RecTools")
        model = found.ImplicitALSWrapperModel(found.IALS(factors=8, iterations=5, random_state=0))
        for _ in range(5):
            model.fit_partial(found.dataset, epochs=1)
        expected = found.ials.model.item_factors
        np.testing.assert_allclose(model.model.item_factors, expected, atol=1e-4)


class TestLensKit:
    def test_recommendations_are_the_models(self, recipe: Recipe) -> None:
        pytest.importorskip("lenskit.implicit")
        found = recipe.run("LensKit")
        scorer = pickle.loads(pickle.dumps(found.scorer))
        expected = TPUAlternatingLeastSquares(8, iterations=5, random_state=0, objective="ials")
        expected.fit(scorer.matrix, show_progress=False)  # its own order of users and items
        np.testing.assert_array_equal(scorer.item_embeddings, expected.item_factors)
        user = scorer.users.number(0)
        ids = expected.recommend(user, scorer.matrix[user])[0]
        np.testing.assert_array_equal(found.ranked.ids(), scorer.items.ids(ids))


class TestRecBole:
    def test_an_epoch_is_an_iteration(self, recipe: Recipe) -> None:
        pytest.importorskip("recbole")
        Path("events").mkdir()
        pairs = "".join(f"{u}\t{i}\n" for u, i in zip(*recipe.module.train.nonzero(), strict=True))
        Path("events/events.inter").write_text("user_id:token\titem_id:token\n" + pairs)
        found = recipe.run("RecBole")
        als, losses = found.trainer.model.als, [*found.trainer.train_loss_dict.values()]
        once = TPUAlternatingLeastSquares(
            8, iterations=5, calculate_training_loss=True, random_state=als.random_state
        ).fit(found.trainer.model.rows, show_progress=False)
        np.testing.assert_allclose(losses, once.history_["loss"], rtol=1e-4)
        np.testing.assert_allclose(als.item_factors, once.item_factors, atol=1e-4)
        assert 0 < found.values["ndcg@10"] < 1 and found.best == found.values["ndcg@10"]


class TestIrspack:
    def test_metrics_are_ours(self, recipe: Recipe) -> None:
        pytest.importorskip("irspack.evaluation")
        found = recipe.run("irspack")
        expected = ours(found)
        same = {"recall": "recall_full", "precision": "precision_full", "ndcg": "ndcg"}
        same |= {"map": "map_full", "hit": "hit_rate"}
        for theirs, name in same.items():
            assert found.scores[theirs] == pytest.approx(expected[name], abs=1e-6), name


class TestRanxAndPytrecEval:
    HEADING = "ranx and pytrec_eval"

    @pytest.mark.slow  # it compiles for minutes when it runs for the first time
    def test_ranx(self, recipe: Recipe) -> None:
        pytest.importorskip("ranx")
        found = recipe.run(self.HEADING, 0, 2)
        expected = ours(found)
        assert found.by_ranx == pytest.approx(
            {
                "recall@10": expected["recall_full"],
                "map@10": expected["map_full"],
                "ndcg@10": expected["ndcg"],
            },
            abs=1e-6,
        )

    def test_pytrec_eval(self, recipe: Recipe) -> None:
        pytest.importorskip("pytrec_eval")
        recipe.run(self.HEADING, 0, 1)
        found = recipe.run(self.HEADING, 2)
        expected = ours(found)
        names = {"recall_10": "recall_full", "map_cut_10": "map_full", "ndcg_cut_10": "ndcg"}
        for theirs, name in names.items():
            mean = np.mean([user[theirs] for user in found.by_user.values()])
            assert mean == pytest.approx(expected[name], abs=1e-6), name


class TestOptuna:
    def test_some_trials_are_pruned(self, recipe: Recipe) -> None:
        optuna = pytest.importorskip("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        found = recipe.run("Optuna")
        pruned = [t for t in found.study.trials if t.state == optuna.trial.TrialState.PRUNED]
        done = [t for t in found.study.trials if t.state == optuna.trial.TrialState.COMPLETE]
        assert len(pruned) > 0 and len(pruned) + len(done) == 12
        assert all(0 < len(trial.intermediate_values) < 5 for trial in pruned)
        assert all(len(trial.intermediate_values) == 5 for trial in done)
        assert found.study.best_value == max(trial.value for trial in done)


FITTED = ["tpu_als.serving.factor_table.FactorTable", "tpu_als.serving.fitted.FittedModel"]
ESTIMATOR = "tpu_als.estimator.TPUAlternatingLeastSquares"


class TestSkops:
    def test_the_recipe(self, recipe: Recipe) -> None:
        io = pytest.importorskip("skops.io")
        found = recipe.run("skops")
        assert io.get_untrusted_types(file="model.skops") == sorted(found.TRUSTED)
        np.testing.assert_array_equal(found.loaded.item_factors, found.model.item_factors)
        for got, expected in zip(
            found.loaded.recommend(3, found.train[3]),
            found.model.recommend(3, found.train[3]),
            strict=True,
        ):
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize(
        ("make", "types"),
        [
            (compat.AlternatingLeastSquares, ["tpu_als.compat.AlternatingLeastSquares"]),
            *(
                (
                    lambda f, w=weighting: make_pipeline(w(), TPUAlternatingLeastSquares(f)),
                    [ESTIMATOR, f"tpu_als.weighting.{weighting.__name__}"],
                )
                for weighting in (LogWeighting, TfidfWeighting, BM25Weighting)
            ),
            (
                lambda f: RecommenderPipeline([("model", TPUAlternatingLeastSquares(f))]),
                [ESTIMATOR, "tpu_als.pipelines.RecommenderPipeline"],
            ),
            (lambda f: TPUAlternatingLeastSquares(f, dtype="bfloat16"), [ESTIMATOR]),
            (
                lambda f: TPUAlternatingLeastSquares(f, random_state=np.random.default_rng(0)),
                [ESTIMATOR],
            ),
        ],
    )
    def test_types_of_other_objects(self, make: Any, types: list[str], recipe: Recipe) -> None:
        io = pytest.importorskip("skops.io")
        train = recipe.module.train
        fitted = make(4).fit(train)
        stored = io.dumps(fitted)
        assert io.get_untrusted_types(data=stored) == sorted([*types, *FITTED])
        loaded = io.loads(stored, trusted=[*types, *FITTED])
        np.testing.assert_array_equal(loaded.transform(train), fitted.transform(train))


class TestMlflow:
    @pytest.mark.slow
    def test_log_and_load(self, recipe: Recipe, tmp_path: Path) -> None:
        mlflow = pytest.importorskip("mlflow")
        pytest.importorskip("skops")
        importlib.import_module("mlflow.sklearn")
        recipe.run("skops")
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
        found = recipe.run("MLflow")
        assert found.info.flavors["sklearn"]["serialization_format"] == "skops"
        np.testing.assert_array_equal(found.loaded.item_factors, found.model.item_factors)
        logged = mlflow.get_run(found.info.run_id).data.params
        assert logged == {"factors": "8", "alpha": "1.0", "iterations": "5"}


class TestSklearnCallbacks:
    HEADING = "scikit-learn callbacks"

    def test_scores_of_each_iteration(self, recipe: Recipe) -> None:
        pytest.importorskip("sklearn.callback")
        found = recipe.run(self.HEADING)
        steps = found.log[found.log["task_name"] == "iteration"]
        assert len(steps) == 5
        scores: list[float] = []
        scorer = evaluation.make_ranking_scorer("ndcg")
        model = TPUAlternatingLeastSquares(8, iterations=5, random_state=0)
        model.fit(
            found.train,
            show_progress=False,
            callback=lambda *_: scores.append(scorer(model, found.train)),
        )
        np.testing.assert_allclose(steps["ndcg"].to_numpy(), scores, rtol=1e-6)
        np.testing.assert_array_equal(found.watched.item_factors, model.item_factors)

    def test_in_a_search_and_stopped(self, recipe: Recipe) -> None:
        pytest.importorskip("sklearn.callback")
        found = recipe.run(self.HEADING)
        monitor = found.ScoringMonitor(scoring={"recall": evaluation.make_ranking_scorer("recall")})
        model = found.WithCallbacks(factors=4, iterations=3, random_state=0).set_callbacks(monitor)
        search = GridSearchCV(model, {"alpha": [1.0, 5.0]}, cv=2).fit(found.train)
        assert search.best_estimator_.n_iter_ == 3

        class AfterTwo:
            def setup(self, estimator: Any, context: Any) -> None: ...
            def teardown(self, estimator: Any, context: Any) -> None: ...
            def on_fit_task_begin(self, estimator: Any, context: Any) -> None: ...
            def on_fit_task_end(self, estimator: Any, context: Any) -> bool:
                return context.task_name == "iteration" and context.task_id == 1

        stopped = found.WithCallbacks(factors=4, iterations=9, random_state=0)
        assert stopped.set_callbacks(AfterTwo()).fit(found.train).n_iter_ == 2


class TestShards:
    def test_duckdb(self, recipe: Recipe) -> None:
        pytest.importorskip("duckdb")
        found = recipe.run("DuckDB")
        self.check(found, "by_duckdb")
        self.check_table(found, *found.table.fetchnumpy().values())

    def test_polars(self, recipe: Recipe) -> None:
        pytest.importorskip("polars")
        pytest.importorskip("duckdb")
        recipe.run("DuckDB")  # it defines `totals`
        found = recipe.run("Polars")
        self.check(found, "by_polars")
        self.check_table(found, *(found.entries[name].to_numpy() for name in found.entries.columns))

    def check(self, found: Any, path: str) -> None:
        got = open_shards(path).to_csr()
        np.testing.assert_array_equal(got.toarray(), found.train.toarray())
        assert found.model.item_factors.shape == (100, 8)

    def check_table(self, found: Any, users: Any, items: Any, values: Any) -> None:
        dense = np.zeros(found.train.shape, np.float32)
        dense[users, items] = values
        assert len(users) == found.train.nnz
        np.testing.assert_array_equal(dense, found.train.toarray())
