"""LoRA through peft: what is trained, and under which names it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from distrust.errors import ConfigError

ADAPTER_NAME = "default"


def add_adapter(
    model: torch.nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: Sequence[str],
    rslora: bool,
    dora: bool,
) -> torch.nn.Module:
    """The model with a LoRA adapter in float32; everything else is frozen.

    Its first values are drawn from torch's generator: seed it before.

    Raises:
        ConfigError: if the model has no module of these names.
    """
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if list(target_modules) == ["all-linear"] else list(target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        use_dora=dora,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers has begun to change: not the user's concern.
            warnings.simplefilter("ignore", FutureWarning)
            adapted: torch.nn.Module = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)}
        )
        raise ConfigError(
            f"--target-modules {' '.join(target_modules)}: {' '.join(str(error).split())} "
            f"The model's linear modules are: {', '.join(names)}"
        ) from error
    return adapted


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is trained, by the names of peft's own files, without the adapter's name."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)
