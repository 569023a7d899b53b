"""What this package needs of a tokenizer, and nothing more.

The tokenizers of transformers fit as they are. It is this small so that data can be prepared, and tested,
without any framework.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from blake3 import blake3

_PROBE_CHARACTERS = 2000


class Tokenizer(Protocol):
    """Text -> token ids, and conversations -> text."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a sequence."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a sequence."""

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills up a batch."""

    @property
    def chat_template(self) -> Any:
        """None where the tokenizer cannot render conversations."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text; with ``add_special_tokens``, as the tokenizer begins and ends a sequence."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """The conversation as text (``tokenize=False``), up to where an answer begins if so asked."""


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, without special tokens: those that ``encode`` gives of each.

    The core of transformers' fast tokenizers takes many texts at once, uses all CPU cores, and leaves out
    what only others need. A piece of one text is encoded both ways: where a tokenizer does more than its
    core, the texts go one by one.
    """
    core = _core(tokenizer)
    if texts and core is not None:
        probe = max(texts, key=len)[:_PROBE_CHARACTERS]
        wanted = tokenizer.encode(probe, add_special_tokens=False)
        # After ``encode`` the core neither cuts nor pads, and treats special tokens as the tokenizer does.
        encodings = core.encode_batch_fast([*texts, probe], add_special_tokens=False)
        *found, again = [encoding.ids for encoding in encodings]
        if again == wanted:
            return found
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def digest_tokenizer(tokenizer: Tokenizer) -> str | None:
    """BLAKE3, in hex, of all that decides a tokenizer's ids; None where that cannot be told.

    It can be of the fast tokenizers of transformers: they print themselves whole. Versions of the libraries
    are part of it.
    """
    core = _core(tokenizer)
    if core is None:
        return None
    tokenizer.encode("", add_special_tokens=False)  # it leaves its core neither cutting nor padding
    decides = {
        "core": core.to_str(),
        "template": repr(tokenizer.chat_template),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split_special_tokens": repr(getattr(tokenizer, "split_special_tokens", None)),
        "kind": type(tokenizer).__qualname__,
        "versions": [_version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    return blake3(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _core(tokenizer: Tokenizer) -> Any:
    """What a fast tokenizer of transformers is a face of; None for any other."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return core if hasattr(core, "encode_batch_fast") and hasattr(core, "to_str") else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
