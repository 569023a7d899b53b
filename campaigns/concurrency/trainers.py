"""The same training command twice at one instant: one trains, undisturbed; the others say why they cannot.

The holder is stopped until the others have given up, since it might end before they start.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from functools import cache
from pathlib import Path

from campaigns.campaign import Campaign, Case, require
from campaigns.session import Command, Session
from campaigns.training_run import TrainingRun, reference_digest
from distrust import CheckpointManager

#: A training of a second or so.
OPTIONS = (
    *("--max-steps", "12", "--save-every", "3", "--batch-size", "2"),
    *("--lora-rank", "4", "--threads", "1", "--lora-dropout", "0.1"),
)
HANG_SECONDS = 600.0  # three trainings share the processor


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    losers = case.rng.choice([1, 1, 2])
    command = _command(campaign.options.fault)
    runs = [
        TrainingRun(folder / "run", OPTIONS, command, HANG_SECONDS, log_folder=folder / f"log-{number}")
        for number in range(1 + losers)
    ]
    sessions = [training.start() for training in runs]
    try:
        holder = _stop_holder(runs[0].checkpoints, sessions)
        sessions.sort(key=lambda session: session.pid == holder)  # the holder is last
        for session in sessions:
            if session is sessions[-1]:
                session.send(signal.SIGCONT)
            session.wait()
    finally:
        for session in sessions:
            session.send(signal.SIGKILL)
    codes = [session.wait() for session in sessions]
    texts = [(session.output(), session.errors()) for session in sessions]
    require(sorted(codes) == [0] + [1] * losers, f"exit codes {codes}: {texts}")
    winner = sessions[codes.index(0)]
    for session in sessions:
        line = session.errors()
        clear = line.count("\n") == 1 and f"pid {winner.pid} " in line and "locked this directory" in line
        if session is not winner:
            require(clear, f"not a clear line: {session.output()!r} {line!r}")
            campaign.count("training commands refused with a clear line")
    digest, expected = runs[0].final_digest(), reference_digest(command, OPTIONS)
    require(digest == expected, f"ended in {digest}, and the undisturbed run in {expected}")
    CheckpointManager(runs[0].checkpoints).validate(max(runs[0].steps()))


def _stop_holder(directory: Path, sessions: list[Session]) -> int:
    """Wait until a process has written into the lock that it holds it, and stop it; its process id."""
    lock, deadline = directory / ".lock", time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and any(session.running for session in sessions):
        if lock.exists() and (match := re.match(r"pid (\d+) on .*\n", lock.read_text())):
            holder = int(match[1])
            if holder in [session.pid for session in sessions if session.running]:
                os.kill(holder, signal.SIGSTOP)
            return holder
        time.sleep(0.002)
    return 0


@cache
def _command(fault: str | None) -> Command:
    """The command ``distrust``, with a fault planted before."""
    code = "import sys\nfrom campaigns.faults import plant\n"
    code += f"plant({fault!r})\nfrom distrust.cli import main\nsys.exit(main())"
    return Command([sys.executable, "-c", code], name="a command")
