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

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distrust.engines.torch.layers import linear

#: Logits of a chunk: 64 MiB of float32. Larger chunks are not faster,
CHUNK_LOGITS = 2**24
#: and chunks of fewer tokens are slower: each product reads the whole head.
MIN_CHUNK_TOKENS = 256
#: On CPUs a chunk is computed in equal parts of at most 32 MiB: glibc maps larger blocks anew each time, and
#: their page faults take longer than what is computed in them. Rows do not depend on each other, so that the
#: bits stay, unless the head is trained: its gradient is a sum over rows.
PART_LOGITS = 2**23 - 2**10
#: On CUDA 1 GiB of float32, so that a chunk has enough products to hide the reading of the head.
CUDA_CHUNK_LOGITS = 2**28


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
        chunk_tokens: tokens whose logits exist at once. Default: as many as have :data:`CHUNK_LOGITS` or
            :data:`CUDA_CHUNK_LOGITS` logits, and at least :data:`MIN_CHUNK_TOKENS`.

    Returns:
        float32[], the weighted sum, with a gradient; float32[m], each token's cross-entropy, in nats.
    """
    if chunk_tokens is None:
        logits = CUDA_CHUNK_LOGITS if hidden.device.type == "cuda" else CHUNK_LOGITS
        chunk_tokens = max(MIN_CHUNK_TOKENS, logits // head.weight.shape[0])
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
        differentiate = _method(hidden)
        in_parts = hidden.device.type == "cpu" and not any(ctx.needs_input_grad[1:3])
        part_tokens = max(1, PART_LOGITS // len(weight)) if in_parts else chunk_tokens
        for chunk in _parts(len(hidden), chunk_tokens, part_tokens):
            inputs, target, token_weight = hidden[chunk], targets[chunk, None], token_weights[chunk, None]
            losses[chunk], grad_logits = differentiate(
                linear(inputs, head_weight, head_bias), target, token_weight, any(ctx.needs_input_grad)
            )
            if grad_logits is None:
                continue
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = linear(grad_logits, head_weight.t())  # [chunk, width]
            if grad_weight is not None:
                grad_weight += torch.mm(grad_logits.t(), inputs)  # [vocabulary, width]
            del grad_logits  # its memory is for the next chunk
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


def _parts(tokens: int, chunk_tokens: int, part_tokens: int) -> Iterator[slice]:
    """Chunks of ``chunk_tokens``, each in equal parts of at most ``part_tokens``.

    Equal, because a small remainder might be multiplied by another library; see :func:`linear`.
    """
    for start in range(0, tokens, chunk_tokens):
        length = min(chunk_tokens, tokens - start)
        count = -(-length // part_tokens)
        for part in range(count):
            yield slice(start + length * part // count, start + length * (part + 1) // count)


def _method(hidden: Tensor) -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]:
    return _by_few_passes if hidden.is_cuda and hidden.dtype != torch.float32 else _in_place


def _in_place(
    logits: Tensor, target: Tensor, token_weight: Tensor, needs_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses float32[c], and with ``needs_gradients`` those of the logits [c, vocabulary], times the weights.

    In one buffer of float32 for logits, then probabilities, then their gradient.
    """
    logits = logits.float()  # no copy if it is float32 already
    highest = logits.amax(dim=1, keepdim=True)  # subtracted, so that exp cannot overflow
    target_logit = logits.gather(1, target) - highest
    probs = logits.sub_(highest).exp_()
    normalizer = probs.sum(dim=1, keepdim=True)
    losses = (normalizer.log() - target_logit).squeeze(1)
    if not needs_gradients:
        return losses, None
    gradients = probs.mul_(token_weight / normalizer)
    gradients.scatter_(1, target, gradients.gather(1, target) - token_weight)
    return losses, gradients


def _by_few_passes(
    logits: Tensor, target: Tensor, token_weight: Tensor, needs_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The same for GPUs, where passes over the logits cost what the products do. Gradients replace them."""
    log_probs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    target_log_prob = log_probs.gather(1, target)
    losses = -target_log_prob.squeeze(1)
    if not needs_gradients:
        return losses, None
    gradients = torch.exp(log_probs, out=logits).mul_(token_weight)
    # Not 1 subtracted from a rounded probability: of one near 1, nothing would be left.
    gradients.scatter_(1, target, (target_log_prob.expm1() * token_weight).to(gradients.dtype))
    return losses, gradients
