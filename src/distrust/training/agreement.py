"""What the ranks of a run agree on: options, data and model, then after each step how to go on, and weights.

Other data or weights on one of them would spoil the sum of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrust.checkpoint.lock import LOCK_NAME
from distrust.config import TrainConfig, flag
from distrust.contract import Engine
from distrust.errors import ConfigError, RanksDiffer, warn
from distrust.options import as_text
from distrust.ranks import Ranks, gather_json, leads
from distrust.training import resume
from distrust.training.prepare_data import PreparedData


@dataclass(frozen=True, slots=True)
class Requests:
    """What a rank asks for after a step; agreed on, what any rank asks for."""

    signal: int = 0  # number of the signal that asks to stop; 0 for none
    stop: bool = False  # a program asks to stop
    failed: bool = False  # an observer has failed
    save: bool = False  # the leader's clock asks for a save after the next step
    reset: bool = False  # memory is to be reset
    excess: bool = False  # the next step would exceed a limit of memory

    @property
    def to_stop(self) -> bool:
        """Whether to save and end."""
        return bool(self.signal or self.stop or self.failed)

    def agree(self, ranks: Ranks) -> Requests:
        """The requests of all ranks together: each rank gets the same, and so decides the same."""
        signal, *flags = ranks.gather(np.array(astuple(self), np.int64)).max(axis=0).tolist()
        return Requests(signal, *map(bool, flags))


def require_equal_weights(ranks: Ranks, engine: Engine, *, step: int) -> None:
    """Raise RanksDiffer, on all ranks, if their trained weights or moments are not the same bits.

    Equal gradients and updates give equal weights, unless a device computes wrongly: this finds it.
    """
    if ranks.count == 1:
        return
    sums = ranks.gather(np.array([engine.checksum() % 2**63], np.int64))[:, 0].tolist()
    usual, times = Counter(sums).most_common(1)[0]
    if times < ranks.count:
        has_majority = 2 * times > ranks.count
        suspects = [ranks.describe(i) for i, each in enumerate(sums) if each != usual or not has_majority]
        raise RanksDiffer(
            f"step {step}: weights or moments are not the same on all ranks: a device computes wrongly, or "
            f"versions or the content of --from differ, on {' or '.join(suspects)}; this step is not saved, "
            "and the run resumes from the checkpoint before it"
        )


def require_same_options(ranks: Ranks, config: TrainConfig) -> None:
    """Raise RanksDiffer, naming each option that ranks are given other values for."""
    require_equal(ranks, {flag(name): value for name, value in config.non_default().items()})


def require_same_run(ranks: Ranks, data: PreparedData, engine: Engine) -> None:
    """Raise RanksDiffer, naming what differs of data, base model and what options became on each rank.

    If environments differ, such as devices or versions, the leader warns.
    """
    digests = resume.fingerprints(data, engine)
    if data.evaluation is not None:
        digests["eval_data"] = data.evaluation.corpus.fingerprint
    options = {flag(name): value for name, value in data.config.with_effect("result").items()}
    contents = {f"the content of {flag(name)}": digest[:12] for name, digest in digests.items()}
    require_equal(ranks, {**options, **contents})
    for difference in _differences(ranks, engine.environment()):
        if leads(ranks):
            warn(f"no longer bit-identical: {difference}")


def require_shared_folder(ranks: Ranks, directory: Path) -> None:
    """Raise ConfigError, on all ranks, if one does not see the directory that the leader has locked."""
    try:
        note = (directory / LOCK_NAME).read_text(errors="replace")
    except OSError:
        note = ""
    for index, text in enumerate(notes := gather_json(ranks, note)):
        if text != notes[0]:
            raise ConfigError(
                f"--shard all: {ranks.describe(index)} does not see {directory} of {ranks.describe(0)}: all "
                "ranks write each checkpoint; give --out a folder that all machines share"
            )


def require_equal(ranks: Ranks, values: Mapping[str, Any]) -> None:
    """Raise RanksDiffer, on all ranks, if the JSON values of a name differ between them."""
    if differences := _differences(ranks, values):
        raise RanksDiffer([f"{line}; give all ranks the same" for line in differences])


def _differences(ranks: Ranks, values: Mapping[str, Any]) -> list[str]:
    """A line for each name that differs: the first rank with another value than the leader, and both."""
    leader, *followers = gather_json(ranks, values)
    lines: dict[str, str] = {}
    for index, follower in enumerate(followers, start=1):
        for name in {**leader, **follower}:
            value, leading = follower.get(name, "none"), leader.get(name, "none")
            if value != leading:
                line = f"{ranks.describe(index)} has {as_text(value)}, {ranks.describe(0)} has"
                lines.setdefault(name, f"{name}: {line} {as_text(leading)}")
    return list(lines.values())
