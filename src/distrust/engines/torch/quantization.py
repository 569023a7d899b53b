"""The frozen base in 8 or 4 bits, through bitsandbytes.

Chosen by trying, see ``docs/memory.md``. 8 bits are LLM.int8, 4 bits are NF4 with its scales quantized, too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from distrust.config import Quantization
from distrust.errors import ConfigError

LIBRARY = "bitsandbytes"


def loading_options(
    quantization: Quantization, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What the loader of transformers is to be told.

    Args:
        quantization: how many bits; "none" needs no option.
        dtype: of the arithmetic.
        device: where to quantize, and to compute.

    Raises:
        ConfigError: if the library is not installed.
    """
    if quantization == "none":
        return {}
    if importlib.util.find_spec(LIBRARY) is None:
        raise ConfigError(
            f"--quantization {quantization}: needs {LIBRARY}, which is not installed; "
            "pip install 'distrust-trainer[quantization]'"
        )
    from transformers import BitsAndBytesConfig

    kept_in: dict[str, dict[str, Any]] = {
        "8bit": {"load_in_8bit": True},
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
    }
    return {"quantization_config": BitsAndBytesConfig(**kept_in[quantization]), "device_map": {"": device}}


def prepare_quantized(model: torch.nn.Module) -> None:
    """Make a model that was just loaded fit for training.

    On processors with bfloat16 instructions the library packs 4-bit weights anew at the first forward pass
    outside training, with rounded scales, and leaves them so: the steps after it would be other ones. It is
    told not to. And what is not quantized is copied: it lies in the mapped file, which it would keep whole.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


@contextlib.contextmanager
def token_by_token(model: torch.nn.Module) -> Iterator[None]:
    """A context in which each token is computed by itself, as everywhere but in LLM.int8.

    There a column with one large value is kept in full for all tokens of a pass, so that each moves the
    others by rounding, in any batch: not what a trial of boundaries looks for.
    """
    found: list[Any] = [getattr(module, "state", None) for module in model.modules()]
    states = [state for state in found if hasattr(state, "threshold")]
    thresholds = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


def count(parameter: torch.Tensor) -> int:
    """How many numbers a parameter holds: two of four bits lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def environment(quantization: Quantization) -> dict[str, str]:
    """What may change the last bits; nothing without quantization."""
    return {} if quantization == "none" else {LIBRARY: version(LIBRARY)}
