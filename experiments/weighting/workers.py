"""Runs in parallel, each worker with one thread and the libraries loaded once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from experiments.weighting.design import Run, Training
from experiments.weighting.results import Result, Results


def compute(results: Results, wanted: Sequence[Run], training: Training, *, jobs: int, folder: Path) -> None:
    """Make the runs that have no result yet, and add each result when it is complete.

    Raises:
        SystemExit: if it is stopped; results that were added are kept.
    """
    missing = results.missing(wanted)
    if not missing:
        return
    os.environ["OMP_NUM_THREADS"] = str(training.threads)  # read by a worker's libraries when it starts
    began = time.perf_counter()
    workers = ProcessPoolExecutor(min(jobs, len(missing)), mp_context=multiprocessing.get_context("spawn"))
    try:
        pending = [
            workers.submit(_execute, run, training, folder / str(number))
            for number, run in enumerate(missing)
        ]
        for completed, future in enumerate(as_completed(pending), start=1):
            run, result = future.result()
            if result is None:
                raise SystemExit(f"stopped at {run}; the same command resumes")
            results.add(result)
            left = (time.perf_counter() - began) / completed * (len(missing) - completed)
            print(
                f"{len(wanted) - len(missing) + completed}/{len(wanted)} {run}: {result['seconds']:.0f} s; "
                f"about {left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command resumes") from None
    finally:
        workers.shutdown(cancel_futures=True)


def _execute(run: Run, training: Training, folder: Path) -> tuple[Run, Result | None]:
    from experiments.weighting.run import execute  # the libraries, in the worker only

    return run, execute(run, training, folder)
