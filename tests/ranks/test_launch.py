"""``distrust train --nproc N``: flags, exit codes, signals, restarts, and the end of its ranks.

Most ranks here are small programs that a stub of Python starts in milliseconds: the launcher does not know.
"""

from __future__ import annotations

import os
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.cli.launch import exit_code
from distrust.testing.models import make_model, train_arguments, write_records

SOURCE = Path(__file__).parents[2] / "src"
#: A stub of Python: instead of `-m distrust train` it runs the code in $RANK_PROGRAM.
ENOUGH = ["--gradient-accumulation", "4"]  # micro-batches for all ranks
STUB = """#!{python} -IS
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def save(number, _):
    (folder / f"saving-{{rank}}").touch()
    time.sleep(float(os.environ.get("SAVE_SECONDS", 0)))
    (folder / f"saved-{{rank}}").touch()
    os._exit(128 + number)
def meet():
    while not all((folder / f"start-{{start}}-{{other}}").exists() for other in (0, 1)):
        time.sleep(0.01)
def wait():
    (folder / f"pid-{{rank}}").write_text(str(os.getpid()))
    time.sleep(60)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, save)
(folder / "launcher").write_text(os.environ["DISTRUST_LAUNCHER"])
(folder / f"start-{{start}}-{{rank}}").write_text(" ".join(sys.argv[1:]))
exec(os.environ["RANK_PROGRAM"])
"""
#: The launcher: `distrust ARGUMENTS`, whose Python is the stub.
LAUNCHER = """
import sys
sys.executable = sys.argv[1]
# For torch's log, which nobody reads: with as many modules as a fork has, it takes seconds.
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
dynamic_rendezvous.get_method_name = lambda **_: ""
import inspect
inspect.getmodule = lambda *_, **__: None
{setup}
from distrust.cli import main
sys.exit(main(sys.argv[2:]))
"""


class Launched:
    """A launcher with stubs as ranks."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process

    def pids(self, count: int = 2) -> list[int]:
        """Of the ranks, once all of them wait."""
        files = [self.folder / f"pid-{rank}" for rank in range(count)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    def signal(self, number: int) -> None:
        """Signal the launcher itself: its program passes on only some signals."""
        os.kill(int((self.folder / "launcher").read_text()), number)

    def end(self) -> tuple[int, str]:
        """Exit code, and what it printed."""
        output, _ = self.process.communicate(timeout=240)
        return self.process.returncode, output

    def names(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(pattern))


def wait_until(holds: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command, with these variables in addition; ended after the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: Sequence[object], **variables: str) -> subprocess.Popen[str]:
        outputs: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([*map(str, command)], env={**os.environ, **variables}, **outputs)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(start, forked_python, tmp_path) -> Callable[..., Launched]:
    """Start `distrust train ARGUMENTS` whose ranks run a program."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable), "utf-8")
    stub.chmod(0o755)

    def launch(program: str, *arguments: str, setup: str = "", **variables: str) -> Launched:
        command = [forked_python, "-c", LAUNCHER.format(setup=setup), stub, "train", *arguments, *ENOUGH]
        return Launched(tmp_path, start(command, FOLDER=str(tmp_path), RANK_PROGRAM=program, **variables))

    return launch


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@given(
    st.integers(1, 64),
    st.lists(st.sampled_from([1, 2]), max_size=3),
    st.lists(st.sampled_from([0, 143, -15]), max_size=3),
    st.randoms(),
)
def test_the_exit_code_is_that_of_the_cause(number, errors, stops, random):
    """A rank that is killed makes others fail, and one that fails makes others stop."""
    codes = [*errors, *stops, -int(signal.SIGKILL)]
    random.shuffle(codes)
    assert exit_code(codes) == 137
    if errors:
        assert exit_code([*stops, *errors]) == errors[0]
    assert exit_code([*stops, 0]) == (143 if any(stops) else 0)


@pytest.mark.parametrize(("program", "code"), [("", 0), ("wait() if rank else (meet(), sys.exit(1))", 1)])
def test_the_end_of_the_ranks_is_the_end_of_the_run(launch, program, code):
    launched = launch(program, "--out", "$$ ${local_rank}", "--nproc=2", "--max-restarts", "0", "--seed", "3")
    assert launched.end() == (code, "")
    assert launched.names("start-*") == ["start-0-0", "start-0-1"]
    command = "-m distrust train --out $$ ${local_rank} --nproc=2 --max-restarts 0 --seed 3"
    command = " ".join([command, *ENOUGH])
    assert (launched.folder / "start-0-1").read_text() == command


@pytest.mark.parametrize("code", [2, 143], ids=["wrong usage", "preempted"])
def test_some_ends_are_not_tried_again(launch, code):
    launched = launch(
        f"(meet(), sys.exit({code})) if rank else wait()", "--nproc", "2", "--max-restarts", "3"
    )
    assert launched.end() == (code, "")
    assert launched.names("start-*") == ["start-0-0", "start-0-1"]
    assert launched.names("saved-*") == ["saved-0"]


def test_ranks_start_again_after_a_failure(launch):
    launched = launch("start or os.kill(os.getpid(), 9); os._exit(7)", "--nproc", "1", "--max-restarts", "1")
    assert launched.end() == (7, "distrust: starting again; restarts left: 0\n")
    assert launched.names("start-*") == ["start-0-0", "start-1-0"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_all_ranks(launch, number):
    """A background job ignores what its shell ignores, here SIGHUP."""
    setup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    launched = launch("wait()", "--nproc", "2", "--max-restarts", "1", setup=setup, SAVE_SECONDS="0.3")
    launched.pids()
    launched.signal(signal.SIGHUP)
    launched.signal(number)
    wait_until(lambda: len(launched.names("saving-*")) == 2)  # of two at once, either may come first
    launched.signal(signal.SIGTERM)  # a second one changes nothing
    assert launched.end() == (128 + number, "")
    assert launched.names("saved-*") == ["saved-0", "saved-1"]
    assert launched.names("start-1-*") == []


def test_a_signal_to_one_rank_ends_all(launch):
    launched = launch("wait()", "--nproc", "2")
    os.kill(launched.pids()[1], signal.SIGUSR1)
    assert launched.end() == (143, "")  # of the rank that torch has ended; ranks of a run agree on one signal


def test_the_second_ctrl_c_ends_at_once(launch):
    launched = launch("wait()", "--nproc", "2", SAVE_SECONDS="60")
    pids = launched.pids()
    launched.signal(signal.SIGINT)
    time.sleep(0.1)
    launched.signal(signal.SIGINT)
    assert launched.end() == (130, "distrust: interrupted\n")
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 1)


def test_a_save_may_take_longer_than_torch_waits(launch):
    """torch waits 30 s for ranks to end if one has failed; here 0.1 s."""
    setup = (
        "from torch.distributed.elastic.multiprocessing.api import PContext\n"
        "PContext.close.__defaults__ = (None, 0.1)"
    )
    launched = launch(
        "wait() if rank == 0 else (meet(), sys.exit(1))", "--nproc", "2", setup=setup, SAVE_SECONDS="1"
    )
    assert launched.end() == (1, "")
    assert launched.names("saved-*") == ["saved-0"]


def test_a_name_that_is_none_is_one_line(launch):
    launched = launch("", "--nproc", "2", "--nnodes", "2", "--rendezvous", "a..b:1")
    code, output = launched.end()
    assert (code, output.count("\n")) == (1, 2)
    assert output.splitlines()[1].startswith("distrust: --rendezvous a..b:1: ")


def test_a_suspended_rank_ends_with_the_others(launch):
    launched = launch("wait()", "--nproc", "2")
    first, second = launched.pids()
    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    assert launched.end() == (137, "distrust: rank 1 was killed by SIGKILL\n")


def test_a_killed_launcher_leaves_no_ranks(launch):
    """The ranks ask the system to signal them; nothing else could."""
    imports = [str(SOURCE), *site.getsitepackages()]
    program = f"sys.path[:0] = {imports}; from distrust.cli import launch; launch.end_with_agent(); wait()"
    launched = launch(program, "--nproc", "2")
    pids = launched.pids()
    launched.signal(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 5)
    assert launched.names("saved-*") == ["saved-0", "saved-1"]


def test_two_machines_meet(launch, free_port):
    flags = ["--nproc", "2", "--nnodes", "2", "--rendezvous", f"127.0.0.1:{free_port}"]
    program = "(folder / f'world-{rank}').write_text(os.environ['WORLD_SIZE'] + os.environ['MASTER_ADDR'])"
    machines = [launch(program, *flags) for _ in "ab"]
    line = f"distrust: waiting for the machines of the run at 127.0.0.1:{free_port}\n"
    assert [machine.end() for machine in machines] == [(0, line)] * 2
    assert machines[0].names("world-*") == [f"world-{rank}" for rank in range(4)]
    assert {path.read_text() for path in machines[0].folder.glob("world-*")} == {"4127.0.0.1"}


@pytest.fixture
def forked_ranks(forked_python, tmp_path) -> Path:
    """A Python for ranks: forks, which note their process. A fork is no child of the launcher."""
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\n"
        f"echo $$ > {tmp_path}/pid-$TORCHELASTIC_RESTART_COUNT-$RANK\n"
        '[ "$1" = -u ] && shift\n'  # torchrun's
        f'export DISTRUST_LAUNCHER=; exec {forked_python} "$@"\n',
        "utf-8",
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def run_folder(tmp_path) -> Path:
    make_model(tmp_path / "model")
    write_records(tmp_path / "data.jsonl", 40)
    return tmp_path


def digest_in(output: str) -> str:
    return output.rpartition("state digest ")[2].split()[0]


def test_a_run_that_was_killed_and_stopped_ends_as_one_process(
    start, forked_python, forked_ranks, run_folder
):
    """The launcher's ranks: one is killed, and one of the next is told to stop. torchrun goes on."""

    def arguments(name: str) -> list[str]:
        return train_arguments(run_folder, run_folder / name, "--gradient-accumulation", 2, "--max-steps", 20)

    def newest() -> int:
        files = (run_folder / "run/checkpoints").glob("checkpoint-*.safetensors")
        return max((int(file.stem.rpartition("-")[2]) for file in files), default=0)

    code = LAUNCHER.format(setup="")
    flags = ["--nproc", "2", "--max-restarts", "1"]
    launched = start([forked_python, "-c", code, forked_ranks, *arguments("run"), *flags])
    alone = start([forked_python, "-m", "distrust", *arguments("alone")])
    wait_until(lambda: newest() > 0)
    os.kill(int((run_folder / "pid-0-1").read_text()), signal.SIGKILL)
    wait_until(lambda: (run_folder / "pid-1-1").exists())
    step = newest()
    wait_until(lambda: newest() > step)
    os.kill(int((run_folder / "pid-1-1").read_text()), signal.SIGTERM)
    output = launched.communicate(timeout=90)[0]
    assert launched.returncode == 143, output
    lines = output.splitlines()
    messages = [line for line in lines if line.startswith("distrust: ")]
    assert messages[-1] == "distrust: starting again; restarts left: 0"  # nothing of the stop
    assert any(line.startswith("Resuming from step ") for line in lines)
    assert f"Stopped by SIGTERM: step {newest()} is saved" in output
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "distrust"]
    by_torch = start([forked_python, *torchrun, *arguments("run")], PYTHON_EXEC=str(forked_ranks))
    digests = [digest_in(process.communicate(timeout=90)[0]) for process in (by_torch, alone)]
    assert digests[0] == digests[1]
