"""Power loss: on every disk that a cut may leave, nothing is lost that was reported durable.

    python -m campaigns.power_loss --seed 1 --seconds 600
    python -m campaigns.power_loss --leave-out sync         # a fault of the protocol: it must be found
    python -m campaigns.power_loss --shared                 # several ranks write each checkpoint together

A case is a random sequence of saves (``power/program.py``) on a recording disk. For every prefix of the
record the disks are built that a cut may leave (``power/cut.py``), and checked (``power/search.py``). The
next sequence begins on one of them. Half of the cases use direct I/O.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from campaigns.campaign import Campaign, parser, run
from campaigns.power.program import INNER, Program
from campaigns.power.recording import Operation, Sync, SyncDirectory
from campaigns.power.search import search
from campaigns.power.shared_program import SharedProgram

#: What can be left out of the protocol, to show that its absence is found.
FAULTS: dict[str, Callable[[Operation], bool]] = {
    "sync": lambda operation: isinstance(operation, Sync),
    "sync_of_part": lambda operation: isinstance(operation, Sync) and operation.writer > 0,  # with --shared
    "sync_directory": lambda operation: isinstance(operation, SyncDirectory) and _is_inner(operation),
    "sync_parent": lambda operation: isinstance(operation, SyncDirectory) and not _is_inner(operation),
}


def _is_inner(operation: SyncDirectory) -> bool:
    return operation.path.name == INNER.name


def body(campaign: Campaign) -> None:
    options = campaign.options
    program = SharedProgram if options.shared or options.leave_out == "sync_of_part" else Program
    search(campaign, FAULTS.get(options.leave_out, lambda operation: False), program)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--leave-out", choices=FAULTS, help="a call of the protocol: it must be found")
    options.add_argument("--shared", action="store_true", help="each checkpoint is written by several ranks")
    return run("power_loss", options, body, cases=20, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
