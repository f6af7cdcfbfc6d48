"""Settings of the documentation site. CONTRIBUTING.md has the command that builds it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]

import tpu_als  # noqa: E402

project = "tpu_als"
author = "The tpu_als authors"
version = release = tpu_als.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_design",
    "example",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
nitpicky = True
# Bases of public classes that have no page, and words of signatures that are not Python objects.
nitpick_ignore_regex = [
    ("py:.*", r"tpu_als\..*"),
    ("py:.*", r"sklearn\..*"),
    ("py:.*", r"numpy\..*"),
]
suppress_warnings = ["config.cache"]

# Pages are read on a code host too, so they use plain Markdown where it suffices.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_timeout = 180
nb_execution_raise_on_error = True
nb_merge_streams = True

autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "groupwise"
toc_object_entries_show_parents = "hide"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = False
default_role = "code"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = f"tpu_als {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {"**": ["pages.html"]}
html_theme_options = {
    "logo": {"text": "tpu_als"},
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "navigation_with_keys": False,
    "show_prev_next": True,
    "show_toc_level": 2,
    "footer_start": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}
linkcheck_anchors = False

# Links of Markdown files that lead out of docs/ on a code host, and where they lead on the site.
_OUTSIDE = [
    (re.compile(r"\]\((?:\.\./)?examples/(\w+)\.py\)"), r"](/examples/\1.md)"),
    (re.compile(r"\[([^\]]*)\]\((?:\.\./)?(?:benchmarks|examples)/?(?:\w+\.py)?\)"), r"\1"),
    (re.compile(r"\]\(docs/"), "](/"),
    (re.compile(r"\]\((?:\.\./)?README\.md(?:#[\w-]+)?\)"), "](/index.md)"),
    (re.compile(r"\]\((?:\.\./)?(CHANGELOG|CONTRIBUTING|SECURITY)\.md"),
     lambda found: f"](/{found[1].lower()}.md"),
]  # fmt: skip
_MODULES = ("", "baselines", "compat", "datasets", "engine", "evaluation", "exceptions",
            "plotting", "shards", "weighting")  # fmt: skip


def _rewrite_links(app: Any, docname: str, source: list[str]) -> None:
    """Lead links to files outside docs/ to the pages that show them."""
    for pattern, replacement in _OUTSIDE:
        source[0] = pattern.sub(replacement, source[0])


def _included(app: Any, path: Path, docname: str, source: list[str]) -> None:
    _rewrite_links(app, docname, source)


def _skip_inherited(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    """Leave out methods of scikit-learn's base classes, which its own pages describe."""
    return skip or (getattr(obj, "__module__", None) or "").startswith("sklearn")


def missing_public_names() -> list[str]:
    """Public names of the package that the API reference does not list, in any module."""
    listed = set(re.findall(r"^ {3}([\w.]+)$", (HERE / "api.md").read_text("utf-8"), re.MULTILINE))
    missing = []
    for module in _MODULES:
        try:
            found = importlib.import_module(f"tpu_als.{module}".rstrip("."))
        except ModuleNotFoundError as error:
            if error.name != f"tpu_als.{module}":
                raise
            continue
        for name in getattr(found, "__all__", ()):
            full = f"{module}.{name}".lstrip(".")
            is_public = name not in _MODULES and not name.startswith("__")
            is_listed = full in listed or (
                name in listed and getattr(tpu_als, name, None) is getattr(found, name)
            )
            if is_public and not is_listed:
                missing.append(full)
    return missing


def _check_api(app: Any) -> None:
    from sphinx.util import logging

    for name in missing_public_names():
        logging.getLogger(__name__).warning("docs/api.md does not list the public name %s", name)


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("source-read", _rewrite_links)
    app.connect("include-read", _included)
    app.connect("autodoc-skip-member", _skip_inherited)
    app.connect("builder-inited", _check_api)
