"""Check the relative links and anchors of Markdown files, as a code host resolves them.

python .ci/links.py README.md CONTRIBUTING.md docs/*.md
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache
from pathlib import Path

FENCED = re.compile(r"^( *)(```+).*?^\1\2`*$", flags=re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?)#*$", flags=re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """The anchors that a code host gives the headings of a file."""
    found: set[str] = set()
    for title in HEADING.findall(FENCED.sub("", path.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        kept = (c for c in text if c in " -_" or unicodedata.category(c)[0] in "LN")
        slug = "".join(kept).replace(" ", "-")
        found.add(slug)
    return found


def broken(path: Path) -> list[str]:
    """Links of a file that lead nowhere."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    problems = []
    for target in LINK.findall(INLINE_CODE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        if not file.exists():
            problems.append(f"{path}: no file {target}")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.resolve()):
            problems.append(f"{path}: no heading {target}")
    return problems


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    found = [problem for file in files for problem in broken(file)]
    print("\n".join([*found, f"{len(found)} broken links in {len(files)} files"]))
    sys.exit(bool(found))
