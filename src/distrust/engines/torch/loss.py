"""Cross-entropy with a weight for each token, without the logits of the whole batch.

The logits of a batch are its largest tensor by far: 2,048 tokens of a vocabulary of 128k take 1 GiB, and
autograd keeps several such. Here they are made for a few hundred tokens at a time, and their gradient is made
where they stand, since the weight of each token is known beforehand:

    loss = Σ_i s_i · ce_i        d loss / d logits_i = s_i · (softmax(logits_i) − onehot_i)

So there are two products with the vocabulary, as without chunks, and no third one to compute logits again.
Tokens that carry no loss (prompts, padding) have no logits at all. Where the head itself is trained, its
gradient is summed up chunk by chunk, in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from distrust.engines.torch.linear_onednn import linear

#: Numbers in the logits of a chunk: 64 MiB of float32. Larger ones are no faster,
CHUNK_NUMBERS = 2**24
#: and fewer tokens at a time are slower: each product reads all of the head.
CHUNK_TOKENS = 256


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token from logits that are there anyway: float32[m], in nats."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def chunked_losses(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    targets: torch.Tensor,
    scales: torch.Tensor,
    *,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled sum of the cross-entropy of each token, from what goes into the head.

    Args:
        hidden: [m, width]; the products are computed in its dtype.
        head: width -> vocabulary.
        targets: int64[m]: the token that is predicted.
        scales: float32[m]: what each token's loss is multiplied by.
        chunk_tokens: the logits of how many tokens stand in memory at once. Default: :data:`CHUNK_NUMBERS`
            logits, and those of :data:`CHUNK_TOKENS` tokens at least.

    Returns:
        float32[], the scaled sum, which has a gradient; float32[m], each token's cross-entropy, in nats.
    """
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_TOKENS, CHUNK_NUMBERS // head.weight.shape[0])
    parts = [hidden, head.weight, head.bias]
    if not torch.is_grad_enabled():  # else the gradients would be made, and dropped
        parts = [None if part is None else part.detach() for part in parts]
    return _ChunkedLosses.apply(*parts, targets, scales, chunk_tokens)  # type: ignore[no-untyped-call,no-any-return]


class _ChunkedLosses(torch.autograd.Function):
    """The gradients are computed on the way forward, and only multiplied on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scales: torch.Tensor,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            total, losses, gradients = _losses(hidden, weight, bias, targets, scales, chunk_tokens, wanted)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        gradients = [None if part is None else part * slope.to(part.dtype) for part in ctx.saved_tensors]
        return *gradients, None, None, None


def _losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scales: torch.Tensor,
    rows: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """The scaled sum, each loss, and the gradients that are wanted of hidden, weight and bias."""
    table = weight.to(hidden.dtype)
    shift = None if bias is None else bias.to(hidden.dtype)
    losses = torch.empty_like(scales)
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
    for begin in range(0, len(hidden), rows):
        part = slice(begin, begin + rows)
        inputs, target, scale = hidden[part], targets[part, None], scales[part, None]
        odds = linear(inputs, table, shift).float()  # the same memory where it is float32 already
        highest = odds.amax(dim=1, keepdim=True)
        hit = odds.gather(1, target) - highest
        odds.sub_(highest).exp_()
        mass = odds.sum(dim=1, keepdim=True)
        losses[part] = (mass.log() - hit).squeeze(1)
        if not any(wanted):
            continue
        slopes = odds.mul_(scale / mass)
        slopes.scatter_(1, target, slopes.gather(1, target) - scale)
        if of_bias is not None:
            of_bias += slopes.sum(dim=0)
        slopes = slopes.to(hidden.dtype)
        if of_hidden is not None:
            of_hidden[part] = linear(slopes, table.t())
        if of_weight is not None:
            of_weight += torch.mm(slopes.t(), inputs)
    gradients = [
        of_hidden,
        None if of_weight is None else of_weight.to(weight.dtype),
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
    ]
    return (losses * scales).sum(), losses, gradients
