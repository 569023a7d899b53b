"""Runs in processes that can be killed, without loading the libraries for each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

#: Runs ``run(**job)`` of a module for each job of its input, in a process that is forked from one that has
#: imported the module and computed nothing.
SERVER = """
import contextlib, importlib, json, os, signal, sys
import tests.without_fsync
sys.path.insert(0, sys.argv[1])
run = importlib.import_module(sys.argv[2]).run
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        run(**json.loads(line))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # a loader's worker would notice after seconds
    print(code, flush=True)
"""


@pytest.fixture
def start_runs(start_python, forked_python) -> Callable[..., Callable[..., int]]:
    """``start_runs(module)`` returns a function that runs a job: -9 means that it was killed."""

    def start_runs(module: str, **environment: str) -> Callable[..., int]:
        environment |= {"OMP_NUM_THREADS": "1"}
        server = start_python(SERVER, Path(__file__).parent, module, python=forked_python, **environment)

        def run_job(**job: object) -> int:
            print(json.dumps(job, default=str), file=server.stdin, flush=True)
            return int(server.stdout.readline() or server.stderr.read())

        return run_job

    return start_runs
