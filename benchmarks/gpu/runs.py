"""Runs of the real command that are killed and resumed, and the project's own tests, on the device."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from benchmarks.driver import ROOT
from benchmarks.gpu.setting import Setting
from campaigns.session import Command
from campaigns.training_run import TrainingRun
from campaigns.triggers import once_on_disk
from distrust.config import flag

Figures = dict[str, Any]
SAVES_BEFORE_A_KILL = 2
FOLDERS = ["tests/checkpoint", "tests/engines"]  # others import libraries that a GPU does not need


def resume(setting: Setting, options: Mapping[str, Any]) -> Figures:
    """Train alone, alone again, and killed twice by SIGKILL and resumed: do all end in the same state?"""
    work = setting.work("40M")
    steps, save_every = ("12", "2") if setting.tiny else ("60", "5")
    flags = [
        *("--model", str(work.folder / "model"), "--data", str(work.folder / "data.jsonl")),
        *("--device", setting.device, "--max-length", str(work.row), "--batch-size", "2", "--threads", "1"),
        *("--max-steps", steps, "--save-every", save_every, "--keep-last", "99"),
        *([] if options.get("lora_rank") == 0 else ["--lora-dropout", "0.1"]),
    ]
    for name, value in options.items():
        flags += [flag(name), *([] if value is True else [str(value)])]
    command = Command([setting.python, "-m", "distrust"], name="distrust")
    name = "resume-" + "-".join(map(str, options.values()))
    with setting.empty_folder(name) as folder, ThreadPoolExecutor(1 if setting.tiny else 3) as pool:
        runs = [TrainingRun(folder / name, flags, command) for name in ("alone", "again", "killed")]
        digests = [pool.submit(run.finish) for run in runs[:2]]
        kills = pool.submit(_kill_twice, runs[2])
        first, second = (digest.result() for digest in digests)
        count, third = kills.result(), runs[2].final_digest()
    short = [digest[:12] for digest in (first, second, third)]
    return {
        "exact": first == second == third,
        "repeatable": first == second,
        "kills": count,
        "digests": short,
    }


def _kill_twice(run: TrainingRun) -> int:
    """Kill it after its first saves, twice, and let it end; returns how many kills hit it."""
    trigger = once_on_disk("renamed", SAVES_BEFORE_A_KILL)
    codes = [run.disturb(signal.SIGKILL, trigger)[1] for _ in range(2)]
    run.finish()
    return codes.count(-signal.SIGKILL)


def tests(setting: Setting) -> Figures:
    """The project's tests that are marked ``device``, on the device; log.txt has what pytest prints."""
    chosen = ["tests/checkpoint/test_snapshot.py", "-k", "with_overlap"] if setting.tiny else FOLDERS
    parallel = ["-n", "8", "--dist", "loadfile"] if find_spec("xdist") and not setting.tiny else []
    command = [
        *(setting.python, "-m", "pytest", "-q", "--tb", "short", "-p", "no:cacheprovider"),
        *("--continue-on-collection-errors", "--device", setting.device, "-m", "device", *parallel, *chosen),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)  # at once: the step may be cut off
            lines.append(line.strip()[:200])
    if process.returncode not in (0, 1):
        raise RuntimeError(next(filter(None, reversed(lines)), f"pytest ended with {process.returncode}"))
    return count_tests(lines)


def count_tests(lines: Sequence[str]) -> Figures:
    """How many tests passed, failed and were skipped, by what pytest prints, and which did not pass."""
    summaries = (re.findall(r"(\d+) (passed|failed|skipped|error)", line) for line in reversed(lines))
    counts = {word: int(number) for number, word in next(filter(None, summaries), [])}
    return {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "failures": [line for line in lines if line.startswith(("FAILED tests", "ERROR tests"))][:20],
        "skips": [line for line in lines if line.startswith("SKIPPED [")][:20],
    }
