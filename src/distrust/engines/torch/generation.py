"""Text from a model."""

from __future__ import annotations

import torch

from distrust.data import beginning
from distrust.engines.torch import randomness
from distrust.engines.torch.engine import TorchEngine
from distrust.errors import DataError


@torch.no_grad()
def generate(engine: TorchEngine, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """What the model writes after a prompt, the prompt left out.

    Args:
        engine: the model and tokenizer.
        prompt: as it stands; begin-of-text is added where the tokenizer has one.
        max_new_tokens: at most so many; it ends earlier at the end-of-text token.
        temperature: 0 takes the most probable token each time.
        seed: of the drawing.

    Raises:
        DataError: if there is nothing to go on from.
    """
    tokenizer = engine.tokenizer
    ids = beginning(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise DataError("an empty prompt: this tokenizer begins with nothing either; give some text")
    inputs = torch.tensor([ids], device=engine.device)
    drawing = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
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
