"""The base model through mlx-lm, from a folder or a hub name: in transformers' layout, or in mlx's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from blake3 import blake3
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_model_of_mlx_lm

from distrust.config import Device, Dtype, Quantization
from distrust.engines.model_source import locate
from distrust.engines.tokenizer import load_error
from distrust.errors import ConfigError, ModelError

#: How many weights share a scale; the second for models that are too narrow for the first.
GROUP_SIZES = (64, 32)
#: What mlx-lm loads a model from.
FILES = ("*.json", "model*.safetensors")


def load_model(name: str, *, dtype: Dtype) -> tuple[Any, dict[str, Any]]:
    """A language model of mlx-lm in evaluation mode, and its config.

    Raises:
        ModelError: saying which model, and why not.
    """
    try:
        folder = model_folder(name)
        told = rope_settings(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model, config = load_model_of_mlx_lm(folder, lazy=True, trust_remote_code=False, model_config=told)
        model.set_dtype(getattr(mx, dtype))
        mx.eval(model.parameters())
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise load_error(name, error) from error
    if not hasattr(model, "layers"):
        raise ModelError(f"--model {name}: mlx-lm's {type(model).__module__} has no list of layers to adapt")
    model.eval()
    return model, config


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm is to be told of rotary positions: transformers 5 writes them where few of its models look.

    Args:
        config: as the model's folder has it.

    Returns:
        ``rope_theta``, ``rope_scaling`` and their kin, where the config has them in ``rope_parameters`` only;
        the whole ``text_config`` where they stand in that.
    """
    told: dict[str, Any] = {}
    found = config.get("rope_parameters")
    if isinstance(found, dict):
        by_layer = {name: value for name, value in found.items() if isinstance(value, dict)}
        if by_layer:  # a set for each kind of layer
            found = by_layer.get("full_attention", {})
            told["rope_local_base_freq"] = by_layer.get("sliding_attention", {}).get("rope_theta")
        told |= {name: found.get(name) for name in ("rope_theta", "partial_rotary_factor")}
        if found.get("rope_type", "default") != "default":
            told["rope_scaling"] = found
    told = {name: value for name, value in told.items() if value is not None and config.get(name) is None}
    inner = config.get("text_config")
    if isinstance(inner, dict) and (lifted := rope_settings(inner)):
        told["text_config"] = {**inner, **lifted}
    return told


def text_of(config: dict[str, Any], name: str) -> Any:
    """An entry of a config, or of the part of it that is about text."""
    found = config.get(name)
    inner = config.get("text_config")
    return inner.get(name) if found is None and isinstance(inner, dict) else found


def sliding_window(config: dict[str, Any]) -> int | None:
    """How many tokens back the layers see, if the config limits that."""
    window = text_of(config, "sliding_window")
    used = text_of(config, "use_sliding_window")
    return window if type(window) is int and used is not False else None


def model_folder(name: str) -> Path:
    """The folder of a model; of one on a hub, what is loaded of it was fetched.

    Raises:
        OSError: if the hub does not give it.
    """
    source, local = locate(name)
    if local:
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=list(FILES)))


def quantize(model: Any, quantization: Quantization) -> None:
    """Keep the weights of linear layers and embeddings in 8 or 4 bits, in groups with a scale and a bias.

    Raises:
        ConfigError: if no layer is wide enough.
    """
    if quantization == "none":
        return
    bits = int(quantization.removesuffix("bit"))
    for group_size in GROUP_SIZES:
        able = [module for _, module in model.named_modules() if _quantizable(module, group_size)]
        if able:
            nn.quantize(model, group_size, bits, class_predicate=lambda _, m: _quantizable(m, group_size))  # noqa: B023 - called at once
            mx.eval(model.parameters())
            return
    raise ConfigError(
        f"--quantization {quantization}: no layer of the model can be quantized: their widths are no "
        f"multiples of {GROUP_SIZES[-1]}, or they are quantized already"
    )


def named_weights(model: Any) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """Weights as :func:`distrust.engines.fingerprint.fingerprint` takes them."""
    for name, array in sorted(tree_flatten(model.parameters())):
        host: Any = mx.view(mx.contiguous(array).reshape(-1), mx.uint8)
        yield name, dtype_name(array.dtype), tuple(array.shape), memoryview(host)


def dtype_name(dtype: mx.Dtype) -> str:
    """Such as ``float32``."""
    return str(dtype).removeprefix("mlx.core.")


def config_digest(config: dict[str, Any]) -> str:
    """BLAKE3 over the model's config, without what says nothing of the computation."""
    silent = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
    told = {name: value for name, value in config.items() if name not in silent}
    return blake3(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def choose_device(device: Device) -> mx.Device:
    """The device that an option stands for.

    Raises:
        ConfigError: if this machine or this build of mlx does not have it.
    """
    available: dict[Device, bool] = {"mps": mx.metal.is_available(), "cuda": _has_cuda(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if not available[device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(f"--device {device}: not available to mlx here; available: {there}")
    return mx.Device(mx.cpu if device == "cpu" else mx.gpu, 0)


def _has_cuda() -> bool:
    cuda = getattr(mx, "cuda", None)
    return cuda is not None and bool(cuda.is_available())


def _quantizable(module: Any, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0
