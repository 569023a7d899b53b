"""The proof that no run is lost: the same training, left alone and disturbed, ends in the same state.

    python scripts/prove_resume.py --seed 1
    python scripts/prove_resume.py --kills 50 -- --data mine.jsonl --max-steps 300

Four runs of ``distrust train``, each in a folder of its own:

- alone: nobody touches it;
- killed: SIGKILL at random instants, the first of them during a save, and the same command again each time;
- stopped: SIGTERM at a random instant, and the same command again;
- resumed: Ctrl-C (SIGINT) twice, each time in the middle of an epoch, and the same command again.

Each must end with the state digest of the first. What stands after ``--`` goes to every ``distrust train``.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DISTRUST = [sys.executable, "-m", "distrust"]
TRAINING = ["--max-steps", "60", "--save-every", "5", "--keep-last", "100", "--lora-dropout", "0.1"]
POLL_SECONDS = 0.0005


@dataclass
class Run:
    """One folder, the command that trains into it, and what was done to it."""

    out: Path
    options: list[str]
    story: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        command = [*DISTRUST, "train", "--out", str(self.out), *TRAINING, *self.options]
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "errors.txt").open("ab") as errors:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)

    def finish(self) -> str:
        """Run the command to its end; returns the final state digest."""
        code = self.start().wait()
        if code != 0:
            raise SystemExit(f"{self.out}: exit code {code}: {(self.out / 'errors.txt').read_text()}")
        shown = subprocess.run(
            [*DISTRUST, "show", str(self.out), "--json"], capture_output=True, check=True, text=True
        )
        checkpoint = json.loads(shown.stdout)
        if checkpoint["kind"] != "final":
            raise SystemExit(f"{self.out}: ended without a final checkpoint")
        return str(checkpoint["state_digest"])

    def disturb(self, number: signal.Signals, condition: Callable[[], bool], what: str) -> bool:
        """Start, and send a signal as soon as ``condition`` holds; False if the run had ended by then."""
        process = self.start()
        while process.poll() is None and not condition():
            time.sleep(POLL_SECONDS)
        process.send_signal(number)
        code = process.wait()
        last = max(self.steps(), default=0)
        hit = code == (-number if number == signal.SIGKILL else 128 + number)
        if not hit and code != 0:
            raise SystemExit(f"{self.out}: exit code {code}: {(self.out / 'errors.txt').read_text()}")
        outcome = f"exit {code}, newest checkpoint {last}" if hit else "too late, the run had ended"
        self.story.append(f"{number.name} {what}: {outcome}")
        return hit

    def steps(self) -> list[int]:
        names = self.checkpoints.glob("checkpoint-*.safetensors")
        return [int(path.stem.split("-")[1]) for path in names]

    def temporary(self) -> list[Path]:
        return list(self.checkpoints.glob(".checkpoint-*.tmp"))

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


def kill_during_save(run: Run) -> None:
    """SIGKILL while a temporary file is there; tried again when the save was faster."""
    while True:
        if not run.disturb(signal.SIGKILL, _new_file(run.temporary), "during a save"):
            raise SystemExit("the run ended before a save could be caught; give it more --max-steps")
        if run.temporary():
            run.story[-1] += ", a half-written file left behind"
            return
        run.story[-1] += ", but the save was faster"


def _new_file(listed: Callable[[], list[Path]]) -> Callable[[], bool]:
    before = set(listed())
    return lambda: bool(set(listed()) - before)


def kill_at_random(run: Run, chance: random.Random, longest: float) -> bool:
    """SIGKILL after a random time."""
    delay = chance.uniform(0, longest)
    began = time.monotonic()
    return run.disturb(signal.SIGKILL, lambda: time.monotonic() - began >= delay, f"after {delay:.1f} s")


def stop_after_step(run: Run, number: signal.Signals, step: int) -> None:
    """A signal as soon as the checkpoint of a step stands."""
    run.disturb(number, lambda: max(run.steps(), default=0) >= step, f"once step {step} was saved")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the four runs; default: a temporary one")
    parser.add_argument("--seed", type=int, default=1, help="of the instants")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs, one of them during a save")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    arguments = parser.parse_args(own)
    options = sys.argv[len(own) + 2 :]
    out = arguments.out or Path(tempfile.mkdtemp(prefix="distrust-"))
    chance = random.Random(arguments.seed)

    began = time.time()
    alone = Run(out / "alone", options)
    expected = alone.finish()
    seconds = time.time() - began
    saved = sorted(alone.steps())
    # What comes before the first checkpoint is done again at every start.
    starting = min(path.stat().st_mtime for path in alone.checkpoints.glob("*.safetensors")) - began
    print(f"alone    {expected}  ({seconds:.0f} s, checkpoints {saved})", flush=True)

    killed = Run(out / "killed", options)
    kill_during_save(killed)
    for left in range(arguments.kills - 1, 0, -1):
        done = max(killed.steps(), default=0) / saved[-1]
        if not kill_at_random(killed, chance, starting + (1 - done) * (seconds - starting) / left):
            raise SystemExit("the run ended before its last kill; give another --seed, or more --max-steps")

    stopped = Run(out / "stopped", options)
    stop_after_step(stopped, signal.SIGTERM, chance.choice(saved[:-1]))

    resumed = Run(out / "resumed", options)
    for step in sorted(chance.sample(saved[:-1], 2)):
        stop_after_step(resumed, signal.SIGINT, step)

    equal = True
    for run in (killed, stopped, resumed):
        digest = run.finish()
        equal = equal and digest == expected
        print(f"{run.out.name:8} {digest}  {'the same' if digest == expected else 'DIFFERENT'}")
        for line in run.story:
            print(f"         {line}")
    print("all four ended in the same state, bit for bit" if equal else "NOT the same state")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
