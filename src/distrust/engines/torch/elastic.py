"""Starts the ranks of this machine with torch's elastic agent, waits for them, and starts them again.

Agents meet at a rendezvous, which numbers the ranks. A single machine's is a private file and no port, since
agents unpickle what they read there. Other than under ``torchrun``, a save is not cut off after 30 seconds, a
second Ctrl-C ends everything at once, and wrong usage is not tried again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch reads it when it is imported

import torch
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from distrust.activity import STOPPING, current
from distrust.errors import ConfigError, RankLost

_END_SECONDS = 3600  # for the step and the save of ranks that have to end
#: Exit codes after which ranks do not start again: wrong usage, and a stop, as by a preemption notice.
_LAST_CODES = {2, 128 + signal.SIGTERM}


def run_ranks(
    command: Sequence[str], count: int, *, endpoint: str | None, machines: tuple[int, int], max_restarts: int
) -> dict[int, int]:
    """Run ``count`` processes of a command on this machine, 0 for one on each GPU, until all have ended.

    ``endpoint`` is HOST:PORT where ``machines`` (minimum, maximum) meet; None for this machine alone. Returns
    rank -> exit code, as of subprocess.Popen; {-1: 128 + signal} if the signal came while no rank ran.

    Raises ConfigError if there is no GPU, RankLost if the machines did not meet, and KeyboardInterrupt if
    Ctrl-C followed another signal, and the ranks were killed.
    """
    count = count or torch.cuda.device_count()
    if not count:
        raise ConfigError("--nproc is 'gpu': torch sees no GPU; give a number")
    # With the store that torch shares by default, ranks that start again meet those of the last start.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""  # by torch: the agent below has a handler
    logging.disable()  # torch's log of what the ranks report
    program, *arguments = (word.replace("$", "$$") for word in command)  # torch fills in $local_rank
    with tempfile.TemporaryDirectory(prefix="distrust-") as folder:
        # Each keep-alive makes the file longer.
        options: dict[str, Any] = {"store_type": "file", "keep_alive_interval": 10**6}
        meeting, address = f"{folder}/rendezvous", "127.0.0.1"
        if endpoint is not None:
            print(f"distrust: waiting for the machines of the run at {endpoint}", file=sys.stderr)
            is_host, address = _place(endpoint)
            meeting, options = endpoint, {"is_host": is_host, "join_timeout": 900}
        try:
            parameters = RendezvousParameters("c10d", meeting, "run", *machines, address, **options)
            handler = _meet(parameters)
            spec = WorkerSpec("rank", count, handler, None, program, tuple(arguments), max_restarts)
            agent = Agent(spec, DefaultLogsSpecs(log_dir=os.devnull))
            for number in (*STOPPING, signal.SIGQUIT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, agent.stop)
            current.has_steps_to_lose = True  # those of the ranks
            agent.run()
            handler.shutdown()
        except SignalException as stop:  # the rendezvous stays open: other machines may go on
            return agent.exit_codes() or {-1: 128 + stop.sigval}
        except (RendezvousError, DistError) as error:
            raise RankLost(f"{endpoint}: the machines did not meet, or the others have ended") from error
        return agent.exit_codes()


class Agent(LocalElasticAgent):
    """torch's, but for what the module says."""

    _pcontext: Any  # torch's SubprocessContext of the last start, or None
    _is_stopping = False

    def exit_codes(self) -> dict[int, int]:
        """Of the ranks of the last start that have ended."""
        handlers = self._pcontext.subprocess_handlers if self._pcontext else {}
        workers = self._worker_group.workers if handlers else ()
        codes = {worker.global_rank: handlers[worker.local_rank].proc.poll() for worker in workers}
        return {rank: code for rank, code in codes.items() if code is not None}

    def stop(self, number: int, _frame: object = None) -> None:
        """Pass a signal on to the ranks and wait for them; end them at once if Ctrl-C follows another one."""
        if not self._is_stopping:
            self._is_stopping = True
            raise SignalException("", signal.Signals(number))
        if number == signal.SIGINT:
            self._send(signal.SIGKILL)
            raise KeyboardInterrupt

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self._pcontext is not None:
            print(f"distrust: starting again; restarts left: {self._remaining_restarts}", file=sys.stderr)
            self._pcontext = None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ids: dict[int, Any] = super()._start_workers(worker_group)
        close = self._pcontext.close

        def end_ranks(death_sig: int | None = None, timeout: int = 0) -> None:
            if _LAST_CODES & {*self.exit_codes().values()}:
                self._remaining_restarts = 0
            self._send(signal.SIGCONT)  # a suspended one could not end
            close(death_sig, max(timeout, _END_SECONDS))

        self._pcontext.close = end_ranks
        return ids

    def _send(self, number: int) -> None:
        for pid in self._pcontext.pids().values() if self._pcontext else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)


def _meet(parameters: RendezvousParameters) -> RendezvousHandler:
    try:
        return get_rendezvous_handler(parameters)
    except RendezvousConnectionError:
        if not parameters.get_as_bool("is_host"):
            raise
        parameters.config["is_host"] = False  # another agent on this machine was faster
        return get_rendezvous_handler(parameters)


def _place(endpoint: str) -> tuple[bool, str]:
    """Whether this machine has that address, and the one by which the others reach it."""
    host, _, port = endpoint.rpartition(":")
    with contextlib.suppress(OSError, UnicodeError), socket.create_server((host, 0)):
        return True, host
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((host, int(port)))  # sends nothing
            return False, sender.getsockname()[0]
    except (OSError, UnicodeError) as error:
        raise RankLost(f"--rendezvous {endpoint}: {error}") from error
