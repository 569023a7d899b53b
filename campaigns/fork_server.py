"""Runs one program again and again, each time in a fork of a process that has imported what it needs.

    python -m campaigns.fork_server campaigns.saving:main
    python -m campaigns.fork_server distrust.cli:main torch transformers

A training imports torch for seconds before it makes its first step; a fork of a process that has done so
begins at once, so that a campaign kills hundreds in the time of some dozens. What is forked is otherwise an
ordinary process: it has its own output, ends as the interpreter ends, and dies by signals.

Each line of input is an order in JSON: ``arguments``, and the files ``out`` and ``err`` to append to. It is
answered by a line with the process id, and, once the process has ended, by a line with its exit code,
negative if a signal ended it. The server never uses what it imports: a fork has no thread but its own.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

Program = Callable[[Sequence[str]], int]


def main() -> int:
    """Serve orders until there are no more; in a fork: the program's exit code."""
    module, _, name = sys.argv[1].partition(":")
    program: Program = getattr(importlib.import_module(module), name)
    for needed in sys.argv[2:]:
        importlib.import_module(needed)
    _require_one_thread()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _take_over(order)
            return program(order["arguments"])
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


def _require_one_thread() -> None:
    tasks = "/proc/self/task"
    if os.path.isdir(tasks) and len(os.listdir(tasks)) > 1:
        sys.exit("importing started threads, which a fork would not have")


def _take_over(order: dict[str, Any]) -> None:
    """Be a process of one's own: nothing of the server's input and output."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path in ((1, order["out"]), (2, order["err"])):
        descriptor = os.open(path, flags, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
