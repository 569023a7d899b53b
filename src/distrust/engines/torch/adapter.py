"""LoRA through peft: what is trained, and under which names it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distrust.errors import ConfigError

#: Widened exactly, where another program saved such.
NARROWER = (torch.float16, torch.bfloat16)
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
            # Of layers that keep their weights the other way round it says that it found out.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
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


def named_as_peft_does(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors under the names of a checkpoint -> under those of peft's files.

    They differ where peft keeps a tensor by the adapter's name itself, as for embeddings.

    Args:
        model: with the adapter, which has exactly these tensors.
        tensors: by the names of :func:`trained_parameters`.
    """
    from peft import get_peft_model_state_dict

    inside = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    state = {name: tensors[saved] for name, saved in zip(inside, trained_parameters(model), strict=True)}
    named: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=ADAPTER_NAME, save_embedding_layers=False
    )
    return named


def description(model: Any, *, base: str) -> Any:
    """The adapter's config as peft saves it, the same bytes each time.

    Args:
        model: with the adapter.
        base: the base model's hub name or folder.
    """
    config = model.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path = base
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, which comes in any order
    if float(config.lora_alpha).is_integer():
        config.lora_alpha = int(config.lora_alpha)  # readers other than peft take whole numbers only
    return config


def untie_adapted(model: Any) -> None:
    """Give each adapted layer weights of its own, where it shares them.

    Output layers often share the embedding's weights: to add an adapter's product to them would change the
    embedding too, which the adapter never did.
    """
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for module in model.modules():
        weight = getattr(getattr(module, "base_layer", None), "weight", None)
        if weight is not None and holders.get(id(weight), 0) > 1:
            module.base_layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            model.get_base_model().config.tie_word_embeddings = False


def differences(saved: Mapping[str, Any], trained: Mapping[str, torch.nn.Parameter]) -> list[str]:
    """A line for each tensor that is missing, of another shape or of another dtype."""
    found = [f"{name}: in the model, not in the checkpoint" for name in trained if name not in saved]
    found += [f"{name}: in the checkpoint, not in the model" for name in saved if name not in trained]
    for name, parameter in trained.items():
        was = saved.get(name)
        fits = was is not None and was.shape == parameter.shape
        if was is not None and not (fits and was.dtype in (parameter.dtype, *NARROWER)):
            found.append(
                f"{name}: was {was.dtype}{list(was.shape)}, is {parameter.dtype}{list(parameter.shape)}"
            )
    return found


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)
