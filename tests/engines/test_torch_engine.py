"""What only the torch engine does: it sets its model's mode, and frees what it has computed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from small_batches import make_batch

from distrust import TrainConfig
from distrust.engines import create_engine


@pytest.fixture
def engine(tiny_model) -> Any:
    """An engine whose results with and without dropout differ."""
    options = {"lora_rank": 4, "lora_dropout": 0.5}
    return create_engine(TrainConfig(engine="torch", device="cpu", model=str(tiny_model), **options))


def micro_step(engine: Any) -> Any:
    engine.begin_micro_step(seed=0, step=1, micro_step=0)
    return engine.micro_step(make_batch(vocabulary=32), tokens=10)


def gradients(engine: Any) -> list[torch.Tensor]:
    micro_step(engine)
    return [weight.grad for weight in engine.model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("part", ["the base model", "a layer", "all"])
def test_a_program_that_changes_the_mode_changes_no_result(engine, part):
    base = engine.model.get_base_model()
    module = {"the base model": base, "a layer": base.model.layers[0], "all": engine.model}[part]
    batch = make_batch(vocabulary=32)
    trained, evaluated = gradients(engine), engine.evaluate(batch).cross_entropy
    module.train()
    assert (engine.evaluate(batch).cross_entropy == evaluated).all()
    micro_step(engine)
    module.eval()
    assert all(torch.equal(*pair) for pair in zip(gradients(engine), trained, strict=True))


def test_a_closed_engine_keeps_no_losses(engine):
    losses = weakref.ref(micro_step(engine))
    layer = weakref.ref(engine.model.get_base_model().model.layers[0])
    assert losses() is not None
    engine.close()
    gc.collect()
    assert (losses(), layer()) == (None, None)
