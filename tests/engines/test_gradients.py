"""The weighting reaches the gradient of a real model: collation, accumulation and loss preserve it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import inputs_of, trained_parameters

from distrust import CheckpointManager, TrainConfig, weighting
from distrust.contract import Engine
from distrust.data import IGNORED, MicroBatch, evaluation_batches
from distrust.engines import create_engine
from distrust.training.data_sources import read_sources
from distrust.training.memory_guard import MemoryGuard
from distrust.training.prepare_data import PreparedData, prepare_data
from distrust.training.saver import Saver
from distrust.training.step import EngineHolder, StepRunner

#: On GPUs, too: gradients are compared closely.
FLOAT32: dict[str, Any] = {"engine": "torch", "dtype": "float32"}


@pytest.fixture(scope="module", params=["lora", "all weights"])
def engine(request, tiny_model):
    rank = 4 if request.param == "lora" else 0
    options = {**FLOAT32, "model": str(tiny_model), "lora_rank": rank, "threads": 1}
    engine = create_engine(TrainConfig(**options))
    with torch.no_grad():
        for parameter in trained_parameters(engine.model).values():
            if not parameter.any():  # LoRA's B starts at zero, and A would have no gradient
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return engine


@pytest.fixture(scope="module")
def plan_of(engine, data, tiny_model):
    def plan_of(**options: Any):
        config = TrainConfig(
            **FLOAT32,
            model=str(tiny_model),
            max_grad_norm=0.0,  # clipping would hide differences of scale
            **{"data": str(data), "max_steps": 4, **options},
        )
        return prepare_data(
            config,
            read_sources(config),
            engine.tokenizer,
            context_length=engine.context_length,
        )

    return plan_of


def current_gradients(engine) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trained_parameters(engine.model).items()}


class GradientRecorder:
    """An engine whose update records the gradients, and changes nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def update(self, *, learning_rate: float) -> None:
        self.gradients = current_gradients(self._engine)


@pytest.fixture
def gradients(tmp_path):
    """Gradients of one optimizer step as the trainer makes it: ``gradients(engine, plan, batches)``."""

    def gradients(
        engine: Engine, plan: PreparedData, batches: Sequence[MicroBatch] | None = None
    ) -> dict[str, torch.Tensor]:
        recorder = GradientRecorder(engine)
        holder = EngineHolder(recorder)
        runner = StepRunner(
            engines=holder,
            data=plan,
            saver=Saver(CheckpointManager(tmp_path), lambda event: None),  # has nothing to save
            memory=MemoryGuard(plan.config, holder.build(plan.config)),
        )
        runner.run(1, plan.batches.step(1) if batches is None else batches)
        return recorder.gradients

    return gradients


def transformers_gradients(engine, batches: list[MicroBatch], tokens: int) -> dict[str, torch.Tensor]:
    """Gradients of transformers' own loss; each micro-batch is a share of the step."""
    engine.model.zero_grad(set_to_none=True)
    for batch in batches:
        loss = engine.model(**inputs_of(batch, "labels")).loss
        (loss * (batch.tokens / tokens)).backward()
    return current_gradients(engine)


def same_bits(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        scale = float(a[name].abs().max())
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5 * scale + 1e-9, msg=name)


def differ_clearly(a, b) -> bool:
    """Whether any gradient differs by more than 1% of the largest one."""
    return any(float((a[name] - b[name]).abs().max()) > 0.01 * float(a[name].abs().max()) for name in a)


def loss_of(engine, batch: MicroBatch, *, term: bool) -> torch.Tensor:
    """Σ weight · cross-entropy / tokens, computed independently, with or without the published term."""
    engine.model.train()
    padded = inputs_of(batch, "labels", "weights")
    logits = engine.model(**inputs_of(batch)).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), padded["labels"][:, 1:].flatten(), reduction="none"
    )
    loss = (losses * padded["weights"][:, 1:].flatten()).sum() / batch.tokens
    if term:
        assert batch.distrust.min() < batch.distrust.max()
        loss = loss + torch.from_numpy(batch.distrust).mean()
    return loss


def test_the_published_term_changes_no_gradient_and_the_weighting_does(engine, plan_of, gradients):
    gradients_of, losses = {}, {}
    variants = [("plain", "off", False), ("added", "off", True), ("weighted", "monotone", True)]
    for name, weigh, term in variants:
        (batch,) = plan_of(weighting=weigh).batches.step(1)
        engine.model.zero_grad(set_to_none=True)
        loss = loss_of(engine, batch, term=term)
        loss.backward()
        losses[name] = loss.item()
        gradients_of[name] = current_gradients(engine)
    assert losses["added"] > losses["plain"]
    assert same_bits(gradients_of["added"], gradients_of["plain"])
    assert differ_clearly(gradients_of["weighted"], gradients_of["plain"])
    # The trainer uses the weighted gradient, without the term.
    assert_close(gradients(engine, plan_of()), gradients_of["weighted"])


def test_weighting_off_equal_weights_and_transformers_agree(engine, plan_of, gradients, data, tmp_path):
    equal = tmp_path / "equal.jsonl"
    records = [json.loads(line) for line in data.read_text().splitlines()]
    source = {"authority_weight": 0.2, "provenance_entropy": 1.3}
    equal.write_text("".join(json.dumps({**record, **source}) + "\n" for record in records))
    options = {"batch_size": 3, "gradient_accumulation": 2}
    off = plan_of(weighting="off", **options)
    same = plan_of(weighting="monotone", data=str(equal), **options)
    nothing = plan_of(weighting="monotone", lambda_=0.0, **options)
    assert same.weights.tolist() == [1.0] * 11
    reference = gradients(engine, off)
    assert same_bits(reference, gradients(engine, same))
    assert same_bits(reference, gradients(engine, nothing))
    batches = off.batches.step(1)
    assert_close(reference, transformers_gradients(engine, batches, sum(batch.tokens for batch in batches)))


def test_losses_are_those_of_transformers(engine, plan_of):
    (batch,) = plan_of().batches.step(1)
    losses = engine.evaluate(batch)
    with torch.no_grad():
        expected = float(engine.model(**inputs_of(batch, "labels")).loss)
    assert losses.cross_entropy.sum() / batch.tokens == pytest.approx(expected, rel=1e-5)
    example_weights = batch.pad(batch.weights, filler=0).max(axis=1)
    np.testing.assert_allclose(losses.weighted, losses.cross_entropy * example_weights, rtol=1e-6)


@pytest.mark.parametrize("weigh", ["monotone", "published", "off"])
def test_accumulation_changes_no_gradient(engine, plan_of, gradients, weigh):
    """1 × 8, 4 × 2 and 8 × 1 agree; lengths differ, so a mean of means would not."""
    single = plan_of(weighting=weigh, batch_size=8)
    assert len({int(n) for n in single.batches.step(1)[0].lengths}) > 2
    reference = gradients(engine, single)
    for accumulation in (4, 8):
        parts = plan_of(weighting=weigh, batch_size=8 // accumulation, gradient_accumulation=accumulation)
        assert len(parts.batches.step(1)) == accumulation
        assert_close(reference, gradients(engine, parts))


def test_the_gradient_is_the_weighted_sum_of_single_examples(engine, plan_of, gradients):
    """Σ u·∇ce / N from transformers' loss of single examples: any lost weight shows."""
    plan = plan_of(batch_size=3, gradient_accumulation=2)
    batches = plan.batches.step(2)
    corpus = plan.corpus
    single = {int(batch.examples[0]): batch for batch in evaluation_batches(corpus, batch_size=1)}
    u = weighting.example_weights(corpus.authority_weight, corpus.provenance_entropy)
    u = u / (np.sum(u * corpus.loss_tokens) / corpus.loss_tokens.sum())
    sampled = [int(example) for batch in batches for example in batch.examples]
    assert u[sampled].max() / u[sampled].min() > 1.5
    tokens = sum(single[example].tokens for example in sampled)
    expected: dict[str, torch.Tensor] = {}
    for example in sampled:
        batch = single[example]
        for name, gradient in transformers_gradients(engine, [batch], batch.tokens).items():
            part = gradient.double() * float(u[example]) * batch.tokens / tokens
            expected[name] = expected.get(name, torch.zeros_like(part)) + part
    actual = gradients(engine, plan, batches)
    assert_close({name: value.float() for name, value in expected.items()}, actual)
    # The test detects these ways to lose weights, each a bug of other trainers.
    for lost in (_without_weights(batches), _normalized_by_weight(batches)):
        assert differ_clearly(gradients(engine, plan, lost), actual)


def _without_weights(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [replace(b, weights=(b.labels != IGNORED).astype(np.float32)) for b in batches]


def _normalized_by_weight(batches: list[MicroBatch]) -> list[MicroBatch]:
    return [replace(b, weights=b.weights * np.float32(b.tokens / b.weights.sum())) for b in batches]


def test_a_batch_of_one_example_is_weighted(engine, plan_of, gradients):
    plan = plan_of(batch_size=1)
    plain = plan_of(batch_size=1, weighting="off")
    ratios = []
    for step in (1, 2, 3):
        (batch,) = plan.batches.step(step)
        u = float(plan.weights[batch.examples[0]])
        ratios.append(u)
        unweighted = gradients(engine, plain, plain.batches.step(step))
        expected = {name: gradient * u for name, gradient in unweighted.items()}
        assert_close(expected, gradients(engine, plan, [batch]))
    assert max(ratios) / min(ratios) > 1.2


@pytest.mark.parametrize("targets", ["gate_proj down_proj", "up_proj down_proj", "o_proj", "q_proj v_proj"])
def test_gradients_are_complete_for_any_target_modules(tiny_model, plan_of, gradients, targets):
    options = {**FLOAT32, "lora_rank": 2, "target_modules": tuple(targets.split()), "threads": 1}
    engine = create_engine(TrainConfig(model=str(tiny_model), **options))
    with torch.no_grad():
        for parameter in trained_parameters(engine.model).values():
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    plan = plan_of()
    fused = gradients(engine, plan)
    for module in engine.model.modules():
        vars(module).pop("forward", None)  # restore the original forward
    assert_close(fused, gradients(engine, plan))
