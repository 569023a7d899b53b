"""Checkpoints compared with other libraries and with the hardware: same states, same disk, same run.

    python -m benchmarks.checkpoints --quick
    python -m benchmarks.checkpoints --markdown bench.md --json bench.json --picture docs/checkpoints.png
    python -m benchmarks.checkpoints --states 1GiB --cases 'save|raw write|copy' --repeats 7
    python -m benchmarks.checkpoints --directory /mnt/fast --states 20MiB,1GiBx10000
    python -m benchmarks.checkpoints --redraw bench.json --picture docs/checkpoints.png

Every figure comes from a fresh process. All cases run once, then all again. A state is written SIZE or
SIZExTENSORS: up to 64 MiB without a number of tensors it is that of a LoRA run (adapter and AdamW), above
that 400 equal tensors; "commands" stands for `distrust ls`. Nothing is tuned to a machine. The whole run may
take two hours, --quick five minutes; both need six times the largest state on the disk, and four times in
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import driver, picture, states, tables
from benchmarks.cases import CASES, Case
from benchmarks.results import NOT_INSTALLED, Results
from benchmarks.states import Spec

STATES, REPEATS = "20MiB,1GiB,4GiB,1GiBx10000,commands", 5
QUICK_STATES, QUICK_REPEATS = "20MiB,256MiB", 3
#: What --quick omits: cases that start slowly, and variants of a better case.
NOT_QUICK = "orbax|trainer|overlap|clone|bytes|[13] in flight|dcp background$|copy, all|BLAKE3, one"
LIBRARIES = ("torch", "safetensors", "transformers", "orbax-checkpoint", "jax", "blake3")
#: File systems in memory: nothing there is ever cold, and nothing is ever written.
IN_MEMORY = {"tmpfs", "ramfs"}
#: If the output is no terminal, tables need not be squeezed.
FILE_WIDTH = 130


def main() -> int:
    """Measure, and show the results."""
    options = _options()
    results, about = _read(options.redraw) if options.redraw else _measure_or_load(options)
    specs = [spec for spec in options.states if spec.text in results.samples]
    if not specs:
        return 1
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    for table in tables.for_terminal(results, specs):
        console.print(table, crop=False)
    console.print(tables.NOTES.replace("*", ""), highlight=False)
    _write(options, results, specs, about)
    return 0


def file_system(path: Path) -> str:
    """The type of a folder's file system, as the system names it."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    return kinds[-1] if kinds else "unknown"


def _measure_or_load(options: argparse.Namespace) -> tuple[Results, dict[str, Any]]:
    results, console = Results(), Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix=".bench-") as folder:
        kind = file_system(Path(folder))
        if kind in IN_MEMORY:
            console.print(f"warning: {folder} is a {kind}: its disk figures mean nothing", style="red")
        try:
            _run(Path(folder), options, results, console)
        except KeyboardInterrupt:
            console.print("interrupted: what follows is of the repeats so far", style="red")
    for state, failures in results.failures.items():
        for case, reason in failures.items():
            console.print(f"{state}: {case}: {reason}", style="yellow", markup=False, soft_wrap=True)
    return results, _about(kind, options.repeats)


def _run(folder: Path, options: argparse.Namespace, results: Results, console: Console) -> None:
    turns = driver.plan(options.states, options.cases, options.repeats, results)
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=600) as progress:
        task = progress.add_task("", total=len(turns))
        skip_reason = None
        for turn in driver.measure(turns, folder, options.pause, results):
            label = f"{turn.spec.title}, repeat {turn.repeat + 1} of {options.repeats}"
            if not console.is_terminal and label != skip_reason:
                console.print(f"{label}: {progress.tasks[task].completed:.0f} of {len(turns)} done")
                skip_reason = label
            progress.update(task, description=f"{label}: {turn.case.name}")
            progress.advance(task)


def _read(path: Path) -> tuple[Results, dict[str, Any]]:
    document = json.loads(path.read_text("utf-8"))
    results = Results(failures=document["failures"])
    for state, cases in document["samples"].items():
        results.samples[state] = {
            case: {
                name: {int(repeat): value for repeat, value in values.items()}
                for name, values in figures.items()
            }
            for case, figures in cases.items()
        }
    return results, document["about"]


def _write(options: argparse.Namespace, results: Results, specs: list[Spec], about: dict[str, Any]) -> None:
    line = "; ".join(f"{name} {value}" for name, value in about.items())
    if options.json:  # first: the other outputs can be made from it
        document = {
            "about": about,
            "samples": results.samples,
            "failures": results.failures,
            "targets": [
                dict(zip(tables.TARGET_HEADS, row, strict=True)) for row in tables.targets(results, specs)
            ],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    if options.markdown:
        options.markdown.write_text(tables.markdown(results, specs, line), "utf-8")
    if options.picture:
        picture.draw(results, specs, options.picture, about=line)


def _about(kind: str, repeats: int) -> dict[str, Any]:
    about: dict[str, Any] = {
        "repeats": repeats,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "cores": os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "file system": kind,
        "Python": platform.python_version(),
    }
    for name in LIBRARIES:
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = NOT_INSTALLED
    return about


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--states", type=_states, help=f"separated by commas; default: {STATES}")
    parser.add_argument("--repeats", type=int, help=f"of every case; default: {REPEATS}")
    parser.add_argument("--cases", help="only those whose name has this regular expression in it")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STATES}, {QUICK_REPEATS} repeats and fewer cases, unless said otherwise",
    )
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="on the disk to measure; default: the current folder"
    )
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two cases, for the disk")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--picture", type=Path, help="write the picture to this PNG file")
    parser.add_argument("--redraw", type=Path, help="measure nothing: show what --json wrote")
    options = parser.parse_args()
    options.directory = options.directory.resolve()
    if options.redraw and options.states is None:
        options.states = list(map(states.parse, json.loads(options.redraw.read_text("utf-8"))["samples"]))
    options.states = options.states or _states(QUICK_STATES if options.quick else STATES)
    options.repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    options.cases = _chosen(options, parser)
    if options.list:
        print("\n".join(case.name for case in options.cases))
        sys.exit()
    return options


def _states(text: str) -> list[Spec]:
    try:
        return [states.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    if options.quick and options.cases is None:
        return [case for case in CASES if not re.search(NOT_QUICK, case.name)]
    try:
        chosen = [case for case in CASES if re.search(options.cases or "", case.name)]
    except re.error as error:
        parser.error(f"--cases {options.cases!r}: {error}")
    if not chosen:
        parser.error(f"--cases {options.cases!r}: no case has that in its name; see --list")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
