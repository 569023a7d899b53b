"""Text from a model of mlx-lm."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from distrust.engines.mlx import randomness
from distrust.engines.mlx.engine import MlxEngine
from distrust.engines.prompts import prompt_tokens


def generate(
    engine: MlxEngine,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    top_p: float | None = None,
    chat: bool = False,
) -> str:
    """What the model writes after a prompt, the prompt left out.

    Args and errors: those of the engine of torch; but without ``top_p`` all tokens are drawn from.
    """
    tokenizer: Any = engine.tokenizer
    ids = prompt_tokens(tokenizer, prompt, chat=chat)
    randomness.reseed(seed=seed, step=0, micro_step=0)
    model = engine.model
    model.eval()
    written = []
    sampler = make_sampler(temp=temperature, top_p=top_p or 0.0)
    for token, _ in generate_step(mx.array(ids), model, max_tokens=max_new_tokens, sampler=sampler):
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text
