"""What a model is to go on with, as tokens."""

from __future__ import annotations

from distrust.data import Tokenizer, bos_prefix
from distrust.errors import DataError, ModelError


def prompt_tokens(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """A prompt's tokens; begin-of-text stands before it where the tokenizer has one.

    Args:
        tokenizer: the model's.
        prompt: as it stands.
        chat: it is a user's turn, and an answer is to follow.

    Raises:
        DataError: if there is nothing to go on from.
        ModelError: if the tokenizer renders no conversations.
    """
    ids = _chat_prompt(tokenizer, prompt) if chat else _with_bos(tokenizer, prompt)
    if not ids:
        raise DataError("an empty prompt: this tokenizer begins with nothing either; give some text")
    return ids


def _with_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    return bos_prefix(tokenizer) + tokenizer.encode(text, add_special_tokens=False)


def _chat_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """A conversation up to where the answer begins, as a template prints it in training."""
    if tokenizer.chat_template is None:
        raise ModelError(
            "--chat: the model's tokenizer has no chat template, so it knows no turns; leave --chat out"
        )
    turns = [{"role": "user", "content": question}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"--chat: the model's chat template refuses the prompt: {reason}") from error
    return tokenizer.encode(text, add_special_tokens=False)
