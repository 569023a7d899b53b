"""Tokenizers of transformers, for every engine, and prompts as tokens."""

from __future__ import annotations

from typing import Any

from distrust.data import Tokenizer, bos_prefix
from distrust.engines.loading import load_pretrained
from distrust.errors import DataError, ModelError


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model, by its folder or hub name.

    Raises:
        ModelError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, name)


def require_vocabulary(tokenizer: Any, embedding_rows: int, *, name: str) -> None:
    """Refuse a tokenizer with token ids outside the model's embedding.

    Raises:
        ModelError: with both sizes.
    """
    if len(tokenizer) > embedding_rows:
        raise ModelError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model {embedding_rows}; "
            "they do not belong together"
        )


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Tokens of a prompt, with begin-of-text first where the tokenizer defines it.

    Args:
        tokenizer: the model's.
        prompt: the text.
        chat: render the prompt as a user's turn, up to where the answer starts.

    Raises:
        DataError: if there are no tokens.
        ModelError: if the tokenizer has no chat template, or the template fails.
    """
    if chat:
        ids = tokenizer.encode(_render_chat(tokenizer, prompt), add_special_tokens=False)
    else:
        ids = bos_prefix(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise DataError("an empty prompt: this tokenizer adds no begin-of-text token; give some text")
    return ids


def _render_chat(tokenizer: Tokenizer, question: str) -> str:
    if tokenizer.chat_template is None:
        raise ModelError("--chat: the model's tokenizer has no chat template; leave --chat out")
    turns = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"--chat: the model's chat template refuses the prompt: {reason}") from error
