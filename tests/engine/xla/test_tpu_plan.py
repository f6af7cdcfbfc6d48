"""Programs of training and ranking compile for TPUs that are not here, and are as large as planned.

Their estimated cycles must not rise. Each topology is compiled in its own process: libtpu needs its
environment before JAX starts.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SCRIPT = BENCHMARKS / "tpu_plan.py"
ROWS, COLS, FACTORS = 20_000, 10_000, 32
# Lengths that are all the same: one rung a side.
SMALL = f"--rows {ROWS} --cols {COLS} --entries 3e5 --factors {FACTORS} --k 10 --queries 64 "
SMALL += "--deviation 0 --exponent 0 --values float32"


@functools.cache
def _plan(topology: str, *options: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the script prints by kind, and its programs by name."""
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--topology", topology, *SMALL.split(), *options],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    programs = {line["program"]: line for line in lines if line["what"] == "program"}
    return {line["what"]: line for line in lines}, programs


TOPOLOGIES = ["v5e:2x2", "v4:2x2x1", "v5p:2x2x1"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_all_programs_compile(topology: str) -> None:
    lines, programs = _plan(topology)
    parts = ("rotate", "solve 0", "requests, once")
    assert set(programs) == {"rank"} | {f"{s}: {p}" for s in ("users", "items") for p in parts}
    assert all(program["compiles"] for program in programs.values())
    assert lines["assumptions"]["n_chips"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_memory_adds_up(topology: str) -> None:
    """The compiler's bytes of arguments, from the plan's sizes by hand."""
    lines, programs = _plan(topology)
    kept, layout = lines["memory"], lines["layout"]
    entries = messages = 0
    for name, other in (("users", "items"), ("items", "users")):
        side, source = layout[name], layout[other]
        [[_, _, n_chunks]], [[chunks, rows]] = side["rungs"], side["routes"]
        sends = 4 * 4 * rows * -(-n_chunks // chunks)  # int32, to each of four chips
        cells = 8 * side["cells"]  # an int32 and a float32
        tables = 2 * FACTORS * (side["slots"] + source["slots"])
        expected = tables + cells + sends + 4 * side["slots"]
        found = programs[f"{name}: solve 0"]
        assert found["argument_bytes"] == pytest.approx(expected, abs=1 << 17)
        assert found["output_bytes"] == pytest.approx(2 * FACTORS * side["slots"], abs=1 << 12)
        assert found["alias_bytes"] == found["output_bytes"]
        entries, messages = entries + cells, messages + sends
    slots = layout["users"]["slots"] + layout["items"]["slots"]
    assert kept["tables"] == kept["tables_of_a_half_epoch"] == slots * FACTORS * 2
    assert (kept["entries"], kept["messages"]) == (entries, messages)
    epoch = [program for name, program in programs.items() if name.endswith(("rotate", "solve 0"))]
    code = sum(program["code_bytes"] for program in programs.values())
    assert kept["scratch"] == max(program["scratch_bytes"] for program in epoch)
    assert kept["code"] == code
    parts = 2 * kept["tables"] + entries + messages + kept["lengths"] + kept["long_entries"]
    assert kept["total"] == parts + kept["scratch"] + code
    assert sum(layout[name]["cells"] for name in ("users", "items")) * 4 >= 2 * 3e5


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_programs_exchange_the_planned_rows(topology: str) -> None:
    """Rows of the storage dtype, as many as the route says, in one all-to-all a rung."""
    lines, programs = _plan(topology)
    for name in ("users", "items"):
        [[_, rows]] = lines["layout"][name]["routes"]
        found = programs[f"{name}: solve 0"]["all_to_all_bodies_once"]
        # A group that is received in advance has an exchange of its own.
        assert found and set(found) == {f"bf16[4,{rows},{FACTORS}]"}
        received = lines["layout"][name]["received_rows"]
        if lines["prediction"]["in_background"]:  # one group more, from three other chips
            received += 3 * rows
        assert lines["epoch"][name]["exchange"]["interconnect"] == received * FACTORS * 2


def test_bytes_fall_with_the_chips() -> None:
    """At the size of WebGraph-sparse; the arithmetic alone."""
    size = ("--rows", "365.4e6", "--cols", "365.4e6", "--entries", "30e9", "--factors", "128")
    size += ("--deviation", "1.1", "--exponent", "0.88", "--no-compile")
    found = [_plan(topology, *size)[0] for topology in ("v5e:8x8", "v5e:8x16", "v5e:16x16")]
    for few, many in itertools.pairwise(found):
        sent = [plan["epoch"]["interconnect_bytes"] for plan in (few, many)]
        assert 0.49 < sent[1] / sent[0] < 0.51
        assert 0.45 <= many["memory"]["tables"] / few["memory"]["tables"] < 0.55
        assert 0.45 <= many["memory"]["entries"] / few["memory"]["entries"] < 0.55
    last = found[-1]
    assert last["memory"]["total"] < 8 * 2**30
    assert last["epoch"]["epoch_s"] < 20
    phases = [phase for side in ("users", "items") for phase in last["epoch"][side].values()]
    bounds = ("flops_s", "memory_s", "interconnect_s")
    total = sum(max(phase[bound] for bound in bounds) for phase in phases)
    assert last["epoch"]["epoch_s"] == pytest.approx(total, rel=1e-4)  # printed with six digits


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_cycles_of_solving_rows_do_not_rise(chip: str) -> None:
    """At most a fifth above the recorded ones, and a quarter of those of XLA's own products."""
    pytest.importorskip("libtpu")
    script = BENCHMARKS / "tpu_cycles.py"
    options = ("--chips", chip, "--products", "tiles", "--lengths", "16", "128", "1024", "--check")
    done = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = json.loads(script.with_suffix(".json").read_text())
    for line in done.stdout.splitlines():
        found = json.loads(line)
        before = records[f"{chip} bfloat16 128 xla {found['length']}"]
        most = 4 if chip == "v5e" else 2
        assert most * found["cycles_per_cell"] < before


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_predictions_add_up(topology: str) -> None:
    lines, programs = _plan(topology)
    found = lines["prediction"]
    phases = [phase for side in ("users", "items") for phase in found[side].values()]
    assert all(phase["bound_s"] > 0 for phase in phases)
    total = sum(phase["predicted_s"] for phase in phases)
    assert found["predicted_epoch_s"] == pytest.approx(total, rel=1e-4)
    for name in ("users", "items"):
        [group] = programs[f"{name}: solve 0"]["cycles"]["loops"]
        [chunk] = group["loops"]
        [[_, _, n_chunks]] = lines["layout"][name]["rungs"]
        seconds = n_chunks * chunk["cycles"] / found["clock"]
        assert found[name]["solve"]["cycles_s"] == pytest.approx(seconds, rel=1e-4)
        assert set(chunk["unestimated"]) == {"gather"}
        # The exchange of a single group is moved out of its loop.
        whole = programs[f"{name}: solve 0"]["cycles"]
        assert "all-to-all" in {**group["unestimated"], **whole["unestimated"]}


HLO = """HloModule a
%body (p: f32[8]) -> f32[8] {
  %b = (s32[], f32[8,4]{1,0:T(8,128)}) fusion(%p), backend_config={"estimated_cycles":"30"}
  ROOT %g = bf16[16,4]{1,0} fusion(%t, %i), metadata={op_name="jit(f)/while/body/gather"}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %f = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"12"}
  %w = (s32[], f32[8]) while(%f), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = ((f32[2]), f32[2], u32[]{:S(2)}) all-to-all-start(%f), channel_id=1
  %n = f32[9] custom-call(%f), custom_call_target="ConcatBitcast"
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_cycles_are_read_from_compiled_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    hlo_cycles = importlib.import_module("hlo_cycles")
    found = hlo_cycles.of_program(HLO)
    [loop] = found.loops
    assert (found.cycles, loop.cycles, loop.trips) == (12, 30, 3)
    assert found.unestimated == {"all-to-all": hlo_cycles.Unestimated(1, 8)}
    assert loop.unestimated == {"gather": hlo_cycles.Unestimated(1, 16 * 4 * 2)}
    with pytest.raises(ValueError, match="compile it for a TPU"):
        hlo_cycles.of_program(HLO.replace("estimated_cycles", "cost"))
