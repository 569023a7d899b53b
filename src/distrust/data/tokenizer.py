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

from distrust.data.corpus import common_length

_PROBE_CHARACTERS = 2000  # enough to show a difference; encoding it twice costs no time


class Tokenizer(Protocol):
    """Text -> token ids, and conversations -> text. One with a chat template also has ``decode``."""

    bos_token_id: int | None  # begins a sequence
    eos_token_id: int | None  # ends a sequence
    pad_token_id: int | None  # pads a batch
    chat_template: Any  # None if the tokenizer cannot render conversations

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text; ``add_special_tokens`` adds the BOS and EOS that the tokenizer is set up for."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **options: Any,
    ) -> Any:
        """The conversation as text (``tokenize=False``), optionally up to where the next answer begins."""


class Encoded:
    """The ids of a text, and which token a character belongs to: found by encoding prefixes."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.ids = tokenizer.encode(text, add_special_tokens=False)
        self._tokenizer, self._text = tokenizer, text

    def token_at(self, character: int) -> int:
        """The first token that has this character or a later one; the number of tokens if none has."""
        prefix = self._tokenizer.encode(self._text[:character], add_special_tokens=False)
        # Where the prefix ends within a token, that token has the character.
        return common_length(self.ids, prefix)

    def end_at(self, character: int) -> int:
        """The first token that has only this character or later ones; the number of tokens if none has."""
        prefix = self._tokenizer.encode(self._text[:character], add_special_tokens=False)
        common = common_length(self.ids, prefix)
        return min(common + (len(prefix) > common), len(self.ids))  # the prefix ends within a token


class _WithOffsets(Encoded):
    """Ids of the Rust core, which knows the characters of each token."""

    def __init__(self, encoding: Any, characters: int) -> None:
        self.ids = encoding.ids
        self._encoding, self._characters = encoding, characters

    def token_at(self, character: int) -> int:
        for position in range(character, self._characters):  # a character may be in no token
            token = self._encoding.char_to_token(position)
            if token is not None:
                return int(token)
        return len(self.ids)

    def end_at(self, character: int) -> int:
        token = self.token_at(character)
        if token < len(self.ids) and self._encoding.token_to_chars(token)[0] < character:
            return token + 1  # it has an earlier character, too
        return token


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    """Encode each text as a whole, without special tokens: the ids are those that ``encode`` returns for it.

    The Rust core of transformers' fast tokenizers encodes a batch on all CPU cores. One probe is encoded both
    ways first: if the tokenizer does more than its core, the texts are encoded one by one.
    """
    core = _fast_core(tokenizer)
    if texts and core is not None:
        probe = max(texts, key=len)[:_PROBE_CHARACTERS]
        expected = tokenizer.encode(probe, add_special_tokens=False)
        # ``encode`` has set the core up: no truncation, no padding, special tokens as in the tokenizer.
        *encodings, of_probe = core.encode_batch([*texts, probe], add_special_tokens=False)
        if of_probe.ids == expected:
            return [
                _WithOffsets(encoding, len(text)) for encoding, text in zip(encodings, texts, strict=True)
            ]
    return [Encoded(tokenizer, text) for text in texts]


def decode_all(tokenizer: Tokenizer, ids: Sequence[list[int]]) -> list[str | None]:
    """The text that each sequence of ids stands for; None if the tokenizer cannot tell."""
    core, decode = _fast_core(tokenizer), getattr(tokenizer, "decode", None)
    if core is not None:
        return list(core.decode_batch(ids, skip_special_tokens=False))
    return [None if decode is None else str(decode(part)) for part in ids]


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
