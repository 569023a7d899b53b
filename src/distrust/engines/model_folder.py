"""What a model's folder may hold: checked before a framework reads it, because anyone may have made it.

A size in the config is only a claim, and frameworks build what it says: layers one by one, weights that the
files lack. Names of files in it are names within the folder, nothing else.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from distrust.errors import ModelError, quote_untrusted

#: Bound on each file that a parser reads as a whole; the largest tokenizers take some ten MiB.
MAX_FILE_BYTES = 256 << 20
MAX_CONFIG_BYTES = 4 << 20
_PARSED_SUFFIXES = frozenset((".json", ".jinja", ".txt", ".model", ".tiktoken"))
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS_FILE = "a .safetensors file in the folder"
#: Files of an adapter; transformers applies one that it finds beside a model.
_ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"
#: The files of a model on the hub that are read here; it need not have the second kind.
CONFIG = "config.json"
OPTIONAL_CHECKED_FILES = ("adapter_config.json", WEIGHTS_INDEX, GENERATION_CONFIG)
_UNBOUNDED = (1 << 63) - 1
#: Largest value by the words of an entry's name, the first that matches. Real configs stay far below each.
_MAX_VALUES = (
    # Constants, ids, and notes on the training: they size nothing.
    (re.compile(r"theta|token|offset|pixel|param|seed|_base$|_freq|_ids?$|_index$"), _UNBOUNDED),
    (re.compile(r"sample|step|seen|flos|epoch|_date|dataset|byte|total|model_size"), _UNBOUNDED),
    (re.compile(r"vocab|length|position|ctx|context|window|seq"), (1 << 31) - 1),
    (re.compile(r"layer|label|head|expert"), 1 << 17),  # each becomes objects of Python
    (
        re.compile(
            r"^(n|d|num)_|size|dim|width|hidden|rank|channel|emb|ffn|inner|depth|block|group|kernel|state"
        ),
        1 << 24,
    ),
)
#: Bounds on the modules and parameters that a framework builds. In the largest mixtures of experts there are
#: some 200,000; each thousand bytes of weights may have one, so a small folder costs little.
MAX_PARTS, FREE_PARTS = 300_000, 10_000
BYTES_PER_PART = 1000
#: Weights in 1 bit are 8 in each byte of a file. A loader that quantizes builds each layer twice.
ELEMENTS_PER_BYTE = 16
#: Tables that are computed, not stored, such as masks.
FREE_ELEMENTS = 1 << 26


def require_safe(name: str, folder: Path) -> None:
    """Raise ModelError for a folder that could make a framework do more than load the model ``name``."""
    for file in _ADAPTER_FILES:
        if os.path.lexists(folder / file):
            raise ModelError(
                f"--model {name}: the folder also holds an adapter ({file}); merge it into the model with "
                "peft's merge_and_unload, or move it to a folder of its own"
            )
    for path in sorted(folder.iterdir()):
        if path.suffix in _PARSED_SUFFIXES and path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
            raise _refusal(name, f"{path.name} is larger than any model's")
    _require_plausible(name, _read_json(name, folder / CONFIG, max_bytes=MAX_CONFIG_BYTES))


def weight_files(name: str, folder: Path) -> list[Path]:
    """The files of a model's weights; ModelError if their index names files outside the folder."""
    single, path = folder / WEIGHTS, folder / WEIGHTS_INDEX
    if not path.is_file():
        return [single]
    weight_map = _read_json(name, path, max_bytes=MAX_FILE_BYTES).get("weight_map")
    files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    for file in sorted(files):
        if not _is_weights_file(file):
            shown = quote_untrusted(file)
            raise _refusal(name, f"{WEIGHTS_INDEX} names {shown}, which is not {_WEIGHTS_FILE}")
    return [single] if single.is_file() else [folder / file for file in sorted(files)]


def generation_config(name: str, folder: Path) -> dict[str, Any]:
    """The entries of a model's generation config; those of its config that name tokens if it has none."""
    path = folder / GENERATION_CONFIG
    if path.is_file():
        return _read_json(name, path, max_bytes=MAX_CONFIG_BYTES)
    config = _read_json(name, folder / CONFIG, max_bytes=MAX_CONFIG_BYTES)
    return {entry: config[entry] for entry in ("bos_token_id", "eos_token_id") if entry in config}


def _is_weights_file(file: Any) -> bool:
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        return False
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and file.isprintable()


def _read_json(name: str, path: Path, *, max_bytes: int) -> dict[str, Any]:
    try:
        if path.stat().st_size > max_bytes:
            raise _refusal(name, f"{path.name} is larger than any model's")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _refusal(name, f"{path.name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = quote_untrusted(" ".join(str(error).split()))
        raise _refusal(name, f"{path.name} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise _refusal(name, f"{path.name} is not a JSON object")
    return value


def _require_plausible(name: str, config: dict[str, Any]) -> None:
    if "configuration_files" in config:  # transformers would read another file than the one checked here
        raise _refusal(name, "config.json refers to other configs (configuration_files); remove the entry")
    weights = config.get("transformers_weights")  # in place of the usual name
    if weights is not None and not _is_weights_file(weights):
        raise _refusal(name, f"config.json: transformers_weights is not {_WEIGHTS_FILE}")
    for key, value in _entries(config):
        if type(value) is int and abs(value) > _max_value(key):
            shown = f"{quote_untrusted(key)} = {quote_untrusted(str(value))}"
            problem = f"{shown} is larger than any model's, {_max_value(key)} at most"
            raise _refusal(name, f"config.json: {problem}; correct or remove the entry")
        # The name of a repository with code, in place of an implementation that transformers contains.
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            shown = quote_untrusted(value)
            raise _refusal(name, f"config.json: {quote_untrusted(key)} {shown} is code, which is never run")


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All values that are neither lists nor objects, each with the name of its entry."""
    nodes: list[tuple[str, Any]] = [("", config)]
    while nodes:
        key, value = nodes.pop()
        if isinstance(value, dict):
            # The entries of "attn_implementation": {"text_config": ...} keep its name.
            inherited = key if key.endswith("_implementation") else ""
            nodes += [(inherited or inner, child) for inner, child in value.items()]
        elif isinstance(value, list):
            nodes += [(key, child) for child in value]
        else:
            yield key, value


def _max_value(key: str) -> int:
    return next((bound for words, bound in _MAX_VALUES if words.search(key)), _UNBOUNDED)


class BuildLimit:
    """Counts what a framework builds from a config, and raises ModelError before it is too much.

    It counts only in the thread that made it: other threads may build models of their own meanwhile.
    ``find_folder`` returns the folder with the weights; None if no memory is taken for weights.
    """

    def __init__(self, name: str, find_folder: Callable[[], Path] | None) -> None:
        self._name, self._find_folder = name, find_folder
        self._thread = threading.get_ident()
        self._parts = self._elements = 0

    def count(self, elements: int = 0) -> None:
        """Count a module, parameter or buffer, with elements that are not in memory yet."""
        if threading.get_ident() != self._thread:
            return
        self._parts += 1
        self._elements += elements
        if self._parts <= FREE_PARTS and self._elements <= FREE_ELEMENTS:
            return
        max_parts, max_elements = self._limits
        if self._parts > max_parts:
            raise _refusal(self._name, "its config describes more layers than its files can have weights for")
        if self._elements > max_elements:
            raise _refusal(self._name, "its config describes many times more weights than its files hold")

    @cached_property
    def _limits(self) -> tuple[int, float]:
        """How many parts and elements there may be."""
        if self._find_folder is None:
            return MAX_PARTS, math.inf
        stored = sum(path.stat().st_size for path in self._find_folder().glob("*.safetensors"))
        if not stored:
            return MAX_PARTS, math.inf
        max_parts = FREE_PARTS + stored // BYTES_PER_PART
        return min(max_parts, MAX_PARTS), FREE_ELEMENTS + ELEMENTS_PER_BYTE * stored


def _refusal(name: str, reason: str) -> ModelError:
    return ModelError(f"--model {name}: cannot be loaded: {reason}")
