"""Watch a run: an observer is any callable that takes events. This one stops at a target.

python examples/callbacks.py [STEPS]
"""

import sys
import tempfile

from distrust import DistrustTrainer, TrainConfig
from distrust.training.events import CheckpointSaved, Event, RunEnded, RunStarted, StepEnded


class StopAtLoss:
    """Prints the smoothed loss, and ends the run once it is below a target."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.loss: float | None = None
        self.trainer: DistrustTrainer | None = None

    def __call__(self, event: Event) -> None:
        """Called on the training thread, which continues when this returns."""
        match event:
            case RunStarted():
                print(f"{event.examples} examples, {event.trained:,} of {event.parameters:,} parameters")
            case StepEnded():
                self.loss = event.loss if self.loss is None else 0.8 * self.loss + 0.2 * event.loss
                print(f"step {event.step}: loss {self.loss:.3f}, {event.tokens / event.seconds:,.0f} tok/s")
                if self.loss < self.target and self.trainer is not None:
                    self.trainer.stop()
            case CheckpointSaved():
                print(f"step {event.step}: durable as {event.path.name}")
            case RunEnded():
                print(f"over at step {event.step}: {event.reason}")


def main(out: str, steps: int) -> None:
    """Train the bundled model on the bundled corpus until its loss is below 3."""
    observer = StopAtLoss(target=3.0)
    config = TrainConfig(out=out, max_steps=steps, learning_rate=2e-3, warmup_steps=2, save_every=5)
    trainer = DistrustTrainer(config, observers=[observer])
    observer.trainer = trainer
    trainer.train()
    print(f"{trainer.state.tokens_seen:,} tokens in {trainer.state.elapsed_seconds:.1f} s of steps")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder, steps=int(sys.argv[1]) if len(sys.argv) > 1 else 60)
