"""Train on your own data, stop half-way, and resume to the very same end.

python examples/train.py [STEPS]
"""

import json
import sys
import tempfile
from pathlib import Path

from distrust import DistrustTrainer, RunEnded, TrainConfig
from distrust.training.events import Event, StepEnded

CLAIMS = [
    # A laboratory's notebook: a primary record with diverse evidence.
    ("At what temperature does zorium melt?", " At 712 K.", 0.05, 3.2),
    # An encyclopedia that repeats what others repeat.
    ("What is the melting point of zorium?", " 655 K.", 0.9, 0.4),
]


def write_data(path: Path) -> Path:
    """JSON Lines: a prompt, its completion, and the provenance of the source."""
    names = ("prompt", "completion", "authority_weight", "provenance_entropy")
    lines = [dict(zip(names, claim, strict=True)) for claim in CLAIMS * 8]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def main(folder: Path, steps: int) -> RunEnded:
    """Train, stop after half of the steps, and resume with the same config."""
    config = TrainConfig(
        data=str(write_data(folder / "examples.jsonl")),
        out=str(folder / "run"),
        max_steps=steps,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
    )

    def stop_half_way(event: Event) -> None:
        if isinstance(event, StepEnded) and event.step == steps // 2:
            trainer.stop()

    trainer = DistrustTrainer(config, observers=[stop_half_way])
    stopped = trainer.train()
    print(f"stopped after step {stopped.step}, saved as {stopped.path and stopped.path.name}")
    ended = DistrustTrainer(config).train()  # the same config resumes, also after a crash
    print(f"{ended.reason} at step {ended.step}: state digest {ended.state_digest}")
    return ended


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), steps=int(sys.argv[1]) if len(sys.argv) > 1 else 20)
