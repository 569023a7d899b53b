"""Random programs over managers, copies, clones, forks and threads, against a model (``program.py``)."""

from __future__ import annotations

import json
from pathlib import Path

from campaigns.campaign import Campaign, Case
from campaigns.child_lines import Actor

#: In one process, one after the other.
PROGRAMS = 10


def run(campaign: Campaign, case: Case, folder: Path) -> None:
    """Some programs, in a process of their own."""
    more = ["--fault", campaign.options.fault] if campaign.options.fault else []
    seed = case.chance.random()
    with Actor("campaigns.concurrency.program", folder, seed, PROGRAMS, *more) as program:
        for _ in range(PROGRAMS):
            answer = json.loads(program.answer())
            for what, number in answer["counts"].items():
                campaign.count(what, number)
            campaign.require(answer["finding"] is None, answer["finding"])
        program.end()
