"""The fork server: starts the agents and ranks of an attempt as forks of a process with its imports done.

    python -m campaigns.ranks.server

Orders and answers are lines of JSON. An order is what :func:`_run` takes. Answers: ``{"started": pid}``;
``{"ended": pid, "code": code}`` of every process that ended here. The
server adopts the ranks of an agent that died, so that whatever runs is a descendant of it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from campaigns.ranks import faults
from campaigns.ranks.machines import join_network

POLL_SECONDS = 0.003  # how late the end of a process may be reported
#: What a rank and its agent import: most of the time before the first step.
IMPORTS = (
    *("distrust.cli.train", "distrust.engines.torch.engine", "distrust.reporting.console"),
    *("distrust.training", "numpy.random", "peft", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
    *("torch.distributed", "torch.distributed.launcher.api", "distrust.testing.models"),
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: Seconds: how long agents wait for more machines, and when one that is silent is gone.
_MEETING = {"last_call_timeout": 3, "keep_alive_interval": 1, "keep_alive_max_attempt": 3}
_DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


def main() -> int:
    for name in IMPORTS:
        importlib.import_module(name)
    tasks = os.listdir("/proc/self/task")
    if len(tasks) > 1:
        sys.exit("importing started threads, which a fork would not have")
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the memory of every object
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _answer(ready=os.getpid())
    return _serve()


def _serve() -> int:
    buffer = b""
    while True:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            piece = os.read(0, 1 << 16)
            if not piece:
                return 0  # its processes end with it
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                _answer(started=_fork(json.loads(line)))
        _report_ends()


def _report_ends() -> None:
    with contextlib.suppress(ChildProcessError):  # there is no child
        while (end := os.waitpid(-1, os.WNOHANG))[0] != 0:
            _answer(ended=end[0], code=os.waitstatus_to_exitcode(end[1]))


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _fork(order: Mapping[str, Any]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        _run(order)
    return pid


def _run(order: Mapping[str, Any]) -> NoReturn:
    """In a fork: run a :class:`campaigns.ranks.processes.Program`, its output appended to two files."""
    os.setsid()
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, order["out"], append),
        (2, order["err"], append),
    ):
        descriptor = os.open(path, flags, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if order["network"] is not None:
        join_network(order["network"])
    os.environ.update(order["environment"])
    if order["fresh"]:
        os.execv(sys.executable, [sys.executable, "-m", order["module"], *order["arguments"]])
    faults.plant(order["fault"])
    _make_ranks_forks()
    _run_module(order["module"], order["arguments"])


def _run_module(module: str, arguments: Sequence[str]) -> NoReturn:
    """What ``python -m module`` does from its imports on; its end leaves out tearing down the modules."""
    faulthandler.enable()  # a process that hangs is aborted, and then says where
    sys.argv = [module, *arguments]
    code: Any = 1
    try:
        code = importlib.import_module(f"{module}.cli" if module == "distrust" else module).main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    finally:  # whatever fails: what forked this process must not go on in it
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined] # waits for the threads that are no daemons
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _make_ranks_forks() -> None:
    """The ranks that an agent starts in this process are forks of it, not new interpreters.

    Agents of several machines wait less for each other than torch's do.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    def start(handler: Any, args: Sequence[str], env: dict[str, str]) -> Any:
        return _Fork(args, env=env, stdout=handler._stdout, stderr=handler._stderr)

    original = RendezvousParameters.__init__

    def initialize(parameters: Any, *arguments: Any, **options: Any) -> None:
        original(parameters, *arguments, **{**_MEETING, **options})

    RendezvousParameters.__init__ = initialize  # type: ignore[method-assign, assignment]
    subprocess_handler.SubprocessHandler._popen = start  # type: ignore[method-assign, assignment]


class _Fork(subprocess.Popen[bytes]):
    """A Popen whose process is a fork that runs ``-m MODULE …`` of its command line."""

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        environment = next(value for value in rest if isinstance(value, dict))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(writer)
            for number in _DEFAULT_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.closerange(3, 4096)
            atexit._clear()  # the agent's: they would remove its temporary files
            os.environ.clear()
            os.environ.update(environment)
            module = args.index("-m") + 1
            _run_module(args[module], args[module + 1 :])
        os.close(writer)
        os.read(reader, 1)  # until it leads a group, which the agent signals: then nobody has the other end
        os.close(reader)
        self.pid = pid
        self._child_created = True


if __name__ == "__main__":
    sys.exit(main())
