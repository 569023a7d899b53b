"""Ranks for tests: processes that stay, and run one scenario after another together.

A scenario is a function whose arguments and result are JSON. Each rank runs it with one thread and with the
variables that torchrun sets; its rendezvous is a fresh store in a process of its own, as torchrun's agent
hosts it. A rank that has raised or ended is forked again, from a process with the imports done.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE_NAME = "scenario"  # of the function in a scenario's source text


@dataclass(frozen=True)
class Outcome:
    """How a scenario ended on one rank: with a value, an error, or the end of its process."""

    value: Any = None
    error: tuple[str, str] | None = None  # name of its class, and its text
    code: int | None = None  # of the process, as subprocess has it: -9 if it was killed
    stdout: str = ""
    stderr: str = ""


class World:
    """Up to ``most`` ranks. A context manager, which ends their processes."""

    def __init__(self, python: Path, *, most: int = 4) -> None:
        self._python = python  # of the fixture forked_python
        self._ranks: list[subprocess.Popen[str] | None] = [None] * most
        self._host: subprocess.Popen[str] | None = None

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._ranks, self._host):
            if process is not None:
                process.kill()
                process.communicate()

    def run(
        self,
        scenario: str,
        *,
        count: int,
        seconds: float = 60,
        environment: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> list[Outcome]:
        """Run a scenario on ``count`` ranks; returns the outcome of each.

        Args:
            scenario: "module:function", or the source of a function ``scenario``.
            count: the number of ranks.
            seconds: after which the ranks are killed, and the test fails.
            environment: variables for all ranks.
            **arguments: of the scenario.
        """
        if self._host is None:
            self._host = self._start("host")
        port = _ask(self._host, {})
        for index in range(count):
            self._ranks[index] = self._ranks[index] or self._start("rank")
        ranks = [rank for rank in self._ranks[:count] if rank is not None]
        with ExitStack() as files:
            # Files, because nobody reads while the scenario runs.
            outputs = [
                [files.enter_context(tempfile.NamedTemporaryFile("r", errors="replace")) for _ in "12"]
                for _ in ranks
            ]
            for index, rank in enumerate(ranks):
                order = {
                    "scenario": scenario,
                    "arguments": arguments,
                    "environment": {**torchrun_variables(index, count, port=port), **(environment or {})},
                    "outputs": [file.name for file in outputs[index]],
                }
                _write(rank, order)
            deadline = time.monotonic() + seconds
            return [self._outcome(index, outputs[index], deadline) for index in range(count)]

    def values(self, scenario: str, **options: Any) -> list[Any]:
        """The results of :meth:`run`, all of whose ranks have to return one."""
        outcomes = self.run(scenario, **options)
        failed = {rank: each for rank, each in enumerate(outcomes) if each.error or each.code is not None}
        assert not failed, "\n".join(f"rank {rank}: {each}" for rank, each in failed.items())
        return [outcome.value for outcome in outcomes]

    def _start(self, role: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [self._python, "-m", "tests.ranks.world", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert _read(process) == "ready"  # the first waits for the imports
        return process

    def _outcome(self, index: int, outputs: list[Any], deadline: float) -> Outcome:
        rank = self._ranks[index]
        assert rank is not None
        assert rank.stdout is not None
        if not select.select([rank.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
            texts = [file.read() for file in outputs]
            self.__exit__()
            self._ranks, self._host = [None] * len(self._ranks), None
            raise AssertionError(f"rank {index} has not ended in time; it wrote {texts}")
        answer = _read(rank)
        code = None
        if answer is None or "error" in answer:
            self._ranks[index] = None
            rank.communicate()
            code = rank.returncode
        texts = [file.read() for file in outputs]
        if answer is None:
            return Outcome(None, None, code, *texts)
        error = answer.get("error")
        return Outcome(answer.get("value"), tuple(error) if error else None, None, *texts)


def torchrun_variables(index: int, count: int, *, port: int) -> dict[str, str]:
    """What torchrun tells a worker on one machine."""
    numbers = {
        "RANK": index,
        "WORLD_SIZE": count,
        "LOCAL_RANK": index,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    texts = {name: str(number) for name, number in numbers.items()}
    return {
        **texts,
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test",
    }


def _write(process: subprocess.Popen[str], message: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def _read(process: subprocess.Popen[str]) -> Any:
    """The next message; None if the process has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _ask(process: subprocess.Popen[str], message: Any) -> Any:
    _write(process, message)
    return _read(process)


# In the processes


def serve(role: str) -> None:
    """Answer the messages of standard input, one a line, until it ends."""
    faulthandler.enable()
    # Nothing that a scenario prints or reads meets the messages.
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    importlib.import_module("tests.without_fsync")
    answer: Any = "ready"
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        if role == "rank" and "error" in answer:
            os._exit(1)  # what it leaves behind is not known
        if not (line := orders.readline()):
            os._exit(0)
        answer = host() if role == "host" else run_order(json.loads(line))


def host() -> int:
    """A fresh store; returns its port."""
    import torch.distributed as dist

    global _store  # it lives until the next one
    _store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return _store.port


_store: Any = None


def run_order(order: dict[str, Any]) -> dict[str, Any]:
    """Run a scenario; returns its value or error."""
    import torch
    import torch.distributed as dist

    for descriptor, name in enumerate(order["outputs"], 1):
        with open(name, "w") as output:
            os.dup2(output.fileno(), descriptor)
    torch.set_num_threads(1)
    environment = dict(os.environ)
    os.environ.update(order["environment"])
    try:
        value = find(order["scenario"])(**order["arguments"])
        if dist.is_initialized():
            _wait_for_all(dist)  # a rank that closes its connections may take away what others still read
            dist.destroy_process_group()
    except Exception as error:
        import traceback

        traceback.print_exc()
        return {"error": [type(error).__name__, str(error)]}
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.environ.clear()
        os.environ.update(environment)
    return {"value": value}


def _wait_for_all(dist: Any) -> None:
    """Wait until every rank is here, for at most 30 seconds: some may have died."""
    store, end = dist.distributed_c10d._get_default_store(), time.monotonic() + 30
    with contextlib.suppress(RuntimeError):  # the rank that keeps the store has left
        store.add("ended", 1)
        while store.add("ended", 0) < dist.get_world_size() and time.monotonic() < end:
            time.sleep(0.005)


def find(scenario: str) -> Any:
    """The function that an order names, or whose source it is."""
    if "\n" in scenario:
        namespace: dict[str, Any] = {}
        exec(compile(scenario, "<scenario>", "exec"), namespace)
        return namespace[SOURCE_NAME]
    module, _, name = scenario.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    serve(sys.argv[1])
