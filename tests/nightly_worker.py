"""Runs the job of `examples/nightly.py` in a child that kills itself at a replacement of a file.

    nightly_worker.py FOLDER MOMENT NUMBER

MOMENT is "before" or "after" the replacement, and NUMBER counts the replacements in FOLDER from 1.
Replacements elsewhere are not counted: compiled code may be written to a cache on the way.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import nightly

replace = os.replace
folder = Path(sys.argv[1]).resolve()
calls = 0


def deadly(source: Any, target: Any) -> None:
    """Replace a file, or die."""
    global calls
    is_counted = folder in Path(target).resolve().parents
    calls += is_counted
    is_last = is_counted and calls == int(sys.argv[3])
    if is_last and sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if is_last:
        os.kill(os.getpid(), signal.SIGKILL)


os.replace = deadly  # type: ignore[assignment]
nightly.run(folder)
