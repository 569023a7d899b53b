"""LoRA's fused layer over a base in 4 and 8 bits: the results of peft's own layer, with less memory.

It is used on CUDA only; here a CPU is told to use it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import add_lora, gradients, small_model

from distrust.config import TrainConfig
from distrust.engines import create_engine
from distrust.engines.torch.layers import fuse
from distrust.engines.torch.model import load_model

IDS = torch.arange(24).reshape(2, 12)
LORA_LAYERS = 14
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    small_model("qwen2").save_pretrained(path)  # it has biases
    return str(path)


def quantized_pair(folder: str, *, bits: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """A fused model, and the same one as peft computes it."""
    base = load_model(folder, dtype=dtype, device=torch.device("cpu"), quantized=bits)
    model = add_lora(base, rank=4, **options)
    plain = copy.deepcopy(model)
    assert fuse(model, dtype=dtype, cuda=True)["lora"] == LORA_LAYERS
    return model, plain


def train_pass(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Logits, gradients, and the bytes that autograd keeps between forward and backward."""
    storages: dict[int, int] = {}
    weights = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with (
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        logits = model(input_ids=IDS).logits.float()
    logits.tanh().sum().backward()
    return logits.detach(), gradients(model), sum(storages.values())


@pytest.mark.parametrize(
    ("bits", "dtype", "training"),
    [
        *(("4bit", torch.float32, True), ("4bit", torch.bfloat16, False)),
        *(("8bit", torch.bfloat16, True), ("8bit", torch.float32, False)),
    ],
)
def test_results_and_gradients_are_those_of_peft(folder, bits, dtype, training):
    model, plain = quantized_pair(folder, bits=bits, dtype=dtype)
    (logits, gradients, saved), (expected_logits, expected, saved_by_peft) = (
        train_pass(each.train(training), dtype) for each in (model, plain)
    )
    assert float((logits - expected_logits).norm()) <= ROUNDING[dtype] * float(expected_logits.norm())
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0
        assert float((gradients[name] - gradient).norm()) <= ROUNDING[dtype] * float(gradient.norm()), name
    assert saved < 0.8 * saved_by_peft


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_base_product_is_the_library_s(folder, bits):
    """With B at 0, only the base computes: the bits are equal."""
    model, plain = quantized_pair(folder, bits=bits, dtype=torch.float32)
    with torch.no_grad():
        for each in (model, plain):
            for name, parameter in each.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        layer, reference = (each.base_model.model.model.layers[1].self_attn.q_proj for each in (model, plain))
        x = torch.randn(2, 5, 32)
        assert torch.equal(layer(x), reference(x))


@pytest.mark.parametrize("options", [{"dora": True}, {"lora_dropout": 0.3}])
def test_variants_keep_their_own_way(folder, options):
    base = load_model(folder, dtype=torch.float32, device=torch.device("cpu"), quantized="4bit")
    model = add_lora(base, rank=4, **options)
    plain = copy.deepcopy(model)
    fuse(model, dtype=torch.float32, cuda=True)
    results = []
    for each in (model, plain):
        torch.manual_seed(3)
        results.append(train_pass(each.train(), torch.float32)[0])
    assert torch.allclose(results[0], results[1], atol=1e-5)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_runs_on_a_cpu_keep_peft_s_own_way(tiny_model, bits):
    config = TrainConfig(
        engine="torch", model=str(tiny_model), lora_rank=4, threads=1, device="cpu", quantization=bits
    )
    assert create_engine(config).environment()["fused"]["lora"] == 0
