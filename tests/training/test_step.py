"""What the loop asks of an engine: the calls of a step, its divisor, and the origin of its random numbers."""

from __future__ import annotations

from typing import Any

from distrust.testing.toy_engine import ToyEngine
from distrust.training.events import StepEnded


class CallRecorder(ToyEngine):
    """Records the calls of each step, and the arguments of each micro-step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.begun: list[tuple[int, int, int]] = []  # seed, step, micro-step
        self.divisors: list[int] = []  # the tokens that a loss is divided by
        self.own_tokens: list[int] = []  # those of the micro-batch

    def begin_micro_step(self, *, seed, step, micro_step):
        self.calls.append("begin_micro_step")
        self.begun.append((seed, step, micro_step))
        super().begin_micro_step(seed=seed, step=step, micro_step=micro_step)

    def micro_step(self, batch, *, tokens):
        self.calls.append("micro_step")
        self.divisors.append(tokens)
        self.own_tokens.append(batch.tokens)
        return super().micro_step(batch, tokens=tokens)

    def clip_gradients(self, max_norm):
        self.calls.append("clip_gradients")
        return super().clip_gradients(max_norm)

    def update(self, *, learning_rate):
        self.calls.append("update")
        super().update(learning_rate=learning_rate)


def record_calls(run, out, **options: Any) -> tuple[CallRecorder, list[StepEnded]]:
    engine = CallRecorder()
    _, events = run(out, engine=engine, max_steps=4, gradient_accumulation=3, **options)
    return engine, [event for event in events if isinstance(event, StepEnded)]


def test_a_step_is_clipped_once_and_then_updated(run, tmp_path):
    engine, _ = record_calls(run, tmp_path)
    assert engine.calls == [*["begin_micro_step", "micro_step"] * 3, "clip_gradients", "update"] * 4


def test_each_micro_batch_is_divided_by_the_tokens_of_the_step(run, tmp_path):
    engine, steps = record_calls(run, tmp_path)
    sums = [sum(engine.own_tokens[first : first + 3]) for first in range(0, 12, 3)]
    assert [event.tokens for event in steps] == sums
    assert engine.divisors == [tokens for tokens in sums for _ in range(3)]
    assert len(set(engine.own_tokens)) > 1  # a mean of means would differ


def test_random_numbers_derive_from_seed_step_and_micro_step(run, tmp_path):
    engine, _ = record_calls(run, tmp_path, seed=5)
    assert engine.begun == [(5, step, micro_step) for step in range(1, 5) for micro_step in range(3)]
