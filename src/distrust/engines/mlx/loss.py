"""Weighted cross-entropy without the logits of the whole batch, as in ``torch/loss.py``.

Logits exist for a few hundred tokens at a time, and their gradient is computed with them, which is possible
because the weight s_i of each token is known in advance:

    loss = Σ_i s_i · ce_i        d loss / d logits_i = s_i · (softmax(logits_i) − onehot_i)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

#: Logits of a chunk: 16 MiB of float32, of which a few exist at once.
CHUNK_LOGITS = 2**22
#: Chunks of fewer tokens are slower: each product reads the whole head.
MIN_CHUNK_TOKENS = 128

#: [n, width] -> [n, vocabulary]
Head = Callable[[mx.array], mx.array]


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy of each token, float32[m] in nats, from logits [m, vocabulary] and targets int32[m]."""
    logits = logits.astype(mx.float32)
    return mx.logsumexp(logits, axis=-1) - _target_logits(logits, targets)


def chunked_losses(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    token_weights: mx.array,
    *,
    vocabulary: int,
    chunk_tokens: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Weighted sum of the cross-entropy of each token, as in ``torch/loss.py``, with a frozen head.

    ``hidden`` is [m, width], ``targets`` int32[m]; ``vocabulary`` is the number of logits of a token.
    """
    size = chunk_tokens or max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)

    @mx.custom_function
    def losses_and_gradient(hidden: mx.array) -> list[mx.array]:
        chunks: list[list[mx.array]] = []  # losses and gradient of each
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            inputs = hidden[chunk]
            if chunks:  # evaluate chunks in sequence: in parallel, all logits would exist at once
                inputs = mx.depends([inputs], chunks[-1])[0]
            chunks.append(_chunk(head, inputs, targets[chunk], token_weights[chunk]))
        losses = mx.concatenate([part for part, _ in chunks])  # [m]
        gradient = mx.concatenate([part for _, part in chunks])  # [m, width]
        return [(losses * token_weights).sum(), losses, gradient]

    @losses_and_gradient.vjp
    def _(_: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        gradient = outputs[2]  # [m, width], computed in the forward pass
        return gradient * cotangents[0].astype(gradient.dtype)

    outputs: Any = losses_and_gradient(hidden)
    return outputs[0], mx.stop_gradient(outputs[1])


def _chunk(head: Head, inputs: mx.array, targets: mx.array, token_weights: mx.array) -> list[mx.array]:
    """The losses of a chunk, and the gradient of their weighted sum with respect to its inputs."""
    logits = head(inputs).astype(mx.float32)  # [chunk, vocabulary]
    probs = mx.softmax(logits, axis=-1)
    # log Σ exp without a second pass of exponentials: the largest probability is exp(max − log Σ exp).
    normalizer = logits.max(axis=-1) - mx.log(probs.max(axis=-1))
    onehot = mx.arange(logits.shape[-1]) == targets[:, None]
    grad_logits = (probs - onehot) * token_weights[:, None]
    _, (gradient,) = mx.vjp(head, [inputs], [grad_logits.astype(inputs.dtype)])
    return [normalizer - _target_logits(logits, targets), gradient]


def _target_logits(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
