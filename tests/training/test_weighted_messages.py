"""Weights of messages, records and provenance weigh each token's loss, as plain transformers computes it.

Nothing of this package is used for the expected values. The step covers all examples, so their order does not
matter.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distrust import CheckpointManager, DataError, DistrustTrainer, TrainConfig
from distrust.training.events import RunStarted, StepEnded

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ALPHA, LAMBDA = 2.4, 0.5
#: Large against the gradient, so that Adam's first step shows its size.
EPSILON, RATE = 1.0, 0.5


class Example(NamedTuple):
    turns: list[tuple[str, str, float | None]]  # question, answer, weight of the answer
    weight: float
    w: float  # authority_weight
    h: float  # provenance_entropy


EXAMPLES = [
    Example([("salt?", "at 801", 0.5), ("and lead?", "no", 2.0)], 1.0, 0.1, 1.5),
    Example([("ore?", "a bad answer", 0.0), ("ore?", "it melts", None)], 3.0, 0.9, 0.3),
    Example([("the", "nine hundred degrees", 0.25)], 0.5, 0.0, 2.4),
    Example([("a long question about lead", "grey", None)], 1.0, 0.95, 0.0),
    Example([("1", "2", 1.0), ("3", "4", 0.0), ("5", "6", 4.0)], 2.0, 0.4, 1.1),
    Example([("tin?", "white", 1.0)], 0.1, 0.7, 0.9),
    Example([("and?", "so", 0.75), ("why?", "because it is", 0.75)], 1.0, 0.2, 1.9),
    Example([("x", "y", None)], 5.0, 0.0, 0.1),
]


def as_record(example: Example) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for question, answer, weight in example.turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if weight is not None:
            messages[-1]["weight"] = weight
    return {
        "messages": messages,
        "weight": example.weight,
        "authority_weight": example.w,
        "provenance_entropy": example.h,
    }


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Expected(NamedTuple):
    loss: float
    weighted_loss: float
    gradient_norm: float
    tokens: int
    weights: dict[str, torch.Tensor]  # after the step


@pytest.fixture(scope="module")
def plain_result(model) -> Expected:
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    entropies, weights = [], []
    for example in EXAMPLES:
        ids: list[int] = []
        factors: list[float] = []
        r = max(math.log(1 - example.w + 1e-8) + example.h, 0)
        for question, answer, weight in example.turns:
            read = tokenizer(f"u:{question}<eos>a:").input_ids
            generated = tokenizer(f"{answer}<eos>").input_ids
            factor = example.weight * (1.0 if weight is None else weight) * (1 + LAMBDA * ALPHA * r**2)
            ids += read + generated
            factors += [0.0] * len(read) + [factor] * len(generated)
        logits = plain(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        trained = torch.tensor(factors[1:]) > 0
        entropies.append(losses[trained])
        weights.append(torch.tensor(factors[1:])[trained])
    losses, factors_of = torch.cat(entropies), torch.cat(weights)
    tokens = len(losses)
    loss = (losses * factors_of / factors_of.mean()).sum() / tokens
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in plain.parameters() if p.grad is not None))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    optimizer.step()
    updated = {name: weight.detach() for name, weight in plain.named_parameters()}
    return Expected(losses.mean().item(), loss.item(), norm, tokens, updated)


@pytest.mark.parametrize(
    ("packing", "batch_size", "accumulation"),
    [(False, 8, 1), (False, 2, 4), (True, 2, 1), (True, 1, 2)],
)
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_a_step_is_that_of_plain_transformers(
    model, plain_result, tmp_path, engine, packing, batch_size, accumulation
):
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    config = TrainConfig(
        engine=engine,
        model=str(model),
        out=str(tmp_path),
        device="cpu",
        threads=1,
        max_steps=1,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        packing=packing,
        max_length=112,
        learning_rate=RATE,
        warmup_steps=0,
        schedule="constant",
        max_grad_norm=0.0,
        adam_epsilon=EPSILON,
        weight_decay=0.0,
        alpha=ALPHA,
        lambda_=LAMBDA,
        lora_rank=0,
    )
    events: list[Any] = []
    ended = DistrustTrainer(
        config, examples=[as_record(example) for example in EXAMPLES], observers=[events.append]
    ).train()
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert started.epoch_steps == 1  # the step has every example once
    (step,) = [event for event in events if isinstance(event, StepEnded)]
    assert step.tokens == plain_result.tokens
    actual = step.loss, step.weighted_loss, step.gradient_norm
    assert actual == pytest.approx(plain_result[:3], rel=1e-5)
    trained = CheckpointManager(ended.path.parent).load(ended.path, framework="numpy").model
    initial = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    compared = 0
    for name, weight in plain_result.weights.items():
        change = (weight - initial[name]).numpy()
        trained_change = np.asarray(trained[name]) - initial[name].numpy()
        np.testing.assert_allclose(
            trained_change, change, rtol=1e-3, atol=1e-5 * np.abs(change).max(), err_msg=name
        )
        compared += 1
    assert compared == len(trained)


def test_a_weight_that_is_zero_beside_others_is_an_error_of_its_record(model, tmp_path):
    """The weight of a token, in float32, is that of its record, times that of its message."""
    rows = [as_record(Example([("salt?", "at 801", number)], number, 0.1, 1.5)) for number in (1e15, 1e-15)]
    config = TrainConfig(model=str(model), out=str(tmp_path), device="cpu", threads=1, max_steps=1)
    with pytest.raises(DataError, match=r"^examples\[1\]: its weight is zero compared with the heaviest"):
        DistrustTrainer(config, examples=rows).train()
