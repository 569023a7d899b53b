"""A process that wants to write in a directory, at the same instant as others.

go INSTANT HOW STEP   at that instant of the monotonic clock: acquire, save or save_async
save                  save on, faster than anybody waits; each step is told when it is durable
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

from campaigns.faults import plant


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("directory", type=Path)
    options.add_argument("--fault")
    given = options.parse_args()
    plant(given.fault)

    from campaigns.concurrency import content
    from distrust import CheckpointManager
    from distrust.errors import CheckpointDirectoryLocked

    manager = CheckpointManager(given.directory, keep_last=None)
    print("ready", flush=True)
    step = 0
    for line in sys.stdin:
        if line == "save\n":
            for later in itertools.count(step + 1):
                manager.save(content.make(later, later, 5_000))
                print(later, flush=True)
        _, instant, how, at = line.split()
        step = int(at)
        while time.monotonic() < float(instant):
            pass
        began = time.monotonic()
        try:
            if how == "acquire":
                manager.acquire()
            elif how == "save":
                manager.save(content.make(step, step, 500))
            else:
                manager.save_async(content.make(step, step, 500)).wait()
            refused = None
        except CheckpointDirectoryLocked as error:
            refused = str(error)
        print(json.dumps({"refused": refused, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
