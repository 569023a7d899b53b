"""Runs steps in processes of their own, within a time limit, and records each at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.driver import ROOT
from benchmarks.gpu.records import Outcome, Record, Records
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import Step

LEAST_SECONDS = 8.0  # no step is worth starting with less
SIDE_BY_SIDE = 8

Result = tuple[Outcome, dict[str, Any], str]


@dataclass
class Runner:
    """Runs steps until a deadline: checks side by side, figures alone."""

    setting: Setting
    records: Records
    log: Path  # what the steps print
    deadline: float  # of ``time.monotonic``
    machine: dict[str, str]

    def __post_init__(self) -> None:
        self._groups: set[int] = set()  # of the processes that run
        self._mutex = threading.Lock()
        self._is_stopped = False

    def run(self, steps: Sequence[Step], show: Callable[[Record], None]) -> None:
        """Run them in order, as far as time permits."""
        for is_alone, group in groupby(steps, key=lambda step: step.alone):
            workers = 1 if is_alone else max(1, min(SIDE_BY_SIDE, (os.cpu_count() or 1) // 2))
            with ThreadPoolExecutor(workers) as pool:
                try:
                    list(pool.map(lambda step: self._run_step(step, show), group))
                except BaseException:  # Ctrl-C: no process outlives this one
                    self._is_stopped = True
                    for number in tuple(self._groups):
                        _kill(number)
                    raise

    def _run_step(self, step: Step, show: Callable[[Record], None]) -> None:
        began = time.monotonic()
        result = self._measure(step)
        seconds, of = round(time.monotonic() - began, 1), self.setting
        with self._mutex:
            if result is not None and not self._is_stopped:
                outcome, figures, reason = result
                record = Record(
                    step.name, outcome, seconds, of.device, of.tiny, figures, reason, self.machine
                )
                self.records.add(record)
                show(record)

    def _measure(self, step: Step) -> Result | None:
        """None if there is no time."""
        if step.missing:
            return "not installed", {}, ", ".join(step.missing)
        seconds_left = self.deadline - time.monotonic()
        if seconds_left < LEAST_SECONDS or self._is_stopped:
            return None
        command = [self.setting.python, "-m", "benchmarks.gpu.child", step.name, *self.setting.arguments]
        with self.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(  # a group: what it starts is killed with it
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, process_group=0
            )
        self._groups.add(process.pid)
        try:
            output, _ = process.communicate(timeout=min(step.seconds, seconds_left))
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            process.communicate()
            if seconds_left < step.seconds:
                return "cut off", {}, f"after {seconds_left:.0f} s"
            return "too slow", {}, f"took more than {step.seconds:.0f} s"
        finally:
            self._groups.discard(process.pid)
        lines = output.splitlines() or [f"ended with {process.returncode}; see {self.log}"]
        return ("failed", {}, lines[-1]) if process.returncode else ("ok", json.loads(lines[-1]), "")


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
