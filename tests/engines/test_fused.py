"""Fused layers are the layers: the same results and gradients, and never where a layer does more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import adapted, gradients, small_model, trained

from distrust.engines.torch.layers import fuse

LAYERS = 2
ALL = {"lora": 7 * LAYERS, "norm": 2 * LAYERS + 1, "gate": LAYERS}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def outcome(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of some fixed tokens."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # of dropout, where there is any
        logits = model(input_ids=torch.arange(24).reshape(2, 12)).logits.float()
    logits.tanh().sum().backward()
    return logits.detach(), gradients(model)


def assert_same(found: Any, expected: Any, *, rounding: float) -> None:
    (logits, slopes), (wanted_logits, wanted) = found, expected
    assert float((logits - wanted_logits).norm()) <= rounding * float(wanted_logits.norm())
    assert slopes.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert slopes[name].dtype == gradient.dtype
        assert float((slopes[name] - gradient).norm()) <= rounding * float(gradient.norm()) + 1e-7, name


def check(model: Any, *, dtype: torch.dtype = torch.float32, taken: dict[str, int]) -> None:
    plain = copy.deepcopy(model)
    assert fuse(model, dtype=dtype) == taken
    for training in (False, True):
        model.train(training)
        plain.train(training)
        assert_same(outcome(model), outcome(plain), rounding=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_lora_norm_and_gate_are_what_they_were(family, dtype):
    check(adapted(small_model(family, dtype=dtype), rank=4), dtype=dtype, taken=ALL)


def test_with_all_weights_trained_too():
    """The norms' own gradients among them."""
    model = small_model("llama")
    check(model, taken={**ALL, "lora": 0})
    assert float(model.model.norm.weight.grad.norm()) > 0


@pytest.mark.parametrize(
    "modules",
    [("gate_proj", "down_proj"), ("up_proj", "down_proj"), ("down_proj",), ("gate_proj",), ("o_proj",)],
)
def test_whichever_modules_have_an_adapter(modules):
    """Of the first layer's inputs none wants a gradient: only what is adapted itself."""
    model = adapted(small_model("llama"), rank=4, target_modules=modules)
    check(model, taken={**ALL, "lora": len(modules) * LAYERS})
    assert all(part.grad is not None for part in trained(model).values())


def test_rank_stabilized_lora_keeps_its_scale():
    check(adapted(small_model("llama"), rank=4, rslora=True), taken=ALL)


def test_dora_is_not_fused():
    check(adapted(small_model("llama"), rank=4, dora=True), taken={**ALL, "lora": 0})


def test_dropout_draws_as_it_did():
    check(adapted(small_model("llama"), rank=4, dropout=0.3), taken=ALL)


def test_another_activation_is_no_gate_and_another_norm_no_norm():
    taken = {"lora": 7 * LAYERS, "norm": 0, "gate": 0}
    check(adapted(small_model("gemma2, softcapping"), rank=4), taken=taken)


def test_layers_of_another_kind_are_left_alone():
    check(adapted(small_model("gpt2"), rank=4), taken={"lora": 0, "norm": 0, "gate": 0})


def test_an_adapter_that_is_switched_off_or_merged():
    model = adapted(small_model("llama"), rank=4)
    plain = copy.deepcopy(model)
    fuse(model, dtype=torch.float32)
    adapted_logits, _ = outcome(model)
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
    """Named like a norm and with a norm's parts, but it takes a gate besides, as some models' do."""

    def __init__(self, width: int, *, optional: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(width))
        self.variance_epsilon = 1e-6
        self.optional = optional

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if gate is None and not self.optional:
            raise TypeError("a gate is wanted")
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * normed * (1 if gate is None else gate.sigmoid())


@pytest.mark.parametrize("optional", [True, False])
def test_what_a_module_is_given_besides_is_not_lost(optional):
    model = torch.nn.Sequential(GatedRMSNorm(8, optional=optional))
    hidden, gate = torch.randn(2, 8), torch.randn(2, 8)
    expected = model[0](hidden, gate)
    assert fuse(model, dtype=torch.float32)["norm"] == int(optional)
    assert torch.equal(model[0](hidden, gate), expected)
