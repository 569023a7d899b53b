"""What weighting by provenance does and does not do: every figure of docs/weighting.md.

    python -m experiments.weighting --out runs/weighting --write-docs docs/weighting.md
    python -m experiments.weighting --out runs/bundled --worlds bundled --seeds 1 2
    python -m experiments.weighting --out runs/trial --quick

Trains the bundled model once for each world, method, share of wrong labels and seed, and measures what it
then prefers. Each result is a line of OUT/results.jsonl; called again after a kill, it computes what is
missing. Tables are written to OUT/tables.md, and plots to OUT/weighting.png and OUT/weighting_curve.png (and
.svg). The duration depends on the machine, the results do not: each training has one thread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.weighting.design import METHODS, QUICK, SEEDS, WORLDS, Training, runs
from experiments.weighting.results import Results
from experiments.weighting.run import digest
from experiments.weighting.workers import compute


def main() -> int:
    options = _options()
    training = QUICK if options.quick else Training()
    results = Results(options.out / "results.jsonl", design=digest(training))
    requested = list(runs(options.worlds, options.seeds, options.methods))
    compute(results, requested, training, jobs=options.jobs, folder=options.out / "work")
    from experiments.weighting import picture, tables

    blocks = tables.blocks(results.all)
    (options.out / "tables.md").write_text("\n\n".join(blocks.values()) + "\n", encoding="utf-8")
    for folder in (options.out, options.write_docs.parent if options.write_docs else options.out):
        picture.draw_results(results.all, folder / "weighting")
        picture.draw_curve(folder / "weighting_curve")
    if options.write_docs:
        tables.write_into(options.write_docs, blocks)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.weighting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/weighting"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 1 2 3 4 5")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two steps each: to see that it runs")
    parser.add_argument(
        "--write-docs",
        type=Path,
        metavar="FILE",
        help="put the tables between this file's markers, and the pictures beside it",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
