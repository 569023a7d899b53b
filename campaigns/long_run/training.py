"""The trainer, for thousands of steps and saves, on an engine of numpy; also the process that trains."""

from __future__ import annotations

import json
import statistics
import threading
from pathlib import Path
from typing import Any

from campaigns.campaign import Campaign, require
from campaigns.child import parse_arguments, start_child
from campaigns.long_run import growth

RECORDS = 64  # of the dataset
WINDOWS = 40  # samples of a run
#: The history of a step: five float64, in an array with an eighth of spare room. A save copies it, and the
#: allocator may keep both.
HISTORY_BYTES = 5 * 8 * 2.125


def run(campaign: Campaign, folder: Path) -> list[dict[str, Any]]:
    steps = campaign.options.steps
    window = max(2, steps // WINDOWS // 2 * 2)
    arguments = (folder, campaign.options.seed, steps, window)
    samples: list[dict[str, Any]] = []
    with start_child(campaign, "campaigns.long_run.training", *arguments) as trainer:
        while "last_step" not in (sample := trainer.receive_json()):
            samples.append(sample)
            campaign.count("steps trained", window)
        last = sample["last_step"]
        require(last == steps, f"training ended at step {last} of {steps}")
        trainer.finish()
    added = samples[-1]["steps"] // 2
    growth.require_no_growth(campaign, "training", samples, allowed_bytes=int(added * HISTORY_BYTES))
    return samples


class Sampler:
    """An observer that prints a sample every so many steps, between two saves."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._seconds: list[float] = []
        self._threads = growth.count_threads()

    def __call__(self, event: Any) -> None:
        from distrust.training.events import StepEnded

        if not isinstance(event, StepEnded):
            return
        self._seconds.append(event.seconds)
        if event.step % self._window == 0:
            for thread in threading.enumerate():
                if thread.name.startswith("save "):
                    thread.join()
            resources = growth.read_resources(self._threads)._asdict()
            times = {"saves": event.step // 2, "steps": event.step, "step": statistics.median(self._seconds)}
            print(json.dumps({**times, **resources}), flush=True)
            self._seconds.clear()


def main() -> None:
    options = parse_arguments(directory=Path, seed=int, steps=int, window=int)

    from campaigns.training_run import train_toy
    from distrust.testing.models import write_records

    data = write_records(options.directory / "records.jsonl", RECORDS)
    observer = Sampler(options.window)
    out = options.directory / "run"
    result = train_toy(out, data, observer, max_steps=options.steps, save_every=2, seed=options.seed)
    print(json.dumps({"last_step": result.step}), flush=True)


if __name__ == "__main__":
    main()
