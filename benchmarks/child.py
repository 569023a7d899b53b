"""Runs one case once, in this process; the last line of its output is its figures as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks import states
from benchmarks.cases import CASES, Task, prepare


def main() -> None:
    """``child.py measure|prepare NAME STATE FOLDER PREPARED``."""
    verb, name, state, folder, prepared = sys.argv[1:]
    task = Task(states.parse(state), Path(folder), Path(prepared))
    if verb == "prepare":
        prepare(name, task)
        figures = {}
    else:
        (case,) = (case for case in CASES if case.name == name)
        figures = case.run(task)
    print()
    print(json.dumps(figures), flush=True)
    # Skip the interpreter's shutdown: it is not measured, and some libraries hang in it.
    os._exit(0)


if __name__ == "__main__":
    main()
