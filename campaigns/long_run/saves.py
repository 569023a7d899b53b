"""Many saves of a small state in one process; and saves into a directory that keeps many checkpoints."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaigns.campaign import Campaign, fault_arguments
from campaigns.child import Child
from campaigns.long_run import growth
from campaigns.long_run.saver import metric
from campaigns.oracle import Rules, Saved, retained

RULES = Rules(keep_last=3, keep_best=2)
#: The lock, and the union of the rules.
FILES = 1 + 3 + 2
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
    with _saver(campaign, folder) as saver:
        saver.send({"rules": RULES._asdict()})
        for first, count in _windows(campaign):
            saver.send({"first": first, "count": count})
            sample = saver.receive_json()
            total = first + count
            samples.append({"saves": total, **sample})
            campaign.count("saves", count)
            checkpoints = (Saved(step, metric=metric(step)) for step in range(total))
            expected = sorted(saved.step for saved in retained(checkpoints, RULES))
            campaign.require(
                sample["steps"] == expected and sample["files"] <= FILES,
                f"after {total:,} saves the rules retain {expected}; there are {sample['steps']} in "
                f"{sample['files']} files",
            )
        saver.finish()
    growth.require_no_growth(campaign, "saves", samples)
    growth.require_no_slowdown(campaign, "saves", samples, enforce=total >= TIMED_FROM)
    return samples


def run_many(campaign: Campaign, folder: Path) -> list[dict[str, Any]]:
    """Fill the directory, and then save as often again with as many checkpoints; returns the samples."""
    many = campaign.options.many
    window = max(5, many // MANY_WINDOWS)
    samples: list[dict[str, Any]] = []
    with _saver(campaign, folder) as saver:
        for keep_last, first in ((None, 0), (many, many)):
            saver.send({"rules": {"keep_last": keep_last, "keep_best": 0}})
            for begin in range(first, first + many, window):
                saver.send({"first": begin, "count": window})
                sample = saver.receive_json()
                samples.append({"saves": begin + window, **sample})
                campaign.count("saves into a directory that keeps many", window)
                count = len(sample["steps"])
                expected = begin + window if keep_last is None else min(many, begin + window)
                campaign.require(count == expected, f"there are {count:,} checkpoints, not {expected:,}")
        saver.finish()
    middle = len(samples) // 2
    _require_linear(campaign, samples[:middle])
    growth.require_no_growth(
        campaign, f"{many:,} checkpoints", samples[middle:], allowed_blocks=BLOCKS_PER_CHECKPOINT * many
    )
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
    campaign.require(
        full - first <= GROWTH_BOUND * max(0.0, half - first) + NOISE_SECONDS,
        f"a save took {first * 1e3:.1f} ms of processor time with few checkpoints, {half * 1e3:.1f} with "
        f"half of them, {full * 1e3:.1f} with all: more than linear",
    )


def _saver(campaign: Campaign, folder: Path) -> Child:
    return Child(
        "campaigns.long_run.saver",
        folder / "checkpoints",
        campaign.options.seed,
        *fault_arguments(campaign.options),
    )


def _windows(campaign: Campaign) -> Iterator[tuple[int, int]]:
    """First step and number of steps, as long as there are cases."""
    window = WINDOW
    if campaign.options.cases is not None:
        window = max(10, min(WINDOW, campaign.options.cases // SAMPLES))
    cases = campaign.cases()
    while batch := list(itertools.islice(cases, window)):
        if len(batch) == window:  # the median of fewer would be less exact
            yield batch[0].number, window
