"""A directory that keeps a thousand checkpoints: what a save costs with how many stand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from campaigns.campaign import Campaign
from campaigns.child_lines import Actor
from campaigns.long_run import verdict

WINDOWS = 20
#: From half of the checkpoints to all of them, the work of a save beyond the first one may double: each one
#: is looked at. Were it quadratic, it would be four times as much. Work, not time: neighbours add to that.
GROWTH_BOUND, NOISE_SECONDS = 3.0, 0.004
#: A header is remembered two seconds after its file was written: how many are is for the disk to say.
BLOCKS_EACH = 3


def run(campaign: Campaign, folder: Path) -> list[dict[str, Any]]:
    """Fill the directory, and then save as often again with as many standing; returns the samples."""
    standing = campaign.options.standing
    window = max(5, standing // WINDOWS)
    samples: list[dict[str, Any]] = []
    more = ["--fault", campaign.options.fault] if campaign.options.fault else []
    with Actor("campaigns.long_run.saver", folder / "checkpoints", campaign.options.seed, *more) as saver:
        for keep_last, first in ((None, 0), (standing, standing)):
            saver.tell(json.dumps({"rules": {"keep_last": keep_last, "keep_best": 0}}))
            for begin in range(first, first + standing, window):
                saver.tell(json.dumps({"first": begin, "count": window}))
                sample = json.loads(saver.answer())
                samples.append({"saves": begin + window, **sample})
                campaign.count("saves into a directory that keeps many", window)
                there = len(sample["steps"])
                expected = begin + window if keep_last is None else min(standing, begin + window)
                campaign.require(there == expected, f"{there:,} checkpoints stand, not {expected:,}")
        saver.end()
    middle = len(samples) // 2
    _judge(campaign, samples[:middle])
    verdict.pronounce(
        campaign, f"{standing:,} standing", samples[middle:], known_blocks=BLOCKS_EACH * standing
    )
    return samples


def _judge(campaign: Campaign, filling: list[dict[str, Any]]) -> None:
    """Find growth that is more than linear."""
    first, half, full = (
        statistics.median(sample["cpu"] for sample in filling[begin : begin + 3])
        for begin in (0, len(filling) // 2 - 2, len(filling) - 3)
    )
    each = (full - first) / filling[-1]["saves"]
    campaign.counts["standing: work of a save with few, µs"] = round(first * 1e6)
    campaign.counts["standing: work of a save with all, µs"] = round(full * 1e6)
    campaign.counts["standing: for each that stands, µs"] = round(each * 1e6)
    campaign.require(
        full - first <= GROWTH_BOUND * max(0.0, half - first) + NOISE_SECONDS,
        f"a save was work of {first * 1e3:.1f} ms with few standing, {half * 1e3:.1f} with half of them, "
        f"{full * 1e3:.1f} with all: more than linear",
    )
