"""LoRA through peft: which parameters are trained, and their names in checkpoints and in peft's files.

LoRA (Hu et al. 2021, arXiv:2106.09685) computes W·x + scale · B·A·x, with A [rank, in] and B [out, rank].
rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from distrust.config import TrainConfig
from distrust.engines import target_modules
from distrust.engines.target_modules import Adaptable, Selection, kinds
from distrust.errors import ConfigError

ADAPTER_NAME = "default"


def add_adapter(model: torch.nn.Module, config: TrainConfig) -> tuple[torch.nn.Module, Selection]:
    """Wrap a model with the LoRA adapter of a run, in float32, and freeze everything else.

    torch's generator initializes the adapter: seed it first. Also returns which modules are adapted.
    """
    import peft

    choices = adaptable(model)
    selection = target_modules.select(config, choices)
    by_weight = _adapted_by_weight(model, selection.names, choices.modules)
    by_module = [name for name in selection.names if name not in by_weight]
    packed = config.quantization != "none" and by_weight.keys() & choices.modules
    if by_weight and (config.lora_dropout or config.dora or packed):
        option = "--quantization" if packed else "--dora" if config.dora else "--lora-dropout"
        names = kinds(packed or by_weight)
        raise ConfigError(
            f"{option}: peft cannot combine it with an adapter of {', '.join(names)}, in a mixture of "
            f"experts; leave it out, or add --exclude-modules {' '.join(names)}"
        )
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules.shortest(by_module, choices.modules),
        target_parameters=sorted(by_weight.values()) or None,
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )
    # Otherwise peft would allocate whatever rank a config claims.
    device: Any = torch.device("meta") if next(model.parameters()).is_meta else nullcontext()
    try:
        with warnings.catch_warnings(), device:
            # peft calls transformers by a deprecated name: not the user's concern.
            warnings.simplefilter("ignore", FutureWarning)
            # peft corrects this option itself for layers that store transposed weights.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            adapted: Any = peft.get_peft_model(model, lora, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        other_kinds = ", ".join(kind for kind in kinds(choices.shapes) if repr(kind) not in str(error))
        raise ConfigError(
            f"--target-modules {' '.join(config.target_modules)}: {' '.join(str(error).split())} Leave it "
            f"out with --exclude-modules; the modules that torch can adapt are: {other_kinds}"
        ) from error
    if {*adapted.targeted_module_names} != {*by_module}:  # it matches ends of names
        raise ConfigError("--target-modules: peft cannot tell these modules from others; give other names")
    return adapted, selection


def adaptable(model: Any) -> Adaptable:
    """What peft can adapt: modules, and the weights that hold a layer's experts in one tensor."""
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    other_kinds = (torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    shapes, in_all_linear = {}, []
    for name, module in modules.items():
        kind = type(module).__name__  # routers return more than a product, some multiply parts of the input
        if isinstance(module, (*linear, *other_kinds)) and not kind.endswith(("Router", "GroupedLinear")):
            shapes[name] = _shape(module)
            if isinstance(module, linear) and module is not head:  # as peft does
                in_all_linear.append(name)
        for label, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3 and ("experts" in name.split(".") or "Experts" in kind):
                shapes[f"{name}.{label}"] = tuple(weight.shape)
                in_all_linear.append(f"{name}.{label}")
    return Adaptable("torch", shapes, in_all_linear, modules.keys())


def _shape(module: Any) -> tuple[int, ...]:
    if hasattr(module, "in_features"):  # a quantized weight is stored in another shape
        return module.out_features, module.in_features
    return tuple(module.weight.shape)


def _adapted_by_weight(model: Any, names: Collection[str], modules: Collection[str]) -> dict[str, str]:
    """Of the names, those that peft must be given as a weight, and the name of that weight.

    Experts in one tensor are no modules. Beside them, peft takes the names that their parts once had, such as
    ``gate_proj``, for the experts', even if another module has that name.
    """
    import peft

    weights = {name: name for name in names if name not in modules}
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:  # versions that do not rename
        return weights
    for end in kinds(names):
        probe = peft.LoraConfig(target_modules=[end])
        try:
            convert(probe, model, None)
        except ValueError:  # it would need the other parts
            probe.target_modules = set()
        if set(probe.target_modules) != {end}:
            weights |= {
                name: f"{name}.weight" for name in names if name in modules and kinds([name]) == [end]
            }
    return weights


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
