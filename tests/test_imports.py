"""Rules on imports: which modules import which, and that an import has no side effects."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tpu_als

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tpu_als"
FILES = sorted(PACKAGE.glob("**/*.py"))
HOST_ONLY = [
    "baselines",
    "datasets",
    "evaluation",
    "shards",
    "storage",
    "validation",
    "compat",
    "exceptions",
    "host",
    "parameters",
    "pipelines",
    "recommender",
    "subclasses",
    "weighting",
    "engine_options",
    "implicit_api",
    "serving",
    "engine/layout",
    "engine/cells",
    "engine/digests",
    "training/initial",
    "training/progress",
]


def tree(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(node: ast.AST) -> list[str]:
    """Dotted names of an import statement, including the names after ``import``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = [*["tpu_als"] * node.level, *([node.module] if node.module else [])]
        return [".".join([*module, alias.name]) for alias in node.names]
    return []


def needs_jax(name: str) -> bool:
    """Whether a module may be imported late, because it imports JAX."""
    return name.startswith(("tpu_als.engine.xla", "tpu_als.training.checkpoint"))


def is_for_types(node: ast.AST, module: ast.Module) -> bool:
    """Whether an import is below ``if TYPE_CHECKING:``."""
    for statement in module.body:
        if isinstance(statement, ast.If) and getattr(statement.test, "id", "") == "TYPE_CHECKING":
            return node in statement.body
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_late_or_private_imports(path: Path) -> None:
    module = tree(path)
    top = {id(node) for node in module.body}
    for node in ast.walk(module):
        for name in imported(node):
            parts = name.split(".")
            if parts[0] == "tpu_als" and not needs_jax(name):
                assert id(node) in top or is_for_types(node, module), f"{path.name}: late {name}"
            elif parts[0] not in ("__future__", "tpu_als"):
                private = [part for part in parts if re.match(r"_(?!_)", part)]
                assert not private, f"{path.name}: {name} is private to another package"
            assert parts[0] not in ("benchmarks", "tests", "examples")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_print(path: Path) -> None:
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [f for f in calls if isinstance(f, ast.Name) and f.id == "print"]


def test_jax_and_processes_are_used_in_their_modules_only() -> None:
    assert not (PACKAGE / "utils.py").exists()
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        roots = {name.split(".")[0] for node in ast.walk(tree(path)) for name in imported(node)}
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name in HOST_ONLY or name.split("/")[0] in HOST_ONLY:
            assert not roots & {"jax", "jaxlib"}, f"{path.name} imports jax"
        if name != "engine/xla/mesh":
            assert "process_index" not in text and "process_count" not in text, path.name


def run(code: str) -> str:
    """Standard output of a fresh interpreter that starts from the repository root."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.slow
def test_importing_starts_no_backend() -> None:
    # the number of CPU devices can be set only before a backend starts
    code = """
import tpu_als
import jax
from sklearn.base import clone
model = clone(tpu_als.TPUAlternatingLeastSquares(factors=3, iterations=1))
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
model.fit(np.eye(4, 3), show_progress=False)
print(jax.device_count(), model.item_factors.shape)
"""
    assert run(code).split("\n")[0] == "2 (3, 3)"


@pytest.mark.slow
def test_works_without_implicit() -> None:
    code = """
import sys
sys.modules["implicit"] = None
from tpu_als import TPUAlternatingLeastSquares
import numpy as np
model = TPUAlternatingLeastSquares(2, iterations=2).fit(np.eye(4, 3), show_progress=False)
print(len(model.similar_items(0, 3)[0]), "implicit.cpu" in sys.modules)
"""
    assert run(code).split("\n")[0] == "3 False"


# What users import: the submodules of `tpu_als.__all__`, and the modules of its other names.
PUBLIC = sorted(
    {"tpu_als", *(f"tpu_als.{name}" for name in tpu_als._SUBMODULES)}
    | {name for name in tpu_als._HOME.values() if name.count(".") == 1}
)


@pytest.mark.parametrize("name", PUBLIC)
def test_tab_completion_shows_public_names_only(name: str) -> None:
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


def test_public_names() -> None:
    assert tpu_als.__version__
    assert "TPUAlternatingLeastSquares" in tpu_als.__all__
    assert (PACKAGE / "py.typed").exists()


def test_readme_begins_with_code_that_recommends(tmp_path: Path) -> None:
    """The first block runs as pasted, in an empty folder, and prints what the README says."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(
        r"```python\n(.*?)```\n+<!-- prints -->\n+```text\n(.*?)```", readme, flags=re.DOTALL
    )
    assert first is not None
    assert first.start() == readme.index("```python")
    assert len(first.group(1).strip().splitlines()) <= 12
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", first.group(1)], cwd=tmp_path, env=environment, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert printed.split() == first.group(2).split()
