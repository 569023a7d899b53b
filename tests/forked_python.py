"""A Python with its imports done: each of its processes is a fork of a server, and ready in milliseconds.

Importing torch, transformers and peft takes a process six seconds; most tests are not about that. The
program that :func:`fork_server` makes takes ``-m MODULE …`` or ``-c CODE …`` as ``python`` does, also after
``-u``. It ends, is signalled and is killed like it, in its folder, with its environment, input and output.
The workers of xdist are such programs, too. A test of what is loaded, or of the variables that Python reads
when it starts, needs ``sys.executable`` instead. A server that nobody uses costs next to nothing: the first
program makes it import.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

POLL_SECONDS = 0.01  # how late the end of a fork may be noticed

#: The program: hands its arguments and open files to the server, passes signals on, ends as the fork ends.
PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
order = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
order = json.dumps(order).encode()
socket.send_fds(server, [len(order).to_bytes(4, "big")], [0, 1, 2])
server.sendall(order)
def pass_on(number, _):
    try:
        server.sendall(bytes([number]))
    except BrokenPipeError:
        pass  # the fork has ended: its exit code is there to be read

for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, pass_on)
code = int(server.recv(16))
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def fork_server(imports: Sequence[str]) -> Iterator[Path]:
    """Start a server that imports these modules at its first program; yields the path of the program.

    It imports from where this process does.
    """
    with tempfile.TemporaryDirectory(prefix="forks-") as name:  # short: the address of a socket has 108 bytes
        address, program = Path(name, "socket"), Path(name, "python")
        program.write_text(PROGRAM.format(python=sys.executable, path=str(address)), "utf-8")
        program.chmod(0o755)
        command = [sys.executable, __file__, str(address), *imports]
        # No threads of OpenBLAS and of pyarrow's allocator: a fork would lose them.
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # A session of its own: of Ctrl-C only the programs are told, and they pass it on.
        server = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n", "the fork server has ended"
            yield program
        finally:
            server.communicate()  # the end of its input ends the server


class Fork(NamedTuple):
    pid: int
    program: socket.socket  # closed by the program's end


def serve(address: str, imports: Sequence[str]) -> Callable[[], object] | None:
    """Fork for each program, until standard input ends. In a fork it returns what that has to run."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    if listener in select.select([0, listener], [], [])[0]:
        _import(imports)
    forks: list[Fork] = []
    while True:
        sockets = [0, listener, *(fork.program for fork in forks)]
        ready = select.select(sockets, [], [], POLL_SECONDS if forks else None)[0]
        # First of all: whoever killed a program may start the next at once, and expects the first to be dead.
        forks = [fork for fork in forks if not _ends(fork, is_ready=fork.program in ready)]
        if 0 in ready:
            for fork in forks:
                os.kill(fork.pid, signal.SIGKILL)
            return None
        if listener in ready:
            program, _ = listener.accept()
            try:
                order, files = _receive(program)
            except ValueError:  # it was killed before it had said what to run
                program.close()
                continue
            with warnings.catch_warnings(action="ignore"):  # jax warns of each fork; it has no threads yet
                pid = os.fork()
            if pid == 0:
                for opened in (listener, program, *(fork.program for fork in forks)):
                    opened.close()
                return _prepare(order, files)
            for descriptor in files:
                os.close(descriptor)
            forks.append(Fork(pid, program))


def _import(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):  # whoever needs it fails by that, or is skipped
            importlib.import_module(name)
    tasks = "/proc/self/task"
    if os.path.isdir(tasks) and len(os.listdir(tasks)) > 1:
        sys.exit(f"importing {', '.join(names)} started threads, which a fork would not have")
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page


def _ends(fork: Fork, *, is_ready: bool) -> bool:
    """Pass signals on; report the fork's end to its program. Returns whether it has ended."""
    numbers = fork.program.recv(16) if is_ready else b""
    for number in numbers:
        os.kill(fork.pid, number)
    killed = is_ready and not numbers
    if killed:
        os.kill(fork.pid, signal.SIGKILL)
    pid, status = os.waitpid(fork.pid, 0 if killed else os.WNOHANG)
    if pid == 0:
        return False
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        fork.program.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    fork.program.close()
    return True


def _receive(program: socket.socket) -> tuple[Any, list[int]]:
    length, files, _, _ = socket.recv_fds(program, 4, 3)
    with program.makefile("rb") as reader:
        return json.loads(reader.read(int.from_bytes(length, "big"))), files


def _prepare(order: Any, files: Sequence[int]) -> Callable[[], object]:
    """Give this fork the folder, the environment and the open files of its program."""
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.path[:0] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    arguments = order["arguments"]
    kind, text, *arguments = arguments[1:] if arguments[0] == "-u" else arguments
    sys.argv = [kind, *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    if kind == "-m":
        return lambda: runpy.run_module(text, run_name="__main__", alter_sys=True)
    if kind == "-c":
        return lambda: exec(compile(text, "<string>", "exec"), main.__dict__)
    sys.exit(f"give -m MODULE or -c CODE, not {kind}")


def end_after(run: Callable[[], object]) -> NoReturn:
    """Run a program and end as Python does, but leave its modules alone: to tear those down takes seconds."""
    code: Any = 0
    try:
        run()
    except SystemExit as exit_:
        code = exit_.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> None:
    del sys.path[0]  # the folder of this file
    if run := serve(sys.argv[1], sys.argv[2:]):
        end_after(run)


if __name__ == "__main__":
    main()
