"""The tokenizer protocol, and the digest that identifies a tokenizer.

The tokenizers of transformers satisfy the protocol as they are. It is small so that data can be prepared
and tested without a framework.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from blake3 import blake3

_PROBE_CHARACTERS = 2000  # enough to show a difference; encoding it twice costs no time


class Tokenizer(Protocol):
    """Text -> token ids, and conversations -> text."""

    bos_token_id: int | None  # begins a sequence
    eos_token_id: int | None  # ends a sequence
    pad_token_id: int | None  # pads a batch
    chat_template: Any  # None if the tokenizer cannot render conversations

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text; ``add_special_tokens`` adds the BOS and EOS that the tokenizer is set up for."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The conversation as text (``tokenize=False``), optionally up to where the next answer begins."""


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text without special tokens, equal to what ``encode`` returns for it.

    The Rust core of transformers' fast tokenizers encodes a batch on all CPU cores. One probe is encoded both
    ways first: if the tokenizer does more than its core, the texts are encoded one by one.
    """
    core = _fast_core(tokenizer)
    if texts and core is not None:
        probe = max(texts, key=len)[:_PROBE_CHARACTERS]
        expected = tokenizer.encode(probe, add_special_tokens=False)
        # ``encode`` has set the core up: no truncation, no padding, special tokens as in the tokenizer.
        encodings = core.encode_batch_fast([*texts, probe], add_special_tokens=False)
        *ids, probe_ids = [encoding.ids for encoding in encodings]
        if probe_ids == expected:
            return ids
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def digest_tokenizer(tokenizer: Tokenizer) -> str | None:
    """BLAKE3, in hex, of everything that determines a tokenizer's ids, library versions included.

    None if the tokenizer cannot be serialized; the fast tokenizers of transformers can.
    """
    core = _fast_core(tokenizer)
    if core is None:
        return None
    tokenizer.encode("", add_special_tokens=False)  # resets truncation and padding, which the core serializes
    identity = {
        "core": core.to_str(),
        "template": repr(tokenizer.chat_template),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split_special_tokens": repr(getattr(tokenizer, "split_special_tokens", None)),
        "kind": type(tokenizer).__qualname__,
        "versions": [_version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    return blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _fast_core(tokenizer: Tokenizer) -> Any:
    """The ``tokenizers.Tokenizer`` inside a fast tokenizer of transformers; None for any other."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return core if hasattr(core, "encode_batch_fast") and hasattr(core, "to_str") else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # a tokenizer may need only some of the libraries
