"""The base model in torch, from a folder or a hub name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from distrust.config import TrainConfig
from distrust.engines.loading import cached_folder, load_error, load_pretrained
from distrust.engines.model_folder import BuildLimit, weight_files
from distrust.engines.out_of_memory import raise_if_out_of_memory
from distrust.engines.state_conversion import dtype_name
from distrust.engines.torch import quantization
from distrust.errors import ConfigError, ModelError
from distrust.option_values import Quantization


def load_model(
    name: str, *, dtype: torch.dtype, device: torch.device, quantized: Quantization, parts: int = 1
) -> torch.nn.Module:
    """Load a causal language model of transformers, in evaluation mode; of several parts, this rank's.

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
    if parts > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=parts)  # selects the device of this rank
    elif device.type == "cuda":
        options["device_map"] = {"": device}  # no copy of the model in the host's memory
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
    if quantized != "none":
        quantization.prepare_quantized(model)  # already on the device
    else:
        model.to(device)
    return model.eval()  # type: ignore[no-any-return]


def copy_model(
    model: Any, tokenizer: Any, config: TrainConfig, *, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A copy of a model that a program has loaded, in evaluation mode, which leaves the program's as it is.

    It shares the weights that have the dtype and the device already, unless all weights are trained.

    Raises:
        ConfigError: not a model and a tokenizer of transformers, or not as the config wants them.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    problem = ""
    if not (isinstance(model, PreTrainedModel) and isinstance(tokenizer, PreTrainedTokenizerBase)):
        kinds = f"{type(model).__name__} and {type(tokenizer).__name__}"
        problem = f"{kinds} are not a model and a tokenizer of transformers"
    elif any(type(module).__module__.startswith("peft.") for module in model.modules()):
        problem = "the model has an adapter already"
    elif getattr(model, "hf_quantizer", None) is not None:
        problem = "the model is quantized already"
    elif any(weight.is_meta for weight in model.parameters()):
        problem = "weights of the model are not in memory"
    elif config.engine == "mlx" or config.quantization != "none":
        problem = "--engine mlx and --quantization load the model themselves"
    advice = "give TrainConfig(model=...) the folder or hub name of the base model"
    if problem:
        raise ConfigError(f"{problem}; {advice}")
    copies = {}  # of each weight, for deepcopy
    for weight in model.parameters():
        is_float = weight.is_floating_point()
        frozen = weight.detach().to(device, dtype if is_float else None, copy=not config.lora_rank)
        copies[id(weight)] = torch.nn.Parameter(frozen, requires_grad=is_float)
    try:
        _require_buffers(model, dtype)
        copied = copy.deepcopy(model, copies).to(device)
    except (TypeError, RuntimeError) as error:  # an attribute that cannot be copied, such as a lock
        raise_if_out_of_memory(error)
        raise ConfigError(f"the model cannot be copied: {str(error).splitlines()[0]}; {advice}") from error
    copied.config.use_cache = False
    return copied.eval()  # type: ignore[no-any-return]


def _require_buffers(model: Any, dtype: torch.dtype) -> None:
    """Refuse a model whose computed buffers, such as rotary frequencies, a cast has rounded.

    The fingerprint does not contain them, so that a resume by name would compute other bits silently.
    """
    with torch.device("meta"):
        loaded = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    dtypes = {name: buffer.dtype for name, buffer in loaded.named_buffers()}
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and dtypes.get(name, buffer.dtype) != buffer.dtype:
            raise ConfigError(
                f"the model's {name} is {dtype_name(buffer)}, and not what the same model by name has; load "
                f"it with from_pretrained(..., dtype={dtype}), and do not cast it"
            )


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


def stored_weights(name: str, *, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in a model's files, by name, each read when it is asked for; None: in their own dtype.

    The names are those of the files; only few models rename or merge weights when they are loaded.
    """
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        paths = weight_files(name, cached_folder(name))
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        file_of = {label: file for file in files for label in file.keys()}  # noqa: SIM118  # no mapping
        for label in sorted(file_of):
            yield label, file_of[label].get_tensor(label).to(dtype=dtype)
