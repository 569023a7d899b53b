"""Scenarios: ranks sum gradients, and their engines take steps."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch

from distrust import DistrustWarning, TrainConfig
from distrust.data import MicroBatch
from distrust.engines import join_ranks
from distrust.engines.torch import exchange
from distrust.engines.torch.engine import TorchEngine
from distrust.engines.torch.model_runner import DeviceLosses, ModelRunner
from distrust.ranks import Ranks
from tests.engines.small_batches import make_batch

SHAPES = [(5,), (3, 4), (), (17,), (2, 2, 2)]


def config(**options: Any) -> TrainConfig:
    defaults = {"model": "bundled", "data": ["bundled"], "out": "out", "device": "cpu", "dtype": "float32"}
    return TrainConfig(**{**defaults, "threads": 1, **options})


@contextlib.contextmanager
def join(**options: Any) -> Iterator[tuple[TrainConfig, Ranks]]:
    """The config, and the ranks, which have met."""
    of_run = config(**options)
    with join_ranks(of_run) as ranks:
        yield of_run, ranks


def gradients_of(seed: int, micro_batch: int, missing: Sequence[int]) -> list[torch.Tensor | None]:
    """Of a micro-batch; some are missing, some are zeros of either sign, and sizes differ by far."""
    generator = torch.Generator().manual_seed(seed * 1000 + micro_batch)
    tensors: list[torch.Tensor | None] = []
    for number, shape in enumerate(SHAPES):
        values = torch.randn(shape, generator=generator) * 10 ** (4 * torch.rand(shape, generator=generator))
        signed_zeros = torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, -0.0)
        values = torch.where(torch.rand(shape, generator=generator) < 0.2, signed_zeros, values)
        tensors.append(None if number in missing else values)
    return tensors


def sums(cases: Sequence[Any], *, reduction: str, bucket_bytes: int) -> list[Any]:
    """The bits of the gradients of each case, a list of what each micro-batch has no gradient of."""
    parameters = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    parameters[1] = torch.zeros(4, 3).t().requires_grad_()

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    # For this scenario alone: the process stays, and its ranks must agree in the next one.
    with patch.object(exchange, "BUCKET_BYTES", bucket_bytes), join(reduction=reduction) as (of_run, ranks):
        if ranks.count > 1:
            exchanged = exchange.Exchange(parameters, ranks, of_run.reduction, clear=clear)
        results = []
        for seed, case in enumerate(cases):

            def compute(micro_batch: int, seed: int = seed, case: Any = case) -> None:
                tensors = gradients_of(seed, micro_batch, case[micro_batch])
                for parameter, tensor in zip(parameters, tensors, strict=True):
                    if tensor is not None:  # as autograd adds it
                        parameter.backward(tensor)

            if ranks.count > 1:
                exchanged.accumulate(compute, len(case))
            else:
                clear()
                for micro_batch in range(len(case)):
                    compute(micro_batch)
            results.append([describe(parameter.grad) for parameter in parameters])
    return results


def describe(gradient: torch.Tensor | None) -> Any:
    if gradient is None:
        return None
    return [gradient.flatten().view(torch.int32).tolist(), list(gradient.stride())]


class FailingRunner(ModelRunner):
    """Its second pass fails when all gradients are added, as one without a deterministic kernel does."""

    passes = 0

    def train(self, batch: MicroBatch, *, tokens: int) -> DeviceLosses:
        losses = super().train(batch, tokens=tokens)
        FailingRunner.passes += 1
        if FailingRunner.passes == 2:
            raise RuntimeError("put_ does not have a deterministic implementation")
        return losses


class FailingEngine(TorchEngine):
    runner_class = FailingRunner


def engine_steps(*, micro_batches: int = 4, fails: bool = False, **options: Any) -> dict[str, Any]:
    """The losses and norms of two steps, and a digest of the weights and moments."""
    FailingRunner.passes = 0
    engine_class = FailingEngine if fails else TorchEngine
    with (
        join(gradient_accumulation=micro_batches, **options) as (of_run, ranks),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        engine = engine_class(of_run, None, ranks)
        engine.deterministic = True  # its trial is no part of this
        results = [make_step(engine, batches_of(step, micro_batches), step=step) for step in (1, 2)]
    assert not fails or FailingRunner.passes > 2
    environment = engine.environment()
    return {
        "steps": results,
        "digest": [digest_of(engine), engine.checksum()],
        "notices": [str(each.message) for each in caught if issubclass(each.category, DistrustWarning)],
        "recorded": {name: environment.get(name) for name in ("reduction", "ranks")},
    }


def batches_of(step: int, count: int) -> list[MicroBatch]:
    lengths = [(9, 3, 12), (20,), (4, 4, 4, 4), (15, 2), (7, 7)]
    return [
        make_batch(seed=step * 100 + number, lengths=lengths[(number + step) % len(lengths)])
        for number in range(count)
    ]


def make_step(engine: Any, batches: Sequence[MicroBatch], *, step: int) -> list[Any]:
    tokens = sum(batch.tokens for batch in batches)
    losses = engine.accumulate(batches, seed=3, step=step, tokens=tokens)
    norm = engine.clip_gradients(0.5)
    engine.update(learning_rate=1e-3)
    return [norm, *([each.cross_entropy.tolist(), each.weighted.tolist()] for each in losses)]


def digest_of(engine: Any) -> str:
    state = engine.state()
    digest = hashlib.sha256()
    for name, tensor in state.model.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for moments in state.optimizer["state"].values():
        for tensor in moments.values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def different_steps(wrong: Mapping[str, int], **options: Any) -> None:
    """Rank 1 differs."""
    with join(gradient_accumulation=4, **options) as (of_run, ranks):
        engine = TorchEngine(of_run, None, ranks)
        numbers = {"seed": 0, "step": 5, "tokens": 44, **(wrong if ranks.index == 1 else {})}
        batches = batches_of(numbers.pop("data", 0), 4)
        engine.accumulate(batches, **numbers)


def checksums(model: str) -> list[int]:
    """Of a state, and of that state with one bit of each of its tensors flipped in turn."""
    engine = TorchEngine(config(model=model, lora_rank=2, target_modules=("q_proj",)))
    make_step(engine, batches_of(0, 1), step=1)
    state, numbers = engine.state(), [engine.checksum()]
    moments = [tensor for each in state.optimizer["state"].values() for tensor in each.values()]
    for tensor in [*state.model.values(), *moments]:
        bits = tensor.view(torch.int32).reshape(-1)
        bits[-1] ^= 1
        numbers.append(engine.checksum())
        bits[-1] ^= 1
    return numbers
