"""The trained weights as other programs take them: an adapter of peft, a whole model, or the tensors alone.

Each function prepares first, and gives a function that writes: what can be wrong is found before anything
is on the disk.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from distrust.config import ExportDtype, TrainConfig
from distrust.engines import state_conversion
from distrust.engines.model_source import reference
from distrust.engines.tokenizer import load_tokenizer
from distrust.engines.torch import adapter, model
from distrust.engines.torch.engine import TorchEngine
from distrust.errors import ConfigError, DistrustWarning

PEFT_WEIGHTS = "adapter_model.safetensors"  # the name that peft loads
Write = Callable[[Path], None]


def prepare_adapter(config: TrainConfig, tensors: Mapping[str, torch.Tensor], *, dtype: ExportDtype) -> Write:
    """An adapter folder of peft, with the tokenizer beside it.

    Of the base model only the config and the tokenizer are read: its weights are in no adapter. What can be
    compared without them is: that the adapter's tensors are those of this model, by name and shape.

    Args:
        config: of the run, with ``model`` where the base model is.
        tensors: of the checkpoint.
        dtype: of the written tensors.

    Raises:
        ModelError: if config or tokenizer cannot be loaded.
        ResumeRefused: if the adapter does not fit the model.
        ConfigError: if the tensors do not fit the dtype.
    """
    tokenizer = load_tokenizer(config.model)
    if model.is_quantized_by_mlx(config.model):
        warnings.warn(
            f"{config.model} is in mlx's quantized layout, which transformers does not load: the adapter "
            "needs the model that it was made of, whose weights are other ones; --format mlx makes one for "
            "mlx-lm",
            DistrustWarning,
            stacklevel=2,
        )
    hollow: Any = adapter.add_adapter(
        model.meta_model(config.model),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        rslora=config.rslora,
        dora=config.dora,
    )
    differences = adapter.differences(tensors, adapter.trained_parameters(hollow))
    if differences:
        raise state_conversion.state_mismatch(
            f"the adapter does not fit --model {config.model}", differences, tensors
        )
    weights = adapter.named_as_peft_does(hollow, _cast(tensors, dtype))
    described = adapter.description(hollow, base=reference(config.model))

    def write(folder: Path) -> None:
        with _as_os_error():
            _save(weights, folder / PEFT_WEIGHTS)
            described.save_pretrained(folder)
            _save_tokenizer(tokenizer, folder)

    return write


def require_mergeable(config: TrainConfig) -> None:
    """Refuse a base model whose weights nothing can be added to here.

    Raises:
        ModelError: if it cannot be looked at.
        ConfigError: if mlx has quantized it.
    """
    if model.is_quantized_by_mlx(config.model):
        raise ConfigError(
            f"--format merged: {config.model} is in mlx's quantized layout, which torch does not read; give "
            "mlx, and merge it with mlx_lm.fuse"
        )


def prepare_merged(engine: TorchEngine, config: TrainConfig, *, dtype: ExportDtype) -> Write:
    """A model folder of transformers, the adapter added to the weights, with the tokenizer.

    The sum is made in float32, and rounded once, to ``dtype``. The engine is of no use afterwards.

    Raises:
        ConfigError: if the weights do not fit the dtype.
    """
    whole: Any = engine.model.float()
    if config.lora_rank:
        adapter.untie_adapted(whole)
        whole = whole.merge_and_unload(safe_merge=True)
    whole.to(_dtype(dtype))
    _require_finite(whole.named_parameters(), dtype)
    # Switched off to train; who writes text wants what the model came with.
    whole.config.use_cache = getattr(model.load_config(config.model), "use_cache", True)
    tokenizer: Any = engine.tokenizer

    def write(folder: Path) -> None:
        with _as_os_error():
            whole.save_pretrained(folder)
            _save_tokenizer(tokenizer, folder)

    return write


def prepare_state(
    tensors: Mapping[str, torch.Tensor], *, file_name: str, dtype: ExportDtype, about: Mapping[str, str]
) -> Write:
    """The trained tensors alone, in one file of safetensors, under the names of the checkpoint.

    Raises:
        ConfigError: if the tensors do not fit the dtype.
    """
    weights = _cast(tensors, dtype)

    def write(folder: Path) -> None:
        with _as_os_error():
            _save(weights, folder / file_name, about)

    return write


def _cast(tensors: Mapping[str, torch.Tensor], dtype: ExportDtype) -> dict[str, torch.Tensor]:
    cast = {name: tensor.to(_dtype(dtype)).contiguous() for name, tensor in tensors.items()}
    _require_finite(cast.items(), dtype)
    return cast


def _require_finite(named: Any, dtype: ExportDtype) -> None:
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                f"--dtype {dtype}: {name} holds numbers that are too large for it; "
                "give bfloat16 or float32, which have the same range"
            )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    for of_this_machine in ("is_local", "local_files_only"):  # how it was loaded here is saved with it
        tokenizer.init_kwargs.pop(of_this_machine, None)
    tokenizer.save_pretrained(folder)


def _dtype(dtype: ExportDtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _save(weights: dict[str, torch.Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt", **(about or {})})


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """A disk that refuses is an OSError, whichever library met it."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(" ".join(str(error).split())) from error
