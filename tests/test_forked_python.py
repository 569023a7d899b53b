"""The program whose processes are forks behaves like Python: otherwise, tests that use it show nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.forked_python import fork_server

BEHAVIOUR = {
    "arguments": "import sys; print(sys.argv)",
    "folder, environment and input": "import os; print(os.getcwd(), ascii(os.environ['A']), input())",
    "an exit code": "import sys; sys.exit(3)",
    "a message": "import sys; sys.exit('no')",
    "an exception": "1 / 0",
    "a signal to itself": "import os; os.kill(os.getpid(), 9)",
    "what is called at the end": "import atexit; atexit.register(print, 'last'); print('first')",
}
WAITING = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def python():
    with fork_server(["json"]) as program:
        yield program


@pytest.mark.parametrize("code", BEHAVIOUR.values(), ids=BEHAVIOUR)
def test_it_ends_and_prints_as_python_does(python, tmp_path, code):
    fork, process = (
        subprocess.run(
            [program, "-c", code, "x", "ü"],
            cwd=tmp_path,
            env={**os.environ, "A": "\udc80"},
            input=b"hello\n",
            capture_output=True,
            check=False,
        )
        for program in (python, sys.executable)
    )
    assert (fork.returncode, fork.stdout) == (process.returncode, process.stdout)
    assert fork.stderr.splitlines()[-1:] == process.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_whoever_ends_the_program_ends_the_fork(python, number):
    process = subprocess.Popen([python, "-c", WAITING], stdout=subprocess.PIPE)
    pid = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(60) == -number
    process.stdout.close()
    subprocess.run([python, "-c", ""], check=True)  # the server sees the end before it starts the next
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
