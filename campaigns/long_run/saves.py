"""Many saves of a small state in one process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from campaigns.campaign import Campaign
from campaigns.child_lines import Actor
from campaigns.long_run import verdict
from campaigns.long_run.saver import metric

RULES = {"keep_last": 3, "keep_best": 2}
#: The lock, and the rules' union.
FILES = 1 + 3 + 2
#: Saves from one sample to the next, and at the least so many samples.
WINDOW, SAMPLES = 100, 20
#: Of fewer saves latency is told, and no finding: they are over before a disk is done with other work.
TIMED_FROM = 5_000


def run(campaign: Campaign, folder: Path) -> list[dict[str, Any]]:
    """Save as often as the campaign has cases; returns the samples."""
    samples: list[dict[str, Any]] = []
    total = 0
    with Actor(
        "campaigns.long_run.saver", folder / "checkpoints", campaign.options.seed, *_fault(campaign)
    ) as saver:
        saver.tell(json.dumps({"rules": RULES}))
        for first, count in _windows(campaign):
            saver.tell(json.dumps({"first": first, "count": count}))
            sample = json.loads(saver.answer())
            total = first + count
            samples.append({"saves": total, **sample})
            campaign.count("saves", count)
            campaign.require(
                sample["steps"] == kept(total) and sample["files"] <= FILES,
                f"after {total:,} saves the rules keep {kept(total)}; there are {sample['steps']} in "
                f"{sample['files']} files",
            )
        saver.end()
    verdict.pronounce(campaign, "saves", samples)
    verdict.slowed(campaign, "saves", samples, counts=total >= TIMED_FROM)
    return samples


def kept(total: int) -> list[int]:
    """What the rules keep of so many steps."""
    best = sorted(range(total), key=metric)[: RULES["keep_best"]]
    return sorted({*range(max(0, total - RULES["keep_last"]), total), *best})


def _windows(campaign: Campaign) -> Iterator[tuple[int, int]]:
    """First step and number of steps, as long as there are cases."""
    window = WINDOW
    if campaign.options.cases is not None:
        window = max(10, min(WINDOW, campaign.options.cases // SAMPLES))
    cases = campaign.cases()
    while batch := list(itertools.islice(cases, window)):
        if len(batch) == window:  # of fewer saves a median says less
            yield batch[0].number, window


def _fault(campaign: Campaign) -> list[str]:
    return ["--fault", campaign.options.fault] if campaign.options.fault else []
