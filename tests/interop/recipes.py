"""Runs the code blocks of docs/interoperation.md."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "interoperation.md"
MODULE = "recipe_of_the_document"

_HEADING = re.compile(r"^## (.*)$", flags=re.MULTILINE)
_BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def sections() -> dict[str, list[str]]:
    """The code blocks by heading, each after as many empty lines as stand before it in the file.

    The blocks before the first heading have the key "".
    """
    text = DOCUMENT.read_text(encoding="utf-8")
    starts = [(0, "")] + [(found.start(), found[1]) for found in _HEADING.finditer(text)]
    found: dict[str, list[str]] = {heading: [] for _, heading in starts}
    for block in _BLOCK.finditer(text):
        heading = [name for start, name in starts if start <= block.start()][-1]
        found[heading].append("\n" * text[: block.start(1)].count("\n") + block[1])
    return found


class Recipe:
    """A module in which blocks run one after the other; their names are its attributes."""

    def __init__(self) -> None:
        # Libraries import or pickle classes of a recipe by the name of their module.
        self.module = sys.modules[MODULE] = types.ModuleType(MODULE)
        self.run("")

    def run(self, heading: str, first: int = 0, last: int | None = None) -> Any:
        """Run some of the blocks below a heading; return the module."""
        blocks = sections()[heading][first:last]
        assert blocks, heading
        for block in blocks:
            exec(compile(block, str(DOCUMENT), "exec"), vars(self.module))
        return self.module
