"""A and B are rounded to bfloat16 once per step, never stale: with the bits of rounding in each layer."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from small_models import add_lora, gradients, small_model, trained_parameters

from distrust.config import TrainConfig
from distrust.engines.torch.layers import fuse
from distrust.engines.torch.optimizer import make_optimizer
from distrust.engines.torch.rounded_factors import RoundedFactors

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def rounds(monkeypatch) -> list[RoundedFactors]:
    """Each time that the matrices are rounded, for which model."""
    calls: list[RoundedFactors] = []
    original = RoundedFactors._round
    monkeypatch.setattr(RoundedFactors, "_round", lambda self: (calls.append(self), original(self)))
    return calls


def fused_model(*, dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False) -> Any:
    base = small_model("llama", dtype=dtype)
    if checkpointing:
        base.enable_input_require_grads()
        enable = getattr(base, "activation_checkpointing_enable", None)  # its name in later versions
        (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
    model = add_lora(base, rank=4)
    assert fuse(model, dtype=dtype)["lora"] == 14
    return model.train()


def micro_step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and accumulated gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=IDS).logits.float()
    logits.tanh().sum().backward()
    return logits.detach(), gradients(model)


def rounded_in_each_layer(model: Any) -> Any:
    """A model with the same weights, whose layers have no copies to take."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        fused = getattr(vars(module).get("forward"), "args", (None, None))[1]
        if hasattr(fused, "rounded"):
            fused.rounded.layers = []
    return reference


def assert_same_bits(model: Any) -> None:
    model.zero_grad()
    logits, gradients = micro_step(model)
    expected_logits, expected = micro_step(rounded_in_each_layer(model))
    assert torch.equal(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    assert not [name for name, gradient in gradients.items() if not torch.equal(gradient, expected[name])]


def change_by_step(model: Any) -> None:
    parameters = trained_parameters(model)
    make_optimizer(parameters, TrainConfig(learning_rate=0.1)).step()


@torch.no_grad()
def change_by_loading(model: Any) -> None:
    for parameter in trained_parameters(model).values():
        parameter.copy_(torch.randn_like(parameter))


def change_scale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


@pytest.mark.parametrize("change", [change_by_step, change_by_loading, change_scale])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bits_are_those_of_rounding_in_each_layer(change, checkpointing):
    model = fused_model(checkpointing=checkpointing)
    for _ in range(3):
        assert_same_bits(model)
        change(model)
    assert_same_bits(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rounds_once_for_all_micro_steps_and_evaluations_of_a_step(rounds, checkpointing):
    model = fused_model(checkpointing=checkpointing)
    optimizer = make_optimizer(trained_parameters(model), TrainConfig())
    assert not rounds  # nothing is kept before it is needed
    for step in range(1, 4):
        micro_step(model)
        with torch.no_grad():
            model(input_ids=IDS)
        micro_step(model)
        assert len(rounds) == step
        optimizer.step()


def test_a_caller_in_inference_mode_leaves_copies_that_train():
    """As an observer between two steps, which calls the model first."""
    model = fused_model()
    with torch.inference_mode():
        model(input_ids=IDS)
    assert_same_bits(model)


def test_float32_has_no_copies(rounds):
    model = fused_model(dtype=torch.float32)
    model(input_ids=IDS)
    assert not rounds


def test_a_copied_model_has_copies_of_its_own(rounds):
    """Its parameters count their versions anew, up to those of the original's copies."""
    model = fused_model()
    for _ in range(2):
        micro_step(model)
        change_by_loading(model)
    micro_step(model)
    for changes in range(6):
        copied = copy.deepcopy(model)
        for _ in range(changes):
            change_by_loading(copied)
        assert_same_bits(copied)
    rounds.clear()
    assert_same_bits(model)
    assert len(rounds) == 0  # its copies were still right


def test_copies_are_neither_saved_nor_kept(monkeypatch):
    copies: list[weakref.ref[torch.Tensor]] = []
    original = torch._foreach_copy_
    monkeypatch.setattr(
        torch,
        "_foreach_copy_",
        lambda to, of: (copies.extend(map(weakref.ref, to)), original(to, of)),
    )
    model = fused_model()
    names = {*model.state_dict()}
    micro_step(model)
    assert {*model.state_dict()} == names
    assert len(copies) == 2 * 14
    assert all(reference() is not None for reference in copies)
    del model
    gc.collect()
    assert all(reference() is None for reference in copies)
