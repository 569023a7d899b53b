"""The base model in torch, from a folder or a hub name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distrust.config import Quantization
from distrust.engines.loading import cached_folder, load_error, load_pretrained, locate_to_load
from distrust.engines.model_folder import BuildLimit
from distrust.engines.state_conversion import dtype_name
from distrust.engines.torch import quantization
from distrust.errors import ConfigError, ModelError


def load_model(
    name: str, *, dtype: torch.dtype, device: torch.device, quantized: Quantization
) -> torch.nn.Module:
    """Load a causal language model of transformers, in evaluation mode.

    Raises:
        ModelError: if the model cannot be loaded, or its files lack weights.
        ConfigError: if mlx has quantized the model.
        MissingDependency: if the quantization library is not installed.
    """
    if is_quantized_by_mlx(name):
        raise ConfigError(
            f"--model {name}: is in mlx's quantized layout, which torch does not read: use --engine mlx, or "
            "give the model that it was made of"
        )
    options = quantization.loading_options(quantized, dtype=dtype, device=device)
    from transformers import AutoModelForCausalLM

    with _BuildLimit(name, partial(cached_folder, name)):
        model, loading_info = load_pretrained(
            AutoModelForCausalLM, name, dtype=dtype, output_loading_info=True, **options
        )
    if missing := sorted(loading_info["missing_keys"]):  # transformers has filled them with random values
        suffix = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"--model {name}: its weights lack {missing[0]}{suffix}; is it a causal language model?"
        )
    model.config.use_cache = False  # training needs no cache of keys and values
    if options:
        quantization.prepare_quantized(model)  # already on the device
    else:
        model.to(device)
    return model.eval()  # type: ignore[no-any-return]


def meta_model(name: str) -> torch.nn.Module:
    """The modules and shapes of a model without its weights, on torch's "meta" device."""
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    try:
        with torch.device("meta"), _BuildLimit(name, None):
            return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]
    except ModelError:
        raise
    except Exception as error:  # an invalid config can raise anything
        raise load_error(name, error) from error


class _BuildLimit(BuildLimit):
    """Context manager that applies the limit to all modules of torch that are created in its block."""

    def __enter__(self) -> None:
        hooks = torch.nn.modules.module
        self._handles = (
            hooks.register_module_module_registration_hook(self._count_part),
            hooks.register_module_parameter_registration_hook(self._count_part),
            hooks.register_module_buffer_registration_hook(self._count_part),
        )

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count_part(self, _module: torch.nn.Module, _name: str, part: Any) -> None:
        # On this device it takes no memory yet.
        self.count(part.numel() if isinstance(part, torch.Tensor) and part.is_meta else 0)


def load_config(name: str) -> Any:
    """The config of a model, as its folder has it."""
    from transformers import AutoConfig

    return load_pretrained(AutoConfig, name)


def is_quantized_by_mlx(name: str) -> bool:
    """Whether a model's weights are in mlx's packed layout."""
    config = load_config(name)
    entries = [getattr(config, entry, None) for entry in ("quantization", "quantization_config")]
    # Every method that transformers supports names itself in "quant_method"; mlx does not.
    dicts = [entry for entry in entries if isinstance(entry, dict)]
    return any("bits" in entry and "quant_method" not in entry for entry in dicts)


def stored_weights(name: str, *, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in a model's files, by name, each read when it is asked for.

    The names are those of the files; only few models rename or merge weights when they are loaded.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in _weight_files(name)]
        file_of = {label: file for file in files for label in file.keys()}  # noqa: SIM118  # no mapping
        for label in sorted(file_of):
            yield label, file_of[label].get_tensor(label).to(dtype)


def named_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """Weights in the form that :func:`distrust.engines.loading.fingerprint` takes."""
    for name, parameter in weights:
        host = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield name, dtype_name(parameter), tuple(parameter.shape), host.numpy().data


def _weight_files(name: str) -> list[Path]:
    """The files of the weights, located as transformers does; the model is loaded, so they exist."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    source, local = locate_to_load(name)
    options: dict[str, Any] = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, SAFE_WEIGHTS_NAME, **options)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)  # weights in several files
    shards, _ = get_checkpoint_shard_files(source, index, local_files_only=local)
    return [Path(shard) for shard in shards]
