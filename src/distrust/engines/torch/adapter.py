"""LoRA through peft: which parameters are trained, and their names in checkpoints and in peft's files.

LoRA (Hu et al. 2021, arXiv:2106.09685) computes W·x + scale · B·A·x, with A [rank, in] and B [out, rank].
rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from distrust.config import TrainConfig
from distrust.errors import ConfigError

ADAPTER_NAME = "default"


def add_adapter(model: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """Wrap a model with the LoRA adapter of a run, in float32, and freeze everything else.

    torch's generator initializes the adapter: seed it first.
    """
    import peft

    targets = list(config.target_modules)
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft calls transformers by a deprecated name: not the user's concern.
            warnings.simplefilter("ignore", FutureWarning)
            # peft corrects this option itself for layers that store transposed weights.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            adapted: torch.nn.Module = peft.get_peft_model(model, lora, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        choices = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ConfigError(
            f"--target-modules {' '.join(targets)}: {' '.join(str(error).split())} "
            f"The model's linear modules are: {choices}"
        ) from error
    return adapted


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by the names in peft's files, which omit the adapter's name."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def to_peft_names(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors from a checkpoint's names to those of peft's files.

    The names differ where peft's module stores the tensor under the adapter's name, as for embeddings. The
    tensors are those of :func:`trained_parameters` of the model.
    """
    from peft import get_peft_model_state_dict

    internal = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    # Both iterate over the parameters in the same order.
    state = {name: tensors[saved] for name, saved in zip(internal, trained_parameters(model), strict=True)}
    renamed: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return renamed


def peft_config(model: Any, *, base: str) -> Any:
    """The adapter's config in the form that peft saves, the same bytes each time."""
    config = model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path = base
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set: its order varies between processes
    if float(config.lora_alpha).is_integer():
        config.lora_alpha = int(config.lora_alpha)  # readers other than peft accept integers only
    return config


def untie_adapted(model: Any) -> None:
    """Give each adapted layer its own weights where it shares them.

    The output layer often shares the embedding's weights. Merging an adapter of the output layer into them
    would change the embedding, too, which the adapter never did.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if weight is not None and owners[id(weight)] > 1:
            module.base_layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            model.get_base_model().config.tie_word_embeddings = False
