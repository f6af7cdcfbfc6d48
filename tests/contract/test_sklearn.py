"""scikit-learn's estimator checks, without expected failures, and its tools on sparse data."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import sklearn
from models import make
from scipy import sparse
from sklearn.base import clone
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.metadata_routing import get_routing_for_object

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.compat import AlternatingLeastSquares

# scikit-learn's checks use every sparse format; other tests check the warnings
pytestmark = pytest.mark.filterwarnings("ignore:Method expects CSR")


def small(**changes: Any) -> TPUAlternatingLeastSquares:
    """A small model with the default solver."""
    settings = {"use_cg": True, "factors": 4, "iterations": 4, **changes}
    return make(TPUAlternatingLeastSquares, **settings)


@pytest.mark.slow
@parametrize_with_checks(
    [
        TPUAlternatingLeastSquares(
            factors=4, iterations=3, objective="ials", unobserved_weight=0.5, use_cg=False
        ),
        AlternatingLeastSquares(factors=4, iterations=3, warm_start=False),
    ]
)
def test_scikit_learn_checks_of_variants(estimator: Any, check: Any) -> None:
    check(estimator)


@parametrize_with_checks([TPUAlternatingLeastSquares()])
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


class TestProtocol:
    def test_clone_and_parameters(self, counts: sparse.csr_matrix) -> None:
        model = small(objective="ials", unobserved_weight=0.2, dtype="bfloat16")
        model.fit(counts, show_progress=False)
        other = clone(model)
        assert other.get_params() == model.get_params()
        assert other.user_factors is None and not hasattr(other, "n_iter_")
        other.set_params(factors=2, regularization=1.0).fit(counts, show_progress=False)
        assert other.item_factors.shape == (20, 2)
        assert model.item_factors.shape == (20, 4)

    def test_repr_and_tags(self) -> None:
        assert "factors=4" in repr(small())
        tags = sklearn.utils.get_tags(small())
        assert tags.input_tags.sparse and not tags.input_tags.positive_only
        assert not tags.non_deterministic and tags.transformer_tags is not None

    def test_fit_transform_equals_fit_then_transform(self, counts: sparse.csr_matrix) -> None:
        both = small().fit_transform(counts)
        np.testing.assert_allclose(both, small().fit(counts).transform(counts), atol=1e-6)
        assert both.shape == (30, 4)

    def test_number_of_features_is_checked(self, counts: sparse.csr_matrix) -> None:
        model = small().fit(counts, show_progress=False)
        for call in (model.transform, model.score):
            with pytest.raises(ValueError, match="features"):
                call(counts[:, :10])

    def test_partial_fit_items_adds_features(self, counts: sparse.csr_matrix) -> None:
        model = small().fit(counts, show_progress=False)
        model.partial_fit_items([20], counts.T.tocsr()[3])
        assert model.n_features_in_ == 21
        wider = sparse.csr_matrix((counts.data, counts.indices, counts.indptr), shape=(30, 21))
        assert model.transform(wider).shape == (30, 4)

    @pytest.mark.parametrize("container", ["default", "pandas"])
    def test_set_output(self, counts: sparse.csr_matrix, container: str) -> None:
        model = small().set_output(transform=container).fit(counts, show_progress=False)
        out = model.transform(counts)
        names = [f"tpualternatingleastsquares{i}" for i in range(4)]
        assert list(model.get_feature_names_out()) == names
        if container == "pandas":
            assert list(out.columns) == names and len(out) == 30
        else:
            assert type(out) is np.ndarray

    def test_data_frames_set_feature_names(self, counts: sparse.csr_matrix) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(counts.toarray(), columns=[f"item {i}" for i in range(20)])
        model = small().fit(frame, show_progress=False)
        assert list(model.feature_names_in_) == list(frame.columns)
        with pytest.raises(ValueError, match="feature names"):
            model.transform(frame[frame.columns[::-1]])

    def test_float64_is_preserved_with_dtype_float64(self, counts: sparse.csr_matrix) -> None:
        for dtype in (np.float32, np.float64):
            model = small(dtype=dtype).fit(counts, show_progress=False)
            assert model.transform(counts).dtype == dtype


class TestPipelines:
    def test_pipeline(self, counts: sparse.csr_matrix) -> None:
        pipe = make_pipeline(TfidfTransformer(), small())
        pipe.fit(counts, tpualternatingleastsquares__show_progress=False)
        assert pipe.transform(counts).shape == (30, 4)
        assert 0 <= pipe.score(counts) <= 1
        names = list(pipe[-1].get_feature_names_out())
        assert len(names) == 4
        other = pickle.loads(pickle.dumps(pipe))
        np.testing.assert_array_equal(other.transform(counts), pipe.transform(counts))

    def test_as_a_step_before_another(self, counts: sparse.csr_matrix) -> None:
        pipe = make_pipeline(small(), MaxAbsScaler())
        assert np.abs(pipe.fit_transform(counts)).max() == pytest.approx(1)

    @pytest.mark.skipif(
        "sparse_interface" not in sklearn.get_config(),
        reason="this scikit-learn has no such option",
    )
    def test_upstream_sparse_arrays(self, counts: sparse.csr_matrix) -> None:
        with sklearn.config_context(sparse_interface="sparray"):
            pipe = make_pipeline(TfidfTransformer(), small()).fit(counts)
        expected = make_pipeline(TfidfTransformer(), small()).fit(counts)
        np.testing.assert_allclose(pipe.transform(counts), expected.transform(counts), atol=1e-6)

    @pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array])
    def test_grid_search(self, counts: sparse.csr_matrix, kind: Any) -> None:
        pipe = Pipeline([("scale", MaxAbsScaler()), ("als", small())])
        grid = {"als__regularization": [0.01, 10.0], "als__alpha": [1.0, 20.0]}
        search = GridSearchCV(pipe, grid, cv=KFold(3), error_score="raise")
        search.fit(kind(counts), als__show_progress=False)
        results = search.cv_results_
        assert np.isfinite(results["mean_test_score"]).all()
        assert len(set(results["mean_test_score"])) > 1
        assert 0 <= search.score(counts) <= 1
        assert search.best_estimator_["als"].user_factors.shape[0] == 30

    def test_both_matrix_kinds_score_alike(self, counts: sparse.csr_matrix) -> None:
        values = [
            cross_val_score(small(), kind(counts), cv=3)
            for kind in (sparse.csr_matrix, sparse.csr_array)
        ]
        np.testing.assert_array_equal(*values)

    @pytest.mark.slow
    def test_grid_search_in_several_processes(self, counts: sparse.csr_matrix) -> None:
        grid = {"regularization": [0.01, 1.0]}
        searches = [
            GridSearchCV(small(devices=1), grid, cv=2, n_jobs=jobs, error_score="raise").fit(counts)
            for jobs in (1, 2)
        ]
        np.testing.assert_allclose(*(s.cv_results_["mean_test_score"] for s in searches), atol=1e-6)

    def test_scores_order_models(self, groups: sparse.csr_matrix) -> None:
        order = np.random.default_rng(0).permutation(24)
        good = cross_val_score(small(factors=3), groups[order], cv=3).mean()
        bad = cross_val_score(small(iterations=0), groups[order], cv=3).mean()
        assert good > bad


class TestMetadataRouting:
    def test_off(self, counts: sparse.csr_matrix) -> None:
        seen: list[int] = []
        pipe = make_pipeline(MaxAbsScaler(), small(iterations=2))
        pipe.fit(
            counts,
            tpualternatingleastsquares__show_progress=False,
            tpualternatingleastsquares__callback=lambda i, *_: seen.append(i),
        )
        assert seen == [0, 1]

    def test_on(self, counts: sparse.csr_matrix) -> None:
        seen: list[int] = []
        with sklearn.config_context(enable_metadata_routing=True):
            model = small(iterations=2).set_fit_request(show_progress=True, callback=True)
            pipe = make_pipeline(MaxAbsScaler(), model)
            pipe.fit(counts, show_progress=False, callback=lambda i, *_: seen.append(i))
        assert seen == [0, 1]

    @pytest.mark.parametrize("cls", [TPUAlternatingLeastSquares, AlternatingLeastSquares])
    def test_the_matrix_is_no_metadata(self, cls: Any) -> None:
        routing = get_routing_for_object(cls())
        assert set(routing.fit.requests) == {
            "show_progress", "callback", "user_features", "item_features",
        }  # fmt: skip
        with (
            sklearn.config_context(enable_metadata_routing=True),
            pytest.raises(TypeError, match="user_items"),
        ):
            cls().set_fit_request(user_items=True)
