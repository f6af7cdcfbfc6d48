"""The directive `example`: a script of examples/, and what it prints, run while the site is built.

    ```{example} groceries.py
    ```

With the option ``:not-run: REASON`` the page says why there is no output. Outputs are kept in
docs/_build/examples, named after a digest of the script and of the package.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "_build" / "examples"
SECONDS = 300
log = logging.getLogger(__name__)
# One script at a time, while Sphinx reads other pages.
_pool = ThreadPoolExecutor(1)
_runs: dict[str, Future[str]] = {}


def _digest(script: Path) -> str:
    """Name of the output of a script: it changes with the script and with the package."""
    found = hashlib.sha256(script.read_bytes())
    for source in sorted((ROOT / "tpu_als").rglob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()[:16]


def output_of(name: str) -> str:
    """What the script prints. RuntimeError if it fails."""
    script = ROOT / "examples" / name
    kept = KEPT / f"{script.stem}-{_digest(script)}.txt"
    if kept.exists():
        return kept.read_text("utf-8")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), TQDM_DISABLE="1")
    environment.pop("TPU_ALS_DATA", None)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, timeout=SECONDS, text=True,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(done.stdout, "utf-8")
    return done.stdout


def _run(name: str) -> Future[str]:
    if name not in _runs:
        _runs[name] = _pool.submit(output_of, name)
    return _runs[name]


class Example(SphinxDirective):
    """Shows a script and its output."""

    required_arguments = 1
    option_spec: ClassVar = {"not-run": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        script = ROOT / "examples" / name
        self.env.note_dependency(str(script))
        code = script.read_text("utf-8")
        shown = nodes.literal_block(code, code, language="python")
        if "not-run" in self.options:
            text = f"Not run while this site is built: {self.options['not-run']}."
            return [nodes.note("", nodes.paragraph(text, text)), shown]
        try:
            printed = _run(name).result()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            log.warning("%s", error, location=self.get_location())
            printed = str(error)
        title = "What it prints"
        heading = nodes.section("", nodes.title(title, title), ids=["what-it-prints"])
        heading += nodes.literal_block(printed, printed, language="none")
        script_section = nodes.section("", nodes.title("The script", "The script"), shown)
        script_section["ids"] = ["the-script"]
        return [heading, script_section]


def _start(app: Any, env: Any, docnames: list[str]) -> None:
    """Start the scripts of the pages that will be read."""
    for docname in docnames:
        if docname.startswith("examples/"):
            text = Path(env.doc2path(docname)).read_text("utf-8")
            for name, option in re.findall(r"^```\{example\} (\S+)\n(:not-run:)?", text, re.M):
                if not option:
                    _run(name)


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("example", Example)
    app.connect("env-before-read-docs", _start)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
