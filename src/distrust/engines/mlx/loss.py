"""Cross-entropy with a weight for each token, without the logits of the whole batch.

As in the engine of torch: logits are made for some hundred tokens at a time, and their gradient where they
stand, since the weight of each token is known beforehand:

    loss = Σ_i s_i · ce_i        d loss / d logits_i = s_i · (softmax(logits_i) − onehot_i)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

#: Numbers in the logits of a chunk: 16 MiB of float32, of which a few stand at a time.
CHUNK_NUMBERS = 2**22
#: Fewer tokens at a time are slower: each product reads all of the head.
CHUNK_TOKENS = 128

Head = Callable[[mx.array], mx.array]


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy of each token from its logits: float32[m], in nats."""
    logits = logits.astype(mx.float32)
    return mx.logsumexp(logits, axis=-1) - _hits(logits, targets)


def chunked_losses(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    scales: mx.array,
    *,
    vocabulary: int,
    chunk_tokens: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Scaled sum of the cross-entropy of each token, from what goes into the head.

    Args:
        head: hidden[n, width] -> logits[n, vocabulary]; nothing in it is trained.
        hidden: [m, width].
        targets: int32[m]: the token that is predicted.
        scales: float32[m]: what each token's loss is multiplied by.
        vocabulary: logits of a token.
        chunk_tokens: the logits of how many tokens stand in memory at once.

    Returns:
        float32[], the scaled sum, which has a gradient; float32[m], each token's cross-entropy, in nats.
    """
    rows = chunk_tokens or max(CHUNK_TOKENS, CHUNK_NUMBERS // vocabulary)

    @mx.custom_function
    def losses_of(hidden: mx.array) -> list[mx.array]:
        losses: list[mx.array] = []
        slopes: list[mx.array] = []
        before: list[mx.array] = []
        for begin in range(0, len(targets), rows):
            part = slice(begin, begin + rows)
            inputs = hidden[part]
            if before:  # one chunk after the other: evaluated side by side, all logits would stand at once
                inputs = mx.depends([inputs], before)[0]
            before = _chunk(head, inputs, targets[part], scales[part])
            losses.append(before[0])
            slopes.append(before[1])
        found = mx.concatenate(losses)
        return [(found * scales).sum(), found, mx.concatenate(slopes)]

    @losses_of.vjp
    def _(_: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        slopes = outputs[2]
        return slopes * cotangents[0].astype(slopes.dtype)

    found: Any = losses_of(hidden)
    return found[0], mx.stop_gradient(found[1])


def _chunk(head: Head, inputs: mx.array, targets: mx.array, scales: mx.array) -> list[mx.array]:
    """Each loss of a chunk, and the gradient of their scaled sum with respect to its inputs."""
    logits = head(inputs).astype(mx.float32)
    odds = mx.softmax(logits, axis=-1)
    # The logarithm of the sum, without a second pass of exponentials: the largest of the odds is 1 / sum.
    mass = logits.max(axis=-1) - mx.log(odds.max(axis=-1))
    hit = mx.arange(logits.shape[-1]) == targets[:, None]
    slopes = (odds - hit) * scales[:, None]
    _, (gradient,) = mx.vjp(head, [inputs], [slopes.astype(inputs.dtype)])
    return [mass - _hits(logits, targets), gradient]


def _hits(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
