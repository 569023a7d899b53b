"""Processes that read while another one writes: they see a whole checkpoint, or that it is gone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from campaigns.campaign import Campaign, Case
from campaigns.child_lines import Actor
from campaigns.concurrency.board import Board

#: Of all saves together, on a disk that others use too.
SECONDS_A_SAVE, SECONDS_AT_LEAST = 2.0, 60.0


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    """Have some read what another saves."""
    options = campaign.options
    directory, board = folder / "checkpoints", Board(folder / "board")
    seed = case.chance.random()
    buffered = case.chance.random() < 0.5 if options.path == "either" else options.path == "buffered"
    more = [*(["--buffered"] if buffered else []), *(["--fault", options.fault] if options.fault else [])]
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(
                Actor("campaigns.concurrency.reader", directory, folder / "board", f"{seed}/{number}")
            )
            for number in range(options.readers)
        ]
        writer = stack.enter_context(
            Actor("campaigns.concurrency.writer", directory, folder / "board", seed, options.saves, *more)
        )
        writer.answer(max(SECONDS_AT_LEAST, options.saves * SECONDS_A_SAVE))
        writer.end()
        board.end()
        told = [json.loads(reader.answer()) for reader in readers]
        for reader in readers:
            reader.end()
    way = "buffered" if buffered else "direct"
    campaign.count(f"saves beside {options.readers} readers, {way}", options.saves)
    loads = []
    for result in told:
        campaign.require(result["finding"] is None, f"beside a writer ({way}): {result['finding']}")
        for what, number in result["counts"].items():
            campaign.count(f"readers: {what}", number)
        loads.append(sum(number for what, number in result["counts"].items() if what.startswith("load")))
    campaign.count("readers: loads of the one that loaded least", min(loads))
    left = sorted(path.name for path in directory.glob(".checkpoint*"))
    campaign.require(not left, f"the writer left {left}")
