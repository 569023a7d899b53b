"""Text from a model."""

from __future__ import annotations

from typing import Any

import torch

from distrust.engines.prompts import prompt_tokens
from distrust.engines.torch import randomness
from distrust.engines.torch.engine import TorchEngine


@torch.no_grad()
def generate(
    engine: TorchEngine,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_p: float | None = None,
    chat: bool = False,
) -> str:
    """What the model writes after a prompt, the prompt left out.

    Args:
        engine: the model and tokenizer.
        prompt: as it stands; begin-of-text is added where the tokenizer has one.
        max_new_tokens: at most so many; it ends earlier at the end-of-text token.
        temperature: 0 takes the most probable token each time.
        seed: of the drawing.
        top_p: draw from the most probable tokens that have this probability together; None: as the model
            says of itself.
        chat: the prompt is a user's turn, and the answer to it is written.

    Raises:
        DataError: if there is nothing to go on from.
        ModelError: if the tokenizer renders no conversations.
    """
    tokenizer = engine.tokenizer
    ids = prompt_tokens(tokenizer, prompt, chat=chat)
    inputs = torch.tensor([ids], device=engine.device)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature:
        drawing = {"do_sample": True, "temperature": temperature}
        if top_p is not None:
            drawing["top_p"] = top_p
    randomness.reseed(seed=seed, step=0, micro_step=0)
    engine.model.eval()
    output = engine.model.generate(  # type: ignore[operator]
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=True,
        **drawing,
    )
    text: str = tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)  # type: ignore[attr-defined]
    return text
