"""Whether a bar is shown: the call wins over the parameter, and the environment over both."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from models import make
from scipy import sparse
from sklearn.model_selection import GridSearchCV

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.training import progress


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


@pytest.mark.parametrize(
    ("given", "verbose", "disabled"),
    [
        (None, None, None),
        (True, None, False),
        (False, None, True),
        (None, True, False),
        (None, False, True),
        (True, False, False),
        (False, True, True),
        (None, 0, True),
    ],
)
def test_show_progress_overrides_verbose(
    given: Any, verbose: Any, disabled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert progress.is_disabled(given, verbose) is disabled
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert progress.is_disabled(given, verbose) is True
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert progress.is_disabled(given, verbose) is disabled


def test_a_notebook_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_is_in_notebook", lambda: True)
    assert progress.is_disabled(None, None) is False
    assert progress.is_disabled(None, False) is True


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_bars(counts: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, shown in ((None, True), ("1", False)):
        if variable:
            monkeypatch.setenv("TQDM_DISABLE", variable)
        monkeypatch.setattr(sys, "stderr", Terminal())
        make(TPUAlternatingLeastSquares, iterations=2).fit(counts)
        assert ("2/2" in sys.stderr.getvalue()) == shown


def test_a_search_without_verbose_shows_no_bar(
    counts: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    model = make(TPUAlternatingLeastSquares, iterations=1, verbose=False)
    GridSearchCV(model, {"alpha": [1.0, 2.0]}, cv=2).fit(counts)
    assert sys.stderr.getvalue() == ""
    GridSearchCV(model, {"alpha": [1.0, 2.0]}, cv=2).fit(counts, show_progress=True)
    assert sys.stderr.getvalue().count("1/1") >= 5
