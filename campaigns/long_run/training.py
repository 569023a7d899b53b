"""The trainer, for thousands of steps and half as many saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from campaigns.campaign import Campaign
from campaigns.child_lines import Actor
from campaigns.long_run import verdict

WINDOWS = 40
#: What the loop remembers of a step: five float64, in an array that grows by an eighth more than it needs.
#: A save copies it, and both go into memory that the allocator may keep.
HISTORY_BYTES = 5 * 8 * 2.125


def run(campaign: Campaign, folder: Path) -> list[dict[str, Any]]:
    """Train; returns the samples."""
    steps = campaign.options.steps
    window = max(2, steps // WINDOWS // 2 * 2)
    arguments = [folder, campaign.options.seed, steps, window]
    samples: list[dict[str, Any]] = []
    more = ["--fault", campaign.options.fault] if campaign.options.fault else []
    with Actor("campaigns.long_run.trainer", *arguments, *more) as trainer:
        while "ended" not in (sample := json.loads(trainer.answer())):
            samples.append(sample)
            campaign.count("steps trained", window)
        campaign.require(sample["ended"] == steps, f"training ended at step {sample['ended']} of {steps}")
        trainer.end()
    grown = samples[-1]["steps"] // 2
    verdict.pronounce(campaign, "training", samples, known_bytes=int(grown * HISTORY_BYTES))
    return samples
