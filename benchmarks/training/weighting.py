"""What weighting costs: the same steps with it and without, in pairs.

    python -m benchmarks.training.weighting
    python -m benchmarks.training.weighting --size 135M --pairs 10 --threads 1

One process and one model make every step twice: forward, backward, clipping and the optimizer's
update, once with the weights of ``--weighting monotone`` and once with those of ``off``, in alternating
order. Other load on the machine affects both, so the ratio of a pair is more exact than two runs. The
confidence interval of the median comes from resampling the pairs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.devices import synchronize
from benchmarks.training.trainers import our_config
from benchmarks.training.work import LEARNING_RATE, SIZES, Work, make
from distrust import TrainConfig, engines
from distrust.contract import Engine
from distrust.training.data_sources import read_sources
from distrust.training.prepare_data import PreparedData, prepare_data

WAYS = ("monotone", "off")
AIM_PERCENT = 1.0
WARMUP = 2
RESAMPLED = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the ratio."""
    options = _options(arguments)
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="distrust-weighting-") as folder:
        work = make(
            Path(folder),
            size=options.size,
            dtype=options.dtype,
            tokens=options.tokens,
            row=min(512, options.tokens),
            threads=options.threads,
            device=options.device,
        )
        figures = measure(work, options.pairs)
    for weighting in WAYS:
        console.print(f"{weighting}: {figures[f'{weighting}_seconds']:.4f} seconds a step (median)")
    reached = "reached" if figures["high_percent"] < AIM_PERCENT else "NOT shown"
    interval = f"{figures['low_percent']:+.2f} to {figures['high_percent']:+.2f} %"
    console.print(
        f"weighting costs {figures['percent']:+.2f} % of a step, 95 % interval {interval}, "
        f"{options.pairs} pairs (aim: under {AIM_PERCENT:g} %: {reached})"
    )
    return 0


def measure(work: Work, pairs: int) -> dict[str, float]:
    """What weighting adds to a step, in percent: the median of the pairs and its 95 % interval."""
    configs = {weighting: _config(work, weighting) for weighting in WAYS}
    engine = engines.create_engine(configs["monotone"])
    plans = {weighting: plan_batches(config, engine) for weighting, config in configs.items()}
    for step in range(1, WARMUP + 1):
        _seconds(engine, plans["monotone"], step)
    seconds = []
    for pair in range(pairs):
        step = WARMUP + 1 + pair
        order = WAYS if pair % 2 else WAYS[::-1]
        seconds.append({weighting: _seconds(engine, plans[weighting], step) for weighting in order})
    ratios = [pair["monotone"] / pair["off"] for pair in seconds]
    low, high = _interval(ratios)
    return {
        "percent": 100 * (statistics.median(ratios) - 1),
        "low_percent": 100 * (low - 1),
        "high_percent": 100 * (high - 1),
        **{
            f"{weighting}_seconds": statistics.median(pair[weighting] for pair in seconds)
            for weighting in WAYS
        },
    }


def _config(work: Work, way: str) -> TrainConfig:
    return our_config(
        work,
        packing=True,
        batch_size=work.rows_at_once,
        gradient_accumulation=work.micro_batches,
        max_steps=1,
        cache_dir=str(work.folder / "cache"),
        weighting=way,
    )


def plan_batches(config: TrainConfig, engine: Engine) -> PreparedData:
    """The batches of a run, as the trainer plans them."""
    sources = read_sources(config)
    return prepare_data(
        config,
        sources,
        engine.tokenizer,
        context_length=engine.context_length,
    )


def _seconds(engine: Engine, plan: PreparedData, step: int) -> float:
    """Make a step as the training loop does, which plans and prepares the batches ahead of it."""
    batches = [engine.prepare(batch) for batch in plan.batches.step(step)]
    began = time.perf_counter()
    tokens = sum(batch.tokens for batch in batches)
    engine.accumulate(batches, seed=plan.config.seed, step=step, tokens=tokens)
    engine.clip_gradients(plan.config.max_grad_norm)
    engine.update(learning_rate=LEARNING_RATE)
    synchronize(plan.config.device)
    return time.perf_counter() - began


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by the bootstrap."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLED))
    return medians[round(0.025 * RESAMPLED)], medians[round(0.975 * RESAMPLED) - 1]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.weighting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="15M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
