"""Two ranks on two cores: what an exact sum of gradients costs, and their speed beside one process.

    python -m benchmarks.ranks                                    # a quarter of an hour
    python -m benchmarks.ranks --size tiny --row 64 --steps 4 --rounds 1

Exact and fast steps alternate in the same two processes, each with one thread, on the same batches: the cost
is the median difference of two such steps, as a share of the fast one. Round by round one process with two
threads makes the same steps, in a process of its own; speeds are compared within a round. Figures are
medians of the rounds. The batches are full rows of random tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.driver import ROOT
from benchmarks.training.work import SIZES, make
from distrust.option_values import Reduction

RANKS = 2
#: Percent of a step, and part of the speed of one process with as many threads as there are ranks.
AIM_COST, AIM_SPEED = 3.0, 0.95
WARMUP_STEPS = 3
TIMEOUT_SECONDS = 1800
REDUCTIONS: tuple[Reduction, ...] = ("exact", "fast")

Seconds = Mapping[Reduction, Sequence[float]]  # of each step, by reduction


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        model: its folder.
        vocabulary: its tokens.
        lora_rank: of the adapter; 0 for all weights.
        row: tokens of a micro-batch.
        micro_batches: of a step.
        steps: that are measured.
    """

    model: str
    vocabulary: int
    lora_rank: int
    row: int
    micro_batches: int
    steps: int

    def __str__(self) -> str:
        return f"LoRA of rank {self.lora_rank}" if self.lora_rank else "all weights"


def main() -> int:
    """Measure, and print the results; in a process that :func:`_measure` starts, be measured."""
    options = _options()
    if options.setting:
        seconds = time_steps(**json.loads(options.setting), threads=options.threads)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(seconds))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="distrust-ranks-", dir=options.directory) as folder:
        work = make(Path(folder), size=options.size, dtype="float32", tokens=100, row=64, threads=1)
        setting = Setting(
            model=str(work.folder / "model"),
            vocabulary=work.size.vocab_size,
            lora_rank=0,
            row=options.row,
            micro_batches=options.micro_batches,
            steps=options.steps,
        )
        for lora_rank in options.lora_ranks:
            _compare(replace(setting, lora_rank=lora_rank), options.rounds, console)
    return 0


def _compare(setting: Setting, rounds: int, console: Console) -> None:
    costs, speeds = [], []
    for number in range(1, rounds + 1):
        of_ranks, alone = _measure(setting, ranks=RANKS), _measure(setting, ranks=1)
        costs.append(cost_percent(of_ranks))
        speeds.append(statistics.median(alone["exact"]) / statistics.median(of_ranks["exact"]))
        tokens = setting.row * setting.micro_batches / statistics.median(of_ranks["exact"])
        console.print(
            f"  round {number}, {setting}: {tokens:,.0f} tokens/s on {RANKS} ranks, {speeds[-1]:.3f} of one "
            f"process; exact over fast {costs[-1]:+.2f} % of a step"
        )
    cost, speed = statistics.median(costs), statistics.median(speeds)
    console.print(
        f"{setting}: an exact reduction costs {cost:.2f} % of a step (aim: at most {AIM_COST:g} %: "
        f"{_verdict(cost <= AIM_COST)})"
    )
    console.print(
        f"{setting}: {RANKS} ranks of one thread have {speed:.3f} of the tokens/s of one process of {RANKS} "
        f"threads (aim: at least {AIM_SPEED:g}: {_verdict(speed >= AIM_SPEED)})"
    )


def cost_percent(seconds: Seconds) -> float:
    """What an exact step takes longer than the fast one beside it: the median, in percent of the fast one."""
    pairs = zip(seconds["exact"], seconds["fast"], strict=True)
    return 100 * statistics.median((exact - fast) / fast for exact, fast in pairs)


def time_steps(*, threads: int, **values: Any) -> Seconds:
    """The seconds of each step of a :class:`Setting`, by reduction; every rank makes this call."""
    from distrust import TrainConfig
    from distrust.engines import create_engine, join_ranks

    setting = Setting(**values)
    config = TrainConfig(
        model=setting.model,
        data="none",
        engine="torch",
        device="cpu",
        dtype="float32",
        threads=threads,
        lora_rank=setting.lora_rank,
        gradient_accumulation=setting.micro_batches,
    )
    rng = np.random.default_rng(0)
    with join_ranks(config) as ranks, warnings.catch_warnings(action="ignore"):
        reductions = REDUCTIONS if ranks.count > 1 else REDUCTIONS[:1]
        engines = {name: create_engine(replace(config, reduction=name), ranks=ranks) for name in reductions}
        seconds = {name: list[float]() for name in reductions}
        for step in range(1, WARMUP_STEPS + setting.steps + 1):
            batches = [_row(setting, rng) for _ in range(setting.micro_batches)]
            for name in reductions if step % 2 else reductions[::-1]:
                ranks.gather(np.zeros(1))  # all begin together
                start = time.perf_counter()
                engines[name].accumulate(batches, seed=0, step=step, tokens=sum(b.tokens for b in batches))
                engines[name].clip_gradients(1.0)
                engines[name].update(learning_rate=1e-5)
                seconds[name].append(time.perf_counter() - start)
    return {name: times[WARMUP_STEPS:] for name, times in seconds.items()}


def _row(setting: Setting, rng: np.random.Generator) -> Any:
    from distrust.data import IGNORED, MicroBatch

    ids = rng.integers(3, setting.vocabulary, setting.row)
    labels = ids.copy()
    labels[0] = IGNORED
    return MicroBatch(
        input_ids=ids,
        positions=np.arange(setting.row),
        cu_seqlens=np.array([0, setting.row], np.int32),
        labels=labels,
        weights=(labels != IGNORED).astype(np.float32),
        distrust=np.zeros(1),
        examples=np.zeros(1, np.int64),
    )


def _measure(setting: Setting, *, ranks: int) -> Seconds:
    """:func:`time_steps` in fresh processes with ``RANKS`` threads in total."""
    threads = RANKS // ranks
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.run(
        [
            *(sys.executable, *(launcher if ranks > 1 else ()), "-m", "benchmarks.ranks"),
            *("--setting", json.dumps(asdict(setting)), "--threads", str(threads)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if process.returncode:
        raise RuntimeError(process.stderr)
    seconds: Seconds = json.loads(process.stdout.splitlines()[-1])
    return seconds


def _verdict(good: bool) -> str:
    return "reached" if good else "NOT reached"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="15M")
    parser.add_argument("--lora-ranks", type=int, nargs="+", default=[16, 0], help="0: all weights")
    parser.add_argument("--row", type=int, default=512, help="tokens of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--steps", type=int, default=20, help="that are measured, of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="for the model; removed afterwards")
    parser.add_argument("--setting", help=argparse.SUPPRESS)  # of the processes that are measured
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
