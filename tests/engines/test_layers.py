"""Fused layers have the results and gradients of the original layers, and replace no layer that does more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import add_lora, gradients, small_model, trained_parameters

from distrust.engines.torch.layers import fuse

LAYERS = 2
ALL = {"lora": 7 * LAYERS, "norm": 2 * LAYERS + 1, "gate": LAYERS}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def logits_and_gradients(model: Any, *, rows: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients for fixed tokens."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # for dropout
        logits = model(input_ids=torch.arange(24).reshape(rows, -1)).logits.float()
    logits.tanh().sum().backward()
    return logits.detach(), gradients(model)


def assert_same(actual: Any, expected: Any, *, rounding: float) -> None:
    (logits, gradients), (expected_logits, expected_gradients) = actual, expected
    assert float((logits - expected_logits).norm()) <= rounding * float(expected_logits.norm())
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradients[name].dtype == gradient.dtype
        assert float((gradients[name] - gradient).norm()) <= rounding * float(gradient.norm()) + 1e-7, name


def check(model: Any, *, dtype: torch.dtype = torch.float32, counts: dict[str, int]) -> None:
    plain = copy.deepcopy(model)
    assert fuse(model, dtype=dtype) == counts
    for training in (False, True):
        model.train(training)
        plain.train(training)
        assert_same(logits_and_gradients(model), logits_and_gradients(plain), rounding=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_lora_norm_and_gate_are_equivalent(family, dtype):
    check(add_lora(small_model(family, dtype=dtype), rank=4), dtype=dtype, counts=ALL)


def test_with_all_weights_trained():
    """Including the norms."""
    model = small_model("llama")
    check(model, counts={**ALL, "lora": 0})
    assert float(model.model.norm.weight.grad.norm()) > 0


@pytest.mark.parametrize(
    "modules",
    [("gate_proj", "down_proj"), ("up_proj", "down_proj"), ("down_proj",), ("gate_proj",), ("o_proj",)],
)
def test_any_subset_of_adapted_modules(modules):
    """The first layer's inputs need no gradient: only the adapted modules do."""
    model = add_lora(small_model("llama"), rank=4, target_modules=modules)
    check(model, counts={**ALL, "lora": len(modules) * LAYERS})
    assert all(part.grad is not None for part in trained_parameters(model).values())


def test_rank_stabilized_lora_keeps_its_scale():
    check(add_lora(small_model("llama"), rank=4, rslora=True), counts=ALL)


def test_dora_is_not_fused():
    check(add_lora(small_model("llama"), rank=4, dora=True), counts={**ALL, "lora": 0})


def test_dropout_is_unchanged():
    check(add_lora(small_model("llama"), rank=4, lora_dropout=0.3), counts=ALL)


def test_other_activations_and_norms_are_not_fused():
    counts = {"lora": 7 * LAYERS, "norm": 0, "gate": 0}
    check(add_lora(small_model("gemma2, softcapping"), rank=4), counts=counts)


def test_other_layers_are_not_fused():
    check(add_lora(small_model("gpt2"), rank=4), counts={"lora": 0, "norm": 0, "gate": 0})


def test_a_disabled_or_merged_adapter():
    model = add_lora(small_model("llama"), rank=4)
    plain = copy.deepcopy(model)
    fuse(model, dtype=torch.float32)
    adapted_logits, _ = logits_and_gradients(model)
    with torch.no_grad():
        with model.disable_adapter(), plain.disable_adapter():
            ids = torch.arange(24).reshape(2, 12)
            off = model(input_ids=ids).logits
            assert torch.allclose(off, plain(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(off, adapted_logits, atol=1e-2)
        model.merge_adapter()
        assert torch.allclose(model(input_ids=ids).logits, adapted_logits, atol=1e-4)
        model.unmerge_adapter()
        assert torch.allclose(model(input_ids=ids).logits, adapted_logits, atol=1e-4)


class GatedRMSNorm(torch.nn.Module):
    """A norm by name and parts that also takes a gate, as in some models."""

    def __init__(self, width: int, *, optional: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width))
        self.variance_epsilon = 1e-6
        self.optional = optional

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if gate is None and not self.optional:
            raise TypeError("a gate is required")
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * normed * (1 if gate is None else gate.sigmoid())


@pytest.mark.parametrize("optional", [True, False])
def test_extra_arguments_reach_the_module(optional):
    model = torch.nn.Sequential(GatedRMSNorm(8, optional=optional))
    hidden, gate = torch.randn(2, 8), torch.randn(2, 8)
    expected = model[0](hidden, gate)
    assert fuse(model, dtype=torch.float32)["norm"] == int(optional)
    assert torch.equal(model[0](hidden, gate), expected)


class OffsetRMSNorm(torch.nn.Module):
    """A norm by name and parts that multiplies by 1 + weight, as Gemma's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width))
        self.variance_epsilon = 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (1 + self.weight) * normed


def test_a_module_that_computes_something_else_is_not_fused():
    model, hidden = torch.nn.Sequential(OffsetRMSNorm(8)), torch.randn(2, 8)
    expected = model(hidden)
    assert fuse(model, dtype=torch.float32)["norm"] == 0
    assert torch.equal(model(hidden), expected)
