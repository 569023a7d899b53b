"""What --recheck-every costs: the time of a rechecked step, as a multiple of a plain one in the same run.

    python -m benchmarks.recheck
    python -m benchmarks.recheck --steps 60 --model ./my-model

A run of the bundled model rechecks every other step, so both kinds of step meet the same load of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence

from distrust import DistrustTrainer, TrainConfig
from distrust.option_values import BUNDLED
from distrust.training.events import Event, StepEnded

WARM_UP_STEPS = 4  # not counted


def measure(model: str, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of each plain and each rechecked step of a run of that many steps."""
    seconds: dict[int, float] = {}

    def observe(event: Event) -> None:
        if isinstance(event, StepEnded):
            seconds[event.step] = event.seconds

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=model,
            data=BUNDLED,
            out=folder,
            max_steps=steps + WARM_UP_STEPS,
            save_every=0,
            recheck_every=2,
            step_snapshots=False,
        )
        DistrustTrainer(config, observers=[observe]).train()
    counted = {step: value for step, value in seconds.items() if step > WARM_UP_STEPS}
    return [counted[n] for n in counted if n % 2], [counted[n] for n in counted if n % 2 == 0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUNDLED, help="model to train (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="steps to measure (default: %(default)s)")
    options = parser.parse_args(arguments)
    plain, rechecked = map(statistics.median, measure(options.model, options.steps))
    print(
        f"plain step {plain * 1000:.0f} ms, rechecked step {rechecked * 1000:.0f} ms: {rechecked / plain:.2f}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
