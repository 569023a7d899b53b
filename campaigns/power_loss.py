"""Power loss: on every disk that a cut may leave, nothing is lost that was reported durable.

    python -m campaigns.power_loss --seed 1 --seconds 600
    python -m campaigns.power_loss --leave-out sync         # a fault of the protocol: it must be found
    python -m campaigns.power_loss --seed 1 --case 7        # one case once more

A case is a random sequence of what a manager is asked to do (``power/program.py``): new steps and older ones,
the same step again, finals, in the foreground and in the background, clean-ups, a process that is killed
between two system calls and restarted. Its system calls are recorded (``power/recording.py``). For every
prefix of the record, disks are built that POSIX permits after a power cut (``power/cut.py``). On each:

- every file under the name of a checkpoint is intact, and was saved under that name;
- what was reported durable exists, in its last version or one that was being saved over it, unless the rules
  allow its removal, which the oracle decides, not the product;
- ``load_latest`` gives the newest of them;
- the next save works, and no temporary file is left.

The next sequence of a case begins on one of these disks. Half of the cases use direct I/O, where the file
system supports it. Blocks are a page long here, so that a small file has several.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from campaigns.campaign import Campaign, parser, run
from campaigns.power.program import INNER
from campaigns.power.recording import Operation, Sync, SyncDirectory
from campaigns.power.search import search

#: What can be left out of the protocol, to show that its absence is found.
FAULTS: dict[str, Callable[[Operation], bool]] = {
    "sync": lambda operation: isinstance(operation, Sync),
    "sync_directory": lambda operation: (
        isinstance(operation, SyncDirectory) and operation.path.name == INNER.name
    ),
    "sync_parent": lambda operation: (
        isinstance(operation, SyncDirectory) and operation.path.name != INNER.name
    ),
}


def body(campaign: Campaign) -> None:
    name = campaign.options.leave_out
    search(campaign, FAULTS[name] if name else lambda operation: False)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument(
        "--leave-out", choices=FAULTS, help="leave a call out of the protocol: it must be found"
    )
    return run("power_loss", options, body, cases=20, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
