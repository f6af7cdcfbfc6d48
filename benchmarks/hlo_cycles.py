"""Cycles of a program for TPUs, as its compiler estimates them.

The compiled text has `"estimated_cycles"` for each fusion, which the compiler uses to choose tiles
and layouts. They include the time to read operands that are in HBM. Gathers, collectives, sorts and
custom calls have no estimate: they are counted by kind, with their bytes. Background copies, and
custom calls that do nothing at run time, are ignored. The bodies of loops are kept apart, because
their trip counts are often known at run time only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BODY = re.compile(r"\bbody=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"(pred|[a-z]+)(\d*)\[([\d,]*)\]")
# Instructions whose time is not estimated and matters.
_FREE = ("ConcatBitcast", "AssumeGatherIndicesInBound")  # targets of custom calls
_KINDS = ("gather", "scatter", "all-to-all", "all-reduce", "custom-call", "sort")


@dataclass
class Unestimated:
    """Instructions of a kind that have no estimate: their number, and bytes of their results."""

    count: int = 0
    bytes: int = 0


@dataclass
class Cycles:
    """Cycles of the entry of a program, or of one trip of a loop.

    Attributes
    ----------
    cycles : int
        Sum of all estimates, without those of loops.
    trips : int or None
        Trips of this loop, if the compiler knows them.
    unestimated : dict of str to Unestimated
        By kind.
    loops : list of Cycles
        The loops inside.
    """

    cycles: int = 0
    trips: int | None = None
    unestimated: dict[str, Unestimated] = field(default_factory=dict)
    loops: list[Cycles] = field(default_factory=list)


def of_program(text: str) -> Cycles:
    """Read the cycles of a compiled program from its text.

    Raises
    ------
    ValueError
        If the text has no estimates, because it is not for a TPU.
    """
    if not _CYCLES.search(text):
        raise ValueError("the program's text has no estimated_cycles: compile it for a TPU")
    computations, entry, current = dict[str, list[str]](), None, list[str]()
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(found[1])
    assert entry is not None
    return _sum(computations, entry)


def _sum(computations: dict[str, list[str]], name: str) -> Cycles:
    found = Cycles()
    for instruction in computations[name]:
        if body := _BODY.search(instruction):
            loop = _sum(computations, body[1])
            trips = _TRIPS.search(instruction)
            loop.trips = int(trips[1]) if trips else None
            found.loops.append(loop)
        elif estimate := _CYCLES.search(instruction):
            found.cycles += int(estimate[1])
        elif kind := _kind(instruction):
            what = found.unestimated.setdefault(kind, Unestimated())
            what.count += 1
            what.bytes += _bytes(instruction)
    return found


def _kind(instruction: str) -> str | None:
    """Kind of an instruction without an estimate, or None if its time does not matter."""
    called = _split(instruction)[1].removesuffix("-start")
    if called == "custom-call" and any(f'"{target}"' in instruction for target in _FREE):
        return None
    if called in _KINDS:
        return called
    named = _OP_NAME.search(instruction)
    last = named[1].rpartition("/")[2] if named else ""
    return last if called == "fusion" and last in _KINDS else None


def _split(instruction: str) -> tuple[str, str]:
    """Type of an instruction's result, and its operation."""
    depth = 0
    for at, character in enumerate(instruction):
        depth += (character == "(") - (character == ")")
        if character == " " and not depth:
            return instruction[:at], instruction[at + 1 :].partition("(")[0]
    return instruction, ""


def _bytes(instruction: str) -> int:
    """Bytes of the largest array of an instruction's result."""
    sizes = [0]
    for kind, bits, shape in _ARRAY.findall(_split(instruction)[0]):
        count = math.prod(int(axis) for axis in shape.split(",") if axis)
        sizes.append(count * (1 if kind == "pred" else int(bits or 8) // 8))
    return max(sizes)
