"""What this package needs of a tokenizer, and nothing more.

The tokenizers of transformers fit as they are. It is this small so that data can be prepared, and tested,
without any framework.
"""

from __future__ import annotations

from typing import Any, Protocol


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
