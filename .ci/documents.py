"""Run the Python blocks of Markdown files as doctests; blocks without prompts must compile."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(path: Path) -> tuple[int, int]:
    """Return how many examples of a file failed and ran; its blocks share one namespace."""
    text, names = path.read_text(encoding="utf-8"), {"__name__": "__main__"}
    runner, parser = doctest.DocTestRunner(optionflags=FLAGS), doctest.DocTestParser()
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        if ">>>" in block[1]:
            test = parser.get_doctest(block[1], names, str(path), str(path), line)
            runner.run(test, clear_globs=False)
            names.update(test.globs)
        else:
            compile("\n" * line + block[1], str(path), "exec")
    return runner.summarize(verbose=False)


if __name__ == "__main__":
    total = 0
    for name in sys.argv[1:]:
        failed, attempted = run(Path(name))
        print(f"{name}: {attempted} examples, {failed} failed")
        total += failed
    sys.exit(bool(total))
