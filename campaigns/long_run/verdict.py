"""What counts as growth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from campaigns.campaign import Campaign

#: Bytes of resident memory that the last quarter may have more than the second. The allocator takes and
#: gives back memory in arenas of 1 MiB and less, and threads come and go on stacks of their own: a run that
#: leaks nothing was seen to differ by 0.3 MiB. A leak of 250 bytes a save is found in 20,000 saves.
MEMORY_BOUND = 2 << 20
#: Blocks of Python's that the last quarter may have more than the second. They go up and down by a hundred
#: with what caches and free lists hold at the moment. A leak of one object a save is found in 1,000 saves.
BLOCKS_BOUND = 300
#: How many times as long a save may take at the end, and how much of a core's time. Others who use the disk
#: slow it down by more: so saves may take longer by that if a bare write, sync and rename beside them does.
LATENCY_BOUND = 1.5
#: With fewer samples than this, a quarter says nothing.
_FEWEST = 8

Samples = Sequence[dict[str, Any]]


def pronounce(
    campaign: Campaign, name: str, samples: Samples, *, known_bytes: int = 0, known_blocks: int = 0
) -> None:
    """Tell what was measured, and find what grew.

    Args:
        campaign: is told.
        name: of the run.
        samples: in order.
        known_bytes: what the state itself grew by from the second quarter to the last.
        known_blocks: what Python may have given out more for reasons that are known.

    Raises:
        CounterExample: if anything grew.
    """
    if len(samples) < _FEWEST:
        return
    before, after = _quarters(samples)
    for what in ("descriptors", "threads"):
        values = sorted({sample[what] for sample in samples[len(samples) // 4 :]})
        campaign.require(len(values) == 1, f"{name}: {what} differ from sample to sample: {values}")
        campaign.counts[f"{name}: {what}, at each sample"] = values[0]
    too_much = []
    bounds = {"blocks": BLOCKS_BOUND + known_blocks, "resident": MEMORY_BOUND + known_bytes}
    for what, allowed in bounds.items():
        grown = int(_median(after, what) - _median(before, what))
        campaign.counts[f"{name}: {what} at the end"] = int(_median(after, what))
        campaign.counts[f"{name}: {what} grown from the second quarter to the last"] = grown
        if grown > allowed:
            too_much.append(f"{what} grew by {grown:,} ({allowed:,} allowed)")
    told = ", and ".join(too_much)
    campaign.require(not too_much, f"{name}: from the second quarter to the last, {told}")


def slowed(campaign: Campaign, name: str, samples: Samples, *, counts: bool) -> None:
    """Tell how long saves took at the start, after the first samples, and at the end.

    Args:
        campaign: is told.
        name: of the run.
        samples: in order.
        counts: whether it is a finding if they got slower.

    Raises:
        CounterExample: if they got slower than the bound allows, and that counts.
    """
    if len(samples) < _FEWEST:
        return
    tenth = max(1, len(samples) // 10)
    first, last = samples[tenth : 2 * tenth], samples[-tenth:]
    grown = {}
    for what in ("save", "returns", "disk", "cpu"):
        before, after = _median(first, what), _median(last, what)
        campaign.counts[f"{name}: {what}, µs at the start"] = round(before * 1e6)
        campaign.counts[f"{name}: {what}, µs at the end"] = round(after * 1e6)
        grown[what] = after / before
    if counts:
        # A disk that others use now and not before is slower for the probe, too.
        campaign.require(
            min(grown["save"], grown["save"] / grown["disk"]) <= LATENCY_BOUND,
            f"{name}: a save took {grown['save']:.2f} times as long at the end as at the start, and the disk "
            f"{grown['disk']:.2f} times",
        )
        campaign.require(
            grown["cpu"] <= LATENCY_BOUND,
            f"{name}: a save took {grown['cpu']:.2f} times the work at the end",
        )


def _quarters(samples: Samples) -> tuple[Samples, Samples]:
    quarter = len(samples) // 4
    return samples[quarter : 2 * quarter], samples[-quarter:]


def _median(samples: Samples, what: str) -> float:
    return float(statistics.median(sample[what] for sample in samples))
