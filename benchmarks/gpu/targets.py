"""What the project aims at on one H100, and whether the records show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.records import LASTING, Record
from benchmarks.gpu.steps import OURS, PEERS

#: Tokens per second with LoRA of rank 16 in bfloat16, and their share of the arithmetic that is possible.
SPEEDS, SHARE_OF_CEILING = {"1B": 60_000, "8B": 13_000}, 0.45
FASTER, SMALLER, WEIGHTING_PERCENT = 1.3, 0.8, 1.0
STALL_MS = {"0.5 GB": 10, "14.8 GB": 50}
SHARE_OF_LIMIT, TIMES_PEERS = 0.9, 2.0
#: Group -> what must hold in each of its cases.
CHECKS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "resume": ("the same digest: alone, again, killed twice", lambda f: f["exact"] and f["kills"] == 2),
    "determinism": ("one gradient of repeated micro-steps", lambda f: f["digests"] == 1),
    "overlap": ("no torn copy beside training", lambda f: f["torn"] == 0),
    "tests": ("the project's tests on the device", lambda f: f["passed"] > 0 and f["failed"] == 0),
}
Get = Callable[[str, str], float]  # a figure of a step; NaN if there is none


class Verdict(NamedTuple):
    target: str
    value: str = ""
    word: str = "not measured"  # or "reached" or "NOT reached"


def judge(records: Mapping[str, Record], *, tiny: bool) -> list[Verdict]:
    """Every target; with tiny sizes, speeds say nothing."""

    def get(step: str, figure: str) -> float:
        return (
            float(records[step].figures.get(figure, math.nan)) if step in records and not tiny else math.nan
        )

    verdicts = list(_judge_checks(records))
    for text, sign, bound, value in _figures(get, _fastest_peers(records)):
        is_reached = value >= bound if sign == "≥" else value < bound
        number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
        word = "reached" if is_reached else "NOT reached"
        target = f"{text}: {sign} {bound:,g}"
        verdicts.append(Verdict(target) if math.isnan(value) else Verdict(target, number, word))
    return verdicts


def _judge_checks(records: Mapping[str, Record]) -> Iterator[Verdict]:
    """What must hold in every mode that ran, unless the engine says that the mode is not deterministic."""
    cases = [(name.partition(": "), record) for name, record in records.items()]
    inexact = {case for (*_, case), record in cases if record.figures.get("deterministic") is False}
    for group, (target, holds) in CHECKS.items():
        results = {
            case: record.outcome == "ok" and holds(record.figures)
            for (group_of_case, _, case), record in cases
            if group_of_case == group and record.outcome in LASTING and case not in inexact
        }
        failures = [case for case, result in results.items() if not result]
        parts = [f"{len(results) - len(failures)} of {len(results)}", *(f"NOT {case}" for case in failures)]
        if group in ("resume", "determinism"):
            parts += [f"{case} does not promise it" for case in sorted(inexact)]
        word = "NOT reached" if failures else "reached"
        yield Verdict(target, "; ".join(parts), word) if results else Verdict(target)


def _fastest_peers(records: Mapping[str, Record]) -> dict[str, str]:
    """Size -> step of the fastest peer; none while a peer that is installed was not tried."""
    fastest = {}
    for size in SPEEDS:
        peers = [records.get(f"speed {size}: {name}") for name in PEERS]
        speeds = {
            r.step: r.figures["tokens_per_second"] for r in peers if r is not None and r.outcome == "ok"
        }
        if speeds and all(r is not None and r.outcome != "cut off" for r in peers):
            fastest[size] = max(speeds, key=speeds.__getitem__)
    return fastest


def _figures(get: Get, fastest_peers: Mapping[str, str]) -> Iterator[tuple[str, str, float, float]]:
    """Text, sign, bound and value of each target."""
    for size, bound in SPEEDS.items():
        trainer, peer = f"speed {size}: {OURS}", fastest_peers.get(size, "")
        speed, tflops = get(trainer, "tokens_per_second"), get("ceilings: device", "tflops")
        name = peer.partition(": ")[2] or "none measured"
        yield f"{size}, tokens/s", "≥", bound, speed
        yield f"{size}, share of the ceiling", "≥", SHARE_OF_CEILING, get(trainer, "tflops") / tflops
        yield f"{size}, speed / fastest peer ({name})", "≥", FASTER, speed / get(peer, "tokens_per_second")
        yield f"{size}, memory / that peer", "<", SMALLER, get(trainer, "peak_gib") / get(peer, "peak_gib")
    yield "weighting, percent of a step", "<", WEIGHTING_PERCENT, get("weighting: 1B", "high_percent")
    for size, bound in STALL_MS.items():
        yield f"stall of a save of {size}, ms", "<", bound, get(f"stall: {size}", "stall_ms")
    #: Seconds of a gigabyte from the device to the disk and back.
    trips = {
        name: 1 / get(f"files: {name}", "save_disk_gbs") + 1 / get(f"files: {name}", "load_disk_gbs")
        for name in ("distrust", "torch", "dcp")
    }
    to_disk = np.minimum(get("ceilings: device", "to_page_locked_gbs"), get("ceilings: disk", "write_gbs"))
    from_disk = np.minimum(get("ceilings: device", "from_page_locked_gbs"), get("ceilings: disk", "read_gbs"))
    share = float((1 / to_disk + 1 / from_disk) / trips["distrust"])
    yield "speed, device to disk and back / slower of bus and disk", "≥", SHARE_OF_LIMIT, share
    for name in ("torch", "dcp"):
        yield f"speed, device to disk and back / {name}", "≥", TIMES_PEERS, trips[name] / trips["distrust"]
