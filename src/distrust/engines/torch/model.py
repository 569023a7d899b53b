"""The base model and its tokenizer, from a folder or a hub name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from distrust.config import Device, Dtype, Quantization
from distrust.engines.model_source import locate
from distrust.engines.tokenizer import load_error, load_pretrained
from distrust.engines.torch import quantization
from distrust.errors import ConfigError, ModelError

#: No model has as many: to make the modules of a million takes minutes.
MAX_LAYERS = 10_000


def load_model(
    name: str, *, dtype: torch.dtype, device: torch.device, quantized: Quantization = "none"
) -> torch.nn.Module:
    """A causal language model of transformers, in evaluation mode.

    Raises:
        ModelError: saying which model, and why not.
        ConfigError: if what quantizes is not installed, or mlx has quantized the model.
    """
    if is_quantized_by_mlx(name):
        raise ConfigError(
            f"--model {name}: is in mlx's quantized layout, which torch does not read: use --engine mlx, or "
            "give the model that it was made of"
        )
    options = quantization.loading_options(quantized, dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM

    model, found = load_pretrained(
        AutoModelForCausalLM, name, dtype=dtype, output_loading_info=True, **options
    )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would fill them with random values
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"--model {name}: its weights lack {missing[0]}{more}; is it a causal language model?"
        )
    model.config.use_cache = False  # a cache of keys is of no use in training
    module: torch.nn.Module = model
    if options:
        quantization.prepare_quantized(module)
    else:
        module.to(device)
    return module.eval()


def meta_model(name: str) -> torch.nn.Module:
    """The same model without its weights: its modules, and their shapes, on the "meta" device.

    Raises:
        ModelError: saying which model, and why not.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    layers = getattr(config, "num_hidden_layers", None)
    if type(layers) is int and layers > MAX_LAYERS:
        raise ModelError(f"--model {name}: cannot be loaded: its config says {layers} layers")
    try:
        with torch.device("meta"):
            module: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of a config that makes no sense it raises of every kind
        raise load_error(name, error) from error
    return module.eval()


def load_config(name: str) -> Any:
    """The config of a model, as its folder has it.

    Raises:
        ModelError: saying which model, and why not.
    """
    from transformers import AutoConfig

    return load_pretrained(AutoConfig, name)


def is_quantized_by_mlx(name: str) -> bool:
    """Whether a model's weights are packed as mlx packs them; transformers names the method of all others.

    Raises:
        ModelError: saying which model cannot be looked at, and why not.
    """
    config = load_config(name)
    told = [getattr(config, entry, None) for entry in ("quantization", "quantization_config")]
    return any(isinstance(how, dict) and "bits" in how and "quant_method" not in how for how in told)


def config_digest(model: torch.nn.Module) -> str:
    """BLAKE3 over the model's config, without what says nothing of the computation.

    Not part of the fingerprint: a later version of transformers may write the same config otherwise.
    """
    config = model.config.to_diff_dict()  # type: ignore[operator, union-attr]
    silent = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
    told = {name: value for name, value in config.items() if name not in silent}
    return blake3(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def choose_device(device: Device) -> torch.device:
    """The device that an option stands for.

    Raises:
        ConfigError: if this machine or this build of torch does not have it.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(f"--device {device}: not available here; available: {there}")
    return torch.device(device)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The dtype that an option stands for."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def stored_weights(name: str, *, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model as its files hold them, by name, each read when it is asked for.

    Under the names of the files: those of the parameters, but for the few models that fuse weights when they
    are loaded.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _weight_files(name)]
        where = {label: file for file in files for label in file.keys()}  # noqa: SIM118  # no mapping
        for label in sorted(where):
            yield label, where[label].get_tensor(label).to(dtype)


def _weight_files(name: str) -> list[Path]:
    """The files of the weights, as transformers finds them; the model is loaded, so they are there."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    source, local = locate(name)
    options: dict[str, Any] = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    whole = cached_file(source, SAFE_WEIGHTS_NAME, **options)
    if whole is not None:
        return [Path(whole)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    files, _ = get_checkpoint_shard_files(source, index, local_files_only=local)
    return [Path(file) for file in files]


def named_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """Weights as :func:`distrust.engines.fingerprint.fingerprint` takes them."""
    for name, parameter in weights:
        host = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = str(parameter.dtype).removeprefix("torch.")
        yield name, dtype, tuple(parameter.shape), host.numpy().data
