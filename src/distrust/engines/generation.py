"""Generates text with a trained model, whichever engine runs it."""

from __future__ import annotations

from typing import Any

from distrust.contract import Engine
from distrust.data import Tokenizer, bos_prefix
from distrust.errors import DataError, ModelError


def generate(
    engine: Engine,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_p: float | None = None,
    chat: bool = False,
) -> str:
    """Generate the text that follows a prompt.

    Args:
        engine: the model and its tokenizer, of :func:`distrust.engines.create_engine`.
        prompt: the text; begin-of-text is added where the tokenizer defines it.
        max_new_tokens: upper bound; generation stops earlier at EOS, at an ``eos_token_id`` of the model's
            generation config, and with ``chat`` at the end of the turn.
        temperature: 0 for greedy decoding.
        seed: of the sampling.
        top_p: sample from the most probable tokens whose probabilities add up to this; None for the model's
            own default (torch), or all tokens (mlx).
        chat: the prompt is a user's turn, and the answer to it is generated.

    Returns:
        The text without the prompt.

    Raises:
        DataError: if the prompt has no tokens.
        ModelError: if the tokenizer has no chat template.
    """
    generator: Any = engine  # the contract leaves out what only generation needs
    ids = _prompt_tokens(engine.tokenizer, prompt, chat=chat)
    new_ids = generator.sample_tokens(
        ids, limit=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, chat=chat
    )
    return str(generator.tokenizer.decode(new_ids, skip_special_tokens=True))


def _prompt_tokens(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    if chat:
        ids = tokenizer.encode(_render_chat(tokenizer, prompt), add_special_tokens=False)
    else:
        ids = bos_prefix(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise DataError("an empty prompt: this tokenizer adds no begin-of-text token; give some text")
    return ids


def _render_chat(tokenizer: Tokenizer, question: str) -> str:
    """The prompt as a user's turn, up to where the answer starts."""
    if tokenizer.chat_template is None:
        raise ModelError("--chat: the model's tokenizer has no chat template; leave --chat out")
    turns = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"--chat: the model's chat template refuses the prompt: {reason}") from error
