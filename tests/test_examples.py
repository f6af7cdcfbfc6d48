"""Examples do what their docstrings say. `.ci/run` runs all of them, as a reader would."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from tpu_als import Recommender

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
    @pytest.mark.parametrize(("moment", "number"), [("before", 1), ("after", 1), ("before", 2)])
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
