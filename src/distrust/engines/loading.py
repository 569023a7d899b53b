"""Locates base models by folder or hub name, loads them and tokenizers with transformers, and digests them.

Invariants: a model's own code never runs, weights are read from safetensors only, and nothing here imports a
framework before the name of the model has been checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from distrust.bundled import MODEL
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.checkpoint.format import tensor_hasher
from distrust.config import BUNDLED
from distrust.data.hub import is_name
from distrust.errors import NO_SUCH_FILE, ModelError

#: Bound on each JSON file of a model's folder; the largest tokenizers take some ten MiB.
MAX_JSON_BYTES = 256 << 20
REASON_CHARACTERS = 500
#: Entries of a model's config that do not change what it computes.
_INERT_ENTRIES = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
)


def locate(name: str) -> tuple[str, bool]:
    """Resolve a folder, a hub name, or ``bundled`` to what a loader takes, and whether it is a local folder.

    Raises ModelError for anything else, in milliseconds, before a framework is imported.
    """
    if name == BUNDLED:
        return str(MODEL), True
    folder = Path(name)
    if not folder.exists():
        if not is_name(name):
            raise ModelError(f"--model {name}: {NO_SUCH_FILE}")
        return name, False
    if not folder.is_dir():
        raise ModelError(f"--model {name}: is a file; give the folder of a model")
    if (folder / RUN_SUBDIRECTORY).is_dir():
        raise ModelError(f"--model {name}: is a run, not a model; give the folder of the model it trained")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"--model {name}: holds an adapter, not a model; give its base model, or a folder that "
                "`distrust export --format merged` or peft's merge_and_unload wrote"
            )
        raise ModelError(f"--model {name}: contains no config.json, so it is not the folder of a model")
    return name, True


def hub_name(name: str) -> str | None:
    """The name, if it is a hub name and not a local folder."""
    local = name == BUNDLED or Path(name).exists() or not is_name(name)
    return None if local else name


def reference(name: str) -> str:
    """How an adapter refers to its base model: the hub name, or the absolute path of the folder."""
    source, local = locate(name)
    return str(Path(source).absolute()) if local else source


def load_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """Call ``from_pretrained`` of a class of transformers on a folder or a hub name."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, local = locate(name)
    if local:
        _require_bounded_json(name, Path(source))
    if "dtype" in options:  # weights are loaded, not only a config
        options["use_safetensors"] = True  # the other format is a pickle, which runs code
    try:
        return loader.from_pretrained(source, local_files_only=local, trust_remote_code=False, **options)
    except Exception as error:  # an invalid config can raise anything
        raise load_error(name, error) from error


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model, by its folder or hub name."""
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, name)


def require_vocabulary(tokenizer: Any, embedding_rows: int, *, name: str) -> None:
    """Refuse a tokenizer with token ids outside the model's embedding."""
    if len(tokenizer) > embedding_rows:
        raise ModelError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model {embedding_rows}; "
            "they do not belong together"
        )


def load_error(name: str, error: Exception) -> ModelError:
    """The one-line error for a model that a library failed to load."""
    hint = "" if locate(name)[1] else "; there is no folder of this name, and the hub did not return it"
    reason = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        reason = f"{type(error).__name__}: {reason}"  # the text of a KeyError is the key alone
    if len(reason) > REASON_CHARACTERS:  # transformers may list every model type it supports
        reason = f"{reason[:REASON_CHARACTERS]}…"
    if not reason.isprintable():  # the text may quote a hostile config
        reason = repr(reason)
    return ModelError(f"--model {name}: cannot be loaded{hint}: {reason}")


def fingerprint(weights: Iterable[tuple[str, str, tuple[int, ...], Any]]) -> str:
    """BLAKE3, in hexadecimal, over the weights of a model in order of their names: equal in both frameworks.

    Each weight is its name, dtype (such as ``float32``), shape, and a buffer of its bytes.
    """
    hasher = tensor_hasher(all_cores=True)
    for name, dtype, shape, data in weights:
        # "torch." for every engine: the first runs recorded it so, and fingerprints must stay comparable.
        hasher.update(f"{name} torch.{dtype} {shape}\n".encode())
        hasher.update(data)
    return hasher.hexdigest()


def config_digest(config: Mapping[str, Any]) -> str:
    """BLAKE3 over the entries of a model's config that change what it computes.

    Not part of the fingerprint: another version of transformers may write the same config differently.
    """
    relevant = {name: value for name, value in config.items() if name not in _INERT_ENTRIES}
    return blake3(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()


def _require_bounded_json(name: str, folder: Path) -> None:
    for path in folder.glob("*.json"):  # parsers read each of them as a whole
        if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"--model {name}: cannot be loaded: {path.name} is larger than any model's")
