"""Many saves of a small state in one process; and saves into a directory that keeps many checkpoints.

This module is also the process that saves. Its orders are lines of JSON: rules to follow from now on, or the
first step and the number of steps to save, answered by a sample.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from campaigns.campaign import Campaign, require
from campaigns.child import Child, parse_arguments, start_child
from campaigns.long_run import growth
from campaigns.oracle import Rules, Saved, must_keep
from distrust import Checkpoint, CheckpointManager

RULES = Rules(keep_last=3, keep_best=2)  # by number and by metric
#: The lock, and the union of the rules.
FILES = 1 + 3 + 2
#: Saves elsewhere before the first sample, in which Python's caches and free lists fill: by 300 blocks.
WARM_UP = 200
#: Saves from one sample to the next, and the least number of samples.
WINDOW, SAMPLES = 100, 20
#: Latency of fewer saves is reported, but is no finding: the disk may be busy with other work for as long.
TIMED_FROM = 5_000
#: Windows of the directory that keeps many.
MANY_WINDOWS = 20
#: From half of the checkpoints to all of them, the work of a save beyond the first one may double, since each
#: file is looked at; if it were quadratic, it would quadruple. Processor time, since other programs only add
#: to elapsed time.
GROWTH_BOUND, NOISE_SECONDS = 3.0, 0.004
#: A header is cached two seconds after its file was written: how many are depends on the disk's speed.
BLOCKS_PER_CHECKPOINT = 3


def run(campaign: Campaign, folder: Path) -> list[dict[str, Any]]:
    """Save as often as the campaign has cases; returns the samples."""
    samples: list[dict[str, Any]] = []
    total = 0
    with _start_saver(campaign, folder) as saver:
        saver.send({"rules": RULES._asdict()})
        for first, count in _windows(campaign):
            saver.send({"first": first, "count": count})
            sample = saver.receive_json()
            total = first + count
            samples.append({"saves": total, **sample})
            campaign.count("saves", count)
            checkpoints = (Saved(step, metric=metric(step)) for step in range(total))
            expected = sorted(saved.step for saved in must_keep(checkpoints, RULES))
            steps, files = sample["steps"], sample["files"]
            text = f"after {total:,} saves the rules retain {expected}; there are {steps} in {files} files"
            require(steps == expected and files <= FILES, text)
        saver.finish()
    growth.require_no_growth(campaign, "saves", samples)
    growth.require_no_slowdown(campaign, "saves", samples, enforce=total >= TIMED_FROM)
    return samples


def run_many(campaign: Campaign, folder: Path) -> list[dict[str, Any]]:
    """Fill the directory, and then save as often again with as many checkpoints; returns the samples."""
    many = campaign.options.many
    window = max(5, many // MANY_WINDOWS)
    samples: list[dict[str, Any]] = []
    with _start_saver(campaign, folder) as saver:
        for keep_last, first in ((None, 0), (many, many)):
            saver.send({"rules": {"keep_last": keep_last, "keep_best": 0}})
            for begin in range(first, first + many, window):
                saver.send({"first": begin, "count": window})
                sample = saver.receive_json()
                samples.append({"saves": begin + window, **sample})
                campaign.count("saves into a directory that keeps many", window)
                count = len(sample["steps"])
                expected = begin + window if keep_last is None else min(many, begin + window)
                require(count == expected, f"there are {count:,} checkpoints, not {expected:,}")
        saver.finish()
    middle = len(samples) // 2
    _require_linear(campaign, samples[:middle])
    allowed, name = BLOCKS_PER_CHECKPOINT * many, f"{many:,} checkpoints"
    growth.require_no_growth(campaign, name, samples[middle:], allowed_blocks=allowed)
    return samples


def _require_linear(campaign: Campaign, samples: growth.Samples) -> None:
    first, half, full = (
        statistics.median(sample["cpu"] for sample in samples[begin : begin + 3])
        for begin in (0, len(samples) // 2 - 2, len(samples) - 3)
    )
    each = (full - first) / samples[-1]["saves"]
    campaign.counts["many: processor time of a save with few checkpoints, µs"] = round(first * 1e6)
    campaign.counts["many: processor time of a save with all, µs"] = round(full * 1e6)
    campaign.counts["many: for each checkpoint, µs"] = round(each * 1e6)
    is_linear = full - first <= GROWTH_BOUND * max(0.0, half - first) + NOISE_SECONDS
    times = f"{first * 1e3:.1f} ms with few checkpoints, {half * 1e3:.1f} with half of them, {full * 1e3:.1f}"
    require(is_linear, f"more than linear: the processor time of a save was {times} with all")


def _start_saver(campaign: Campaign, folder: Path) -> Child:
    return start_child(campaign, "campaigns.long_run.saves", folder / "checkpoints", campaign.options.seed)


def _windows(campaign: Campaign) -> Iterator[tuple[int, int]]:
    """First step and number of steps, as long as there are cases."""
    window = WINDOW
    if campaign.options.cases is not None:
        window = max(10, min(WINDOW, campaign.options.cases // SAMPLES))
    cases = campaign.cases()
    while batch := list(itertools.islice(cases, window)):
        if len(batch) == window:  # the median of fewer would be less exact
            yield batch[0].number, window


#: The small state: some tensors, a few KiB.
TENSORS, VALUES = 4, 512  # of float64
#: Saves from one probe of the disk to the next.
PROBE_EVERY = 5
#: Saves from one release of the directory to the next.
CLOSE_EVERY = 10


class Saver:
    def __init__(self, directory: Path, seed: str) -> None:
        self._seed = seed  # of the choice between copying and overlapping
        self._directory = directory  # of the checkpoints
        self._manager = CheckpointManager(directory)
        self._threads = growth.count_threads()
        self._weights = {f"layer{number}": np.zeros(VALUES) for number in range(TENSORS)}
        self._blocking: list[float] = []
        self._returning: list[float] = []

    def set_rules(self, rules: dict[str, Any]) -> None:
        self._manager.close()
        self._manager = CheckpointManager(self._directory, **rules)

    def save(self, first: int, count: int) -> dict[str, Any]:
        """Save some steps; returns a sample."""
        self._blocking.clear()
        self._returning.clear()
        probes, cpu = [], 0.0
        for step in range(first, first + count):
            if step % CLOSE_EVERY == 0:
                self._manager.close()  # the next save takes the lock again
            if step % PROBE_EVERY == 0:
                probes.append(self._probe_disk())
            began = time.process_time()
            self._save_step(step)
            cpu += time.process_time() - began
        self._manager.cleanup()  # it waits for the last save
        return {
            **growth.read_resources(self._threads)._asdict(),
            "save": statistics.median(self._blocking),
            "returns": statistics.median(self._returning),
            "disk": statistics.median(probes),
            "cpu": cpu / count,
            "steps": self._manager.list_checkpoints(),
            "files": len(list(self._directory.iterdir())),
        }

    def _probe_disk(self) -> float:
        """The seconds that the disk takes for the same calls as a save."""
        began = time.perf_counter()
        probe = self._directory.parent / "probe"
        with open(probe.with_suffix(".new"), "wb") as file:
            file.write(bytes(TENSORS * VALUES * 8))
            file.flush()
            os.fsync(file.fileno())
        os.rename(probe.with_suffix(".new"), probe)
        descriptor = os.open(self._directory.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - began

    def _save_step(self, step: int) -> None:
        for number, array in enumerate(self._weights.values()):
            array[:] = step + number
        checkpoint = Checkpoint(step=step, model=self._weights, metrics={"eval_loss": metric(step)})
        began = time.perf_counter()
        if step % 2:
            self._manager.save(checkpoint)
            self._blocking.append(time.perf_counter() - began)
            return
        overlap = random.Random(f"{self._seed}/{step}").random() < 0.5
        pending = self._manager.save_async(checkpoint, overlap=overlap)
        self._returning.append(time.perf_counter() - began)
        pending.wait_copied()
        # No save starts while another one runs, so that each measurement is of one save.
        pending.wait()


def metric(step: int) -> float:
    """The metric of a step: good ones come at any time, and go when better ones come."""
    return random.Random(step).random()


def main() -> None:
    options = parse_arguments(directory=Path, seed=str)
    warm_up = Saver(options.directory.with_name("warm-up"), options.seed)
    warm_up.set_rules(RULES._asdict())
    warm_up.save(0, WARM_UP)
    del warm_up
    saver = Saver(options.directory, options.seed)
    for line in sys.stdin:
        order = json.loads(line)
        if "rules" in order:
            saver.set_rules(order["rules"])
        else:
            print(json.dumps(saver.save(**order)), flush=True)


if __name__ == "__main__":
    main()
