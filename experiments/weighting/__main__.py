"""What weighting by provenance does and does not do: every figure of docs/weighting.md.

    python -m experiments.weighting --out runs/weighting --write-docs docs/weighting.md
    python -m experiments.weighting --out runs/bundled --worlds bundled --seeds 1 2
    python -m experiments.weighting --out runs/trial --quick

Trains the bundled model once for each world, method, share of wrong labels and seed, and measures what it
then prefers. Each result is a line of OUT/results.jsonl; killed and called again, it goes on with what is
missing. Tables come to OUT/tables.md, and pictures to OUT/weighting.png and OUT/weighting_curve.png (and
.svg). How long it takes depends on the machine, the results do not: each training has one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from experiments.weighting.design import METHODS, QUICK, SEEDS, WORLDS, Run, Training, digest, runs
from experiments.weighting.results import Results


def main() -> int:
    options = _options()
    training = QUICK if options.quick else Training()
    results = Results(options.out / "results.jsonl", design=digest(training))
    wanted = list(runs(options.worlds, options.seeds, options.methods))
    _compute(results, results.missing(wanted), len(wanted), training, options)
    from experiments.weighting import picture, tables

    blocks = tables.blocks(results.all)
    (options.out / "tables.md").write_text("\n\n".join(blocks.values()) + "\n", encoding="utf-8")
    for folder in (options.out, options.write_docs.parent if options.write_docs else options.out):
        picture.draw_results(results.all, folder / "weighting")
        picture.draw_curve(folder / "weighting_curve")
    if options.write_docs:
        tables.write_into(options.write_docs, blocks)
    return 0


def _compute(
    results: Results, missing: list[Run], total: int, training: Training, options: argparse.Namespace
) -> None:
    if not missing:
        return
    os.environ["OMP_NUM_THREADS"] = str(training.threads)  # read by a worker's libraries when it starts
    began, done = time.perf_counter(), total - len(missing)
    workers = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    try:
        pending = [
            workers.submit(_execute, run, training, options.out / "work" / str(number))
            for number, run in enumerate(missing)
        ]
        for future in as_completed(pending):
            run, result = future.result()
            if result is None:
                raise SystemExit(f"stopped at {run}; the same command goes on")
            results.add(result)
            done += 1
            spent = time.perf_counter() - began
            left = spent / (done - total + len(missing)) * (total - done)
            print(
                f"{done}/{total} {run}: {result['seconds']:.0f} s; about {left / 60:.0f} min left",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        workers.shutdown(cancel_futures=True)


def _execute(run: Run, training: Training, folder: Path) -> tuple[Run, dict[str, object] | None]:
    from experiments.weighting.run import execute  # the libraries, once for each worker

    return run, execute(run, training, folder)


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
    parser.add_argument("--write-docs", type=Path, metavar="FILE",
                        help="put the tables between this file's markers, and the pictures beside it")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
