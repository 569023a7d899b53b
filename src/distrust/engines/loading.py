"""Locates base models by folder or hub name, loads them and tokenizers with transformers, and digests them.

Invariants: a model's own code never runs, weights are read from safetensors only, and nothing here imports a
framework before the name of the model has been checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from distrust.bundled import CHAT_TEMPLATES, MODEL
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.checkpoint.format import tensor_hasher
from distrust.checkpoint.remote.location import require_path
from distrust.config_text import is_template
from distrust.data import hub, turn_ends
from distrust.engines import model_folder
from distrust.engines.out_of_memory import describe, is_out_of_memory
from distrust.errors import ConfigError, ModelError, OutOfMemory, quote_untrusted
from distrust.option_values import BUNDLED, MODEL_OBJECT
from distrust.options import read_text, suggest_name
from distrust.paths import require_regular_files

# Before transformers is imported: nobody asked it to have a server convert a model, or to fetch kernels.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
os.environ.setdefault("USE_HUB_KERNELS", "NO")

REASON_CHARACTERS = 500
MAX_TEMPLATE_BYTES = 1 << 20
#: Entries of a model's config that do not change what it computes.
_INERT_ENTRIES = frozenset(
    ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
)
#: The entries of a config that may limit the context, the most common first.
_CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def locate(name: str) -> tuple[str, bool]:
    """Resolve a folder, a hub name, or ``bundled`` to what a loader takes, and whether it is a local folder.

    Raises ModelError for anything else, in milliseconds, before a framework is imported.
    """
    if name == BUNDLED:
        return str(MODEL), True
    if name == MODEL_OBJECT:
        raise ModelError(f"--model {name}: a program passed the model; give its folder or hub name instead")
    folder = require_path(name, "--model")
    if not folder.exists():
        if not hub.is_name(name):
            raise ModelError(f"--model {name}: {hub.missing_reason(name)}")
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
    require_regular_files(folder, ModelError)
    model_folder.require_safe(name, folder)
    return name, True


def locate_to_load(name: str) -> tuple[str, bool]:
    """Like :func:`locate`, before a loader may access the hub, which is announced."""
    source, local = locate(name)
    if not local:
        hub.announce("model", name)
    return source, local


def hub_name(name: str) -> str | None:
    """The name, if it is a hub name and not a local folder."""
    local = name == BUNDLED or Path(name).exists() or not hub.is_name(name)
    return None if local else name


def reference(name: str) -> str:
    """How an adapter refers to its base model, without a path of this machine.

    A hub name or "bundled" as it is. A folder by its relative path, if the user gave one, or else by its own
    name; either begins with a dot, so that no program looks it up on the hub.
    """
    if name == BUNDLED or not locate(name)[1]:
        return name
    relative = os.path.basename(os.path.abspath(name)) if os.path.isabs(name) else os.path.normpath(name)
    return relative if relative.startswith(".") else os.path.join(".", relative)


def load_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """Call ``from_pretrained`` of a class of transformers on a folder or a hub name."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, local = locate_to_load(name)
    try:
        if not local:
            model_folder.require_safe(name, cached_folder(name))
        if "dtype" in options:  # weights are loaded, not only a config
            options["use_safetensors"] = True  # the other format is a pickle, which runs code
            model_folder.weight_files(name, cached_folder(name))
        return loader.from_pretrained(source, local_files_only=local, trust_remote_code=False, **options)
    except ModelError:
        raise
    except Exception as error:  # an invalid config can raise anything
        raise load_error(name, error) from error


def cached_folder(name: str) -> Path:
    """The local folder of a model; for one on the hub, with what has to be checked before it is loaded."""
    from huggingface_hub import hf_hub_download
    from transformers.utils.hub import cached_file

    source, local = locate(name)
    if local:
        return Path(source)
    # Fails where the hub has no such model or cannot be reached, so that nothing waits for it again.
    folder = Path(hf_hub_download(source, model_folder.CONFIG)).parent
    for file in model_folder.OPTIONAL_CHECKED_FILES:  # of the same commit, so they are in the same folder
        cached_file(
            source,
            file,
            revision=folder.name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return folder


def load_tokenizer(name: str, *, chat_template: str | None = None, given: Any = None) -> Any:
    """The tokenizer of a model, by its folder or hub name, or ``given``; a chat template replaces its own."""
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name) if given is None else given
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(value: str) -> str:
    """The text of a template: of a bundled one, of a file, or the value itself if it is the text.

    Raises:
        ConfigError: the file cannot be read, or its content is not a template.
    """
    flag, text = "--chat-template", value
    if not is_template(value):
        path = CHAT_TEMPLATES.get(value, Path(value))
        if not path.exists() and (hint := suggest_name(value, CHAT_TEMPLATES)):
            raise ConfigError(f"{flag} {value}: no such file{hint}")
        text = read_text(path, flag, max_bytes=MAX_TEMPLATE_BYTES)
        flag = f"{flag} {value}"
        if not is_template(text):
            raise ConfigError(f"{flag}: not a chat template: it prints nothing ({{{{ … }}}})")
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=text)  # only compiles
    except Exception as error:  # a template is a program, and compiling it may raise anything
        line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        reason = quote_untrusted(" ".join(str(error).split()))
        raise ConfigError(f"{flag}: not a valid chat template: {line}{reason}") from None
    return text


def load_context_length(name: str) -> int | None:
    """:func:`context_length` of a model that is not loaded, by its folder or hub name."""
    from transformers import AutoConfig

    return context_length(load_pretrained(AutoConfig, name))


def stop_ids(tokenizer: Any, configured: Any, *, chat: bool) -> list[int]:
    """The ids that generation stops at: EOS, those configured, and with ``chat`` the ends of turns.

    ``configured`` is an ``eos_token_id``, which anyone may have written: only valid ids count.
    """
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    ids += turn_ends(tokenizer).ids if chat else ()
    return sorted({number for number in ids if type(number) is int and 0 <= number < len(tokenizer)})


def require_vocabulary(tokenizer: Any, embedding_rows: int, *, name: str) -> None:
    """Refuse a tokenizer with token ids outside the model's embedding."""
    if len(tokenizer) > embedding_rows:
        raise ModelError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model {embedding_rows}; "
            "they do not belong together"
        )


def load_error(name: str, error: Exception) -> ModelError | OutOfMemory:
    """The one-line error for a model that a library failed to load."""
    if is_out_of_memory(error):
        return describe(error, "load")
    source, local = locate(name)
    reason = _known_reason(error, folder=Path(source)) if local else _hub_reason(name, error)
    if reason is None and "trust_remote_code" in str(error):  # never repeat the library's advice to set it
        reason = "it needs code of its own, which is never run; use a model that transformers contains"
    return ModelError(f"--model {name}: cannot be loaded: {reason or _library_reason(error)}")


def _library_reason(error: BaseException) -> str:
    reason = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        reason = f"{type(error).__name__}: {reason}"  # the text of a KeyError is the key alone
    if len(reason) > REASON_CHARACTERS:  # transformers may list every model type it supports
        reason = f"{reason[:REASON_CHARACTERS]}…"
    if not reason.isprintable():  # the text may quote a hostile config
        reason = repr(reason)
    return reason


def _known_reason(error: Exception, *, folder: Path) -> str | None:
    """Why a folder cannot be loaded, where the library's words would mislead."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")) and "safetensors" in str(error):
        return (
            f"its weights are pickled ({quote_untrusted(pickles[0])}), and pickles are never read, because "
            "they run code; convert them to safetensors"
        )
    return None


def _hub_reason(name: str, error: Exception) -> str | None:
    """Why the hub did not return a model; None if it did, or if the library's words say it."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = f"the hub cannot be reached ({_library_reason(error.__cause__ or error)})"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE=1, and it was not downloaded before"
    elif isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        reason = "the hub has no such model"
    elif isinstance(error, errors.EntryNotFoundError):
        return f"it has no {model_folder.CONFIG}"
    else:
        return None
    return f"{reason}; is the name right? A folder is ./{name}"


def fingerprint(weights: Iterable[tuple[str, str, tuple[int, ...], Iterable[Any]]]) -> str:
    """BLAKE3, in hexadecimal, over the weights of a model in order of their names: equal in both frameworks.

    Each weight is its name, dtype (such as ``float32``), shape, and buffers of its bytes.
    """
    hasher = tensor_hasher(all_cores=True)
    for name, dtype, shape, pieces in weights:
        # "torch." for every engine: the first runs recorded it so, and fingerprints must stay comparable.
        hasher.update(f"{name} torch.{dtype} {shape}\n".encode())
        for piece in pieces:
            hasher.update(piece)
    return hasher.hexdigest()


def not_finite(name: str, weight: str) -> ModelError:
    """The error for a base model with a weight that is NaN or infinite."""
    return ModelError(
        f"--model {name}: its weight {quote_untrusted(weight)} holds numbers that are not finite (NaN or "
        "infinity), so no loss would be; download or convert the model again"
    )


def context_length(config: Any) -> int | None:
    """Tokens that a model can attend to at once, by its config; None if the config sets no limit.

    Of a config of transformers, the entries that are defined for this kind of model precede those that a file
    may have in addition.
    """
    defined = getattr(config, "__dataclass_fields__", ())
    names = sorted(_CONTEXT_LENGTHS, key=lambda name: name not in defined)  # stable
    entries = config if isinstance(config, Mapping) else config.to_dict()
    text_config = entries.get("text_config")
    for part in (entries, text_config if isinstance(text_config, Mapping) else {}):
        for name in names:
            value = part.get(name)
            if type(value) is int and value > 0:
                return value
    return None


def config_digest(config: Mapping[str, Any]) -> str:
    """BLAKE3 over the entries of a model's config that change what it computes.

    Not part of the fingerprint: another version of transformers may write the same config differently.
    """
    relevant = {name: value for name, value in config.items() if name not in _INERT_ENTRIES}
    return blake3(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()
