"""Is training on a GPU exact, and how fast is it?

    python -m benchmarks.gpu                                 # everything, into runs/gpu: 25 minutes at most
    python -m benchmarks.gpu --budget 345                    # as much as fits; once more: what is left
    python -m benchmarks.gpu --only resume speed             # groups, steps, or how their names begin
    python -m benchmarks.gpu --only stall --again            # although they are recorded
    python -m benchmarks.gpu --show runs/gpu                 # the tables of what is recorded
    python -m benchmarks.gpu --device cpu --tiny --out runs/gpu-tiny

Checks come first, then figures, in the order of their value. Each step is a process with a time limit. It
prints one line, and its record is in records.jsonl at once: a cut-off loses only the steps in progress.
summary.md has the tables, log.txt what the steps print. docs/benchmarks.md says what is measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.devices import describe_machine
from benchmarks.gpu import report
from benchmarks.gpu.process import Runner
from benchmarks.gpu.records import LASTING, Records
from benchmarks.gpu.setting import Setting, work_folder
from benchmarks.gpu.steps import GROUPS, STEPS, Step, select


def main() -> int:
    """Run what is not recorded yet; the exit code is 1 if a step has failed."""
    options = _options()
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    out: Path = options.show or options.out
    device, tiny = options.device, options.tiny
    if not options.show:
        try:
            machine = describe_machine(device, options.python)
        except LookupError as error:
            console.print(str(error), soft_wrap=True)
            return 2
        out.mkdir(parents=True, exist_ok=True)
    records = Records(out)
    if not options.show:
        _run(records, options, machine, console)
    elif records.all:
        device, tiny = records.all[-1].device, records.all[-1].tiny
    current = records.newest(device=device, tiny=tiny)
    for table in report.for_terminal(current, tiny=tiny):
        console.print(table)
    console.print(report.TINY if tiny else report.NOTES)
    (out / "summary.md").write_text(report.markdown(current, tiny=tiny), encoding="utf-8")
    return int(any(record.outcome in ("failed", "too slow") for record in current.values()))


def _run(records: Records, options: argparse.Namespace, machine: dict[str, str], console: Console) -> None:
    def open_steps() -> list[Step]:
        """Those without a lasting record."""
        newest = records.newest(device=options.device, tiny=options.tiny)
        recorded = {name for name, record in newest.items() if record.outcome in LASTING}
        return [step for step in STEPS if step.name not in recorded]

    console.print(", ".join(map(" ".join, machine.items())))
    out = options.out.absolute()
    folder = work_folder(out)
    setting = Setting(options.device, options.tiny, folder, out / "disk", options.python)
    steps = STEPS if options.again else open_steps()
    chosen = [step for step in steps if not options.only or step in options.only]
    runner = Runner(setting, records, out / "log.txt", time.monotonic() + options.budget, machine)
    try:
        runner.run(chosen, lambda record: console.print(report.line(record), soft_wrap=True))
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with the steps that are left")
    if count := sum(not step.missing for step in open_steps()):
        console.print(f"{count} steps are left; their models are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _options() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=style)
    cases = {
        group: [s.name.removeprefix(f"{group}: ") for s in STEPS if s.group == group] for group in GROUPS
    }
    lines = [f"  {group}: {'; '.join(names)}" for group, names in cases.items()]
    parser.epilog = "\n".join(["groups and their steps:", *lines])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu"), help="for records and summary; default: runs/gpu")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    add("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    add("--budget", type=float, default=1500, metavar="SECONDS", help="for all steps; default: 1500")
    add("--only", nargs="+", metavar="STEP", help="groups, steps, or how their names begin")
    add("--again", action="store_true", help="also what is recorded")
    add("--show", type=Path, metavar="FOLDER", help="print the tables of its records, and run nothing")
    add("--python", default=sys.executable, help="that runs the steps; default: this one")
    options, chosen = parser.parse_args(), []
    for text in options.only or ():
        try:
            chosen += select(text)
        except LookupError as error:
            parser.error(f"--only {text}: {error}; --help lists all")
    options.only = chosen
    if options.show and not options.show.is_dir():
        parser.error(f"--show {options.show}: there is no such folder")
    return options


if __name__ == "__main__":
    sys.exit(main())
