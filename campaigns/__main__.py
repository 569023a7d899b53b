"""All campaigns, one after the other, each for the same time.

    python -m campaigns --seconds 60
    python -m campaigns --seed 7 --seconds 600 --only power_loss,damage

The last lines give the result of each. The exit code is 1 if any found a counterexample.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

CAMPAIGNS = (
    "power_loss", "failing_calls", "killed_saves", "kills", "killed_steps", "signals", "damage",
    "failing_disks", "concurrency", "fuzz", "integrations", "ranks", "remote", "long_run",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m campaigns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="of every random choice (default: 1)")
    parser.add_argument("--seconds", type=float, default=60, help="how long each runs (default: 60)")
    parser.add_argument("--only", help="some of them, separated by commas")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else CAMPAIGNS
    unknown = [name for name in names if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"no campaign {unknown[0]!r}; there are {', '.join(CAMPAIGNS)}")
    exit_codes: dict[str, int] = {}
    for name in names:
        print(f"== {name}", flush=True)
        limits = ["--seed", str(options.seed), "--seconds", str(options.seconds)]
        exit_codes[name] = subprocess.run(
            [sys.executable, "-m", f"campaigns.{name}", *limits], check=False
        ).returncode
    print("==")
    for name, code in exit_codes.items():
        print(f"{name:14} {'every invariant held' if code == 0 else f'exit code {code}: see above'}")
    return 1 if any(exit_codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
