"""The command ``python -m campaigns.ranks``: what of it can run here, and the table."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from campaigns import ranks
from campaigns.campaign import SKIPPED, Campaign, parser, run
from campaigns.child import PYTHON
from campaigns.disks import volumes
from campaigns.ranks import machines
from campaigns.ranks.accidents import ACCIDENTS, Accident
from campaigns.ranks.attempts import count_of, time_of
from campaigns.ranks.cases import Bench
from campaigns.ranks.faults import FAULTS
from campaigns.ranks.machines import Machines
from campaigns.ranks.processes import Server

CASES = 20
SMALL_DISK_MIB = 64


def main(arguments: Sequence[str] | None = None, *, python: Sequence[str] = PYTHON) -> int:
    cli = parser(ranks.__doc__, writes=True, faults=FAULTS)
    cli.add_argument("--only", default="", help="only the accidents whose name this matches")
    cli.add_argument("--shard", choices=("none", "all"), help="that of all runs (default: some of each)")
    slack = "seconds to add to each bound, for a machine with other work (default: 0)"
    cli.add_argument("--slack", type=float, default=0.0, help=slack)
    cli.add_argument("--markdown", type=Path, help="write a table of the accidents into this file")
    return run("ranks", cli, lambda campaign: _body(campaign, python), cases=CASES, arguments=arguments)


def _body(campaign: Campaign, python: Sequence[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=campaign.options.directory)).resolve()
    accidents = [one for one in ACCIDENTS if re.search(campaign.options.only, one.name)]
    with ExitStack() as stack:
        # Before the server, whose processes have these mounts, too.
        disk = _mount_small_disk(folder) if any(one.full_disk for one in accidents) else None
        obstacle = machines.obstacle()
        two = None if obstacle else stack.enter_context(Machines())
        possible = [one for one in accidents if _is_possible(campaign, one, obstacle, disk)]
        server = stack.enter_context(Server(python))
        bench = Bench(campaign, server, possible, two, folder, disk)
        bench.make_model()
        try:
            for case in campaign.cases():
                bench.run(case)
        finally:
            if campaign.options.markdown is not None:
                campaign.options.markdown.write_text(_markdown(campaign.counts))
    shutil.rmtree(folder, ignore_errors=True)  # not after a counterexample: its folder is evidence


def _mount_small_disk(folder: Path) -> Path | volumes.Skipped:
    home = folder / "mounts"
    home.mkdir()
    try:
        volumes.private_mounts(home)
        return volumes.make("tmpfs", home, mib=SMALL_DISK_MIB)
    except volumes.Skipped as error:
        return error


def _is_possible(
    campaign: Campaign, accident: Accident, no_machines: str | None, disk: Path | volumes.Skipped | None
) -> bool:
    """Whether this machine and user can have the accident; if not, that is counted."""
    reason: object = no_machines if accident.two_machines else None
    if accident.full_disk and isinstance(disk, volumes.Skipped):
        reason = disk
    if reason is not None:
        campaign.count(f"{SKIPPED}: {accident.name}: {reason}")
    return reason is None


def _markdown(counts: Mapping[str, int]) -> str:
    rows = [("accident", "times", "the others had ended after, at most"), ("---", "---:", "---:")]
    for accident in ACCIDENTS:
        if (times := counts.get(count_of(accident))) is not None:
            milliseconds = counts.get(time_of(accident))
            rows.append((accident.name, str(times), "" if milliseconds is None else f"{milliseconds:,} ms"))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
