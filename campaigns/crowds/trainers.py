"""The same training command twice at one instant: one trains, undisturbed; the other says why it cannot."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from campaigns.campaign import Campaign, Case
from distrust import CheckpointManager

#: A few seconds of training, on a fast machine too: the second one has to find the first one at it.
ARGUMENTS = (
    *("--max-steps", "24", "--save-every", "3", "--batch-size", "2", "--gradient-accumulation", "8"),
    *("--lora-rank", "4", "--threads", "1", "--lora-dropout", "0.1"),
)
PATIENCE_SECONDS = 600.0


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    """Start some at once."""
    more = case.chance.choice([1, 1, 2])
    trainers = [_start(folder, campaign.options.fault) for _ in range(1 + more)]
    try:
        ended = [(*trainer.communicate(timeout=PATIENCE_SECONDS), trainer) for trainer in trainers]
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
            clear = len(lines) == 1 and f"pid {winner.pid} " in err and "holds this directory" in err
            campaign.require(clear, f"not a clear line: {out!r} {err!r}")
            campaign.count("training commands refused with a clear line")
    digest = _digest(folder)
    campaign.require(
        digest == _undisturbed(campaign.options.fault),
        f"the one that trained ended in {digest}, and undisturbed in {_undisturbed(campaign.options.fault)}",
    )


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
