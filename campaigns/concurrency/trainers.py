"""The same training command twice at one instant: one trains, undisturbed; the other says why it cannot.

The one that holds the directory is stopped until the other has given up, or it might have ended by then; then
it goes on.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from campaigns.campaign import Campaign, Case
from distrust import CheckpointManager

#: A second or so of training.
ARGUMENTS = (
    *("--max-steps", "12", "--save-every", "3", "--batch-size", "2"),
    *("--lora-rank", "4", "--threads", "1", "--lora-dropout", "0.1"),
)
PATIENCE_SECONDS = 600.0


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    """Start some at once."""
    more = case.chance.choice([1, 1, 2])
    trainers = [_start(folder, campaign.options.fault) for _ in range(1 + more)]
    try:
        # The holder last: it is stopped.
        holder = _stopped_holder(folder, trainers)
        trainers.sort(key=lambda trainer: trainer.pid == holder)
        ended = []
        for trainer in trainers:
            if trainer is trainers[-1]:
                trainer.send_signal(signal.SIGCONT)
            ended.append((*trainer.communicate(timeout=PATIENCE_SECONDS), trainer))
    finally:
        for trainer in trainers:
            trainer.kill()
            trainer.wait()
    codes = [trainer.returncode for trainer in trainers]
    campaign.require(sorted(codes) == [0] + [1] * more, f"exit codes {codes}: {[end[:2] for end in ended]}")
    winner = trainers[codes.index(0)]
    for out, err, trainer in ended:
        if trainer is not winner:
            lines = err.splitlines()
            clear = len(lines) == 1 and f"pid {winner.pid} " in err and "has locked this directory" in err
            campaign.require(clear, f"not a clear line: {out!r} {err!r}")
            campaign.count("training commands refused with a clear line")
    digest = _digest(folder)
    campaign.require(
        digest == _undisturbed(campaign.options.fault),
        f"the one that trained ended in {digest}, and undisturbed in {_undisturbed(campaign.options.fault)}",
    )


def _stopped_holder(folder: Path, trainers: list[subprocess.Popen[str]]) -> int:
    """Wait until one of them says that it holds the directory, and stop it."""
    lock, deadline = folder / "run" / "checkpoints" / ".lock", time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and any(trainer.poll() is None for trainer in trainers):
        if lock.exists() and (found := re.match(r"pid (\d+) on .*\n", lock.read_text())):
            holder = int(found[1])
            if holder in [trainer.pid for trainer in trainers if trainer.poll() is None]:
                os.kill(holder, signal.SIGSTOP)
            return holder
        time.sleep(0.002)
    return 0


def _start(out: Path, fault: str | None) -> subprocess.Popen[str]:
    code = "import sys\nfrom campaigns.faults import plant\n"
    code += f"plant({fault!r})\nfrom distrust.cli import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", "--out", str(out / "run"), *ARGUMENTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=Path(__file__).parent.parent.parent,
    )


@functools.cache
def _undisturbed(fault: str | None) -> str:
    """The digest of the run that nobody disturbs."""
    with tempfile.TemporaryDirectory(prefix="undisturbed-") as folder:
        trainer = _start(Path(folder), fault)
        _, err = trainer.communicate(timeout=PATIENCE_SECONDS)
        if trainer.returncode != 0:
            raise RuntimeError(err)
        return _digest(Path(folder))


def _digest(folder: Path) -> str:
    (final,) = (folder / "run" / "checkpoints").glob("*-final.safetensors")
    CheckpointManager(final.parent).validate(final)
    return CheckpointManager(final.parent).inspect(final).state_digest
