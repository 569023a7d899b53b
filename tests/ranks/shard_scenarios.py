"""Scenarios: ranks divide the frozen base among themselves, or do not."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _world
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distrust import DistrustTrainer, TrainConfig
from distrust.engines import create_engine
from distrust.engines.torch import sharded_base
from distrust.errors import ConfigError, DistrustError
from tests.engines.small_batches import make_batch
from tests.ranks.sum_scenarios import config, digest_of, join, make_step


def train(runs: Sequence[dict[str, Any]]) -> list[Any]:
    """The digest of each run, and its warnings."""
    results = []
    for options in runs:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            digest = DistrustTrainer(TrainConfig(**options), observers=[]).train().state_digest
        results.append([digest, [str(warning.message) for warning in caught]])
    return results


def engine_steps(*, fails: bool = False, **options: Any) -> dict[str, Any]:
    """A digest after two steps, and the numbers of the base that this rank has between them and at the end.

    One micro-batch has a single trained token: its product with the head depends on where the head lies.
    """
    with join(gradient_accumulation=4, **options) as (of_run, ranks):
        groups = len(_world.pg_map)
        engine: Any = create_engine(of_run, ranks=ranks)
        assert len(_world.pg_map) == groups, "each has sockets and threads, and engines are built again"
        engine.deterministic = True  # its trial is no part of this
        if fails:
            fail_once(engine)
        share = 0
        for step in (1, 2):
            lengths = [(9, 3), (2,), (4, 4, 4), (2,)]
            make_step(engine, [make_batch(seed=step, lengths=each) for each in lengths], step=step)
            engine.evaluate(make_batch())
            share = share or count_numbers()
        result = {"digest": digest_of(engine), "share": share, "fingerprint": engine.fingerprint()}
        result["parameters"] = engine.parameters
        engine.close()
        return {**result, "share after": count_numbers()}


def fail_once(engine: Any) -> None:
    """Make a backward pass end in the middle, as one without a deterministic kernel does."""
    calls = []

    def hook(gradient: torch.Tensor) -> None:
        calls.append(gradient)
        if len(calls) == 1:
            raise RuntimeError("put_ does not have a deterministic implementation")

    [*engine._trained.values()][-1].register_hook(hook)


def count_numbers() -> int:
    """Numbers of slices of weights in this process, and of whole weights that slices were gathered to."""
    gc.collect()
    slices = [weight for weight in gc.get_objects() if isinstance(weight, DTensor)]
    return sum(weight.to_local().numel() for weight in {id(weight): weight for weight in slices}.values())


def growth(**options: Any) -> dict[str, int]:
    """Memory that a load and two passes add, and what another load adds."""

    def measure() -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        kibibytes, threads = int(status["RssAnon"].split()[0]), int(status["Threads"])
        descriptors = len(os.listdir("/proc/self/fd"))
        return {"MiB": kibibytes // 1024, "descriptors": descriptors, "threads": threads}

    with join(gradient_accumulation=2, **options) as (of_run, ranks):
        numbers = [measure()]
        for _ in range(2):
            engine: Any = create_engine(of_run, ranks=ranks)
            batches = [make_batch(seed=number, lengths=(9, 3)) for number in range(2)]
            make_step(engine, batches, step=1)
            numbers.append(measure())
            engine.close()
            del engine
            gc.collect()
            numbers.append(measure())
    start, first, closed, _, last = numbers
    return {
        name: (first[name] - start[name] if name == "MiB" else last[name] - closed[name]) for name in start
    }


def refusals() -> list[str]:
    """The texts of what is refused, apart from options, on two ranks."""
    base = {"shard": "base", "gradient_accumulation": 2}
    with join(**base) as (of_run, ranks):

        def refusal_of(create: Callable[[], object]) -> str:
            try:
                create()
            except DistrustError as error:
                return str(error)
            return ""

        engine: Any = create_engine(of_run, ranks=ranks)
        divided = engine._runner._model
        next(divided.model.layers[0].parameters()).requires_grad_()
        problem = sharded_base.find_problem(of_run, ranks, torch.device("cuda:0"))
        texts = [
            refusal_of(lambda: create_engine(of_run, objects=(None, None), ranks=ranks)),
            refusal_of(lambda: create_engine(config(engine="mlx", **base), ranks=ranks)),
        ]
        reset = FSDPModule.reset_iter_state
        del FSDPModule.reset_iter_state
        texts.append(refusal_of(lambda: create_engine(of_run, ranks=ranks)))
        FSDPModule.reset_iter_state = reset
        trained = refusal_of(lambda: sharded_base.ShardedRunner(divided, compute_dtype=torch.float32))
        return [*texts, f"--shard base: {problem}", trained]


def refusal(**options: Any) -> str:
    """The text of the error of every rank."""
    with join(**options) as (of_run, ranks):
        try:
            create_engine(of_run, ranks=ranks)
        except ConfigError as error:
            return str(error)
    return ""
