"""The micro-batches of a step, dealt to the ranks of a run: what the engines share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from distrust.activity import warn_once
from distrust.config import TrainConfig
from distrust.contract import Losses, LossSums
from distrust.data import MicroBatch
from distrust.errors import ConfigError, RanksDiffer
from distrust.ranks import Ranks, leads


def owner(micro_batch: int, *, count: int, ranks: int) -> int:
    """The rank that computes a micro-batch of ``count``.

    Rank 0 has the last one: its random generators end where those of a single process do.
    """
    return (count - 1 - micro_batch) % ranks


def require_enough(config: TrainConfig, ranks: int) -> None:
    """Raise ConfigError if one of so many ranks would never compute."""
    if ranks > config.gradient_accumulation:
        flag = f"--gradient-accumulation {config.gradient_accumulation}"
        raise ConfigError(f"{flag}: {ranks} ranks need {ranks} or more")


def require_work(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ConfigError if a rank would never compute; warn of what else follows from their number."""
    require_enough(config, ranks.count)
    flag = f"--gradient-accumulation {config.gradient_accumulation}"
    if config.gradient_accumulation % ranks.count and leads(ranks):
        warn_once(f"{flag}: {ranks.count} ranks cannot share it evenly, so some wait; give a multiple")
    if config.reduction == "fast" and ranks.count > 1 and leads(ranks):
        warn_once(f"--reduction fast: the last bits depend on the number of ranks, here {ranks.count}")


def require_same_step(ranks: Ranks, batches: Sequence[MicroBatch], *, step: int, tokens: int) -> None:
    """Raise RanksDiffer if the ranks are at different steps, or have other data."""
    rows = ranks.gather(np.array([step, tokens, sum(int(batch.examples.sum()) for batch in batches)]))
    differs = (rows != rows[0]).any(axis=1)
    if differs.any():
        texts = [
            f"{ranks.describe(index)} at step {rows[index, 0]} with {rows[index, 1]} tokens of examples "
            f"whose numbers add up to {rows[index, 2]}"
            for index in (0, int(differs.argmax()))
        ]
        raise RanksDiffer(f"the ranks are not at the same step of the same data: {', '.join(texts)}")


def gather_losses(
    ranks: Ranks, batches: Sequence[MicroBatch], losses: Mapping[int, Losses]
) -> list[LossSums]:
    """The losses of all micro-batches, each from the rank that computed it; ``losses``: of this one."""
    sizes, count = [len(batch.examples) for batch in batches], len(batches)
    sums = np.zeros((count, 2, max(sizes)))
    for number, each in losses.items():
        sums[number, :, : sizes[number]] = each.cross_entropy, each.weighted
    rows = ranks.gather(sums)
    owned = [rows[owner(m, count=count, ranks=ranks.count), m, :, : sizes[m]] for m in range(count)]
    return [LossSums(cross_entropy, weighted) for cross_entropy, weighted in owned]
