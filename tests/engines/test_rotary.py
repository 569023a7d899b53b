"""liger-kernel's rotary positions in single attention layers, on CUDA; here a CPU is told to use them.

They have the results and gradients of the models' own, and replace nothing in transformers.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import fake_liger
import pytest
import torch
from fake_liger import SUFFIX
from small_batches import make_batch
from small_models import add_lora, gradients, small_model
from test_layers import LAYERS, ROUNDING, assert_same, logits_and_gradients
from transformers.models.llama import modeling_llama

from distrust.engines.torch import liger
from distrust.engines.torch.layers import fuse
from distrust.engines.torch.model_runner import ModelRunner

ROPE = f"rope{SUFFIX}"


class Rotations(fake_liger.LigerRopeFunction):
    """Counts its calls."""

    count = 0

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        Rotations.count += 1
        return fake_liger.LigerRopeFunction.forward(ctx, *inputs)


@pytest.fixture
def fuse_with(monkeypatch):
    """Fuses a model by the library, with this function for rotary positions; returns in how many layers."""

    def fuse_by(model: Any, rotate: Any = Rotations, *, dtype: torch.dtype = torch.float32) -> int:
        monkeypatch.setattr(liger, "load", lambda: fake_liger.functions(LigerRopeFunction=rotate))
        return fuse(model, dtype=dtype, cuda=True).get(ROPE, 0)

    return fuse_by


def attention_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def rotations(model: Any, *, rows: int = 1) -> int:
    """Calls of the library in a forward and backward pass of ``rows`` rows."""
    Rotations.count = 0
    logits_and_gradients(model, rows=rows)
    return Rotations.count


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2, softcapping", "stablelm"])
def test_results_and_gradients_are_those_of_the_model(fuse_with, family, dtype):
    """With grouped queries, norms of the queries, and a rotation of a part of each head."""
    model = add_lora(small_model(family, dtype=dtype), rank=4)
    plain = copy.deepcopy(model)
    assert fuse_with(model, dtype=dtype) == LAYERS
    for each in (model, copy.deepcopy(model)):  # a copy computes the same
        assert rotations(each) == LAYERS
        actual, expected = (logits_and_gradients(one, rows=1) for one in (each, plain))
        assert_same(actual, expected, rounding=ROUNDING[dtype])


def test_with_all_weights_trained_and_checkpointed_layers(fuse_with):
    model = small_model("llama")
    plain = copy.deepcopy(model)
    assert fuse_with(model) == LAYERS
    # Its name in later versions of transformers, and in earlier ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.train()
    assert rotations(model) == 2 * LAYERS  # once more in the backward pass
    actual, expected = (logits_and_gradients(one, rows=1) for one in (model, plain))
    assert_same(actual, expected, rounding=1e-5)


def test_packed_examples(fuse_with):
    """Positions begin again with each example of a row."""
    model, batch = add_lora(small_model("llama"), rank=4), make_batch()
    plain = copy.deepcopy(model)
    assert fuse_with(model) == LAYERS
    results = []
    for each in (model, plain):
        runner = ModelRunner(each.base_model.model, compute_dtype=torch.float32)
        assert runner.uses_varlen
        Rotations.count = 0
        losses = runner.train(batch, tokens=batch.tokens)
        assert Rotations.count == (LAYERS if each is model else 0)
        results.append((torch.from_numpy(losses.cross_entropy), gradients(each)))
    assert_same(*results, rounding=1e-5)


def test_nothing_else_changes(fuse_with):
    """Neither the modeling file, nor its classes, nor other models with layers of the same class."""
    names, layer_class = dict(vars(modeling_llama)), dict(vars(modeling_llama.LlamaAttention))
    model, second = small_model("llama"), small_model("llama")
    assert fuse_with(model) == LAYERS
    replaced = {module for module in model.modules() if isinstance(vars(module).get("forward"), MethodType)}
    assert replaced == {*attention_layers(model)}
    assert dict(vars(modeling_llama)) == names
    assert dict(vars(modeling_llama.LlamaAttention)) == layer_class
    assert rotations(second) == 0


def test_memory_of_others_is_not_written(monkeypatch):
    """The library writes over its arguments and their gradients."""
    heads = [torch.randn(1, 6, count, 8).transpose(1, 2).requires_grad_() for count in (4, 2)]
    angles = torch.randn(1, 6, 4).repeat(1, 1, 2)
    originals = [x.detach().clone() for x in heads]
    rotated = fake_liger.functions().rotate(*heads, angles.cos(), angles.sin())
    seeds = [torch.randn(1, 6, x.shape[1], 8).transpose(1, 2) for x in heads]
    original_seeds = [x.clone() for x in seeds]
    torch.autograd.backward(rotated, seeds)
    for x, original in zip([*heads, *seeds], [*originals, *original_seeds], strict=True):
        assert torch.equal(x.detach(), original)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("factor", [1.01, float("nan"), RuntimeError("no kernel image")])
def test_left_where_a_trial_disagrees_or_fails(fuse_with, direction, factor):
    def wrong(ctx: Any, *tensors: Any) -> Any:
        q, k, *nothing = getattr(fake_liger.LigerRopeFunction, direction)(ctx, *tensors)
        if isinstance(factor, Exception):
            raise factor
        return q, factor * k, *nothing

    model = small_model("llama")
    assert fuse_with(model, type("Wrong", (Rotations,), {direction: staticmethod(wrong)})) == 0
    assert not any("forward" in vars(layer) for layer in attention_layers(model))


def test_out_of_memory_is_not_a_disagreement(fuse_with):
    class Exhausted(Rotations):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        fuse_with(small_model("llama"), Exhausted)


@pytest.mark.parametrize("family", ["cohere", "glm", "gpt2", "gpt_oss"])
def test_other_rotations_are_left(fuse_with, family):
    """Of neighbouring elements, of a part of what they get, none at all, and by angles of half the width."""
    assert fuse_with(small_model(family)) == 0


def test_angles_that_the_library_does_not_read(fuse_with):
    """It reads half of them, because the others are the same in most models."""
    model = small_model("llama")
    angles = model.model.rotary_emb.forward
    scale = torch.linspace(0.5, 1.5, 8)
    model.model.rotary_emb.forward = lambda *args, **options: [scale * x for x in angles(*args, **options)]
    assert fuse_with(model) == 0


def test_several_rows_and_dtypes_are_computed_by_the_model(fuse_with):
    model = small_model("llama")
    assert fuse_with(model) == LAYERS
    assert rotations(model, rows=2) == 0
    with torch.autocast("cpu", torch.bfloat16):  # the angles stay float32
        assert rotations(model) == 0
