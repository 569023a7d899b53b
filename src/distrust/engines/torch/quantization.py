"""The frozen base in 8 or 4 bits, through bitsandbytes.

8 bits: LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339). 4 bits: NF4 with quantized scales (QLoRA, Dettmers
et al. 2023, arXiv:2305.14314). ``docs/memory.md`` has the measurements behind this choice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from distrust.errors import MissingDependency
from distrust.option_values import Quantization

LIBRARY = "bitsandbytes"
LINEAR = ("Linear4bit", "Linear8bitLt")  # its layers


def loading_options(quantization: Quantization, *, dtype: torch.dtype, device: Any) -> dict[str, Any]:
    """Options for the loader of transformers."""
    if quantization == "none":
        return {}
    if importlib.util.find_spec(LIBRARY) is None:
        raise MissingDependency(f"--quantization {quantization}", library=LIBRARY, extra="quantization")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def prepare_quantized(model: torch.nn.Module) -> None:
    """Prepare a quantized model for training, right after it was loaded."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise the library repacks 4-bit weights with rounded scales at the first forward pass in
            # evaluation mode, for good: the training steps after an evaluation would differ.
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point():
            # Unquantized weights are views of the mapped file: a view keeps all of it in memory.
            parameter.data = parameter.data.clone()


def is_quantized(layer: object) -> bool:
    """Whether it is one of the library's linear layers."""
    return type(layer).__module__.startswith(LIBRARY) and type(layer).__name__ in LINEAR


def dequantize(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of a linear layer; a quantized one's as the library's backward pass has it."""
    if not is_quantized(layer):
        return layer.weight  # type: ignore[no-any-return]
    if type(layer).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        packed, state = layer.weight.data.view(-1, 1), layer.weight.quant_state
        weight: torch.Tensor = dequantize_4bit(packed, state).to(dtype)
    else:
        weight = layer.state.CB.to(dtype, copy=True)
        weight.mul_(layer.state.SCB.unsqueeze(1).mul(1.0 / 127.0))  # of each row
    return weight


@contextlib.contextmanager
def without_outliers(model: torch.nn.Module) -> Iterator[None]:
    """Context manager in which LLM.int8 computes each token independently.

    Normally a column with one large value stays in full precision for all tokens of a pass, so tokens change
    each other by rounding in any batch. The trial of packing must not see that.
    """
    candidates: list[Any] = [getattr(module, "state", None) for module in model.modules()]
    thresholds = [(state, state.threshold) for state in candidates if hasattr(state, "threshold")]
    try:
        for state, _ in thresholds:
            state.threshold = 0.0  # no value counts as large
        yield
    finally:
        for state, threshold in thresholds:
            state.threshold = threshold


def count(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; two 4-bit weights share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def environment(quantization: Quantization) -> dict[str, str]:
    """The library's version, which may change the last bits; empty without quantization."""
    return {} if quantization == "none" else {LIBRARY: version(LIBRARY)}
