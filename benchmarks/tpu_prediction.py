"""Time of an epoch from the cycles of its compiled programs, and a model of what has no estimate.

A phase takes the compiler's cycles at the chip's clock, plus the modelled time of its gathers:
their rows are read and written once at the bandwidth of HBM. If the lower bound (`tpu_roofline`) is
higher, it is the prediction. Phases are added; only an
exchange overlaps with the solve, if the compiler can run it in the background. Not known: the
latency of steps of loops and of collectives, gathers at less than the full bandwidth, and the
eigendecomposition of the gramian.
"""

from __future__ import annotations

from typing import Any

import tpu_roofline
from hlo_cycles import Cycles
from tpu_roofline import Slice

from tpu_als.engine.xla.data import XlaData as Data
from tpu_als.engine.xla.data import XlaSide as Side


def report(data: Data, where: Slice, programs: dict[str, Cycles]) -> dict[str, Any]:
    """Predicted seconds of each phase of both sides, and their sum."""
    found: dict[str, dict[str, Any]] = {}
    for name, side, source in (
        ("users", data.users, data.items),
        ("items", data.items, data.users),
    ):
        measured = _phases(name, side, data, where, programs)
        works = tpu_roofline.phases(side, source, data)
        works.pop("write")  # its cycles are in those of "solve"
        found[name] = {}
        for phase, work in works.items():
            bound = max(where.seconds(work).values())
            cycles, gathers = measured[phase]
            found[name][phase] = {
                "cycles_s": cycles / where.chip.clock,
                "gathers_s": gathers,
                "bound_s": bound,
                "predicted_s": max(bound, cycles / where.chip.clock + gathers),
            }
        if data.mesh.exchanges_in_background:  # the gathers of the rows to send do not overlap
            solve, exchange = found[name]["solve"], found[name]["exchange"]
            busy = exchange["cycles_s"] + exchange["gathers_s"]
            exchange["predicted_s"] = max(exchange["predicted_s"] - solve["predicted_s"], busy)
    phases = [phase for side in found.values() for phase in side.values()]
    return {
        "predicted_epoch_s": sum(phase["predicted_s"] for phase in phases),
        "in_background": data.mesh.exchanges_in_background,
        "cycles_s": sum(phase["cycles_s"] for phase in phases),
        "clock": where.chip.clock,
        **found,
    }


def _phases(
    name: str, side: Side, data: Data, where: Slice, programs: dict[str, Cycles]
) -> dict[str, tuple[float, float]]:
    """Cycles, and seconds of gathers, of each phase of a side."""

    def gathers(cycles: Cycles) -> float:
        found = cycles.unestimated.get("gather")
        return 2 * found.bytes / where.chip.memory_bandwidth if found else 0.0

    rotate = programs[f"{name}: rotate"]
    exchange = [0.0, 0.0]
    solve = [0.0, 0.0]
    solvers = [program for key, program in programs.items() if key.startswith(f"{name}: solve")]
    loops = [loop for program in solvers for loop in program.loops]
    for program in solvers:  # an exchange before the loops
        exchange[0] += program.cycles
        exchange[1] += gathers(program)
    assert side.routes is not None
    for rung, route, group in zip(side.rows.rungs, side.routes, loops, strict=True):
        [chunk] = group.loops
        n_groups = route.groups(rung.n_chunks)
        exchange[0] += n_groups * group.cycles
        exchange[1] += n_groups * gathers(group)
        solve[0] += rung.n_chunks * chunk.cycles
        solve[1] += rung.n_chunks * gathers(chunk)
    found = {
        "rotate": (_total(rotate), gathers(rotate)),
        "exchange": (exchange[0], exchange[1]),
        "solve": (solve[0], solve[1]),
    }
    if side.long is not None:
        [batch] = programs[f"{name}: long rows"].loops
        n_batches = side.long.starts.shape[-1] - 1
        steps = tpu_roofline.long_steps(side, data)
        found["long"] = (
            n_batches * batch.cycles + steps * sum(loop.cycles for loop in batch.loops),
            n_batches * gathers(batch) + steps * sum(gathers(loop) for loop in batch.loops),
        )
    return found


def _total(program: Cycles) -> float:
    """Cycles of a program whose trip counts the compiler knows; other loops count once."""
    return program.cycles + sum((loop.trips or 1) * _total(loop) for loop in program.loops)
