"""Weighted cross-entropy without the logits of the whole batch.

The logits are by far the largest tensor of a batch: 2,048 tokens of a vocabulary of 128k take 1 GiB, and
autograd keeps several of that size. Here they exist for a few hundred tokens at a time, and become their own
gradient in place, which is possible because the weight s_i of each token is known in advance:

    loss = Σ_i s_i · ce_i        d loss / d logits_i = s_i · (softmax(logits_i) − onehot_i)

That takes two products with the vocabulary, as without chunks, and no third to recompute the logits. Tokens
without a loss (prompts, padding) never get logits. If the head is trained, its gradient accumulates over the
chunks in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distrust.engines.torch.layers import linear

#: Logits of a chunk: 64 MiB of float32. Larger chunks are not faster,
CHUNK_LOGITS = 2**24
#: and chunks of fewer tokens are slower: each product reads the whole head.
MIN_CHUNK_TOKENS = 256


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, float32[m] in nats, from logits [m, vocabulary] and targets int64[m]."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def chunked_losses(
    hidden: Tensor,
    head: torch.nn.Linear,
    targets: Tensor,
    token_weights: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy of each token, from the input of the head.

    Args:
        hidden: [m, width]; the products are computed in its dtype.
        head: width -> vocabulary.
        targets: int64[m], the predicted token.
        token_weights: float32[m], the factor of each token's loss.
        chunk_tokens: tokens whose logits exist at once. Default: as many as have :data:`CHUNK_LOGITS`
            logits, and at least :data:`MIN_CHUNK_TOKENS`.

    Returns:
        float32[], the weighted sum, with a gradient; float32[m], each token's cross-entropy, in nats.
    """
    if chunk_tokens is None:
        chunk_tokens = max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // head.weight.shape[0])
    inputs = [hidden, head.weight, head.bias]
    if not torch.is_grad_enabled():  # or the forward pass would compute gradients for nothing
        inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen below
        return _ChunkedLosses.apply(*inputs, targets, token_weights, chunk_tokens)  # type: ignore[no-untyped-call,no-any-return]


class _ChunkedLosses(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        head_weight = weight.to(hidden.dtype)  # [vocabulary, width]
        head_bias = None if bias is None else bias.to(hidden.dtype)
        losses = torch.empty_like(token_weights)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            inputs, target, token_weight = hidden[chunk], targets[chunk, None], token_weights[chunk, None]
            # One buffer [chunk, vocabulary] for logits, then probabilities, then their gradient.
            probs = linear(inputs, head_weight, head_bias).float()  # no copy if it is float32 already
            highest = probs.amax(dim=1, keepdim=True)  # subtracted, so that exp cannot overflow
            target_logit = probs.gather(1, target) - highest
            probs.sub_(highest).exp_()
            normalizer = probs.sum(dim=1, keepdim=True)
            losses[chunk] = (normalizer.log() - target_logit).squeeze(1)
            if not any(ctx.needs_input_grad):
                continue
            grad_logits = probs.mul_(token_weight / normalizer)
            grad_logits.scatter_(1, target, grad_logits.gather(1, target) - token_weight)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = linear(grad_logits, head_weight.t())  # [chunk, width]
            if grad_weight is not None:
                grad_weight += torch.mm(grad_logits.t(), inputs)  # [vocabulary, width]
        # Summed in float32, saved in the head's own dtype.
        of_head = [None if total is None else total.to(weight.dtype) for total in (grad_weight, grad_bias)]
        ctx.save_for_backward(grad_hidden, *of_head)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients = [
            None if gradient is None else gradient * grad_output.to(gradient.dtype)
            for gradient in ctx.saved_tensors
        ]
        return *gradients, None, None, None
