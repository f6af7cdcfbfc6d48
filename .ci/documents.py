"""Run the Python blocks of Markdown files as they stand, each file in its own process.

    python .ci/documents.py README.md docs/*.md

The blocks of a file share names, and a temporary directory is the working directory. Blocks with
prompts are doctests, others are executed. Three HTML comments are understood:

    <!-- run                    code that readers do not see, which makes what later blocks need
    code
    -->

    <!-- not run: reason -->    before a block that a single machine cannot run; it must compile

    <!-- prints -->         between a block and a block of text, which the first must print; as in
                            doctests, `...` stands for any text

Cells of notebooks (``{code-cell}``) are run when the site is built, and not here.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import sys
import tempfile
import textwrap
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = re.compile(
    r"^<!-- run\n(?P<hidden>.*?)^-->$"
    r"|(?:^<!-- not run: (?P<reason>[^>]+?) -->\n+)?"
    r"^(?P<indent> *)```(?:python|pycon|py)\n(?P<shown>.*?)^(?P=indent)```$"
    r"(?:\n+<!-- prints -->\n+```text\n(?P<printed>.*?)^```$)?",
    flags=re.DOTALL | re.MULTILINE,
)
FENCE = re.compile(r"^ *```(?:python|pycon|py)\b", flags=re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Counts(NamedTuple):
    """What happened to the blocks of a file."""

    ran: int
    examples: int
    hidden: int
    not_run: tuple[str, ...]
    errors: tuple[str, ...]


def run(name: str) -> Counts:
    """Run the blocks of one file, in this process."""
    text = Path(name).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    names: dict[str, Any] = {"__name__": "__main__"}
    ran = examples = hidden = 0
    not_run, errors = [], []
    n_fences, n_found = len(FENCE.findall(text)), sum(b["shown"] is not None for b in blocks)
    if n_fences != n_found:
        errors.append(f"{name}: {n_fences} Python blocks begin, but only {n_found} are complete")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block in blocks:
            part = "shown" if block["shown"] is not None else "hidden"
            line = text[: block.start(part)].count("\n")
            code = textwrap.dedent(block[part])
            if block["reason"]:
                compile(code, name, "exec")
                not_run.append(f"{name}:{line}: {' '.join(block['reason'].split())}")
                continue
            if ">>>" in code:
                count, problem = doctests(code, names, name, line)
            else:
                count, problem = execute(code, names, name, line, block["printed"])
            ran, examples, hidden = ran + 1, examples + count, hidden + (part == "hidden")
            if problem:
                errors.append(problem)
                break  # later blocks may depend on this one
    return Counts(ran, examples, hidden, tuple(not_run), tuple(errors))


def doctests(code: str, names: dict[str, Any], name: str, line: int) -> tuple[int, str]:
    """Run a block with prompts; return the number of its examples and what went wrong."""
    runner, report = doctest.DocTestRunner(optionflags=FLAGS), io.StringIO()
    test = doctest.DocTestParser().get_doctest(code, names, name, name, line)
    runner.run(test, out=report.write, clear_globs=False)
    names.update(test.globs)
    return len(test.examples), report.getvalue()


def execute(
    code: str, names: dict[str, Any], name: str, line: int, expected: str | None
) -> tuple[int, str]:
    """Run a block without prompts; return 1 if its output was checked, and what went wrong."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, name, "exec"), names)
    except Exception:  # noqa: BLE001
        return 0, traceback.format_exc()
    checker = doctest.OutputChecker()
    if expected is None or checker.check_output(expected, printed.getvalue(), FLAGS):
        return int(expected is not None), ""
    return 1, f"{name}:{line}: expected\n{expected}\nprinted\n{printed.getvalue()}"


def main(files: list[str]) -> int:
    """Run all files and print what happened; return 1 after an error."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    n_ran = n_hidden = 0
    not_run: list[str] = []
    n_errors = 0
    spawn = get_context("spawn")
    # A process for each file, because JAX takes its settings once.
    with ProcessPoolExecutor(2, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name, found in zip(files, pool.map(run, files), strict=True):
            n_ran, n_hidden = n_ran + found.ran, n_hidden + found.hidden
            n_errors += len(found.errors)
            not_run += found.not_run
            if found.ran or found.errors:
                print(f"{name}: {found.ran} blocks ran, {found.examples} outputs checked")
            for error in found.errors:
                print(error)
    print(f"{n_ran} blocks ran ({n_hidden} of them hidden), {len(not_run)} were not run")
    for reason in not_run:
        print(f"  not run: {reason}")
    return int(n_errors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
