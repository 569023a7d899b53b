"""Writes trained weights for other programs: an adapter of peft, a merged model, or the tensors alone.

Each function first prepares everything and returns a function that writes, so every error that the inputs can
cause is raised before anything is on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from distrust.config import TrainConfig
from distrust.engines import state_conversion
from distrust.engines.loading import cached_folder, load_tokenizer, reference, stop_ids
from distrust.engines.model_folder import GENERATION_CONFIG, generation_config
from distrust.engines.torch import adapter, model
from distrust.engines.torch.engine import TorchEngine
from distrust.errors import ConfigError, ErrorTranslator, warn
from distrust.option_values import ExportDtype

PEFT_WEIGHTS = "adapter_model.safetensors"  # the name that peft loads
Write = Callable[[Path], None]


def prepare_adapter(config: TrainConfig, tensors: Mapping[str, torch.Tensor], *, dtype: ExportDtype) -> Write:
    """Prepare an adapter folder of peft, with the tokenizer.

    Reads only the config and the tokenizer of the base model, not its weights, and checks names and shapes of
    the adapter's tensors against them.

    Raises:
        ModelError: if config or tokenizer cannot be loaded.
        ResumeRefused: if the adapter does not fit the model.
        ConfigError: if the tensors overflow the dtype.
    """
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
    if model.is_quantized_by_mlx(config.model):
        warn(
            f"{config.model} is in mlx's quantized layout, which transformers does not load: the adapter "
            "needs the model that it was made of, whose weights differ; --format mlx makes one for mlx-lm"
        )
    # Shapes only: an adapter folder needs no weights of the base model.
    meta_model: Any = adapter.add_adapter(model.meta_model(config.model), config)[0]
    differences = state_conversion.list_differences(tensors, adapter.trained_parameters(meta_model))
    summary = f"the adapter does not fit --model {config.model}"
    state_conversion.require_no_differences(differences, tensors, summary=summary)
    weights = adapter.to_peft_names(meta_model, _cast(tensors, dtype))
    peft_config = adapter.peft_config(meta_model, base=reference(config.model))
    text_side = _text_side(config.model, tokenizer, warns=True)
    return _in_order(partial(_save, weights, PEFT_WEIGHTS, {}), peft_config.save_pretrained, text_side)


def require_mergeable(config: TrainConfig) -> None:
    """Refuse a base model that torch cannot add an adapter to."""
    if model.is_quantized_by_mlx(config.model):
        raise ConfigError(
            f"--format merged: {config.model} is in mlx's quantized layout, which torch does not read; give "
            "mlx, and merge it with mlx_lm.fuse"
        )


def prepare_merged(engine: TorchEngine, config: TrainConfig, *, dtype: ExportDtype) -> Write:
    """Prepare a model folder of transformers with the adapter added to the weights, and the tokenizer.

    Adds in float32, and rounds once, to ``dtype``. The engine cannot be used afterwards.
    """
    merged: Any = engine.model.float()
    if config.lora_rank:
        adapter.untie_adapted(merged)  # before merging writes into shared weights
        merged = merged.merge_and_unload(safe_merge=True)
    merged.to(getattr(torch, dtype))
    _require_finite(merged.named_parameters(), dtype)
    # Loading for training has disabled it; generation needs what the model was published with.
    merged.config.use_cache = getattr(model.load_config(config.model), "use_cache", True)
    return _in_order(merged.save_pretrained, _text_side(config.model, engine.tokenizer))


def prepare_state(
    tensors: Mapping[str, torch.Tensor], *, file_name: str, dtype: ExportDtype, about: Mapping[str, str]
) -> Write:
    """Prepare one safetensors file of the trained tensors, under the names of the checkpoint."""
    return _in_order(partial(_save, _cast(tensors, dtype), file_name, about))


def _in_order(*writes: Callable[[Path], object]) -> Write:
    def write(folder: Path) -> None:
        # A failed write, in safetensors' own class.
        with ErrorTranslator((SafetensorError,), lambda error: OSError(" ".join(str(error).split()))):
            for part in writes:
                part(folder)

    return write


def _cast(tensors: Mapping[str, torch.Tensor], dtype: ExportDtype) -> dict[str, torch.Tensor]:
    cast = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in tensors.items()}
    _require_finite(cast.items(), dtype)
    return cast


def _require_finite(named: Iterable[tuple[str, torch.Tensor]], dtype: ExportDtype) -> None:
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):  # trained weights are finite: the cast overflowed
            raise state_conversion.out_of_range(name, dtype)


def _text_side(name: str, tokenizer: Any, *, warns: bool = False) -> Write:
    """Prepare the tokenizer with its chat template, and a generation config that stops also at ends of turns.

    ``warns`` where the base model alone continues past an end of turn.
    """
    entries = generation_config(name, cached_folder(name))
    base = entries.get("eos_token_id")
    entries["eos_token_id"] = ends = stop_ids(tokenizer, base, chat=True)
    passed = [end for end in ends if end not in (base if isinstance(base, list) else [base])]
    if warns and passed:
        marks = " ".join(map(tokenizer.decode, passed))
        warn(
            f"the generation config of {name} does not stop at {marks}; the one of the adapter does: load "
            "it, too, as its README.md shows"
        )
    entries.pop("_from_model_config", None)  # a loader would derive it from the config again
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"

    def write(folder: Path) -> None:
        (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")
        for option in (
            "is_local",
            "local_files_only",
        ):  # how it was loaded here
            tokenizer.init_kwargs.pop(option, None)
        tokenizer.save_pretrained(folder)

    return write


def _save(weights: dict[str, torch.Tensor], name: str, about: Mapping[str, str], folder: Path) -> None:
    save_file(weights, folder / name, metadata={"format": "pt", **about})  # "pt": loaders require it
