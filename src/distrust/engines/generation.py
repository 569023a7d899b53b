"""Generates text with a trained model, whichever engine runs it."""

from __future__ import annotations

from typing import Any, Protocol, cast

from distrust.contract import Engine
from distrust.engines.tokenizer import prompt_tokens


class Generator(Protocol):
    """An engine that can generate."""

    def sample_tokens(
        self, ids: list[int], *, max_new_tokens: int, temperature: float, top_p: float | None, seed: int
    ) -> list[int]:
        """Token ids that continue ``ids``, up to the end-of-text token; see :func:`generate`."""


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
        engine: the model and its tokenizer.
        prompt: the text; begin-of-text is added where the tokenizer defines it.
        max_new_tokens: upper bound; generation stops earlier at the end-of-text token.
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
    tokenizer: Any = engine.tokenizer
    ids = prompt_tokens(tokenizer, prompt, chat=chat)
    new_ids = cast(Generator, engine).sample_tokens(
        ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    text: str = tokenizer.decode(new_ids, skip_special_tokens=True)
    return text
