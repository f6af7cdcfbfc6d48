"""The scripts that check the documents, and the notebook on a file of another kind."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

DOCS = Path(__file__).parents[1] / "docs"
CI = Path(__file__).parents[1] / ".ci"


def script(name: str, folder: Path = CI) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


class TestDocuments:
    def test_blocks_share_names_and_a_folder(self, page: Path) -> None:
        page.write_text(
            "<!-- run\nopen('made', 'w').write('x')\n-->\n\n"
            "```python\nfound = open('made').read()\n```\n\n"
            "```python\n>>> found\n'x'\n```\n"
        )
        counts = script("documents").run(str(page))
        assert (counts.ran, counts.hidden, counts.examples, counts.errors) == (3, 1, 1, ())
        assert not Path("made").exists()

    @pytest.mark.parametrize(
        "text",
        [
            "```python\nraise ValueError('wrong')\n```\n",
            "```python\n>>> 1 + 1\n3\n```\n",
            "```python\nprint(2)\n```\n\n<!-- prints -->\n```text\n3\n```\n",
            "```python\nx = 1\n",  # without an end
            "<!-- run\nraise ValueError('wrong')\n-->\n",
        ],
    )
    def test_reports_what_fails(self, page: Path, text: str) -> None:
        page.write_text(text)
        (error,) = script("documents").run(str(page)).errors
        assert "wrong" in error or "page.md" in error

    def test_output_is_compared(self, page: Path) -> None:
        page.write_text("```python\nprint(2)\n```\n\n<!-- prints -->\n```text\n2\n```\n")
        counts = script("documents").run(str(page))
        assert (counts.ran, counts.examples, counts.errors) == (1, 1, ())

    def test_exempt_blocks_have_a_reason_and_compile(self, page: Path) -> None:
        page.write_text("<!-- not run: many hosts -->\n```python\nraise ValueError\n```\n")
        counts = script("documents").run(str(page))
        assert counts.ran == 0 and counts.errors == ()
        assert counts.not_run == (f"{page}:2: many hosts",)
        page.write_text("<!-- not run: many hosts -->\n```python\nfor\n```\n")
        with pytest.raises(SyntaxError):
            script("documents").run(str(page))


class TestLinks:
    def test_finds_missing_files_and_headings(self, page: Path) -> None:
        page.write_text(
            "# A title: `code`\n[a](page.md#a-title-code) [b](#a-title-code) [c](https://a.b)\n"
            "[d](none.md) [e](page.md#none) `[f](none.md)`\n"
        )
        found = script("links").broken(page)
        assert [problem.rsplit(" ", 1)[1] for problem in found] == ["none.md", "page.md#none"]


@pytest.mark.slow
def test_first_hour_on_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader replaces the first cell and the line that reads the file, as the page says."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    rng, n = np.random.default_rng(5), 9_000
    listeners = rng.integers(400, size=n)
    genres = np.where(rng.random(n) < 0.7, listeners % 5, rng.integers(5, size=n))
    minutes = np.sort(rng.integers(200 * 1_440, size=n))
    events = {
        "listener": listeners,  # numbers
        "track": genres * 40 + rng.geometric(0.08, n) % 40,
        "when": pd.Timestamp("2025-03-01") + pd.to_timedelta(minutes, "min"),
        "device": "phone",
    }
    pd.DataFrame(events).to_csv("mine.csv", index=False)

    text = (DOCS / "first-hour.md").read_text(encoding="utf-8")
    found = re.findall(r"```\{code-cell\} ipython3\n(?::tags:[^\n]*\n)?(.*?)```", text, re.DOTALL)
    made_up, *cells = found
    assert "SHELVES" in made_up and len(cells) > 10
    columns = '{"listener": "customer", "track": "sku", "when": "time"}'
    code = "".join(cells).replace('"12s"', '"3s"')
    reading = 'pd.read_csv("purchases.csv")'
    assert reading in code
    code = code.replace(reading, f'pd.read_csv("mine.csv").rename(columns={columns})')
    names: dict[str, Any] = {}
    exec(code, names)
    scores = names["table"]["ndcg@10"]
    assert scores["tuned"] > max(scores["popular"], scores["first fit"])


def test_the_reference_lists_every_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert script("conf", DOCS).missing_public_names() == []
