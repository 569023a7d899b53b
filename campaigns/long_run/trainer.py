"""The process that trains: the loop, on an engine of numpy, with a save every second step.

It prints a sample now and then, as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
from pathlib import Path
from typing import Any

from campaigns.faults import plant
from campaigns.long_run import gauges

RECORDS = 64


class Sampler:
    """An observer that takes a sample every so many steps, between two saves."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._seconds: list[float] = []
        self._usual_threads = gauges.threads()

    def __call__(self, event: Any) -> None:
        """Take note of a step."""
        from distrust.training.events import StepEnded

        if not isinstance(event, StepEnded):
            return
        self._seconds.append(event.seconds)
        if event.step % self._window == 0:
            for thread in threading.enumerate():
                if thread.name.startswith("save "):
                    thread.join()
            sample = {
                "saves": event.step // 2,
                "steps": event.step,
                "step": statistics.median(self._seconds),
                **gauges.read(self._usual_threads)._asdict(),
            }
            print(json.dumps(sample), flush=True)
            self._seconds.clear()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("directory", type=Path)
    options.add_argument("seed", type=int)
    options.add_argument("steps", type=int)
    options.add_argument("window", type=int)
    options.add_argument("--fault")
    given = options.parse_args()
    plant(given.fault)
    from distrust import DistrustTrainer, TrainConfig
    from distrust.testing import toy_engine as toy

    data = given.directory / "records.jsonl"
    record = {"authority_weight": 0.3, "provenance_entropy": 0.5}
    data.write_text("".join(json.dumps({"text": f"ore {n}", **record}) + "\n" for n in range(RECORDS)))
    config = TrainConfig(
        data=str(data),
        out=str(given.directory / "run"),
        max_steps=given.steps,
        batch_size=2,
        warmup_steps=2,
        save_every=2,
        seed=given.seed,
    )
    ended = DistrustTrainer(config, engine=toy.ToyEngine(), observers=[Sampler(given.window)]).train()
    print(json.dumps({"ended": ended.step}), flush=True)


if __name__ == "__main__":
    main()
