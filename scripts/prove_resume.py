"""Proves that no run is lost: the same training, uninterrupted and disturbed, ends in the same state.

    python scripts/prove_resume.py --seed 1
    python scripts/prove_resume.py --kills 50 -- --data mine.jsonl --max-steps 300

Four runs of ``distrust train``, each in its own folder:

- alone: uninterrupted;
- killed: SIGKILL at random instants, the first of them during a save, and the same command again each time;
- stopped: SIGTERM at a random instant, and the same command again;
- resumed: Ctrl-C (SIGINT) twice, each time in the middle of an epoch, and the same command again.

Each must end with the state digest of the first. Options after ``--`` go to every ``distrust train``.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from campaigns.campaign import CounterExample
from campaigns.session import Session
from campaigns.training_run import TrainingRun
from campaigns.triggers import Trigger, after

SAVE_EVERY = 5
TRAINING = [
    "--max-steps", "60", "--save-every", str(SAVE_EVERY), "--keep-last", "100", "--lora-dropout", "0.1",
]  # fmt: skip


class Run:
    """A training run, and a log of what was done to it."""

    def __init__(self, out: Path, options: Sequence[str]) -> None:
        self.out = out
        self.training = TrainingRun(out, [*TRAINING, *options], hang_seconds=math.inf)
        self.story: list[str] = []

    def disturb(self, number: signal.Signals, instant: Trigger, what: str) -> bool:
        """Start, and send a signal at an instant; False if the run had ended before."""
        session, code = self.training.disturb(number, instant)
        hit = code == (-number if number == signal.SIGKILL else 128 + number)
        if not hit and code != 0:
            raise CounterExample(f"{self.out}: exit code {code}: {session.errors()}")
        newest = max(self.training.steps(), default=0)
        outcome = f"exit {code}, newest checkpoint {newest}" if hit else "too late, the run had ended"
        self.story.append(f"{number.name} {what}: {outcome}")
        return hit


def kill_during_save(run: Run) -> None:
    """SIGKILL while a temporary file exists; tried again if the save was faster."""
    while True:
        if not run.disturb(signal.SIGKILL, _new_file(run.training), "during a save"):
            raise CounterExample("the run ended before a save could be caught; give it more --max-steps")
        if run.training.temporary():
            run.story[-1] += ", a half-written file left behind"
            return
        run.story[-1] += ", but the save was faster"


def _new_file(training: TrainingRun) -> Trigger:
    def watch_for_new_file(_: Session) -> Callable[[], bool]:
        existing = set(training.temporary())
        return lambda: bool(set(training.temporary()) - existing)

    return watch_for_new_file


def kill_at_random(run: Run, rng: random.Random, longest: float) -> bool:
    """SIGKILL after a random time."""
    delay = rng.uniform(0, longest)
    return run.disturb(signal.SIGKILL, after(delay), f"after {delay:.1f} s")


def stop_after_step(run: Run, number: signal.Signals, step: int) -> None:
    """A signal as soon as the checkpoint of a step exists."""

    def watch_for_checkpoint(_: Session) -> Callable[[], bool]:
        return lambda: max(run.training.steps(), default=0) >= step

    run.disturb(number, watch_for_checkpoint, f"once step {step} was saved")


def main() -> int:
    try:
        return prove()
    except CounterExample as error:
        raise SystemExit(str(error)) from None


def prove() -> int:
    """Make the four runs, and compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the four runs; default: a temporary one")
    parser.add_argument("--seed", type=int, default=1, help="of the instants")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs, one of them during a save")
    own_arguments = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    arguments = parser.parse_args(own_arguments)
    options = sys.argv[len(own_arguments) + 2 :]
    out = arguments.out or Path(tempfile.mkdtemp(prefix="distrust-"))
    rng = random.Random(arguments.seed)

    began = time.time()
    alone = Run(out / "alone", options)
    expected = alone.training.finish()
    seconds = time.time() - began
    saved = sorted(alone.training.steps())
    # Everything before the first checkpoint is repeated at every start.
    starting = min(path.stat().st_mtime for path in alone.training.checkpoints.glob("*.safetensors")) - began
    print(f"alone    {expected}  ({seconds:.0f} s, checkpoints {saved})", flush=True)

    killed = Run(out / "killed", options)
    kill_during_save(killed)
    for remaining in range(arguments.kills - 1, 0, -1):
        progress = max(killed.training.steps(), default=0) / saved[-1]
        if not kill_at_random(killed, rng, starting + (1 - progress) * (seconds - starting) / remaining):
            raise CounterExample(
                "the run ended before its last kill; give another --seed, or more --max-steps"
            )

    due = [step for step in saved[:-1] if step % SAVE_EVERY == 0]  # a best one may exist right next to it
    stopped = Run(out / "stopped", options)
    stop_after_step(stopped, signal.SIGTERM, rng.choice(due))

    resumed = Run(out / "resumed", options)
    for step in sorted(rng.sample(due, 2)):
        stop_after_step(resumed, signal.SIGINT, step)

    equal = True
    for run in (killed, stopped, resumed):
        digest = run.training.finish()
        same_log = run.training.metrics() == alone.training.metrics()
        equal = equal and digest == expected and same_log
        print(f"{run.out.name:8} {digest}  {'the same' if digest == expected else 'DIFFERENT'}")
        print(f"         metrics.jsonl: {'the same numbers' if same_log else 'DIFFERENT'}")
        for line in run.story:
            print(f"         {line}")
    print("all four ended in the same state, bit for bit" if equal else "NOT the same state")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
