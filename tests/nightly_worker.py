"""Runs the job of `examples/nightly.py` in a child that kills itself at a replacement of a file.

    nightly_worker.py FOLDER MOMENT NUMBER

MOMENT is "before" or "after" the replacement, and NUMBER counts the replacements from 1.
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
calls = 0


def deadly(*arguments: Any) -> None:
    """Replace a file, or die."""
    global calls
    calls += 1
    is_last = calls == int(sys.argv[3])
    if is_last and sys.argv[2] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
    if is_last:
        os.kill(os.getpid(), signal.SIGKILL)


os.replace = deadly  # type: ignore[assignment]
nightly.run(Path(sys.argv[1]))
