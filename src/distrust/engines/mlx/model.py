"""The base model in mlx-lm, from a folder or a hub name, in transformers' layout or in mlx's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as mlx_lm_load_model
from safetensors import SafetensorError, safe_open

from distrust.engines import model_folder
from distrust.engines.loading import load_error, locate_to_load, not_finite
from distrust.engines.state_conversion import dtype_name
from distrust.errors import ConfigError, ModelError
from distrust.option_values import Dtype, Quantization

#: Weights that share a scale; the second for models that are too narrow for the first.
GROUP_SIZES = (64, 32)
#: Files that mlx-lm loads a model from.
FILES = ("*.json", "model*.safetensors")

_LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError, SafetensorError,
)  # fmt: skip


def load_model(name: str, *, dtype: Dtype) -> tuple[Any, dict[str, Any]]:
    """Load a language model of mlx-lm, in evaluation mode, and its config."""
    try:
        folder = _model_folder(name)
        _require_valid_headers(folder)
        overrides = rope_settings(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        with _BuildLimit(name, lambda: folder):
            model, config = mlx_lm_load_model(
                folder, lazy=True, trust_remote_code=False, model_config=overrides
            )
        model.set_dtype(getattr(mx, dtype))
        mx.eval(model.parameters())  # reads the files
    except _LOAD_ERRORS as error:
        raise load_error(name, error) from error
    if not hasattr(model, "layers"):
        raise ModelError(f"--model {name}: mlx-lm's {type(model).__module__} has no list of layers to adapt")
    model.eval()
    return model, config


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary positions in the entries that mlx-lm reads.

    transformers 5 writes them to ``rope_parameters``, which few models of mlx-lm read. These are the entries
    that a config has only there, such as ``rope_theta``; a complete ``text_config`` where they belong there.
    """
    settings: dict[str, Any] = {}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        by_layer = {name: value for name, value in parameters.items() if isinstance(value, dict)}
        if by_layer:  # one set of parameters for each type of layer
            parameters = by_layer.get("full_attention", {})
            settings["rope_local_base_freq"] = by_layer.get("sliding_attention", {}).get("rope_theta")
        settings |= {name: parameters.get(name) for name in ("rope_theta", "partial_rotary_factor")}
        if parameters.get("rope_type", "default") != "default":
            settings["rope_scaling"] = parameters
    # Entries of the config itself take precedence.
    settings = {
        name: value for name, value in settings.items() if value is not None and config.get(name) is None
    }
    text_config = config.get("text_config")
    if isinstance(text_config, dict) and (text_settings := rope_settings(text_config)):
        settings["text_config"] = {**text_config, **text_settings}
    return settings


def text_entry(config: dict[str, Any], name: str) -> Any:
    """An entry of a config, or of its ``text_config``."""
    value = config.get(name)
    text_config = config.get("text_config")
    return text_config.get(name) if value is None and isinstance(text_config, dict) else value


def quantize(model: Any, quantization: Quantization) -> None:
    """Store the weights of linear layers and embeddings in 8 or 4 bits, in groups with a scale and a bias."""
    if quantization == "none":
        return
    bits = int(quantization.removesuffix("bit"))
    for group_size in GROUP_SIZES:

        def is_quantizable(_: str, module: Any, size: int = group_size) -> bool:
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % size == 0

        if any(is_quantizable(name, module) for name, module in model.named_modules()):
            nn.quantize(model, group_size, bits, class_predicate=is_quantizable)
            mx.eval(model.parameters())
            return
    raise ConfigError(
        f"--quantization {quantization}: no layer of the model can be quantized: their widths are no "
        f"multiples of {GROUP_SIZES[-1]}, or they are quantized already"
    )


def named_weights(model: Any, *, name: str) -> Iterator[tuple[str, str, tuple[int, ...], list[Any]]]:
    """Weights in the form that :func:`distrust.engines.loading.fingerprint` takes.

    Raises ModelError for one that is not finite: the first loss would not be, either.
    """
    for label, array in sorted(tree_flatten(model.parameters())):
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise not_finite(name, label)
        host: Any = mx.view(mx.contiguous(array).reshape(-1), mx.uint8)
        yield label, dtype_name(array), tuple(array.shape), [memoryview(host)]


class _BuildLimit(model_folder.BuildLimit):
    """Context manager that applies the limit to all modules of mlx that are created in its block.

    It counts no weights: mlx computes none before they are used, and refuses files that lack one.
    """

    _lock = threading.Lock()
    _active: ClassVar[list[_BuildLimit]] = []  # of all threads, which share one replaced method
    _initialize: ClassVar[Any]

    def __enter__(self) -> None:
        with self._lock:
            if not self._active:
                _BuildLimit._initialize = nn.Module.__init__
                nn.Module.__init__ = _BuildLimit._initialize_and_count
            self._active.append(self)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._active.remove(self)
            if not self._active:
                nn.Module.__init__ = _BuildLimit._initialize

    @staticmethod
    def _initialize_and_count(module: Any) -> None:
        for limit in tuple(_BuildLimit._active):
            limit.count()
        _BuildLimit._initialize(module)


def _require_valid_headers(folder: Path) -> None:
    for path in folder.glob("model*.safetensors"):  # what mlx-lm loads
        with safe_open(path, framework="np"):  # checks the header, which mlx trusts
            pass


def _model_folder(name: str) -> Path:
    """The local folder of a model, checked; downloads what mlx-lm loads of a model on the hub."""
    source, local = locate_to_load(name)
    if local:
        return Path(source)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, allow_patterns=list(FILES)))
    model_folder.require_safe(name, folder)
    return folder
